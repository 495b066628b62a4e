"""Any split of an answer gives the same calls and content as the whole; nothing is lost, nothing invented."""

from __future__ import annotations

import json
from itertools import count, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seamount.models.tools import ArgumentDelta, CallEnded, CallStarted, ContentDelta, ToolEvent
from seamount.models.tools_formats import DEEPSEEK, HERMES, LLAMA, CallSyntax
from seamount.models.tools_parser import ToolCallParser

NAMES = ("f", "get_weather")
SYNTAXES = [DEEPSEEK, HERMES, LLAMA]
BEGIN, END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, SEP, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"

# What answers are made of, near misses and halves of marks included.
PIECES = st.sampled_from(
    [BEGIN, END, CALL, SEP, CALL_END, "<tool_call>", "</tool_call>", "<|python_tag|>", "<think>", "function", "f", "\n",
     "get_weather", "nobody", " ", "\n\n", "```json", "```", "{", "}", "[", "]", ",", ":", '"', "\\", ";", "1", "true",
     '{"name": "f", "arguments": ', '{"name": "f", "parameters": ', '{"name": "nobody", "parameters": ', '{"a": 1}',
     '"name"', '"arguments"', '"type": "function"', "{}", "null", "<tool", "</tool_", "<｜tool▁", "你", "a", "<", "｜>",
     f"{CALL}f{SEP}{{", f"{CALL}f{SEP}{{}}", f'{CALL}f{SEP}{{"a": [true]}}{CALL_END}', '"}', "]}",
     '<tool_call>{"name": "f", "arguments": {"a', '<tool_call>{"name": "f", "arguments": {"a": {}}}</tool_call>',
     '<tool_call>{"arguments": {"a": 1}, "name": "f"}', '{"name": "f", "parameters": {"a": [',
     '{"name": "f", "parameters": {}}', '; {"name": "f", "parameters": {}}',
     f"{CALL}f{SEP}", f"{BEGIN}{CALL}function{SEP}f\n```json\n", f"\n```{CALL_END}", "}\n</tool_call>", " " * 70]
)  # fmt: skip
TEXTS = st.lists(PIECES, max_size=14).map("".join)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
CALLS = st.lists(
    st.tuples(
        st.sampled_from(NAMES),
        st.builds(
            lambda value, indent: json.dumps(value, indent=indent, ensure_ascii=False),
            st.dictionaries(st.text(max_size=4), VALUES, max_size=3),
            st.sampled_from([None, 2]),
        ),
    ),
    min_size=1,
    max_size=3,
)
PLAIN = st.text("ab 你.\n", max_size=20)


def parse(syntax: CallSyntax, pieces: list[str], *, cut: bool = False, must_call: bool = False) -> list[ToolEvent]:
    numbers = count()
    parser = ToolCallParser(syntax, NAMES, must_call=must_call, new_id=lambda: str(next(numbers)))
    events: list[ToolEvent] = []
    for piece in pieces:
        events += parser.push(piece)
    return merged(events + parser.flush(cut=cut))


def merged(events: list[ToolEvent]) -> list[ToolEvent]:
    """Join neighbours of one kind, which a split may part."""
    found: list[ToolEvent] = []
    for event in events:
        last = found[-1] if found else None
        if isinstance(event, ContentDelta) and isinstance(last, ContentDelta):
            found[-1] = ContentDelta(last.text + event.text)
        elif isinstance(event, ArgumentDelta) and isinstance(last, ArgumentDelta) and event.index == last.index:
            found[-1] = ArgumentDelta(event.index, last.text + event.text)
        else:
            found.append(event)
    return found


@pytest.mark.parametrize("syntax", SYNTAXES, ids=["deepseek", "hermes", "llama"])
@settings(max_examples=300)
@given(text=TEXTS, cuts=st.lists(st.integers(0, 400), max_size=6))
def test_any_split_gives_the_same_events(syntax, text, cuts):
    whole = parse(syntax, [text])
    assert parse(syntax, list(text)) == whole
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    assert parse(syntax, [text[a:b] for a, b in pairwise(edges)]) == whole


