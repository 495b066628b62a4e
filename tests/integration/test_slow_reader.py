"""Clients who read slowly, or not at all: nothing grows for them, and what they hold is given to others."""

from __future__ import annotations

import asyncio
import json
import socket
from contextlib import aclosing
from dataclasses import replace

import pytest

from seamount.core.errors import EngineError
from seamount.core.requests import Request
from seamount.core.sampling import SamplingParams
from seamount.core.settings import EngineConfig
from seamount.engine import client
from seamount.engine.client import WorkerEngine
from seamount.engine.fake import FAKE_FACTS, FakeEngine
from seamount.server.admission import call as admission_call
from seamount.server.door.connections import notice_dead_peers


async def until(condition) -> None:
    async with asyncio.timeout(30):
        while not await condition():
            await asyncio.sleep(0.01)


async def test_a_client_that_stops_reading_is_given_up(serve, monkeypatch):
    monkeypatch.setattr(admission_call, "STALL_S", 0.2)
    # Far more than all buffers between here and there: some kilobytes for each token, and no end.
    engine = FakeEngine(lambda request, index: (65,) * 50_000, facts=replace(FAKE_FACTS, max_model_len=60_000))
    running = await serve(engine)
    with socket.socket() as client_socket:
        client_socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client_socket.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(client_socket, ("127.0.0.1", running.port))
        body = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "stream": True}
        data = json.dumps({**body, "logprobs": True, "top_logprobs": 20}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n"
        await loop.sock_sendall(client_socket, f"{head}Content-Type: application/json\r\n\r\n".encode() + data)

        async def given_up() -> bool:
            return bool(engine.aborted)

        await until(given_up)
        stats = await engine.stats()
        assert (stats.num_running, stats.num_free_blocks) == (0, stats.num_blocks)
        assert stats.num_generated_tokens < 50_000
        assert running.service.admission.load().num_admitted == 0


async def test_an_answer_that_nobody_reads_does_not_grow_in_memory(monkeypatch):
    monkeypatch.setattr(client, "MAX_UNREAD_CHUNKS", 16)
    engine = WorkerEngine(EngineConfig(model="seamount-tiny", num_threads=1))
    try:
        await engine.start()
        sampling = SamplingParams(max_tokens=1500, temperature=0, ignore_eos=True)
        wanted = Request(id="a", prompt_token_ids=(5, 6, 7), sampling=sampling)
        async with aclosing(engine.generate(wanted)) as chunks:
            await anext(chunks)

            async def given_up() -> bool:
                stats = await engine.stats()
                return not stats.num_running and stats.num_free_blocks == stats.num_blocks

            await until(given_up)
            assert (await engine.stats()).num_generated_tokens < 1500
            num_read = 0
            with pytest.raises(EngineError) as caught:
                async for _ in chunks:
                    num_read += 1
            assert caught.value.code == "reader_too_slow"
            assert num_read == 16
    finally:
        await engine.close()


async def test_prompts_that_nobody_waits_for_are_not_computed_to_their_end():
    """Cancelled in the middle of prefill: eight prompts of 100 steps each would be 800."""
    engine = WorkerEngine(EngineConfig(model="seamount-tiny", num_threads=1, max_step_tokens=16))
    try:
        facts = await engine.start()
        length = min(1600, facts.max_model_len - 2)
        prompts = [tuple((5 + number + place) % 200 + 5 for place in range(length)) for number in range(8)]

        async def ask(number: int) -> None:
            request = Request(id=str(number), prompt_token_ids=prompts[number], sampling=SamplingParams(max_tokens=1))
            async with aclosing(engine.generate(request)) as chunks:
                async for _ in chunks:
                    pass

        tasks = [asyncio.create_task(ask(number)) for number in range(8)]

        async def begun() -> bool:
            return bool((await engine.stats()).num_running)

        async def idle() -> bool:
            stats = await engine.stats()
            return not stats.num_running + stats.num_waiting and stats.num_free_blocks == stats.num_blocks

        await until(begun)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await until(idle)
        stats = await engine.stats()
        assert stats.num_generated_tokens < 8
        assert stats.num_steps < 8 * length // 16
    finally:
        await engine.close()


def test_connections_whose_peer_vanished_are_closed_by_the_system():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        notice_dead_peers(listener)
        listener.listen()
        with socket.create_connection(listener.getsockname()) as _, listener.accept()[0] as accepted:
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            idle_s = accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
            probes_s = accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) * accepted.getsockopt(
                socket.IPPROTO_TCP, socket.TCP_KEEPCNT
            )
            assert idle_s + probes_s <= 60
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) <= 60_000
