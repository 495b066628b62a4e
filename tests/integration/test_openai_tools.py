"""The official client calls tools: over scripted answers, whole and streamed, and with the embedded model itself."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import openai
import pytest

from seamount.core.requests import Request
from seamount.core.settings import EngineConfig
from seamount.engine.client import WorkerEngine
from seamount.engine.fake import FakeEngine, say
from seamount.engine.fake_encoder import ByteEncoder, FakePrompt
from seamount.models.builtin_templates import QWEN3
from seamount.models.locate import locate_model
from seamount.models.prompt import PromptEncoder
from seamount.models.tools import choose_format

ASK: list[Any] = [{"role": "user", "content": "Weather?"}]
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": name, "parameters": CITY}} for name in ("weather", "time")
]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
SECOND = '<tool_call>\n{"name": "time", "arguments": {"city": "Rom", "n": [1, true]}}\n</tool_call>'


class CallingEncoder(ByteEncoder):
    """Bytes, Qwen's way to call tools, and answers that callers begin; remembers what it was asked."""

    tool_format = choose_format(QWEN3, ())

    def __init__(self) -> None:
        self.tools: Any = "not asked"

    def encode_chat(
        self, messages: Sequence[Any], *, tools: Any = None, continue_final: bool = False, **more: Any
    ) -> FakePrompt:
        self.tools = tools
        if not continue_final:
            return super().encode_chat(messages, **more)
        prompt = super().encode_chat(messages[:-1], **more)
        begun = self.encode_text(messages[-1]["content"], add_special_tokens=False)
        return FakePrompt((*prompt.token_ids, *begun), prompt.text, prompt.starts_in_reasoning)


def client(url: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def called(message: Any) -> list[tuple[str, Any]]:
    return [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or ()]


async def gather(stream: Any) -> tuple[str, str, list[dict[str, str]], str | None]:
    """Add a stream up by OpenAI's rules: content, reasoning, calls, finish reason."""
    content, reasoning, finish = "", "", None
    calls: list[dict[str, str]] = []
    async for chunk in stream:
        assert finish is None
        (choice,) = chunk.choices
        content += choice.delta.content or ""
        reasoning += getattr(choice.delta, "reasoning_content", None) or ""
        for delta in choice.delta.tool_calls or ():
            if delta.index == len(calls):
                assert (delta.type, delta.function.arguments) == ("function", "")
                calls.append({"id": delta.id, "name": delta.function.name, "arguments": ""})
            else:
                assert (delta.index, delta.id, delta.type, delta.function.name) == (len(calls) - 1, None, None, None)
                calls[delta.index]["arguments"] += delta.function.arguments
        if choice.finish_reason == "tool_calls":
            assert choice.delta.tool_calls is None
        finish = choice.finish_reason
    return content, reasoning, calls, finish


@pytest.mark.parametrize(
    ("answer", "content", "reasoning", "calls"),
    [
        (CALL, "", "", [("weather", {"city": "Köln"})]),
        (f"Let me see.\n{CALL}", "Let me see.", "", [("weather", {"city": "Köln"})]),
        (
            f"<think>\nhm\n</think>\n\n{CALL}\n{SECOND}",
            "",
            "hm",
            [("weather", {"city": "Köln"}), ("time", {"city": "Rom", "n": [1, True]})],
        ),
    ],
)
async def test_calls_whole_and_streamed(serve, answer, content, reasoning, calls):
    encoder = CallingEncoder()
    running = await serve(FakeEngine(say(answer)), encoder)
    async with client(running.url) as api:
        whole = await api.chat.completions.create(model="fake", messages=ASK, tools=TOOLS)
        stream = await api.chat.completions.create(model="fake", messages=ASK, tools=TOOLS, stream=True)
        streamed = await gather(stream)
    choice = whole.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == (content or None)
    assert getattr(choice.message, "reasoning_content", None) == (reasoning or None)
    assert called(choice.message) == calls
    assert len({call.id for call in choice.message.tool_calls}) == len(calls)
    assert streamed[:2] == (content, reasoning)
    assert [(call["name"], json.loads(call["arguments"])) for call in streamed[2]] == calls
    assert streamed[3] == "tool_calls"
    assert encoder.tools == TOOLS


async def test_arguments_stream_while_they_are_written(serve):
    running = await serve(FakeEngine(say(CALL)), CallingEncoder())
    pieces = []
    async with client(running.url) as api:
        async for chunk in await api.chat.completions.create(model="fake", messages=ASK, tools=TOOLS, stream=True):
            pieces += [call.function.arguments for call in chunk.choices[0].delta.tool_calls or ()]
    assert "".join(pieces) == '{"city": "Köln"}'
    assert len(pieces) > 10


async def test_the_clients_own_stream_helper_adds_calls_up(serve):
    running = await serve(FakeEngine(say(f"<think>\nhm\n</think>\n\n{CALL}\n{SECOND}")), CallingEncoder())
    async with (
        client(running.url) as api,
        api.chat.completions.stream(model="fake", messages=ASK, tools=TOOLS) as stream,
    ):
        final = await stream.get_final_completion()
    message = final.choices[0].message
    assert called(message) == [("weather", {"city": "Köln"}), ("time", {"city": "Rom", "n": [1, True]})]
    assert final.choices[0].finish_reason == "tool_calls"


async def test_a_history_with_calls_and_results_goes_back_as_it_came(serve):
    running = await serve(FakeEngine(say(CALL)), CallingEncoder())
    async with client(running.url) as api:
        first = (await api.chat.completions.create(model="fake", messages=ASK, tools=TOOLS)).choices[0].message
        result = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "12 degrees"}
        for sent in (first, first.model_dump()):
            again = await api.chat.completions.create(model="fake", messages=[*ASK, sent, result], tools=TOOLS)
            assert again.choices[0].finish_reason == "tool_calls"


