"""The life of a server: starting, readiness, draining, signals, and a port that is taken."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys

import httpx
import pytest

from seamount.core.errors import CheckpointError, ConfigError
from seamount.core.requests import ModelFacts
from seamount.engine.fake import FakeEngine, say

CHAT = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}


class Gate:
    """Holds every token until opened; `reached` tells that one waits."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self.open = asyncio.Event()

    async def __call__(self) -> None:
        self.reached.set()
        await self.open.wait()


async def test_drain_finishes_running_streams_and_refuses_new_requests(serve):
    gate = Gate()
    running = await serve(FakeEngine(say("abc"), pause=gate), drain_timeout_s=30)
    async with httpx.AsyncClient(base_url=running.url, timeout=10) as client:
        stream = asyncio.create_task(client.post("/v1/chat/completions", json={**CHAT, "stream": True}))
        await gate.reached.wait()
        assert (await client.get("/readyz")).status_code == 200
        running.server.stop()
        async with asyncio.timeout(20):
            while (ready := await client.get("/readyz")).status_code == 200:
                await asyncio.sleep(0.01)
        assert ready.status_code == 503
        assert ready.json()["status"] == "draining"
        assert (await client.get("/healthz")).status_code == 200
        refused = await client.post("/v1/chat/completions", json=CHAT)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert refused.headers["retry-after"] == "1"
        gate.open.set()
        answer = (await stream).text
    assert answer.endswith("data: [DONE]\n\n")
    await running.task
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", running.port)


async def test_what_outlasts_the_drain_ends_with_an_error_chunk(serve):
    count = 0

    async def pause() -> None:
        nonlocal count
        count += 1
        if count > 2:
            await asyncio.Event().wait()

    running = await serve(FakeEngine(say("abc"), pause=pause), drain_timeout_s=0.1)
    async with (
        httpx.AsyncClient(base_url=running.url, timeout=10) as client,
        client.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True}) as answer,
    ):
        running.server.stop()
        text = (await answer.aread()).decode()
    assert '"code": "draining"' in text
    assert "[DONE]" not in text
    await running.task


async def test_probes_answer_while_the_model_loads_and_the_announcement_waits(serve):
    loaded = asyncio.Event()

    class Slow(FakeEngine):
        async def start(self) -> ModelFacts:
            await loaded.wait()
            return await super().start()

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    starting = asyncio.create_task(serve(Slow(), port=port))
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        async with asyncio.timeout(20):
            while True:
                try:
                    ready = await client.get("/readyz")
                    break
                except httpx.ConnectError:
                    await asyncio.sleep(0.01)
        chat = await client.post("/v1/chat/completions", json=CHAT)
        models = await client.get("/v1/models")
        assert not starting.done()
        loaded.set()
        await starting
        ready_now = await client.get("/readyz")
    assert (ready.status_code, ready.json()["status"]) == (503, "starting")
    assert "loaded" in ready.json()["reason"]
    assert (chat.status_code, chat.json()["error"]["code"]) == (503, "starting")
    assert models.status_code == 503
    assert (ready_now.status_code, ready_now.json()) == (200, {"status": "ready"})


async def test_a_model_that_cannot_be_loaded_ends_the_server_with_its_own_error(serve):
    with pytest.raises(CheckpointError, match="shard 2 is missing"):
        await serve(FakeEngine(start_failure=CheckpointError("shard 2 is missing.")))


async def test_a_taken_port_is_named_before_anything_is_loaded(serve):
    running = await serve(FakeEngine())
    with pytest.raises(ConfigError, match=str(running.port)) as caught:
        await serve(FakeEngine(), port=running.port)
    assert "--port" in caught.value.hint


async def test_an_unknown_address_is_named(serve):
    with pytest.raises(ConfigError, match=r"203\.0\.113\.1"):
        await serve(FakeEngine(), host="203.0.113.1")


PROGRAM = """
import asyncio, logging
from seamount.core.settings import ServerConfig
from seamount.engine.fake import FakeEngine, say
from seamount.engine.fake_encoder import ByteEncoder
from seamount.server.app import create_app
from seamount.server.serve import run_server

async def pause():
    await asyncio.sleep(0.02)

config = ServerConfig(port=0, drain_timeout_s=20)
run_server(create_app(FakeEngine(say("x" * 20), pause=pause), ByteEncoder(), config), config,
           lambda url: print(url, flush=True))
print("closed", flush=True)
"""


async def test_sigterm_lets_a_stream_finish_and_the_process_ends_well():
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", PROGRAM, stdout=subprocess.PIPE)
    try:
        url = (await process.stdout.readline()).decode().strip()
        async with (
            httpx.AsyncClient(base_url=url, timeout=20) as client,
            client.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True}) as answer,
        ):
            process.send_signal(signal.SIGTERM)
            text = (await answer.aread()).decode()
        assert text.endswith("data: [DONE]\n\n")
        assert text.count('"content":"x"') == 20
        assert (await process.stdout.read()) == b"closed\n"
        assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
