"""The engine in its own process: streams, aborts, dies, comes back, and never outlives its server."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest

from seamount.core.errors import ContextTooLongError, NotFoundError, SeamountError, WorkerDiedError
from seamount.core.requests import Chunk, Request
from seamount.core.sampling import SamplingParams
from seamount.core.settings import EngineConfig
from seamount.engine.client import WorkerEngine

LONG = SamplingParams(max_tokens=1500, temperature=0, ignore_eos=True)


@contextlib.asynccontextmanager
async def running(**options) -> AsyncIterator[WorkerEngine]:
    engine = WorkerEngine(EngineConfig(model="seamount-tiny", num_threads=1, **options))
    try:
        await engine.start()
        yield engine
    finally:
        await engine.close()


def request(name: str, sampling: SamplingParams = LONG) -> Request:
    return Request(id=name, prompt_token_ids=(5, 6, 7, 8), sampling=sampling)


async def collect(engine: WorkerEngine, wanted: Request) -> list[Chunk]:
    return [chunk async for chunk in engine.generate(wanted)]


async def until(condition) -> None:
    async with asyncio.timeout(20):
        while not await condition():
            await asyncio.sleep(0.01)


async def test_many_requests_stream_side_by_side() -> None:
    async with running() as engine:
        sampling = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
        answers = await asyncio.gather(*(collect(engine, request(str(i), sampling)) for i in range(16)))
        tokens = [[t for chunk in chunks for t in chunk.token_ids] for chunks in answers]
        assert all(len(t) == 20 for t in tokens)
        assert all(chunks[-1].finish_reason == "length" for chunks in answers)
        assert (await engine.stats()).num_generated_tokens == 320


async def test_a_closed_stream_frees_its_blocks() -> None:
    async with running() as engine:
        stream = engine.generate(request("a"))
        await anext(stream)
        await stream.aclose()

        async def all_free() -> bool:
            stats = await engine.stats()
            return stats.num_running == 0 and stats.num_free_blocks == stats.num_blocks

        await until(all_free)
        assert (await engine.stats()).num_generated_tokens < 1500


async def test_a_killed_worker_is_reported_and_replaced() -> None:
    async with running() as engine:
        facts = await engine.start() if engine.state() != "ready" else None
        assert facts is None
        stream = engine.generate(request("a"))
        await anext(stream)
        (worker,) = _workers()
        os.kill(worker, signal.SIGKILL)
        with pytest.raises(WorkerDiedError) as caught:
            async for _ in stream:
                pass
        assert caught.value.retry_after is not None
        assert engine.state() == "restarting"
        after = await collect(engine, request("b", SamplingParams(max_tokens=3, ignore_eos=True)))
        assert sum(len(chunk.token_ids) for chunk in after) == 3
        assert engine.state() == "ready"
        stats = await engine.stats()
        assert stats.num_worker_restarts == 1
        assert stats.num_generated_tokens > 3, "counters go on across a restart"


async def test_errors_cross_the_process_with_their_type() -> None:
    async with running() as engine:
        with pytest.raises(ContextTooLongError, match="100000") as caught:
            await collect(engine, request("a", SamplingParams(max_tokens=100_000)))
        assert caught.value.param == "max_tokens"


async def test_more_answers_than_run_side_by_side_come_in_turn() -> None:
    async with running(max_num_seqs=2) as engine:
        chunks = await collect(engine, request("a", SamplingParams(n=128, max_tokens=2, ignore_eos=True)))
        assert sorted(chunk.index for chunk in chunks if chunk.finish_reason == "length") == list(range(128))


async def test_a_model_that_cannot_load_fails_at_the_start() -> None:
    engine = WorkerEngine(EngineConfig(model="/no/such/folder"))
    with pytest.raises(NotFoundError):
        await engine.start()
    assert engine.state() == "failed"
    with pytest.raises(NotFoundError):
        await collect(engine, request("a"))
    await engine.close()


async def test_python_files_in_the_working_directory_are_not_imported(tmp_path, monkeypatch) -> None:
    """The working directory may be a checkpoint folder that somebody else made."""
    for name in ("torch", "numpy", "json", "seamount"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.chdir(tmp_path)
    async with running():
        assert not (tmp_path / "ran").exists()


async def test_when_no_process_can_be_had_it_is_tried_again(monkeypatch) -> None:
    async with running() as engine:
        spawn = asyncio.create_subprocess_exec
        refusals = 2

        async def refuse_twice(*args, **kwargs):
            nonlocal refusals
            refusals -= 1
            if refusals >= 0:
                raise OSError(24, "Too many open files")
            return await spawn(*args, **kwargs)

        monkeypatch.setattr(asyncio, "create_subprocess_exec", refuse_twice)
        os.kill(_workers()[0], signal.SIGKILL)
        await until(_is(engine, "restarting"))
        chunks = await collect(engine, request("a", SamplingParams(max_tokens=2, ignore_eos=True)))
        assert chunks[-1].finish_reason == "length"


async def test_bytes_that_are_no_message_end_in_a_new_worker() -> None:
    async with running() as engine:
        (worker,) = _workers()
        engine._writer.write(b"\x04\x00\x00\x00junk")  # the worker cannot read it, says so in its log, and ends
        await until(_is(engine, "restarting"))
        chunks = await collect(engine, request("a", SamplingParams(max_tokens=2, ignore_eos=True)))
        assert chunks[-1].finish_reason == "length"
        assert _workers() != [worker]


async def test_closing_ends_requests_and_the_process() -> None:
    async with running() as engine:
        stream = engine.generate(request("a"))
        await anext(stream)
        (worker,) = _workers()
        await engine.close()
        with pytest.raises(SeamountError):
            async for _ in stream:
                pass
        assert not psutil.pid_exists(worker)
        await engine.close()


def test_the_worker_ends_when_its_server_is_killed(tmp_path: Path) -> None:
    script = textwrap.dedent(
        """
        import asyncio
        from seamount.core.settings import EngineConfig
        from seamount.engine.client import WorkerEngine

        async def main():
            facts = await WorkerEngine(EngineConfig(model="seamount-tiny", num_threads=1)).start()
            print(facts.worker_pid, flush=True)
            await asyncio.sleep(600)

        asyncio.run(main())
        """
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        worker = psutil.Process(int(server.stdout.readline()))
        server.kill()
        worker.wait(timeout=20)


async def test_an_idle_worker_sleeps() -> None:
    async with running() as engine:
        await collect(engine, request("a", SamplingParams(max_tokens=2, ignore_eos=True)))
        process = psutil.Process(_workers()[0])
        before = process.cpu_times()
        await asyncio.sleep(1.0)
        after = process.cpu_times()
        assert (after.user + after.system) - (before.user + before.system) < 0.2


def _is(engine: WorkerEngine, state: str):
    async def check() -> bool:
        return engine.state() == state

    return check


def _workers() -> list[int]:
    children = psutil.Process().children()
    return [child.pid for child in children if "seamount.engine.worker" in " ".join(child.cmdline())]
