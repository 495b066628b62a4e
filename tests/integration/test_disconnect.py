"""A client that goes away frees what its request held, at once, whatever the request was waiting for."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest

from seamount.engine.fake import FakeEngine, say


class Hold:
    """Lets `free` tokens pass; the next one waits for ever. `reached` and `cancelled` tell when."""

    def __init__(self, free: int) -> None:
        self.free = free
        self.reached = asyncio.Event()
        self.cancelled = asyncio.Event()

    async def __call__(self) -> None:
        self.free -= 1
        if self.free >= 0:
            return
        self.reached.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled.set()


def raw_request(path: str, body: dict) -> bytes:
    data = json.dumps({"model": "fake", **body}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    return f"{head}\r\n\r\n".encode() + data


CHAT = ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "n": 2})
TEXTS = ("/v1/completions", {"prompt": ["ab", "cd", "ef"]})


@pytest.mark.parametrize("tokens_before", [0, 5], ids=["before-the-first-token", "midway"])
@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize(("path", "body"), [CHAT, TEXTS], ids=["chat", "completions"])
async def test_engine_aborts_and_frees_blocks(serve, path, body, stream, tokens_before):
    hold = Hold(tokens_before)
    engine = FakeEngine(say("abcdef"), pause=hold)
    running = await serve(engine)
    _, writer = await asyncio.open_connection("127.0.0.1", running.port)
    writer.write(raw_request(path, {**body, "stream": stream}))
    await hold.reached.wait()
    num_requests = len(body.get("prompt", ["chat"]))
    assert (await engine.stats()).num_free_blocks < (await engine.stats()).num_blocks
    writer.close()
    await hold.cancelled.wait()
    async with asyncio.timeout(20):
        while len(engine.aborted) < num_requests:
            await asyncio.sleep(0.01)
    stats = await engine.stats()
    assert (stats.num_running, stats.num_free_blocks) == (0, stats.num_blocks)
    async with asyncio.timeout(20):
        while running.service.num_active:
            await asyncio.sleep(0.01)


async def test_one_client_leaving_does_not_touch_another(serve):
    hold = Hold(3)
    engine = FakeEngine(say("abcdef"), pause=hold)
    running = await serve(engine)
    _, writer = await asyncio.open_connection("127.0.0.1", running.port)
    writer.write(raw_request(CHAT[0], {**CHAT[1], "stream": True}))
    await hold.reached.wait()
    writer.close()
    await hold.cancelled.wait()
    hold.free = 1000
    async with httpx.AsyncClient(base_url=running.url) as client:
        answer = await client.post(CHAT[0], json={"model": "fake", **CHAT[1]})
    assert answer.json()["choices"][1]["message"]["content"] == "abcdef"


async def test_a_failing_prompt_ends_its_siblings(serve):
    engine = FakeEngine(say("abcdef"), fail_after_tokens=2)
    running = await serve(engine)
    async with httpx.AsyncClient(base_url=running.url) as client:
        answer = await client.post("/v1/completions", json={"model": "fake", "prompt": ["a", "b"]})
    assert answer.status_code == 500
    stats = await engine.stats()
    assert (stats.num_running, stats.num_free_blocks) == (0, stats.num_blocks)
