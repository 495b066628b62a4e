"""Embeddings and tokens over gRPC at a real server: the same answers, refusals and limits as over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import grpc
import httpx
import pytest
import pytest_asyncio

from seamount.cli.wire import make_access
from seamount.core.embedding import EmbeddingFacts
from seamount.core.identity import Limits, Principal
from seamount.core.state import open_state
from seamount.engine.fake import FAKE_FACTS, FakeEngine
from seamount.security.keys import ApiKeys

HOW = EmbeddingFacts(pooling="last", normalize=True, num_dimensions=3, shorter_dimensions=(2,), max_tokens=64)
EMBEDS = replace(FAKE_FACTS, embedding=HOW)
OWN_CONNECTION = ("grpc.use_local_subchannel_pool", 1)


@pytest_asyncio.fixture
async def open_service(serve, stubs) -> AsyncIterator[Callable[..., Any]]:
    """Return `await open_service(engine, **settings)`: a running server, and a stub that is connected to it."""
    async with AsyncExitStack() as stack:

        async def start(engine: FakeEngine, **settings: object) -> Any:
            running = await serve(engine, **{"grpc_port": 0, **settings})
            made = grpc.aio.insecure_channel(running.grpc_address, options=(OWN_CONNECTION,))
            return running, stubs.grpc.SeamountStub(await stack.enter_async_context(made))

        yield start


@pytest.fixture
def pb(stubs):
    return stubs.pb


def texts(pb, *given: str | list[int]) -> list[Any]:
    return [pb.Prompt(text=one) if isinstance(one, str) else pb.Prompt(token_ids=pb.TokenIds(ids=one)) for one in given]


async def refused(call) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def same_refusal(call, url: str, path: str, body: dict[str, Any]) -> str:
    """Check that a call is refused in HTTP's words; return the code."""
    async with httpx.AsyncClient(base_url=url) as client:
        answer = await client.post(path, json=body)
    assert answer.status_code == 400
    expected, error = answer.json()["error"], await refused(call)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details() == expected["message"]
    told = dict(error.trailing_metadata())
    assert (told["seamount-code"], told.get("seamount-param")) == (expected["code"], expected["param"])
    return told["seamount-code"]


async def test_embeddings_are_those_of_http(open_service, pb):
    running, stub = await open_service(FakeEngine(facts=EMBEDS, embed=lambda request: [0.1, -7.0, 1e-3]))
    answer = await stub.Embed(pb.EmbedRequest(model="fake", input=texts(pb, "ab", "c"), dimensions=2))
    body = {"model": "fake", "input": ["ab", "c"], "dimensions": 2}
    async with httpx.AsyncClient(base_url=running.url) as client:
        same = (await client.post("/v1/embeddings", json=body)).json()
    assert [list(item.embedding) for item in answer.data] == [item["embedding"] for item in same["data"]]
    assert [item.index for item in answer.data] == [0, 1]
    assert (answer.model, answer.usage.prompt_tokens) == ("fake", same["usage"]["prompt_tokens"])
    ids = await stub.Embed(pb.EmbedRequest(model="fake", input=texts(pb, [1, 2], [3])))
    assert ids.usage.prompt_tokens == 3


async def test_more_texts_than_run_side_by_side_come_in_order(open_service, pb):
    _, stub = await open_service(FakeEngine(facts=EMBEDS))
    given = ["x" * (1 + number % 50) for number in range(2048)]
    answer = await stub.Embed(pb.EmbedRequest(model="fake", input=texts(pb, *given)))
    assert [item.embedding[2] for item in answer.data] == [len(text) + 1 for text in given]


@pytest.mark.parametrize(
    ("given", "more", "code"),
    [
        (["a", [1]], {}, "invalid_value"),
        (["a" * 64], {}, "context_length_exceeded"),
        ([[2**30]], {}, "invalid_value"),
        (["a"], {"dimensions": 1}, "invalid_value"),
        (["a"], {"dimensions": 2**40}, "invalid_value"),
    ],
    ids=["mixed", "too long", "no such token", "not made for so few", "out of range"],
)
async def test_what_cannot_be_embedded_is_refused_in_the_same_words(open_service, pb, given, more, code):
    running, stub = await open_service(FakeEngine(facts=EMBEDS))
    call = stub.Embed(pb.EmbedRequest(model="fake", input=texts(pb, *given), **more))
    assert await same_refusal(call, running.url, "/v1/embeddings", {"model": "fake", "input": given, **more}) == code


async def test_a_model_that_makes_no_embeddings_says_so(open_service, pb):
    running, stub = await open_service(FakeEngine())
    call = stub.Embed(pb.EmbedRequest(model="fake", input=texts(pb, "a")))
    body = {"model": "fake", "input": "a"}
    assert await same_refusal(call, running.url, "/v1/embeddings", body) == "not_an_embedding_model"


