"""Prompts are encoded beside everything else: probes answer meanwhile, and a client who leaves is not waited for."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from seamount.engine.fake import FakeEngine, say
from seamount.engine.fake_encoder import ByteEncoder
from seamount.server.service import MAX_ENCODES

PATIENCE_S = 20
TEXT = ("/v1/completions", {"model": "fake", "prompt": "hi"})
CHAT = ("/v1/chat/completions", {"model": "fake", "messages": [{"role": "user", "content": "hi"}]})


class SlowEncoder(ByteEncoder):
    """Encodes when `open` is set; `begun` is released for each encoding that begins."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.begun = threading.Semaphore(0)
        self.num_begun = 0

    def encode_text(self, text: str, **options: Any) -> tuple[int, ...]:
        self.num_begun += 1
        self.begun.release()
        self.open.wait(PATIENCE_S)
        return super().encode_text(text, **options)


@pytest.fixture
def encoder() -> Iterator[SlowEncoder]:
    """A slow encoder that lets go at the end, whatever happened."""
    slow = SlowEncoder()
    yield slow
    slow.open.set()


async def begin(encoder: SlowEncoder) -> None:
    """Wait until one more encoding has begun."""
    assert await asyncio.to_thread(encoder.begun.acquire, timeout=PATIENCE_S)


async def until_idle(service: Any) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while service.num_active:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(("path", "body"), [TEXT, CHAT])
async def test_the_server_answers_while_it_encodes(serve, encoder, path, body):
    running = await serve(FakeEngine(say("ok")), encoder)
    async with httpx.AsyncClient(base_url=running.url, timeout=PATIENCE_S) as client:
        asked = asyncio.create_task(client.post(path, json=body))
        await begin(encoder)
        assert (await client.get("/healthz")).status_code == 200
        assert not asked.done()
        encoder.open.set()
        assert (await asked).status_code == 200


@pytest.mark.parametrize(("path", "body"), [TEXT, CHAT])
async def test_a_client_who_leaves_while_its_prompt_is_encoded_is_not_waited_for(serve, encoder, path, body):
    running = await serve(FakeEngine(say("ok")), encoder)
    _, writer = await asyncio.open_connection("127.0.0.1", running.port)
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    writer.write(f"{head}\r\n\r\n".encode() + data)
    await begin(encoder)
    writer.close()
    await until_idle(running.service)
    assert not encoder.open.is_set()


async def test_few_prompts_are_encoded_at_once_and_those_of_gone_clients_never_begin(serve, encoder):
    running = await serve(FakeEngine(say("ok")), encoder)
    async with httpx.AsyncClient(base_url=running.url, timeout=PATIENCE_S) as client:
        asked = [asyncio.create_task(client.post(TEXT[0], json=TEXT[1])) for _ in range(MAX_ENCODES)]
        for _ in asked:
            await begin(encoder)
        waiting = asyncio.create_task(client.post(TEXT[0], json={"model": "fake", "prompt": ["a", "b"]}))
        async with asyncio.timeout(PATIENCE_S):
            while running.service.num_active <= MAX_ENCODES:
                await asyncio.sleep(0.01)
        waiting.cancel()
        async with asyncio.timeout(PATIENCE_S):
            while running.service.num_active > MAX_ENCODES:
                await asyncio.sleep(0.01)
        encoder.open.set()
        assert [answer.status_code for answer in await asyncio.gather(*asked)] == [200] * MAX_ENCODES
    assert encoder.num_begun == MAX_ENCODES
