"""Anthropic's own client against a real server: what it reads is what was meant, and nobody else is asked."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Collection, Sequence
from typing import Any

import anthropic
import pytest
from pydantic import BaseModel

from seamount.core.errors import EngineError, QueueFullError, UnauthenticatedError
from seamount.core.identity import Limits, Principal
from seamount.core.requests import Request
from seamount.core.settings import EngineConfig
from seamount.engine.client import WorkerEngine
from seamount.engine.fake import FakeEngine, say
from seamount.engine.fake_encoder import ByteEncoder, FakePrompt
from seamount.models.builtin_templates import QWEN3
from seamount.models.locate import locate_model
from seamount.models.prompt import PromptEncoder
from seamount.models.tools import choose_format
from seamount.server.door.access import Access

ASK: Any = {"model": "fake", "max_tokens": 200, "messages": [{"role": "user", "content": "Weather?"}]}
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS: Any = [{"name": name, "description": "Tells it.", "input_schema": CITY} for name in ("weather", "time")]
CALLS = (
    "<think>\nhm\n</think>\n\nLet me see.\n"
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "time", "arguments": {"city": "Rom"}}\n</tool_call>'
)


class CallingEncoder(ByteEncoder):
    """Bytes, and Qwen's way to call tools; remembers the messages that it was given."""

    tool_format = choose_format(QWEN3, ())

    def __init__(self) -> None:
        self.messages: list[Any] = []

    def encode_chat(
        self, messages: Sequence[Any], *, tools: Any = None, continue_final: bool = False, **more: Any
    ) -> FakePrompt:
        self.messages = list(messages)
        return super().encode_chat(messages, **more)


def text_of(block: Any) -> tuple[str, str]:
    return block.type, block.thinking if block.type == "thinking" else block.text


def client(url: str, **more: Any) -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(**{"base_url": url, "api_key": "none", "max_retries": 0, **more})


async def test_sync_client_asks_and_streams(serve, only_this_machine):
    running = await serve(FakeEngine(say("<think>\nzwei und zwei\n</think>\n\nVier. 四。"), num_cached_tokens=3))

    def use() -> tuple[Any, str, Any, list[str]]:
        with anthropic.Anthropic(base_url=running.url, api_key="none", max_retries=0) as api:
            whole = api.messages.create(**ASK)
            with api.messages.stream(**ASK) as stream:
                streamed = "".join(stream.text_stream)
                final = stream.get_final_message()
            raw = [event.type for event in api.messages.create(**ASK, stream=True)]
            return whole, streamed, final, raw

    whole, streamed, final, raw = await asyncio.to_thread(use)
    assert [block.type for block in whole.content] == ["thinking", "text"]
    assert (whole.content[0].thinking, whole.content[0].signature) == ("zwei und zwei", "")
    assert whole.content[1].text == streamed == "Vier. 四。"
    assert [text_of(block) for block in final.content] == [text_of(block) for block in whole.content]
    assert (whole.stop_reason, whole.stop_sequence, whole.role) == ("end_turn", None, "assistant")
    assert final.usage == whole.usage
    assert whole.usage.input_tokens + whole.usage.cache_read_input_tokens == len("user: Weather?\n") + 2
    assert raw[0] == "message_start"
    assert raw[-1] == "message_stop"
    assert whole._request_id


async def test_async_client_runs_a_loop_of_tools(serve, only_this_machine):
    encoder = CallingEncoder()
    running = await serve(FakeEngine(say(CALLS)), encoder)
    async with client(running.url) as api:
        whole = await api.messages.create(**ASK, tools=TOOLS)
        async with api.messages.stream(**ASK, tools=TOOLS) as stream:
            inputs = [event.snapshot async for event in stream if event.type == "input_json"]
            final = await stream.get_final_message()
        uses = [block for block in whole.content if block.type == "tool_use"]
        assert [(use.name, use.input) for use in uses] == [("weather", {"city": "Köln"}), ("time", {"city": "Rom"})]
        assert whole.stop_reason == final.stop_reason == "tool_use"
        assert [block.type for block in final.content] == ["thinking", "text", "tool_use", "tool_use"]
        assert [getattr(block, "input", None) for block in final.content] == [
            getattr(block, "input", None) for block in whole.content
        ]
        assert len(inputs) > 10
        results: Any = [{"type": "tool_result", "tool_use_id": use.id, "content": "12"} for use in uses]
        for answer in (whole.content, [block.model_dump() for block in whole.content]):
            turns: Any = [
                *ASK["messages"],
                {"role": "assistant", "content": answer},
                {"role": "user", "content": results},
            ]
            await api.messages.create(**{**ASK, "messages": turns}, tools=TOOLS)
            assert [message["role"] for message in encoder.messages] == ["user", "assistant", "tool", "tool"]
            assert encoder.messages[1]["reasoning_content"] == "hm"
            calls = encoder.messages[1]["tool_calls"]
            assert json.loads(calls[0]["function"]["arguments"]) == {"city": "Köln"}
            assert [call["id"] for call in calls] == [use.id for use in uses]


