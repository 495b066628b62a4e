"""gRPC at a real server, with a client made of the .proto: what it answers, whom it lets in, how it refuses."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack

import grpc
import httpx
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from seamount.cli.serve import greeting
from seamount.cli.wire import make_access
from seamount.core.errors import ConfigError, QueueFullError
from seamount.core.identity import Limits, Principal
from seamount.core.state import open_state
from seamount.engine.fake import FakeEngine, say
from seamount.security.keys import ApiKeys

SECRET = "Grünkohl"
# Each test has connections of its own: the library shares them between channels otherwise.
OWN_CONNECTION = ("grpc.use_local_subchannel_pool", 1)
Connect = Callable[..., grpc.aio.Channel]


@pytest_asyncio.fixture
async def connect() -> AsyncIterator[Connect]:
    async with AsyncExitStack() as stack:

        async def start(address: str, *options: tuple[str, object]) -> grpc.aio.Channel:
            channel = grpc.aio.insecure_channel(address, options=(OWN_CONNECTION, *options))
            return await stack.enter_async_context(channel)

        yield start


@pytest.fixture
def pb(stubs):
    return stubs.pb


@pytest.fixture
def open_service(serve, stubs, connect):
    """Return `await open_service(engine, **settings)`: a running server, and a stub that is connected to it."""

    async def start(engine, *options, **settings):
        running = await serve(engine, **{"grpc_port": 0, **settings})
        return running, stubs.grpc.SeamountStub(await connect(running.grpc_address, *options))

    return start


def chat(pb, **fields):
    return pb.ChatRequest(**{"model": "fake", "messages": [pb.Message(role=pb.ROLE_USER, content="hi")], **fields})


async def refused(call) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def test_a_chat_is_answered_as_over_http(open_service, pb):
    running, stub = await open_service(FakeEngine(say("Vier.", "Four.")))
    request = chat(pb, n=2, logprobs=True, top_logprobs=1, max_tokens=9)
    answer = await stub.Chat(request)
    body = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "n": 2, "max_tokens": 9}
    async with httpx.AsyncClient(base_url=running.url) as client:
        same = (await client.post("/v1/chat/completions", json={**body, "logprobs": True, "top_logprobs": 1})).json()
    assert [choice.message.content for choice in answer.choices] == ["Vier.", "Four."]
    for got, expected in zip(answer.choices, same["choices"], strict=True):
        assert got.message.content == expected["message"]["content"]
        assert pb.FinishReason.Name(got.finish_reason) == f"FINISH_REASON_{expected['finish_reason'].upper()}"
        logprobs = expected["logprobs"]["content"]
        assert [entry.logprob for entry in got.logprobs] == [entry["logprob"] for entry in logprobs]
        assert [list(entry.token_bytes) for entry in got.logprobs] == [entry["bytes"] for entry in logprobs]
    assert answer.usage.prompt_tokens == same["usage"]["prompt_tokens"]
    assert answer.usage.completion_tokens == same["usage"]["completion_tokens"]


async def test_a_streamed_chat_adds_up_and_ends_with_usage(open_service, pb):
    _, stub = await open_service(FakeEngine(say("<think>hm</think>Vier.")))
    call = stub.StreamChat(chat(pb, chat_template_kwargs={"thinking": pb.TemplateValue(bool_value=False)}))
    *chunks, last = [chunk async for chunk in call]
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == "Vier."
    assert "".join(chunk.choices[0].delta.reasoning_content for chunk in chunks) == "hm"
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == pb.FINISH_REASON_STOP
    assert len({chunk.id for chunk in [*chunks, last]}) == 1
    assert not last.choices
    assert last.usage.completion_tokens > 0
    assert await call.code() is grpc.StatusCode.OK


async def test_completions_take_texts_and_tokens(open_service, pb):
    _, stub = await open_service(FakeEngine())
    tokens = pb.Prompt(token_ids=pb.TokenIds(ids=list(b"Zwei")))
    answer = await stub.Complete(pb.CompletionRequest(model="fake", prompt=[tokens], max_tokens=50, logprobs=1))
    (choice,) = answer.choices
    assert choice.text == "Zwei"
    assert "".join(choice.logprobs.tokens).startswith("Zwei")
    two = pb.CompletionRequest(model="fake", prompt=[pb.Prompt(text="ab"), pb.Prompt(text="cd")], stop=["d"], n=2)
    texts = {0: "", 1: "", 2: "", 3: ""}
    async for chunk in stub.StreamComplete(two):
        for piece in chunk.choices:
            texts[piece.index] += piece.text
    assert texts == {0: "ab", 1: "ab", 2: "c", 3: "c"}


async def test_models_are_listed_and_described(open_service, pb):
    _, stub = await open_service(FakeEngine(), served_model_name="org/name")
    (model,) = (await stub.ListModels(pb.ListModelsRequest())).models
    assert (model.id, model.root, model.max_model_len) == ("org/name", "fake", 4096)
    assert await stub.GetModel(pb.GetModelRequest(model="org/name")) == model
    error = await refused(stub.GetModel(pb.GetModelRequest(model="fake")))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert dict(error.trailing_metadata())["seamount-code"] == "model_not_found"


async def test_errors_are_those_of_http(open_service, pb):
    running, stub = await open_service(FakeEngine())
    async with httpx.AsyncClient(base_url=running.url) as client:
        for fields in ({"max_tokens": -1}, {"n": 2**40}, {"temperature": 101.0}, {"max_tokens": 5000}):
            error = await refused(stub.Chat(chat(pb, **fields)))
            body = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], **fields}
            expected = (await client.post("/v1/chat/completions", json=body)).json()["error"]
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert error.details() == expected["message"]
            told = dict(error.trailing_metadata())
            assert (told["seamount-code"], told["seamount-param"]) == (expected["code"], expected["param"])
            streamed = await refused(stub.StreamChat(chat(pb, **fields)).read())
            assert streamed.details() == expected["message"]


async def test_a_stream_that_fails_midway_says_why(open_service, pb):
    _, stub = await open_service(FakeEngine(say("abcdef"), fail_after_tokens=3))
    call, got = stub.StreamChat(chat(pb)), ""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for chunk in call:
            got += chunk.choices[0].delta.content
    assert got == "abc"
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert dict(caught.value.trailing_metadata())["seamount-code"] == "engine_error"


async def test_what_nobody_foresaw_is_told_without_its_words(open_service, pb, caplog):
    class Broken(FakeEngine):
        def generate(self, request):
            raise RuntimeError(SECRET)

    _, stub = await open_service(Broken())
    error = await refused(stub.Chat(chat(pb)))
    assert error.code() is grpc.StatusCode.INTERNAL
    assert SECRET not in error.details() + caplog.text
    assert "RuntimeError" in caplog.text


async def test_a_full_queue_says_when_to_come_again(open_service, pb):
    full = QueueFullError("Full.", retry_after=2.5)
    _, stub = await open_service(FakeEngine(say("x"), fail_after_tokens=0, failure=full))
    error = await refused(stub.Chat(chat(pb)))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    told = dict(error.trailing_metadata())
    assert (told["grpc-retry-pushback-ms"], told["retry-after"]) == ("2500", "3")


async def test_every_call_has_an_id_is_counted_and_leaves_no_words_in_the_log(open_service, pb, caplog):
    caplog.set_level(logging.DEBUG)
    running, stub = await open_service(FakeEngine(say(SECRET)))
    asked = chat(pb, messages=[pb.Message(role=pb.ROLE_USER, content=SECRET)])
    call = stub.Chat(asked, metadata=(("x-request-id", "mine-1"),))
    await call
    assert dict(await call.trailing_metadata())["x-request-id"] == "mine-1"
    stream = stub.StreamChat(asked, metadata=(("x-request-id", "not mine!"),))
    async for _ in stream:
        pass
    assert re.fullmatch("[0-9a-f]{32}", dict(await stream.trailing_metadata())["x-request-id"])
    error = await refused(stub.Chat(chat(pb, model=SECRET)))
    assert dict(error.trailing_metadata())["x-request-id"]
    assert SECRET not in caplog.text
    async with httpx.AsyncClient(base_url=running.url) as client:
        told = (await client.get("/metrics")).text
    for method, status in (("Chat", 200), ("Chat", 404), ("StreamChat", 200)):
        sample = f'http_requests_total{{handler="/seamount.v1.Seamount/{method}",method="POST",status="{status}"}} 1.0'
        assert sample in told


@pytest.fixture
def keys(tmp_path):
    database = open_state(str(tmp_path / "state.db"))
    made = ApiKeys(database)
    made.add_first_administrator(tenant="admin", label="")
    yield made, make_access(database)
    database.close()


async def test_keys_are_asked_for_and_limits_hold(open_service, pb, keys):
    made, access = keys
    _, stub = await open_service(FakeEngine(say("ok")), access=access)
    one_route = ("/seamount.v1.Seamount/Chat",)
    limits = Limits(requests_per_minute=1)
    good, _ = made.add(Principal(key_id=None, tenant="bank", limits=limits))
    narrow, _ = made.add(Principal(key_id=None, tenant="bank", routes=one_route))
    foreign, _ = made.add(Principal(key_id=None, tenant="bank", models=("other",)))
    bearer = (("authorization", f"Bearer {good}"),)
    for proof in ((), (("authorization", "Bearer sm-no"),), (*bearer, ("x-api-key", "another"))):
        error = await refused(stub.Chat(chat(pb), metadata=proof))
        assert error.code() is grpc.StatusCode.UNAUTHENTICATED
    # Who is not let in is not read either.
    assert (await refused(stub.Chat(chat(pb, n=-1)))).code() is grpc.StatusCode.UNAUTHENTICATED
    call = stub.Chat(chat(pb), metadata=bearer)
    assert (await call).choices[0].message.content == "ok"
    assert dict(await call.trailing_metadata())["x-ratelimit-remaining-requests"] == "0"
    error = await refused(stub.Chat(chat(pb), metadata=bearer))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    # What is wrong counts too, and then is not told any more.
    wrong, _ = made.add(Principal(key_id=None, tenant="bank", limits=limits))
    codes = [(await refused(stub.Chat(chat(pb, n=-1), metadata=(("x-api-key", wrong),)))).code() for _ in range(2)]
    assert codes == [grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED]
    told = dict(error.trailing_metadata())
    assert told["seamount-code"] == "requests_per_minute_exceeded"
    assert 0 < int(told["retry-after"]) <= 60
    narrow_key = (("x-api-key", narrow),)
    assert await stub.Chat(chat(pb), metadata=narrow_key)
    error = await refused(stub.ListModels(pb.ListModelsRequest(), metadata=narrow_key))
    assert error.code() is grpc.StatusCode.PERMISSION_DENIED
    foreign_key = (("x-api-key", foreign),)
    assert not (await stub.ListModels(pb.ListModelsRequest(), metadata=foreign_key)).models
    for call in (
        stub.Chat(chat(pb), metadata=foreign_key),
        stub.GetModel(pb.GetModelRequest(model="fake"), metadata=foreign_key),
    ):
        assert dict((await refused(call)).trailing_metadata())["seamount-code"] == "model_not_permitted"


async def test_every_method_asks_for_a_key_but_health_and_reflection(serve, connect, keys, stubs):
    running = await serve(FakeEngine(), access=keys[1], grpc_port=0)
    channel = await connect(running.grpc_address)
    (service,) = stubs.pb.DESCRIPTOR.services_by_name.values()
    for method in service.methods:
        make = channel.unary_stream if method.server_streaming else channel.unary_unary
        call = make(f"/{service.full_name}/{method.name}")(b"")
        error = await refused(call.read() if method.server_streaming else call)
        assert error.code() is grpc.StatusCode.UNAUTHENTICATED, method.name
    health = health_pb2_grpc.HealthStub(channel)
    assert (await health.Check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.SERVING
    error = await refused(channel.unary_unary("/seamount.v1.Seamount/Nothing")(b""))
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_reflection_tells_the_services_and_their_messages(serve, connect):
    running = await serve(FakeEngine(), grpc_port=0)
    reflection = reflection_pb2_grpc.ServerReflectionStub(await connect(running.grpc_address))
    call = reflection.ServerReflectionInfo()
    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    names = {service.name for service in (await call.read()).list_services_response.service}
    assert names == {"seamount.v1.Seamount", "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
    await call.write(reflection_pb2.ServerReflectionRequest(file_containing_symbol="seamount.v1.Seamount"))
    (described,) = (await call.read()).file_descriptor_response.file_descriptor_proto
    assert b"ChatRequest" in described
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF


async def test_web_pages_are_refused(open_service, pb):
    _, stub = await open_service(FakeEngine())
    error = await refused(stub.Chat(chat(pb), metadata=(("origin", "http://127.0.0.1"),)))
    assert error.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_messages_are_bounded_and_never_compressed(open_service, pb):
    _, stub = await open_service(FakeEngine(), max_body_bytes=4096)
    big = chat(pb, messages=[pb.Message(role=pb.ROLE_USER, content="a" * 5000)])
    assert (await refused(stub.Chat(big))).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    small = await refused(stub.Chat(big, compression=grpc.Compression.Gzip))  # fits, as long as it is compressed
    assert small.code() in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.INVALID_ARGUMENT)
    assert (await stub.Chat(chat(pb))).choices


async def test_a_request_that_stands_in_its_own_way_is_told_what_was_ignored(open_service, pb):
    _, stub = await open_service(FakeEngine(say("ok")))
    call = stub.Chat(
        chat(pb, tools=[pb.Tool(name="f", strict=True)], tool_choice=pb.ToolChoice(mode=pb.ToolChoice.MODE_NONE))
    )
    await call
    assert dict(await call.trailing_metadata())["x-seamount-ignored"] == "tools.function.strict"


async def test_a_port_that_is_taken_is_told_before_anything_starts(serve):
    running = await serve(FakeEngine(), grpc_port=0)
    engine = FakeEngine()
    with pytest.raises(ConfigError, match="cannot listen on 127.0.0.1"):
        await serve(engine, grpc_port=int(running.grpc_address.rpartition(":")[2]))
    assert engine.state() == "starting"


async def test_without_the_setting_nothing_listens(serve):
    assert (await serve(FakeEngine())).grpc_address is None


def test_the_greeting_says_where_it_is():
    assert "gRPC                 127.0.0.1:5\n" in greeting("http://x", "m", grpc_address="127.0.0.1:5")
    assert "gRPC" not in greeting("http://x", "m")


async def test_tools_are_offered_and_structure_is_checked(open_service, pb):
    """The fake engine enforces nothing: what is asked of the engine is what HTTP asks of it."""
    seen = []

    def reply(request, index):
        seen.append(request)
        return b"ok"

    running, stub = await open_service(FakeEngine(reply))
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    wanted = pb.ResponseFormat(json_schema=pb.ResponseFormat.JsonSchema(name="s", schema=json.dumps(schema)))
    await stub.Chat(chat(pb, response_format=wanted, seed=3))
    body = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "seed": 3}
    format_ = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    async with httpx.AsyncClient(base_url=running.url) as client:
        assert (await client.post("/v1/chat/completions", json={**body, "response_format": format_})).status_code == 200
    first, second = seen
    assert first.sampling.grammar is not None
    assert (first.sampling, first.prompt_token_ids) == (second.sampling, second.prompt_token_ids)
