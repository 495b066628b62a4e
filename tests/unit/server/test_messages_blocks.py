"""However an answer's deltas come, its events add up to the same blocks, and these are what was said."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seamount.server.messages.blocks import Blocks, Event, parse_input
from seamount.server.wire.chat import ChatDelta
from seamount.server.wire.tools import CalledFunctionDelta, ToolCallDelta


def said(words: str) -> ChatDelta:
    return ChatDelta(content=words)


def thought(words: str) -> ChatDelta:
    return ChatDelta(reasoning=words, reasoning_content=words)


def called(index: int, name: str) -> ChatDelta:
    function = CalledFunctionDelta(name=name, arguments="")
    return ChatDelta(tool_calls=[ToolCallDelta(index=index, id=f"call_{index}", type="function", function=function)])


def with_input(index: int, words: str) -> ChatDelta:
    return ChatDelta(tool_calls=[ToolCallDelta(index=index, function=CalledFunctionDelta(arguments=words))])


def run(deltas: list[ChatDelta], **options: Any) -> tuple[list[Event], list[dict[str, Any]]]:
    blocks = Blocks(**options)
    events = [event for delta in deltas for event in blocks.take(delta)] + blocks.end()
    return events, [block.model_dump(exclude_unset=True) for block in blocks.content()]


def add_up(events: list[Event]) -> list[dict[str, Any]]:
    """Add events up by the rules of Anthropic's API, which are checked on the way."""
    found: list[dict[str, Any]] = []
    is_open, pieces = False, ""
    for event in events:
        if event["type"] == "content_block_start":
            assert not is_open
            assert event["index"] == len(found)
            found.append(dict(event["content_block"]))
            is_open, pieces = True, ""
        elif event["type"] == "content_block_delta":
            assert is_open
            assert event["index"] == len(found) - 1
            ((name, words),) = [(key, value) for key, value in event["delta"].items() if key != "type"]
            assert words
            if name == "partial_json":
                pieces += words
                found[-1]["input"] = parse_input(pieces)
            else:
                assert event["delta"]["type"] == f"{name}_delta" == f"{found[-1]['type']}_delta"
                found[-1][name] += words
        else:
            assert event == {"type": "content_block_stop", "index": len(found) - 1}
            assert is_open
            is_open = False
    assert not is_open
    return found


def test_reasoning_text_and_calls_each_have_their_block():
    deltas = [
        thought("h"),
        ChatDelta(reasoning="m", reasoning_content="m", content="Look"),
        said("."),
        called(0, "f"),
        with_input(0, '{"a":'),
        with_input(0, " 1}"),
        said("\n"),
        called(1, "g"),
        with_input(1, "{}"),
    ]
    events, content = run(deltas)
    assert content == [
        {"type": "thinking", "thinking": "hm", "signature": ""},
        {"type": "text", "text": "Look."},
        {"type": "tool_use", "id": "call_0", "name": "f", "input": {"a": 1}},
        {"type": "tool_use", "id": "call_1", "name": "g", "input": {}},
    ]
    assert add_up(events) == content
    assert events[0] == {
        "type": "content_block_start",
        "index": 0,
        "content_block": {"type": "thinking", "thinking": "", "signature": ""},
    }
    assert events[1]["delta"] == {"type": "thinking_delta", "thinking": "h"}
    assert {"type": "input_json_delta", "partial_json": '{"a":'} in [event.get("delta") for event in events]


def test_text_behind_a_call_is_a_block_of_its_own_with_the_space_before_it():
    _, content = run([said("A"), called(0, "f"), with_input(0, "{}"), said("\n"), said(" "), said("B"), said(" ")])
    assert [block.get("text") for block in content] == ["A", None, "\n B "]


def test_there_is_no_block_of_space_alone():
    assert run([said(" \n"), said("\n")]) == ([], [])
    _, content = run([said("\n\n"), called(0, "f")])
    assert [block["type"] for block in content] == ["tool_use"]


def test_hidden_reasoning_has_its_block_and_no_text():
    events, content = run([thought("se"), thought("cret"), said("Hi")], shows_thinking=False)
    assert content == [{"type": "thinking", "thinking": "", "signature": ""}, {"type": "text", "text": "Hi"}]
    assert "cret" not in json.dumps(events)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", {}),
        ("{}", {}),
        ('{"a": "x', {"a": "x"}),
        ('{"a": [1, 2', {"a": [1, 2]}),
        ('{"a": 1, "b"', {"a": 1}),
        ("[1]", {}),
        ('{"a": nonsense}', {}),
        ('{"a": NaN}', {}),
        ('{"a": "\\ud800"}', {}),
        ('{"a":' * 5000, {}),
        ('{"a": 1e999}', {}),
        ('{"n": 123456789012345678901234567890}', {"n": 123456789012345678901234567890}),
    ],
)
def test_arguments_that_are_cut_off_or_broken(text, found):
    assert parse_input(text) == found


SPACES = st.sampled_from([" ", "\n", "a", "b c", "四", "\n\n"])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("said"), SPACES),
        st.tuples(st.just("thought"), SPACES),
        st.tuples(st.just("called"), st.sampled_from(["{}", '{"a": 1}', '{"a": "x'])),
    ),
    max_size=8,
)


def deltas_of(steps: list[tuple[str, str]], size: int) -> list[ChatDelta]:
    """Return deltas that say these things in pieces of at most `size` letters."""
    found: list[ChatDelta] = []
    count = 0
    for kind, words in steps:
        pieces = [words[at : at + size] for at in range(0, len(words), size)]
        if kind == "called":
            found += [called(count, "f"), *(with_input(count, piece) for piece in pieces)]
            count += 1
        else:
            found += [said(piece) if kind == "said" else thought(piece) for piece in pieces]
    return found


@given(steps=STEPS, size=st.integers(1, 9))
def test_any_cut_gives_the_same_blocks_and_events_add_up_to_them(steps, size):
    events, content = run(deltas_of(steps, size))
    assert add_up(events) == content
    assert content == run(deltas_of(steps, 10**6))[1]
    assert all(block["text"].strip() for block in content if block["type"] == "text")
    letters = "".join(words.strip() for kind, words in steps if kind == "said").replace(" ", "").replace("\n", "")
    texts = "".join(block.get("text", "") for block in content).replace(" ", "").replace("\n", "")
    assert texts == letters