async def test_the_clients_own_tool_runner(serve, only_this_machine):
    @anthropic.beta_tool
    def weather(city: str) -> str:
        """Tell the weather.

        Args:
            city: where.
        """
        asked.append(city)
        return "12 degrees"

    asked: list[str] = []

    def reply(request: Request, index: int) -> Sequence[int]:
        only_first = CALLS.rpartition("\n<tool_call>")[0]
        return say("It is cold." if asked else only_first)(request, index)

    running = await serve(FakeEngine(reply), CallingEncoder())

    def use() -> Any:
        with anthropic.Anthropic(base_url=running.url, api_key="none", max_retries=0) as api:
            return api.beta.messages.tool_runner(**ASK, tools=[weather], thread=False).until_done()

    final = await asyncio.to_thread(use)
    assert asked == ["Köln"]
    assert final.content[0].text == "It is cold."


async def test_sampling_reaches_the_engine_as_sent(serve, only_this_machine):
    seen: list[Request] = []

    def reply(request: Request, index: int) -> Sequence[int]:
        seen.append(request)
        return say("one END")(request, index)

    running = await serve(FakeEngine(reply), CallingEncoder())
    async with client(running.url) as api:
        answer = await api.messages.create(
            **ASK,
            extra_body={"temperature": 0.25, "top_p": 0.5, "top_k": 4},  # no longer the client's own parameters
            stop_sequences=["END"],
            metadata={"user_id": "u"},
            system=[{"type": "text", "text": "Be kind.", "cache_control": {"type": "ephemeral"}}],
            extra_headers={"anthropic-beta": "some-beta"},
        )
        await api.messages.create(**ASK, tools=TOOLS, tool_choice={"type": "tool", "name": "time"})
    sampling = seen[0].sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (200, 0.25, 0.5, 4)
    assert (answer.stop_reason, answer.stop_sequence, answer.content[0].text) == ("stop_sequence", "END", "one ")
    assert bytes(token for token in seen[0].prompt_token_ids if token < 256).startswith(b"system: Be kind.\nuser: ")
    grammar = seen[1].sampling.grammar
    assert grammar is not None
    assert '"weather' not in grammar.text.replace('\\"', '"')


async def test_answers_in_a_given_shape(serve, only_this_machine):
    class Weather(BaseModel):
        degrees: int

    seen: list[Request] = []

    def reply(request: Request, index: int) -> Sequence[int]:
        seen.append(request)
        return say('{"degrees": 12}')(request, index)

    running = await serve(FakeEngine(reply))
    async with client(running.url) as api:
        parsed = await api.messages.parse(**ASK, output_format=Weather)
    assert parsed.parsed_output == Weather(degrees=12)
    grammar = seen[0].sampling.grammar
    assert grammar is not None
    assert grammar.kind == "json_schema"


async def test_tokens_are_counted(serve, only_this_machine):
    running = await serve(FakeEngine(say("ok")), CallingEncoder())
    asked = {"model": "fake", "messages": ASK["messages"], "tools": TOOLS, "system": "Be kind."}
    async with client(running.url) as api:
        counted = await api.messages.count_tokens(**asked)
        charged = (await api.messages.create(**asked, max_tokens=5)).usage
        beta = await api.beta.messages.count_tokens(**asked, betas=["token-counting-2024-11-01"])
    assert counted.input_tokens == beta.input_tokens == charged.input_tokens


async def test_models_are_listed(serve, only_this_machine):
    running = await serve(FakeEngine(), served_model_name="org/mine")
    async with client(running.url) as api:
        assert [model.id async for model in api.models.list()] == ["org/mine"]
        model = await api.models.retrieve("org/mine")
        assert (model.id, model.display_name, model.type) == ("org/mine", "org/mine", "model")
        assert abs(model.created_at.timestamp() - time.time()) < 3600


class Keys:
    """Knows two callers; one of them may ask once a minute."""

    async def authenticate(self, credential: str | None, peer: str | None) -> Principal:
        if credential == "clerk":
            return Principal(key_id="c", tenant="bank")
        if credential == "hurried":
            return Principal(key_id="h", tenant="bank", limits=Limits(requests_per_minute=1))
        if credential == "scraper":
            return Principal(key_id="s", tenant="ops", routes=("/metrics",))
        raise UnauthenticatedError("Nobody knows you.")

    async def ended(self, key_ids: Collection[str]) -> dict[str, UnauthenticatedError]:
        return {}