@pytest.mark.parametrize("syntax", SYNTAXES, ids=["deepseek", "hermes", "llama"])
@settings(max_examples=150)
@given(text=TEXTS)
def test_every_boundary_in_turn(syntax, text):
    whole = parse(syntax, [text])
    for cut in range(len(text)):
        assert parse(syntax, [text[:cut], text[cut:]]) == whole


@pytest.mark.parametrize("syntax", SYNTAXES, ids=["deepseek", "hermes", "llama"])
@settings(max_examples=300)
@given(text=TEXTS)
def test_nothing_is_lost_or_invented(syntax, text):
    events = parse(syntax, [text])
    content, is_open, num_calls = "", False, 0
    for event in events:
        match event:
            case CallStarted(index, _, name):
                assert (is_open, index) == (False, num_calls)
                is_open, num_calls = True, num_calls + 1
                assert name in text
            case CallEnded(index):
                assert (is_open, index) == (True, num_calls - 1)
                is_open = False
            case ContentDelta(part):
                assert not is_open
                content += part
            case ArgumentDelta(index, part):
                assert (is_open, index) == (True, num_calls - 1)
                assert part in text or part == "{}"  # a call without arguments has the empty object
    assert not is_open
    rest = iter(text)
    assert all(letter in rest for letter in content)  # in the text's order, with calls and marks left out
    if not num_calls:
        assert content == text


@pytest.mark.parametrize("must_call", [False, True])
@pytest.mark.parametrize("syntax", SYNTAXES, ids=["deepseek", "hermes", "llama"])
@settings(max_examples=200)
@given(text=TEXTS)
def test_a_cut_takes_no_more_than_the_end_of_the_content(syntax, text, must_call):
    """What was said before the length cut the answer off stays; what goes is the head of a call at its end."""
    cut = parse(syntax, [text], cut=True, must_call=must_call)
    assert parse(syntax, list(text), cut=True, must_call=must_call) == cut
    ended = parse(syntax, [text], must_call=must_call)
    told, whole = (
        "".join(event.text for event in events if isinstance(event, ContentDelta)) for events in (cut, ended)
    )
    calls = [event for event in cut if not isinstance(event, ContentDelta)]
    assert whole.startswith(told)
    assert calls == [event for event in ended if not isinstance(event, ContentDelta)][: len(calls)]
    dropped = whole[len(told) :].lstrip()
    if dropped and not must_call:
        assert dropped.startswith((BEGIN, CALL, "<tool_call>", "<|python_tag|>"))


def written_v3(calls) -> str:
    return BEGIN + "\n".join(f"{CALL}function{SEP}{n}\n```json\n{a}\n```{CALL_END}" for n, a in calls) + END


def written_v31(calls) -> str:
    return BEGIN + "".join(f"{CALL}{n}{SEP}{a}{CALL_END}" for n, a in calls) + END


def written_hermes(calls) -> str:
    return "\n".join(f'<tool_call>\n{{"name": "{n}", "arguments": {a}}}\n</tool_call>' for n, a in calls)


def written_llama(calls) -> str:
    return "; ".join(f'{{"name": "{n}", "parameters": {a}}}' for n, a in calls)


@pytest.mark.parametrize(
    ("syntax", "write"),
    [(DEEPSEEK, written_v3), (DEEPSEEK, written_v31), (HERMES, written_hermes), (LLAMA, written_llama)],
)
@settings(max_examples=150)
@given(calls=CALLS, before=PLAIN, size=st.integers(1, 7))
def test_what_a_model_writes_is_read_back(syntax, write, calls, before, size):
    before = "" if syntax is LLAMA else before.rstrip() and before.rstrip() + "\n"
    text = before + write(calls)
    events = parse(syntax, [text[start : start + size] for start in range(0, len(text), size)])
    content = "".join(event.text for event in events if isinstance(event, ContentDelta))
    found = [[event.name, ""] for event in events if isinstance(event, CallStarted)]
    for event in events:
        if isinstance(event, ArgumentDelta):
            found[event.index][1] += event.text
    assert content == before.rstrip()
    assert [tuple(call) for call in found] == calls
