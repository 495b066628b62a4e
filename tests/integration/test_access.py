"""API keys at a real server, with the official client, over a real database."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from seamount.cli.wire import make_access
from seamount.core.database import Database
from seamount.core.identity import Principal
from seamount.core.state import open_state
from seamount.engine.fake import FakeEngine, say
from seamount.security.keys import ApiKeys
from seamount.security.usage import Tokens, usage_by_day

ASK = [{"role": "user", "content": "2+2?"}]


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Database]:
    database = open_state(str(tmp_path / "state.db"))
    yield database
    database.close()


@pytest.fixture
def keys(state: Database) -> ApiKeys:
    made = ApiKeys(state)
    made.add_first_administrator(tenant="admin", label="")
    return made


def client(url: str, key: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)


async def ask(url: str, key: str, model: str = "fake") -> str:
    async with client(url, key) as api:
        whole = await api.chat.completions.create(model=model, messages=ASK)
        return whole.choices[0].message.content


async def test_a_right_key_is_answered_and_a_wrong_one_is_not(serve, state, keys):
    running = await serve(FakeEngine(say("Vier.")), access=make_access(state))
    credential, _ = keys.add(Principal(key_id=None, tenant="bank"))
    assert await ask(running.url, credential) == "Vier."
    for wrong in ("none", credential[:-1], "sm-aaaaaaaaaa-" + "b" * 43):
        with pytest.raises(openai.AuthenticationError) as caught:
            await ask(running.url, wrong)
        assert caught.value.code == "invalid_api_key"
    async with client(running.url, credential) as api:
        stream = await api.chat.completions.create(model="fake", messages=ASK, stream=True)
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == "Vier."
        assert [model.id async for model in api.models.list()] == ["fake"]


async def test_a_key_that_is_revoked_elsewhere_opens_nothing_from_the_next_request_on(serve, state, keys, tmp_path):
    held = asyncio.Event()
    passed = asyncio.Event()

    async def pause() -> None:
        held.set()
        await passed.wait()

    running = await serve(FakeEngine(say("Vier."), pause=pause), access=make_access(state), drain_timeout_s=30)
    (credential, key), (good, _) = (keys.add(Principal(key_id=None, tenant="bank")) for _ in range(2))
    begun = asyncio.create_task(ask(running.url, good))
    await held.wait()
    other = open_state(str(tmp_path / "state.db"))
    ApiKeys(other).revoke(key.id)
    other.close()
    with pytest.raises(openai.AuthenticationError) as caught:
        await ask(running.url, credential)
    assert caught.value.code == "revoked_api_key"
    passed.set()
    assert await begun == "Vier."


async def test_an_expired_key_is_told_so(serve, state):
    now_s = time.time()
    past = ApiKeys(state, clock=lambda: now_s - 100)
    past.add_first_administrator(tenant="admin", label="")
    credential, _ = past.add(Principal(key_id=None, tenant="bank"), lifetime_s=99)
    running = await serve(FakeEngine(), access=make_access(state))
    with pytest.raises(openai.AuthenticationError) as caught:
        await ask(running.url, credential)
    assert caught.value.code == "expired_api_key"


async def test_a_key_for_another_route_or_model_is_forbidden(serve, state, keys):
    running = await serve(FakeEngine(), access=make_access(state))
    elsewhere, _ = keys.add(Principal(key_id=None, tenant="bank", routes=("/v1/completions",)))
    other, _ = keys.add(Principal(key_id=None, tenant="bank", models=("other",)))
    for credential, code in ((elsewhere, "route_not_permitted"), (other, "model_not_permitted")):
        with pytest.raises(openai.PermissionDeniedError) as caught:
            await ask(running.url, credential)
        assert caught.value.code == code


async def test_tokens_are_counted_for_the_key_that_used_them(serve, state, keys):
    first, first_key = keys.add(Principal(key_id=None, tenant="bank"))
    second, second_key = keys.add(Principal(key_id=None, tenant="bank"))
    running = await serve(FakeEngine(say("Vier.")), access=make_access(state))
    told = Tokens()
    async with client(running.url, first) as api:
        for n in (1, 3):
            usage = (await api.chat.completions.create(model="fake", messages=ASK, n=n)).usage
            told += Tokens(usage.prompt_tokens, usage.completion_tokens)
        stream = await api.completions.create(
            model="fake", prompt=["ab", "cd"], stream=True, stream_options={"include_usage": True}
        )
        last = [chunk async for chunk in stream][-1].usage
        told += Tokens(last.prompt_tokens, last.completion_tokens)
    await asyncio.gather(*(ask(running.url, second) for _ in range(5)))
    running.server.stop()
    await running.task
    used = {key_id: sum(days.values(), Tokens()) for key_id, days in usage_by_day(state).items()}
    assert used[first_key.id] == told
    assert used[second_key.id].num_generated == 5 * len("Vier.") + 5
    assert set(used) == {first_key.id, second_key.id}


async def test_what_a_client_that_left_had_used_is_counted(serve, state, keys):
    credential, key = keys.add(Principal(key_id=None, tenant="bank"))
    forever = asyncio.Event()
    count = 0

    async def pause() -> None:
        nonlocal count
        count += 1
        if count > 2:
            await forever.wait()

    running = await serve(FakeEngine(say("abcdef"), pause=pause), access=make_access(state))
    async with client(running.url, credential) as api:
        stream = await api.completions.create(model="fake", prompt="xy", stream=True)
        assert (await anext(aiter(stream))).choices[0].text == "a"
        assert (await anext(aiter(stream))).choices[0].text == "b"
        await stream.close()
    running.server.stop()
    await running.task
    assert sum(usage_by_day(state)[key.id].values(), Tokens()) == Tokens(len("xy") + 1, 2)


async def test_the_anthropic_header_is_a_key_too_and_probes_need_none(serve, state, keys):
    credential, _ = keys.add(Principal(key_id=None, tenant="bank"))
    running = await serve(FakeEngine(), access=make_access(state))
    async with httpx.AsyncClient(base_url=running.url) as http:
        assert (await http.get("/v1/models", headers={"x-api-key": credential})).status_code == 200
        assert (await http.get("/metrics", headers={"x-api-key": credential})).status_code == 403
        for path in ("/healthz", "/readyz", "/", "/console/app.js"):
            assert (await http.get(path)).status_code == 200, path
        refused = await http.post("/v1/chat/completions", content=b"x" * 2**20)
        assert refused.status_code == 401
        assert (await http.get("/healthz")).status_code == 200