async def test_errors_become_the_clients_own(serve, only_this_machine):
    running = await serve(FakeEngine(say("ok")), access=Access(Keys()), max_body_bytes=4096)

    async def fails(kind: type[anthropic.APIStatusError], key: str = "clerk", **fields: Any) -> Any:
        async with client(running.url, api_key=key) as api:
            with pytest.raises(kind) as caught:
                await api.messages.create(**{**ASK, **fields})
        assert type(caught.value) is kind
        assert caught.value.request_id
        return caught.value

    assert (await fails(anthropic.AuthenticationError, "stranger")).body["error"]["type"] == "authentication_error"
    await fails(anthropic.PermissionDeniedError, "scraper")
    assert "called 'fake'" in (await fails(anthropic.NotFoundError, model="other")).message
    assert (
        "images are not supported"
        in (
            await fails(
                anthropic.BadRequestError,
                messages=[{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "x"}}]}],
            )
        ).message
    )
    too_large = await fails(anthropic.RequestTooLargeError, messages=[{"role": "user", "content": "x" * 5000}])
    assert too_large.body["error"]["type"] == "request_too_large"
    async with client(running.url, api_key="hurried") as api:
        await api.messages.create(**ASK)
    assert (await fails(anthropic.RateLimitError, "hurried")).response.headers["retry-after"]


async def test_a_bearer_token_is_proof_too(serve, only_this_machine):
    running = await serve(FakeEngine(say("ok")), access=Access(Keys()))
    async with client(running.url, api_key=None, auth_token="clerk") as api:
        assert (await api.messages.create(**ASK)).content[0].text == "ok"


@pytest.mark.parametrize(
    ("failure", "kind", "retry_after"),
    [
        (QueueFullError("The queue is full.", retry_after=2.5), "overloaded_error", "3"),
        (EngineError("The engine broke."), "api_error", None),
    ],
)
async def test_failures_of_the_server(serve, only_this_machine, failure, kind, retry_after):
    before = await serve(FakeEngine(fail_after_tokens=0, failure=failure))
    midway = await serve(FakeEngine(say("abcdef"), fail_after_tokens=2, failure=failure))
    async with client(before.url) as api:
        with pytest.raises(anthropic.APIStatusError) as caught:
            await api.messages.create(**ASK, stream=True)
    assert caught.value.status_code == (503 if retry_after else 500)
    assert caught.value.body["error"] == {"type": kind, "message": failure.message}
    assert caught.value.response.headers.get("retry-after") == retry_after
    text = ""
    async with client(midway.url) as api:
        with pytest.raises(anthropic.APIStatusError, match=failure.message) as caught:
            async with api.messages.stream(**ASK) as stream:
                async for piece in stream.text_stream:
                    text += piece
    assert text == "ab"
    assert caught.value.body["error"]["type"] == kind


PUMP: Any = {
    "name": "get_pump_pressure",
    "description": "Read the pressure of a pump",
    "input_schema": {"type": "object", "properties": {"pump_id": {"type": "string"}}, "required": ["pump_id"]},
}


async def test_the_embedded_model_thinks_calls_a_tool_and_tells_its_result(serve, only_this_machine):
    engine = WorkerEngine(EngineConfig(model="seamount-tiny", num_threads=1))
    running = await serve(engine, PromptEncoder.from_folder(locate_model("seamount-tiny")))
    await running.service.started
    asked: Any = {"model": "seamount-tiny", "max_tokens": 4000, "extra_body": {"temperature": 0}}
    sums: Any = [{"role": "user", "content": "What is 47 + 38 - 9?"}]
    turns: Any = [{"role": "user", "content": "What is the pressure of pump K-417?"}]
    async with client(running.url) as api:
        thought = await api.messages.create(**asked, messages=sums, thinking={"type": "enabled", "budget_tokens": 1024})
        plain = await api.messages.create(**asked, messages=sums, thinking={"type": "disabled"})
        assert [block.type for block in thought.content] == ["thinking", "text"]
        assert "76" in thought.content[1].text
        assert [block.type for block in plain.content] == ["text"]
        call = await api.messages.create(**asked, messages=turns, tools=[PUMP])
        counted = await api.messages.count_tokens(model="seamount-tiny", messages=turns, tools=[PUMP])
        (use,) = [block for block in call.content if block.type == "tool_use"]
        assert (use.name, use.input, call.stop_reason) == ("get_pump_pressure", {"pump_id": "K-417"}, "tool_use")
        usage = call.usage
        assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens
        result = {"type": "tool_result", "tool_use_id": use.id, "content": '{"result":"83"}'}
        turns += [{"role": "assistant", "content": call.content}, {"role": "user", "content": [result]}]
        async with api.messages.stream(**asked, messages=turns, tools=[PUMP]) as stream:
            told = await stream.get_final_message()
    assert told.stop_reason == "end_turn"
    assert "83" in "".join(block.text for block in told.content if block.type == "text")