async def test_a_cancelled_call_ends_the_work_on_every_text(open_service, pb):
    begun = asyncio.Event()

    async def pause() -> None:
        begun.set()
        await asyncio.Event().wait()

    engine = FakeEngine(facts=EMBEDS, pause=pause)
    running, stub = await open_service(engine)
    call = stub.Embed(pb.EmbedRequest(model="fake", input=texts(pb, *["a"] * 64)))
    await begun.wait()
    call.cancel()
    async with asyncio.timeout(30):
        while running.service.num_active or (await engine.stats()).num_running:
            await asyncio.sleep(0.01)
    assert running.service.admission.load().num_admitted == 0


async def test_tokens_are_those_of_http_and_become_the_text_again(open_service, pb):
    running, stub = await open_service(FakeEngine())
    user = pb.Message(role=pb.ROLE_USER, content="hé")
    cases = [
        ({"prompt": "hé", "return_token_strs": True}, {"prompt": "hé", "return_token_strs": True}),
        ({"prompt": "", "add_special_tokens": False}, {"prompt": "", "add_special_tokens": False}),
        (
            {"messages": [user], "add_generation_prompt": False},
            {"messages": [{"role": "user", "content": "hé"}], "add_generation_prompt": False},
        ),
    ]
    async with httpx.AsyncClient(base_url=running.url) as client:
        for fields, body in cases:
            answer = await stub.Tokenize(pb.TokenizeRequest(model="fake", **fields))
            same = (await client.post("/v1/tokenize", json={"model": "fake", **body})).json()
            assert (answer.count, list(answer.tokens)) == (same["count"], same["tokens"])
            assert answer.max_model_len == same["max_model_len"] == 4096
            assert list(answer.token_strs) == (same["token_strs"] or [])
    plain = await stub.Tokenize(pb.TokenizeRequest(prompt="Grüße", add_special_tokens=False))
    assert (await stub.Detokenize(pb.DetokenizeRequest(tokens=plain.tokens))).prompt == "Grüße"
    assert (await stub.Detokenize(pb.DetokenizeRequest())).prompt == ""


async def test_what_has_no_tokens_is_refused_in_the_same_words(open_service, pb):
    running, stub = await open_service(FakeEngine())
    for fields in ({}, {"prompt": "a", "add_generation_prompt": True}, {"prompt": "a" * 40_000}):
        await same_refusal(stub.Tokenize(pb.TokenizeRequest(**fields)), running.url, "/v1/tokenize", fields)
    for tokens in ([-1], [2**40], [100_000]):
        call = stub.Detokenize(pb.DetokenizeRequest(tokens=tokens))
        await same_refusal(call, running.url, "/v1/detokenize", {"tokens": tokens})
    for call in (
        stub.Tokenize(pb.TokenizeRequest(model="no", prompt="a")),
        stub.Detokenize(pb.DetokenizeRequest(model="no")),
        stub.Embed(pb.EmbedRequest(model="no", input=texts(pb, "a"))),
    ):
        assert (await refused(call)).code() is grpc.StatusCode.NOT_FOUND


async def test_keys_open_what_they_are_for_and_their_limits_hold(open_service, pb, tmp_path):
    state = open_state(str(tmp_path / "state.db"))
    keys = ApiKeys(state)
    keys.add_first_administrator(tenant="admin", label="")
    _, stub = await open_service(FakeEngine(facts=EMBEDS), access=make_access(state))

    def proof(**of_key: Any) -> tuple[tuple[str, str]]:
        return (("x-api-key", keys.add(Principal(key_id=None, tenant="bank", **of_key))[0]),)

    asked = {
        "Embed": pb.EmbedRequest(model="fake", input=texts(pb, "a", "b")),
        "Tokenize": pb.TokenizeRequest(model="fake", prompt="a"),
        "Detokenize": pb.DetokenizeRequest(model="fake", tokens=[97]),
    }

    def ask(name: str, metadata: Any) -> Any:
        return getattr(stub, name)(asked[name], metadata=metadata)

    for name in asked:
        await ask(name, proof())
        foreign = await refused(ask(name, proof(models=("other",))))
        assert dict(foreign.trailing_metadata())["seamount-code"] == "model_not_permitted"
        over_http = proof(routes=("/v1/embeddings", "/v1/tokenize", "/v1/detokenize"))
        assert (await refused(ask(name, over_http))).code() is grpc.StatusCode.PERMISSION_DENIED
        narrow = proof(routes=(f"/seamount.v1.Seamount/{name}",))
        await ask(name, narrow)
        one = proof(limits=Limits(requests_per_minute=1))
        await ask(name, one)
        error = await refused(ask(name, one))
        assert dict(error.trailing_metadata())["seamount-code"] == "requests_per_minute_exceeded"
    few = proof(limits=Limits(tokens_per_minute=3))
    await ask("Embed", few)  # two texts of two tokens each: more than a minute's, which waits for a whole one
    error = await refused(ask("Embed", few))
    assert dict(error.trailing_metadata())["seamount-code"] == "tokens_per_minute_exceeded"
    state.close()
