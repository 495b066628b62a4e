"""A key that is revoked, or expires, while its requests run: they end, others go on, and nothing stays held."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path

import anthropic
import grpc
import httpx
import openai
import pytest

from seamount.core.database import Database
from seamount.core.errors import StateUnavailableError, UnauthenticatedError
from seamount.core.identity import Principal
from seamount.core.state import open_state
from seamount.engine.fake import FAKE_FACTS, FakeEngine, say
from seamount.security.authenticators import KeyAuthenticator
from seamount.security.keys import ApiKeys
from seamount.server.admission import watch
from seamount.server.door.access import Access

CHAT = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}
BANK = Principal(key_id=None, tenant="bank")


class Clock:
    now_s = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now_s


class Hold:
    """Lets `free` tokens pass; the others wait until `go`. `num_held` counts those."""

    def __init__(self, free: int) -> None:
        self.free = free
        self.num_held = 0
        self.go = asyncio.Event()

    async def __call__(self) -> None:
        self.free -= 1
        if self.free < 0:
            self.num_held += 1
            await self.go.wait()


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "LOOK_S", 0.02)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Database]:
    database = open_state(str(tmp_path / "state.db"))
    yield database
    database.close()


@pytest.fixture
def keys(state: Database, clock: Clock) -> ApiKeys:
    made = ApiKeys(state, clock)
    made.add_first_administrator(tenant="admin", label="")
    return made


@pytest.fixture
def access(keys: ApiKeys, clock: Clock) -> Access:
    return Access(KeyAuthenticator(keys, clock))


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


async def gave_all_back(running, engine: FakeEngine) -> None:
    await until(lambda: not running.service.num_active)
    stats = await engine.stats()
    assert (stats.num_running, stats.num_free_blocks) == (0, stats.num_blocks)
    load = running.service.admission.load()
    assert (load.num_admitted, sum(load.num_waiting.values())) == (0, 0)
    assert running.service.calls.keys() == ()


def client(running, credential: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key=credential, max_retries=0)


async def read(stream) -> str:
    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])


async def test_streams_and_whole_answers_end_as_told_and_another_keys_go_on(serve, keys, access, tmp_path):
    hold = Hold(1)
    engine = FakeEngine(say("abcdef"), pause=hold)
    running = await serve(engine, access=access)
    (lost, key), (good, _) = keys.add(BANK), keys.add(BANK)
    async with client(running, lost) as theirs, client(running, good) as others:
        stream = await theirs.chat.completions.create(**CHAT, stream=True)
        await until(lambda: hold.num_held == 1)
        hold.free = 1
        kept = await others.chat.completions.create(**CHAT, stream=True)
        whole = asyncio.create_task(theirs.chat.completions.create(**CHAT))
        texts = asyncio.create_task(theirs.completions.create(model="fake", prompt=["a", "b"], n=2))
        await until(lambda: hold.num_held == 5)
        other = open_state(str(tmp_path / "state.db"))  # as another process does it
        ApiKeys(other).revoke(key.id)
        other.close()
        with pytest.raises(openai.APIError) as caught:
            await read(stream)
        assert (caught.value.code, caught.value.type) == ("revoked_api_key", "invalid_request_error")
        for task in (whole, texts):
            with pytest.raises(openai.AuthenticationError) as refused:
                await task
            assert refused.value.code == "revoked_api_key"
            assert refused.value.response.headers["www-authenticate"].endswith('error="invalid_token"')
        assert len(engine.aborted) == 4
        hold.go.set()
        assert await read(kept) == "abcdef"
    await gave_all_back(running, engine)


async def test_what_waits_for_its_turn_ends_too_when_its_key_expires(serve, keys, access, clock, monkeypatch):
    num_looks, ended = 0, access.ended

    async def count(key_ids: Collection[str]) -> dict[str, UnauthenticatedError]:
        nonlocal num_looks
        num_looks += 1
        return await ended(key_ids)

    monkeypatch.setattr(access, "ended", count)
    hold = Hold(0)
    engine = FakeEngine(say("abc"), pause=hold, facts=replace(FAKE_FACTS, max_num_seqs=1))
    running = await serve(engine, access=access)
    (lost, _), (good, _) = keys.add(BANK, lifetime_s=60), keys.add(BANK)
    async with client(running, lost) as theirs, client(running, good) as others:
        first = asyncio.create_task(others.chat.completions.create(**CHAT))
        await until(lambda: hold.num_held)
        waiting = asyncio.create_task(theirs.chat.completions.create(**CHAT))
        await until(lambda: running.service.admission.load().num_waiting[0] == 1)
        clock.now_s += 59
        seen = num_looks
        await until(lambda: num_looks > seen + 1)
        assert not waiting.done()
        clock.now_s += 1
        with pytest.raises(openai.AuthenticationError) as caught:
            await waiting
        assert caught.value.code == "expired_api_key"
        hold.go.set()
        assert (await first).choices[0].message.content == "abc"
    await gave_all_back(running, engine)


async def test_every_server_on_the_database_notices(serve, keys, access, tmp_path, clock):
    other = open_state(str(tmp_path / "state.db"))
    credential, key = keys.add(BANK)
    hold = Hold(2)
    engines = [FakeEngine(say("abc"), pause=hold) for _ in range(2)]
    doors = [access, Access(KeyAuthenticator(ApiKeys(other, clock), clock))]
    both = [await serve(engine, access=door) for engine, door in zip(engines, doors, strict=True)]
    async with client(both[0], credential) as first, client(both[1], credential) as second:
        tasks = [asyncio.create_task(api.chat.completions.create(**CHAT)) for api in (first, second)]
        await until(lambda: hold.num_held == 2)
        keys.revoke(key.id)
        for task, running, engine in zip(tasks, both, engines, strict=True):
            with pytest.raises(openai.AuthenticationError) as caught:
                await task
            assert caught.value.code == "revoked_api_key"
            await gave_all_back(running, engine)
    for running in both:
        running.server.stop()
        await running.task
    other.close()


async def test_the_other_surfaces_tell_it_in_their_words(serve, state, keys, access):
    hold = Hold(1)
    engine = FakeEngine(say("abc"), pause=hold)
    running = await serve(engine, access=access, state=state)
    credential, key = keys.add(BANK)
    async with (
        client(running, credential) as api,
        anthropic.AsyncAnthropic(base_url=running.url, api_key=credential, max_retries=0) as messages,
    ):
        response = await api.responses.create(model="fake", input="hi", stream=True)
        await until(lambda: hold.num_held == 1)
        hold.free = 1
        message = await messages.messages.create(model="fake", max_tokens=9, messages=CHAT["messages"], stream=True)
        await until(lambda: hold.num_held == 2)
        keys.revoke(key.id)
        events = [event async for event in response]
        assert events[-1].type == "response.failed"
        assert events[-1].response.error.code == "revoked_api_key"
        with pytest.raises(anthropic.APIStatusError, match="authentication_error.*revoked"):
            async for _ in message:
                pass
    assert state.read(lambda run: run("SELECT id FROM responses")) == []
    await gave_all_back(running, engine)


@pytest.mark.parametrize("name", ["Chat", "StreamChat"])
async def test_a_grpc_call_ends_unauthenticated(serve, stubs, keys, access, name):
    hold = Hold(1)
    engine = FakeEngine(say("abc"), pause=hold)
    running = await serve(engine, access=access, grpc_port=0)
    credential, key = keys.add(BANK)
    async with grpc.aio.insecure_channel(running.grpc_address) as channel:
        message = stubs.pb.Message(role=stubs.pb.ROLE_USER, content="hi")
        request = stubs.pb.ChatRequest(model="fake", messages=[message])
        metadata = (("authorization", f"Bearer {credential}"),)
        call = getattr(stubs.grpc.SeamountStub(channel), name)(request, metadata=metadata)
        await until(lambda: hold.num_held)
        keys.revoke(key.id)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            if name == "Chat":
                await call
            else:
                async for _ in call:
                    pass
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert dict(caught.value.trailing_metadata())["seamount-code"] == "revoked_api_key"
    await gave_all_back(running, engine)


async def test_who_sends_and_who_does_not_read_is_cut_off(serve, state, keys, access):
    """Neither waits for the engine: a body that comes slowly, and an answer that is not taken."""
    engine = FakeEngine(lambda request, index: (65,) * 50_000, facts=replace(FAKE_FACTS, max_model_len=60_000))
    running = await serve(engine, access=access, state=state)
    credential, key = keys.add(BANK)
    loop = asyncio.get_running_loop()

    async def send(sock: socket.socket, path: str, body: bytes, length: int) -> None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        await loop.sock_connect(sock, ("127.0.0.1", running.port))
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n"
        head += f"Authorization: Bearer {credential}\r\nContent-Type: application/json\r\n\r\n"
        await loop.sock_sendall(sock, head.encode() + body)

    with socket.socket() as sender, socket.socket() as sleeper:
        await send(sender, "/v1/chat/completions", b'{"mod', 1000)
        data = json.dumps({**CHAT, "stream": True, "logprobs": True, "top_logprobs": 20}).encode()
        await send(sleeper, "/v1/chat/completions", data, len(data))
        seen = -1
        while seen != (seen := (await engine.stats()).num_generated_tokens) or not seen:
            await asyncio.sleep(0.2)  # until every buffer is full
        assert seen < 50_000
        keys.revoke(key.id)
        async with asyncio.timeout(30):
            answer = await loop.sock_recv(sender, 65_536)
        assert answer.startswith(b"HTTP/1.1 401 ")
        assert b"revoked_api_key" in answer
        await gave_all_back(running, engine)
        assert len(engine.aborted) == 1


async def test_a_database_that_cannot_be_reached_ends_nothing(serve, keys, access, monkeypatch, caplog):
    caplog.set_level(logging.WARNING, watch.__name__)
    num_looks = 0

    async def fail(key_ids: object) -> dict[str, UnauthenticatedError]:
        nonlocal num_looks
        num_looks += 1
        raise StateUnavailableError("It is out of reach.")

    hold = Hold(1)
    engine = FakeEngine(say("abc"), pause=hold)
    running = await serve(engine, access=access)
    credential, key = keys.add(BANK)
    with monkeypatch.context() as broken:
        broken.setattr(access, "ended", fail)
        async with client(running, credential) as api:
            stream = await api.chat.completions.create(**CHAT, stream=True)
            keys.revoke(key.id)
            await until(lambda: num_looks > 3)
            hold.go.set()
            assert await read(stream) == "abc"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    async with httpx.AsyncClient(base_url=running.url) as http:
        assert (await http.get("/v1/models", headers={"x-api-key": credential})).status_code == 401
    await gave_all_back(running, engine)
