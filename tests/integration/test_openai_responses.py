"""The official client asks for responses: whole, streamed, with tools, with a shape, and when things go wrong."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any, Literal

import httpx
import openai
import pydantic
import pytest

from seamount.core.errors import EngineError, QueueFullError
from seamount.core.requests import Request
from seamount.core.settings import EngineConfig
from seamount.engine.client import WorkerEngine
from seamount.engine.fake import FakeEngine, say
from seamount.engine.fake_encoder import ByteEncoder, FakePrompt
from seamount.models.builtin_templates import QWEN3
from seamount.models.locate import locate_model
from seamount.models.prompt import PromptEncoder
from seamount.models.tools import choose_format

THOUGHT = "<think>\nzwei und zwei\n</think>\n\nVier. 四。"
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS: list[Any] = [{"type": "function", "name": name, "parameters": CITY} for name in ("weather", "time")]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
SECOND = '<tool_call>\n{"name": "time", "arguments": {"city": "Rom", "n": [1, true]}}\n</tool_call>'


class Encoder(ByteEncoder):
    """Bytes, and Qwen's way to call tools; remembers what it was asked with."""

    tool_format = choose_format(QWEN3, ())

    def __init__(self) -> None:
        self.messages: list[list[dict[str, Any]]] = []

    def encode_chat(
        self, messages: Sequence[Any], *, tools: Any = None, continue_final: bool = False, **more: Any
    ) -> FakePrompt:
        assert not continue_final
        self.messages.append(list(messages))
        return super().encode_chat(messages, **more)