async def test_only_the_first_call_where_several_are_unwanted(serve):
    running = await serve(FakeEngine(say(f"{CALL}\n{SECOND}")), CallingEncoder())
    asked: dict[str, Any] = {"model": "fake", "messages": ASK, "tools": TOOLS, "parallel_tool_calls": False}
    async with client(running.url) as api:
        whole = await api.chat.completions.create(**asked)
        streamed = await gather(await api.chat.completions.create(**asked, stream=True))
    assert called(whole.choices[0].message) == [("weather", {"city": "Köln"})]
    assert [call["name"] for call in streamed[2]] == ["weather"]


@pytest.mark.parametrize("fields", [{}, {"tools": TOOLS, "tool_choice": "none"}])
async def test_where_nothing_may_be_called_marks_are_text(serve, fields):
    encoder = CallingEncoder()
    running = await serve(FakeEngine(say(CALL)), encoder)
    async with client(running.url) as api:
        choice = (await api.chat.completions.create(model="fake", messages=ASK, **fields)).choices[0]
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (CALL, None, "stop")
    assert encoder.tools is None


async def test_a_call_that_is_cut_off_ends_with_length(serve):
    running = await serve(FakeEngine(say(CALL)), CallingEncoder())
    asked: dict[str, Any] = {"model": "fake", "messages": ASK, "tools": TOOLS, "max_tokens": 50}
    async with client(running.url) as api:
        choice = (await api.chat.completions.create(**asked)).choices[0]
        streamed = await gather(await api.chat.completions.create(**asked, stream=True))
    assert choice.finish_reason == streamed[3] == "length"
    assert choice.message.tool_calls[0].function.arguments == streamed[2][0]["arguments"]
    assert '{"city": "Köln"}'.startswith(streamed[2][0]["arguments"])


@pytest.mark.parametrize(
    ("choice", "max_tokens", "content"),
    [("auto", 30, ""), ("required", 4, ""), ("required", 30, ""), ("auto", 4, CALL[:4])],
)
async def test_the_head_of_a_call_that_is_cut_off_is_no_content(serve, choice, max_tokens, content):
    """With four letters, only an answer that must call is certain to have begun one."""
    running = await serve(FakeEngine(say(CALL)), CallingEncoder())
    asked: dict[str, Any] = {"model": "fake", "messages": ASK, "tools": TOOLS, "max_tokens": max_tokens}
    async with client(running.url) as api:
        whole = (await api.chat.completions.create(**asked, tool_choice=choice)).choices[0]
        streamed = await gather(await api.chat.completions.create(**asked, tool_choice=choice, stream=True))
    assert (whole.message.content, whole.message.tool_calls, whole.finish_reason) == (content, None, "length")
    assert streamed == (content, "", [], "length")


async def test_answers_of_n_keep_their_calls_apart(serve):
    running = await serve(FakeEngine(say(CALL, "Just text.", SECOND)), CallingEncoder())
    async with client(running.url) as api:
        whole = await api.chat.completions.create(model="fake", messages=ASK, tools=TOOLS, n=3)
    assert [choice.finish_reason for choice in whole.choices] == ["tool_calls", "stop", "tool_calls"]
    assert whole.choices[1].message.content == "Just text."
    assert called(whole.choices[2].message) == [("time", {"city": "Rom", "n": [1, True]})]


