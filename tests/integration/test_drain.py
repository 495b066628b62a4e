"""A server told to stop, in a process of its own; and one whose disk is full, or whose connections are too many."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import psutil
import pytest

from seamount.engine.fake import FAKE_FACTS, FakeEngine, say

CHAT = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}
MANY = 5000

PROGRAM = """
import asyncio, logging, resource, sys
from seamount.core.settings import ServerConfig
from seamount.engine.fake import FakeEngine, say
from seamount.engine.fake_encoder import ByteEncoder
from seamount.server.app import create_app
from seamount.server.serve import run_server

drain_timeout_s, num_free, max_files, log = float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]

async def pause():
    "Let some tokens pass; the next one never comes."
    global num_free
    num_free -= 1
    if num_free < 0:
        await asyncio.Event().wait()

def ready(url):
    print(url, flush=True)
    if log:
        logging.basicConfig(level=logging.INFO, filename=log)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

if max_files:
    resource.setrlimit(resource.RLIMIT_NOFILE, (max_files, max_files))
config = ServerConfig(port=0, drain_timeout_s=drain_timeout_s)
run_server(create_app(FakeEngine(say("x" * 20), pause=pause), ByteEncoder(), config), config, ready)
print("closed", flush=True)
"""


@contextlib.asynccontextmanager
async def server(
    *,
    drain_timeout_s: float = 20,
    num_free: int = 10**9,
    max_files: int = 0,
    log: str = "",
    stderr: int = subprocess.DEVNULL,
) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """Run a server; yield its process and its URL."""
    words = [str(word) for word in (drain_timeout_s, num_free, max_files, log)]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PROGRAM, *words, stdout=subprocess.PIPE, stderr=stderr
    )
    try:
        assert process.stdout is not None
        yield process, (await process.stdout.readline()).decode().strip()
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def until_draining(client: httpx.AsyncClient) -> None:
    async with asyncio.timeout(20):
        while (await client.get("/readyz")).status_code == 200:
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def held_stream(client: httpx.AsyncClient) -> AsyncIterator[tuple[httpx.Response, AsyncIterator[str]]]:
    """A stream that has begun."""
    async with client.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True}) as answer:
        lines = answer.aiter_lines()
        await anext(lines)
        yield answer, lines


async def test_what_outlasts_the_drain_is_told_and_the_process_ends_well():
    async with server(drain_timeout_s=0.5, num_free=5) as (process, url), httpx.AsyncClient(base_url=url) as client:
        async with held_stream(client) as (_, lines):
            process.send_signal(signal.SIGTERM)
            await until_draining(client)
            refused = await client.post("/v1/chat/completions", json=CHAT)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
            assert int(refused.headers["retry-after"]) >= 1
            text = "\n".join([line async for line in lines])
        assert '"code": "draining"' in text
        assert "[DONE]" not in text
        assert await process.stdout.read() == b"closed\n"
        assert await process.wait() == 0


async def test_a_second_signal_does_not_wait_for_streams():
    async with (
        server(drain_timeout_s=3600, num_free=5, stderr=subprocess.PIPE) as (process, url),
        httpx.AsyncClient(base_url=url) as client,
    ):
        with contextlib.suppress(httpx.RemoteProtocolError):
            async with held_stream(client) as (_, lines):
                process.send_signal(signal.SIGTERM)
                await until_draining(client)
                process.send_signal(signal.SIGTERM)
                async with asyncio.timeout(20):
                    async for _ in lines:
                        pass
        async with asyncio.timeout(20):
            out, err = await process.communicate()
        assert process.returncode == 0
        assert out == b"closed\n"
        assert b"Traceback" not in err


async def test_requests_that_wait_their_turn_are_answered_before_the_end(serve):
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def pause() -> None:
        begun.set()
        await go_on.wait()

    engine = FakeEngine(say("ok"), pause=pause, facts=replace(FAKE_FACTS, max_num_seqs=1))
    running = await serve(engine, drain_timeout_s=20)
    async with httpx.AsyncClient(base_url=running.url) as client:
        tasks = [asyncio.create_task(client.post("/v1/chat/completions", json=CHAT)) for _ in range(3)]
        await begun.wait()
        async with asyncio.timeout(20):
            while running.service.admission.load().num_waiting[0] < 2:
                await asyncio.sleep(0.01)
        running.server.stop()
        await until_draining(client)
        go_on.set()
        assert [answer.status_code for answer in await asyncio.gather(*tasks)] == [200] * 3
    await running.task


async def test_a_full_disk_stops_no_answers(tmp_path: Path):
    """The log may grow to four kilobytes, and then every write fails, as on a full disk."""
    log = tmp_path / "log"
    async with server(log=str(log)) as (process, url), httpx.AsyncClient(base_url=url) as client:
        for number in range(200):
            answer = await client.post("/v1/chat/completions", json=CHAT, headers={"x-request-id": "i" * 100})
            assert answer.status_code == 200, number
        assert (await client.get("/readyz")).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0
    assert 3000 < log.stat().st_size <= 4096


@pytest.fixture
def many_files() -> Iterator[None]:
    """Let this process open many files; skip where it may not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < MANY + 500:
        pytest.skip(f"this process may open {hard} files only")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, MANY + 500), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def connect(url: str, count: int) -> list[asyncio.StreamWriter]:
    host, port = url.removeprefix("http://").split(":")
    found: list[asyncio.StreamWriter] = []
    while len(found) < count:
        opened = await asyncio.gather(*(asyncio.open_connection(host, int(port)) for _ in range(100)))
        found += [writer for _, writer in opened]
    return found


async def close(writers: list[asyncio.StreamWriter]) -> None:
    for writer in writers:
        writer.close()
    await asyncio.gather(*(writer.wait_closed() for writer in writers), return_exceptions=True)


@pytest.mark.usefixtures("many_files")
async def test_thousands_of_idle_connections_cost_little_and_keep_nobody_out():
    async with server() as (process, url):
        before = psutil.Process(process.pid).memory_info().rss
        writers = await connect(url, MANY)
        async with httpx.AsyncClient(base_url=url) as client:
            assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200
        server_process = psutil.Process(process.pid)
        assert len(server_process.net_connections("tcp")) > MANY
        assert (server_process.memory_info().rss - before) / MANY < 50_000, "bytes for each connection"
        await close(writers)


@pytest.mark.usefixtures("many_files")
async def test_when_files_run_short_the_longest_idle_connections_make_room():
    async with server(max_files=700) as (_, url):
        writers = await connect(url, 2000)
        async with httpx.AsyncClient(base_url=url) as client:
            assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200
        await close(writers)