def client(url: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


async def test_sync_client_asks_and_streams(serve):
    running = await serve(FakeEngine(say(THOUGHT), num_cached_tokens=3))

    def use() -> tuple[Any, list[Any]]:
        with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as api:
            whole = api.responses.create(model="fake", input="2+2?", metadata={"who": "test"})
            return whole, list(api.responses.create(model="fake", input="2+2?", stream=True))

    whole, events = await asyncio.to_thread(use)
    assert whole.output_text == "Vier. 四。"
    assert [item.type for item in whole.output] == ["reasoning", "message"]
    assert whole.output[0].content[0].text == "zwei und zwei"
    assert (whole.status, whole.metadata, whole.model, whole.object) == (
        "completed",
        {"who": "test"},
        "fake",
        "response",
    )
    assert whole.completed_at >= whole.created_at > 0
    thought = len(b"\nzwei und zwei\n") + 2 + 2  # the two marks are a token each, all else is bytes
    usage = whole.usage
    assert usage.output_tokens_details.reasoning_tokens == thought
    assert usage.output_tokens == thought + len("Vier. 四。".encode()) + 1
    assert usage.input_tokens == len("user: 2+2?\n") + 2
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert usage.input_tokens_details.cached_tokens == 3
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "Vier. 四。"
    assert events[-1].response.usage == usage


async def test_the_events_of_a_stream_come_in_their_order(serve):
    running = await serve(FakeEngine(say(THOUGHT)))
    async with client(running.url) as api:
        events = [event async for event in await api.responses.create(model="fake", input="2+2?", stream=True)]
    kinds = [event.type for event in events]
    assert [kind for number, kind in enumerate(kinds) if kind != kinds[number - 1]] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.reasoning_text.delta",
        "response.reasoning_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert len({event.response.id for event in events if hasattr(event, "response")}) == 1
    final = events[-1].response
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert done == final.output
    assert {event.item_id for event in events if hasattr(event, "item_id")} == {item.id for item in final.output}


async def test_names_of_events_stand_beside_them_and_nothing_follows_the_last(serve):
    running = await serve(FakeEngine(say("ok")))
    async with httpx.AsyncClient(base_url=running.url) as plain:
        answer = await plain.post("/v1/responses", json={"model": "fake", "input": "x", "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    blocks = answer.text.removesuffix("\n\n").split("\n\n")
    for block in blocks:
        name, data = block.split("\n")
        assert name == f"event: {json.loads(data.removeprefix('data: '))['type']}"
    assert blocks[-1].startswith("event: response.completed\n")


async def test_the_clients_stream_helper_adds_everything_up(serve):
    running = await serve(FakeEngine(say(f"{THOUGHT}{CALL}\n{SECOND}")), Encoder())
    async with client(running.url) as api, api.responses.stream(model="fake", input="2+2?", tools=TOOLS) as stream:
        snapshots = [event.snapshot async for event in stream if event.type == "response.output_text.delta"]
        final = await stream.get_final_response()
    assert snapshots[-1] == final.output_text == "Vier. 四。"
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call", "function_call"]
    calls = [(item.name, json.loads(item.arguments)) for item in final.output[2:]]
    assert calls == [("weather", {"city": "Köln"}), ("time", {"city": "Rom", "n": [1, True]})]
    assert all(item.status == "completed" for item in final.output)


async def test_arguments_stream_while_they_are_written(serve):
    running = await serve(FakeEngine(say(CALL)), Encoder())
    async with client(running.url) as api:
        stream = await api.responses.create(model="fake", input="Weather?", tools=TOOLS, stream=True)
        events = [event async for event in stream]
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    (done,) = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert "".join(deltas) == done.arguments == '{"city": "Köln"}'
    assert len(deltas) > 10
    added = next(event.item for event in events if event.type == "response.output_item.added")
    assert (added.name, added.arguments, added.status, added.id) == ("weather", "", "in_progress", done.item_id)


async def test_a_loop_with_tools_sends_back_what_came(serve):
    encoder = Encoder()
    running = await serve(FakeEngine(say(f"<think>hm</think>{CALL}")), encoder)
    asked: list[Any] = [{"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]}]
    async with client(running.url) as api:
        first = await api.responses.create(model="fake", input=asked, tools=TOOLS, instructions="Be brief.")
        call = first.output[-1]
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "12 degrees"}
        for sent in (first.output, [item.model_dump() for item in first.output]):
            again = [*asked, *sent, result]
            await api.responses.create(model="fake", input=again, tools=TOOLS, instructions="Be brief.")
            assert encoder.messages[-1] == [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Weather?"},
                {
                    "role": "assistant",
                    "content": None,
                    "reasoning_content": "hm",
                    "tool_calls": [
                        {
                            "id": call.call_id,
                            "type": "function",
                            "function": {"name": "weather", "arguments": '{"city": "Köln"}'},
                        }
                    ],
                },
                {"role": "tool", "content": "12 degrees", "tool_call_id": call.call_id},
            ]
    assert first.tools[0].parameters == CITY


async def test_only_the_first_call_where_several_are_unwanted(serve):
    running = await serve(FakeEngine(say(f"{CALL}\n{SECOND}")), Encoder())
    async with client(running.url) as api:
        whole = await api.responses.create(model="fake", input="x", tools=TOOLS, parallel_tool_calls=False)
        none = await api.responses.create(model="fake", input="x", tools=TOOLS, tool_choice="none")
    assert [item.name for item in whole.output] == ["weather"]
    assert not whole.parallel_tool_calls
    assert none.output_text == f"{CALL}\n{SECOND}"


@pytest.mark.parametrize("limit", [3, 12])
async def test_a_limit_ends_the_response_incomplete(serve, limit):
    running = await serve(FakeEngine(say("<think>abcdef</think>0123456789")))
    async with client(running.url) as api:
        whole = await api.responses.create(model="fake", input="x", max_output_tokens=limit)
        stream = await api.responses.create(model="fake", input="x", max_output_tokens=limit, stream=True)
        last = [event async for event in stream][-1]
    assert last.type == "response.incomplete"
    for response in (whole, last.response):
        assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
        assert (response.max_output_tokens, response.completed_at) == (limit, None)
        assert response.output[-1].status == "incomplete"
        assert response.output[-1].type == ("reasoning" if limit == 3 else "message")


async def test_log_probabilities_are_those_of_the_text(serve):
    running = await serve(FakeEngine(say(THOUGHT)))
    asked: dict[str, Any] = {"model": "fake", "input": "x", "include": ["message.output_text.logprobs"]}
    async with client(running.url) as api:
        whole = await api.responses.create(**asked, top_logprobs=2)
        events = [event async for event in await api.responses.create(**asked, top_logprobs=2, stream=True)]
        plain = await api.responses.create(model="fake", input="x")
        with pytest.raises(openai.BadRequestError, match="include"):
            await api.responses.create(model="fake", input="x", top_logprobs=2)
    entries = whole.output[-1].content[0].logprobs
    assert b"".join(bytes(entry.bytes) for entry in entries) == "Vier. 四。".encode()
    assert all(len(entry.top_logprobs) == 2 for entry in entries)
    streamed = [entry for event in events if event.type == "response.output_text.delta" for entry in event.logprobs]
    assert [entry.to_dict() for entry in streamed] == [entry.to_dict() for entry in entries]
    assert plain.output[-1].content[0].logprobs == []


async def test_a_failure_before_the_answer_has_its_status_and_one_midway_ends_the_stream(serve):
    full = await serve(FakeEngine(fail_after_tokens=0, failure=QueueFullError("Full.", retry_after=3)))
    breaks = await serve(FakeEngine(say("abcdef"), fail_after_tokens=3, failure=EngineError("It broke.")))
    async with client(full.url) as api:
        for stream in (True, False):
            with pytest.raises(openai.InternalServerError) as caught:
                await api.responses.create(model="fake", input="x", stream=stream)
            assert caught.value.code == "queue_full"
    async with client(breaks.url) as api:
        events = [event async for event in await api.responses.create(model="fake", input="x", stream=True)]
        with pytest.raises(openai.InternalServerError, match="It broke"):
            await api.responses.create(model="fake", input="x")
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "abc"
    last = events[-1]
    assert last.type == "response.failed"
    assert (last.response.status, last.response.error.code, last.response.error.message) == (
        "failed",
        "engine_error",
        "It broke.",
    )


async def test_a_client_that_leaves_ends_the_work(serve):
    begun, never = asyncio.Event(), asyncio.Event()

    async def pause() -> None:
        if begun.is_set():
            await never.wait()
        begun.set()

    engine = FakeEngine(say("abc"), pause=pause)
    running = await serve(engine)
    async with client(running.url) as api:
        stream = await api.responses.create(model="fake", input="x", stream=True)
        assert (await anext(aiter(stream))).type == "response.created"
        await stream.close()
    while running.service.num_active:
        await asyncio.sleep(0.01)
    assert len(engine.aborted) == 1


async def test_sampling_reaches_the_engine_as_sent(serve):
    seen: list[Request] = []

    def reply(request: Request, index: int) -> tuple[int, ...]:
        seen.append(request)
        return (65,)

    running = await serve(FakeEngine(reply))
    async with client(running.url) as api:
        answer = await api.responses.create(
            model="fake", input="x", temperature=0.25, top_p=0.5, max_output_tokens=9,
            extra_body={"chat_template_kwargs": {"thinking": True}},
        )  # fmt: skip
    sampling = seen[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens, sampling.n) == (0.25, 0.5, 9, 1)
    assert (answer.temperature, answer.top_p, answer.max_output_tokens) == (0.25, 0.5, 9)
    assert [item.type for item in answer.output] == ["reasoning", "message"]  # thinking, and then nothing said


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"background": True}, "background", "background"),
        ({"conversation": "conv_1"}, "conversation", "previous_response_id"),
        ({"truncation": "auto"}, "truncation", "not supported"),
        ({"reasoning": {"effort": "some"}}, "reasoning.effort", "'none'"),
        ({"reasoning": {"summary": "detailed"}}, "reasoning.summary", "summaries"),
        ({"text": {"verbosity": "low"}}, "text.verbosity", "prompt"),
        ({"text": {"format": {"type": "json_schema", "name": "a b", "schema": {}}}}, "text.format.name", "letters"),
        ({"text": {"format": {"type": "regex"}}}, "text.format.type", "json_schema"),
        ({"max_output_tokens": 5000}, "max_output_tokens", "max_output_tokens to at most"),
        ({"input": "x" * 5000}, "input", "context"),
        ({"input": []}, "input", "at least 1"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0]", "function_call_output"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type", "images"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": ""}]}, "input", "No function_call"),
        (
            {"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}]},
            "input",
            "no function_call_output",
        ),
        ({"tools": [{"type": "web_search"}]}, "tools[0]", "type function"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools[1].name", "weather"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "f"}}, "tool_choice", "none of the tools"),
        ({"metadata": {"a": "x" * 513}}, "metadata", "512"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata", "16"),
        ({"stream_options": {"include_obfuscation": True}}, "stream_options", "stream"),
        ({"store": True}, "store", "keeps no responses"),
        ({"previous_response_id": "resp_" + "0" * 32}, "previous_response_id", "No response"),
        ({"seed": 1}, "seed", "Unknown"),
    ],
)
async def test_what_cannot_be_honoured_is_refused_by_name(serve, fields, param, words):
    running = await serve(FakeEngine(say("ok")), Encoder())
    async with client(running.url) as api:
        with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as caught:
            await api.responses.create(model="fake", input="x", extra_body=fields)
    assert caught.value.param == param
    assert words in caught.value.message


async def test_what_has_no_effect_is_named_and_what_asks_for_nothing_is_not(serve):
    running = await serve(FakeEngine(say("ok")), Encoder())
    strict = [{**TOOLS[0], "strict": True}]
    async with client(running.url) as api:
        answer = await api.responses.with_raw_response.create(
            model="fake", input="x", user="u", service_tier="auto", include=["reasoning.encrypted_content"],
            reasoning={"summary": "auto"}, tools=strict, truncation="disabled", background=False,
            text={"verbosity": "medium"},
        )  # fmt: skip
        plain = await api.responses.with_raw_response.create(model="fake", input="x", user="", store=False)
    assert answer.headers["x-seamount-ignored"].split(", ") == [
        "service_tier",
        "user",
        "include.reasoning.encrypted_content",
        "reasoning.summary",
        "tools.strict",
    ]
    assert "x-seamount-ignored" not in plain.headers


class Reading(pydantic.BaseModel):
    level: Literal["low", "high"]
    is_open: bool


@pytest.fixture
async def tiny(serve):
    """A client of a server with the embedded model."""
    engine = WorkerEngine(EngineConfig(model="seamount-tiny", num_threads=1))
    running = await serve(engine, PromptEncoder.from_folder(locate_model("seamount-tiny")))
    await running.service.started
    async with client(running.url) as api:
        yield api


PUMP: Any = {
    "type": "function",
    "name": "get_pump_pressure",
    "description": "Read the pressure of a pump",
    "parameters": {"type": "object", "properties": {"pump_id": {"type": "string"}}, "required": ["pump_id"]},
    "strict": False,
}


async def test_the_embedded_model_fills_a_form_whole_and_streamed(tiny):
    asked: dict[str, Any] = {
        "model": "seamount-tiny", "input": "Is the valve open?", "temperature": 0, "max_output_tokens": 200,
    }  # fmt: skip
    parsed = await tiny.responses.parse(**asked, text_format=Reading)
    assert isinstance(parsed.output_parsed, Reading)
    async with tiny.responses.stream(**asked, text_format=Reading) as stream:
        final = await stream.get_final_response()
    assert final.output_parsed == parsed.output_parsed


async def test_the_embedded_model_calls_a_tool_and_tells_its_result(tiny):
    asked: dict[str, Any] = {"model": "seamount-tiny", "tools": [PUMP], "temperature": 0, "max_output_tokens": 200}
    items: list[Any] = [{"role": "user", "content": "What is the pressure of pump K-417?"}]
    first = await tiny.responses.create(**asked, input=items)
    call = first.output[-1]
    assert (call.name, json.loads(call.arguments)) == ("get_pump_pressure", {"pump_id": "K-417"})
    result = {"type": "function_call_output", "call_id": call.call_id, "output": '{"result":"83"}'}
    told = await tiny.responses.create(**asked, input=[*items, *first.output, result])
    assert "83" in told.output_text