async def test_reasoning_is_counted_and_logprobs_are_kept_with_calls(serve):
    running = await serve(FakeEngine(say(f"<think>\nhm\n</think>\n\n{CALL}")), CallingEncoder())
    async with client(running.url) as api:
        whole = await api.chat.completions.create(model="fake", messages=ASK, tools=TOOLS, logprobs=True)
        stream = await api.chat.completions.create(model="fake", messages=ASK, tools=TOOLS, logprobs=True, stream=True)
        entries = [e async for chunk in stream if (found := chunk.choices[0].logprobs) for e in found.content or ()]
    assert whole.usage.completion_tokens_details.reasoning_tokens == len(b"\nhm\n") + 2 + 2
    assert entries == whole.choices[0].logprobs.content
    assert len(entries) == whole.usage.completion_tokens


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "time"}}])
async def test_a_forced_call_is_asked_of_the_engine_as_a_grammar(serve, choice):
    seen: list[Request] = []

    def reply(request: Request, index: int) -> Sequence[int]:
        seen.append(request)
        return say(SECOND)(request, index)

    running = await serve(FakeEngine(reply), CallingEncoder())
    async with client(running.url) as api:
        await api.chat.completions.create(model="fake", messages=ASK, tools=TOOLS, tool_choice=choice)
        await api.chat.completions.create(model="fake", messages=ASK, tools=TOOLS)
    grammar = seen[0].sampling.grammar
    assert grammar is not None
    assert grammar.kind == "ebnf"
    assert ('"weather' in grammar.text.replace('\\"', '"')) == (choice == "required")
    assert '"time' in grammar.text.replace('\\"', '"')
    assert seen[1].sampling.grammar is None


async def test_tools_are_refused_where_the_model_cannot_call(serve):
    running = await serve(FakeEngine(say("x")))
    async with client(running.url) as api:
        with pytest.raises(openai.BadRequestError, match="cannot be given tools") as caught:
            await api.chat.completions.create(model="fake", messages=ASK, tools=TOOLS)
    assert caught.value.param == "tools"


async def test_a_shape_and_tools_that_cannot_go_together_are_refused(serve):
    running = await serve(FakeEngine(say("x")), CallingEncoder())
    async with client(running.url) as api:
        with pytest.raises(openai.BadRequestError, match="asked for together") as caught:
            await api.chat.completions.create(
                model="fake", messages=ASK, tools=TOOLS, response_format={"type": "json_object"}
            )
    assert caught.value.param == "response_format"


async def test_an_answer_that_the_caller_begins_is_continued(serve):
    seen: list[Request] = []

    def reply(request: Request, index: int) -> Sequence[int]:
        seen.append(request)
        return say(" upon a time")(request, index)

    running = await serve(FakeEngine(reply), CallingEncoder())
    begun: list[Any] = [*ASK, {"role": "assistant", "content": "Once"}]
    async with client(running.url) as api:
        answer = await api.chat.completions.create(model="fake", messages=begun)
        await api.chat.completions.create(model="fake", messages=begun, extra_body={"continue_final_message": False})
        begun[-1]["prefix"] = True
        await api.chat.completions.create(model="fake", messages=begun)
    assert answer.choices[0].message.content == " upon a time"
    texts = [bytes(token for token in request.prompt_token_ids if token < 256).decode() for request in seen]
    assert texts == ["user: Weather?\nOnce", "user: Weather?\nassistant: Once\n", "user: Weather?\nOnce"]


async def test_reasoning_that_the_caller_begins_cannot_be_given_a_shape(serve):
    running = await serve(FakeEngine(say("x")), CallingEncoder())
    begun: list[Any] = [*ASK, {"role": "assistant", "content": "<think>hm"}]
    thinking = {"chat_template_kwargs": {"thinking": True}}
    asked: dict[str, Any] = {"model": "fake", "messages": begun, "tools": TOOLS, "extra_body": thinking}
    async with client(running.url) as api:
        with pytest.raises(openai.BadRequestError, match="begun in its reasoning"):
            await api.chat.completions.create(**asked, tool_choice="required")
        await api.chat.completions.create(**asked)


READ = {
    "type": "function",
    "function": {
        "name": "get_pump_pressure",
        "description": "Read the pressure of a pump",
        "parameters": {"type": "object", "properties": {"pump_id": {"type": "string"}}, "required": ["pump_id"]},
    },
}
BOOK = {
    "type": "function",
    "function": {
        "name": "book_room",
        "description": "Book a room",
        "parameters": {
            "type": "object",
            "properties": {"name": {"type": "string"}, "date": {"type": "string"}},
            "required": ["name", "date"],
        },
    },
}
PUMP: list[Any] = [{"role": "user", "content": "What is the pressure of pump K-417?"}]


@pytest.fixture
async def tiny(serve):
    """A client of a server with the embedded model."""
    engine = WorkerEngine(EngineConfig(model="seamount-tiny", num_threads=1))
    running = await serve(engine, PromptEncoder.from_folder(locate_model("seamount-tiny")))
    await running.service.started
    async with client(running.url) as api:
        yield api


