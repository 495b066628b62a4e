"""A response's events: however the engine's text is cut, they add up to the same response."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seamount.core.errors import EngineError
from seamount.core.requests import Chunk
from seamount.models.builtin_templates import QWEN3
from seamount.models.reasoning import ReasoningParser
from seamount.models.tools import choose_format
from seamount.server.chat.choice import Choice
from seamount.server.responses.events import ResponseWriter
from seamount.server.wire.chat import ChatChunk, ChatChunkChoice, ChatDelta
from seamount.server.wire.common import Usage
from seamount.server.wire.responses import ReasoningConfig, ResponseObject, TextConfig

CALL = '<tool_call>\n{"name": "f", "arguments": {"a": [1, "x"]}}\n</tool_call>'
ANSWERS = (
    "",
    "Vier. 四。",
    "<think>\nhm hm\n</think>\n\nVier.",
    "<think>hm",
    CALL,
    f"<think>hm</think>Look.\n{CALL}\n{CALL}",
    f"Look. {CALL} And so on. {CALL} End.",
    f"x{CALL[:40]}",
    "1 < 2 <tool",
)


def writer() -> ResponseWriter:
    return ResponseWriter(
        ResponseObject(
            id="resp_1",
            object="response",
            created_at=1,
            status="in_progress",
            completed_at=None,
            error=None,
            incomplete_details=None,
            instructions=None,
            max_output_tokens=None,
            metadata={},
            model="m",
            output=[],
            parallel_tool_calls=True,
            previous_response_id=None,
            reasoning=ReasoningConfig(),
            store=True,
            temperature=1.0,
            text=TextConfig(),
            tool_choice="auto",
            tools=[],
            top_logprobs=0,
            top_p=1.0,
            usage=None,
        )
    )


def chat_chunk(delta: ChatDelta, finish: Any = None) -> ChatChunk:
    choice = ChatChunkChoice(index=0, delta=delta, logprobs=None, finish_reason=finish)
    return ChatChunk(id="c", created=1, model="m", choices=[choice])


def events_of(pieces: list[str], reason: Any) -> list[dict[str, Any]]:
    """Return the events of an answer that the engine sends in these pieces, as their JSON says them."""
    found = choose_format(QWEN3, ())
    choice = Choice(ReasoningParser(starts_in_reasoning=False), found.parser({"f"}))
    made, events = writer(), []
    for number, piece in enumerate([*pieces, ""], 1):
        last = number > len(pieces)
        chunk = Chunk(request_id="r", text=piece, token_ids=(1,), finish_reason=reason if last else None)
        deltas = choice.take(chunk)
        for delta in [*deltas, ChatDelta()] if last else deltas:
            events += made.take(chat_chunk(delta, choice.finish_reason() if last else None))
    usage = Usage(prompt_tokens=2, completion_tokens=3, total_tokens=5)
    events += made.take(ChatChunk(id="c", created=1, model="m", choices=[], usage=usage))
    return json.loads(json.dumps([*events, *made.end(7), made.last()]))


def added_up(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add a stream up as clients do: an item is added, its deltas are appended, and it is done."""
    items: list[dict[str, Any]] = []
    for number, event in enumerate(events):
        assert event["sequence_number"] == number
        kind = event["type"]
        if kind == "response.output_item.added":
            assert event["output_index"] == len(items)
            items.append({**event["item"], "text": ""})
        elif kind.endswith(".delta"):
            assert items[-1]["id"] == event["item_id"]
            items[-1]["text"] += event["delta"]
        elif kind.endswith(("_text.done", "arguments.done")):
            assert items[-1]["text"] == event.get("text", event.get("arguments"))
        elif kind == "response.content_part.done":
            assert items[-1]["text"] == event["part"]["text"]
        elif kind == "response.output_item.done":
            assert event["output_index"] == len(items) - 1
            assert items[-1]["text"] == text_of(event["item"])
            items[-1] |= {"status": event["item"]["status"]}
    return items


def text_of(item: dict[str, Any]) -> str:
    return item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"]


def essence(items: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """Return what does not differ from one making to the next."""
    return [(item["type"], text_of(item), item.get("name"), item["status"]) for item in items]


@given(data=st.data(), answer=st.sampled_from(ANSWERS), reason=st.sampled_from(["stop", "length"]))
def test_any_cut_of_an_answer_gives_the_same_response_and_deltas_that_add_up_to_it(data, answer, reason):
    cuts = sorted(data.draw(st.sets(st.integers(1, max(len(answer) - 1, 1)), max_size=12)))
    pieces = [answer[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(answer)], strict=True)]
    events, whole = events_of(pieces, reason), events_of([answer], reason)
    items, final = added_up(events), events[-1]["response"]
    assert [(item["id"], item["type"], item["text"], item["status"]) for item in items] == [
        (item["id"], item["type"], text_of(item), item["status"]) for item in final["output"]
    ]
    assert essence(final["output"]) == essence(whole[-1]["response"]["output"])
    assert final["status"] == ("completed" if reason == "stop" else "incomplete")
    assert final["usage"]["total_tokens"] == 5


def test_what_is_told_of_an_item_at_its_beginning_does_not_change_afterwards():
    made = writer()
    first = made.take(chat_chunk(ChatDelta(content="a")))
    made.take(chat_chunk(ChatDelta(content="b")))
    made.end(1)
    part = next(event["part"] for event in first if event["type"] == "response.content_part.added")
    item = next(event["item"] for event in first if event["type"] == "response.output_item.added")
    assert part == {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    assert (item["content"], item["status"]) == ([], "in_progress")
    assert first[0]["response"]["output"] == []


def test_an_answer_of_nothing_is_an_empty_message_unless_it_was_cut():
    for reason, kinds in (("stop", ["message"]), ("length", [])):
        made = writer()
        made.take(chat_chunk(ChatDelta(), reason))
        made.end(1)
        assert [item.type for item in made.response.output] == kinds


@pytest.mark.parametrize("begun", [True, False])
def test_a_failure_ends_a_stream_that_clients_can_read(begun):
    """OpenAI's client reads no event before `response.created`, even where the failure is all there is to tell."""
    made = writer()
    before = made.take(chat_chunk(ChatDelta(content="half"))) if begun else []
    events = [*before, *made.fail(EngineError("It broke."))]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert events[0]["type"] == "response.created"
    last = events[-1]["response"]
    assert (events[-1]["type"], last["status"], last["output"], last["store"]) == (
        "response.failed",
        "failed",
        [],
        False,
    )
    assert last["error"] == {"message": "It broke.", "type": "server_error", "param": None, "code": "engine_error"}