async def ask(api: openai.AsyncOpenAI, messages: list[Any], **more: Any) -> Any:
    asked = {"model": "seamount-tiny", "messages": messages, "tools": [READ, BOOK], "max_tokens": 200, "temperature": 0}
    return await api.chat.completions.create(**(asked | more))


async def test_the_embedded_model_calls_a_tool_and_tells_its_result(tiny):
    whole = (await ask(tiny, PUMP)).choices[0]
    assert whole.finish_reason == "tool_calls"
    assert whole.message.content is None
    assert called(whole.message) == [("get_pump_pressure", {"pump_id": "K-417"})]
    streamed = await gather(await ask(tiny, PUMP, stream=True))
    assert streamed[0] == ""
    assert streamed[3] == "tool_calls"
    assert [(call["name"], call["arguments"]) for call in streamed[2]] == [
        ("get_pump_pressure", whole.message.tool_calls[0].function.arguments)
    ]
    result = {"role": "tool", "tool_call_id": whole.message.tool_calls[0].id, "content": '{"result":"83"}'}
    told = (await ask(tiny, [*PUMP, whole.message, result])).choices[0]
    assert told.finish_reason == "stop"
    assert "83" in told.message.content


@pytest.mark.parametrize("thinking", [True, False])
async def test_the_embedded_model_calls_what_it_must(tiny, thinking):
    """Forced against its will: asked about a pump, it must book a room."""
    switch = {"chat_template_kwargs": {"thinking": thinking}}
    choice = {"type": "function", "function": {"name": "book_room"}}
    answer = (await ask(tiny, PUMP, tool_choice=choice, max_tokens=400, extra_body=switch)).choices[0]
    assert answer.finish_reason == "tool_calls"
    ((name, arguments),) = called(answer.message)
    assert name == "book_room"
    assert all(isinstance(arguments[key], str) for key in ("name", "date"))
    free = [{"role": "user", "content": "What is 3 + 4?"}]
    required = (await ask(tiny, free, tool_choice="required", max_tokens=400, extra_body=switch)).choices[0]
    assert required.finish_reason == "tool_calls"
    assert {name for name, _ in called(required.message)} <= {"get_pump_pressure", "book_room"}


@pytest.mark.parametrize("max_tokens", range(1, 6))
async def test_marks_of_the_embedded_models_calls_are_no_content_where_the_length_cuts_them(tiny, max_tokens):
    asked: dict[str, Any] = {
        "tool_choice": "required",
        "max_tokens": max_tokens,
        "extra_body": {"chat_template_kwargs": {"thinking": False}},
    }
    whole = (await ask(tiny, PUMP, **asked)).choices[0]
    assert whole.finish_reason == "length"
    assert not whole.message.content
    streamed = await gather(await ask(tiny, PUMP, stream=True, **asked))
    assert (streamed[0], streamed[3]) == ("", "length")


async def test_the_embedded_model_calls_or_answers_in_shape(tiny):
    digit = {
        "type": "object",
        "properties": {"n": {"enum": [1, 2, 3]}},
        "required": ["n"],
        "additionalProperties": False,
    }
    shape = {"type": "json_schema", "json_schema": {"name": "digit", "schema": digit}}
    call = (await ask(tiny, PUMP, response_format=shape)).choices[0]
    assert called(call.message) == [("get_pump_pressure", {"pump_id": "K-417"})]
    alone = (await ask(tiny, PUMP, response_format=shape, tools=[READ], tool_choice="none")).choices[0]
    assert json.loads(alone.message.content)["n"] in (1, 2, 3)


async def test_the_embedded_model_continues_what_the_caller_begins(tiny):
    asked: list[Any] = [{"role": "user", "content": "What is 3 + 4?"}]
    off = {"chat_template_kwargs": {"thinking": False}}
    whole = (await ask(tiny, asked, tools=[], extra_body=off)).choices[0].message.content
    first, space, _ = whole.partition(" ")  # behind a whole token: one cut in two is spelled by others
    assert space
    begun = [*asked, {"role": "assistant", "content": first}]
    rest = (await ask(tiny, begun, tools=[], extra_body=off)).choices[0].message.content
    assert first + rest == whole


async def test_many_callers_at_once_get_their_own_calls(tiny):
    codes = [f"K-{number}" for number in (118, 207, 356, 481)]
    asked = [[{"role": "user", "content": f"What is the pressure of pump {code}?"}] for code in codes]
    answers = await asyncio.gather(*(ask(tiny, messages) for messages in asked))
    assert [called(a.choices[0].message) for a in answers] == [
        [("get_pump_pressure", {"pump_id": code})] for code in codes
    ]
