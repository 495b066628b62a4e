"""Formats are recognised by their fields, and broken records name the field and the reason."""

from __future__ import annotations

import json
from typing import Any

import pytest
from chat_families import sample_of

from seamount.training.examples.formats import recognise
from seamount.training.examples.record import Record, RecordError

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
FUNCTION: dict[str, Any] = {"name": "f", "description": "d"}
PROPERTIES = {"type": "object", "properties": [1]}
CALL = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
FROM = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("messages", {"messages": [USER, ASSISTANT]}),
        ("messages", {"messages": json.dumps([USER, ASSISTANT]), "text": "as CSV has it"}),
        ("conversations", {"conversations": FROM}),
        ("conversations", {"conversation": FROM, "tools": None}),
        ("conversations", {"conversations": [USER, ASSISTANT]}),
        ("prompt/completion", {"prompt": [USER], "completion": [ASSISTANT]}),
        ("prompt/completion", {"prompt": [USER], "completion": "a"}),
        ("alpaca", {"instruction": "q", "input": "", "output": "a"}),
        ("alpaca", {"instruction": "", "input": "q", "output": "a", "history": [], "system": ""}),
    ],
)
def test_formats_that_say_the_same(name: str, value: dict[str, Any]) -> None:
    assert recognise([Record("item 1", 1, value)]).name == name
    sample = sample_of(value)
    assert [(m["role"], m["content"]) for m in sample.messages] == [("user", "q"), ("assistant", "a")]
    assert len(sample.fields) == len(sample.loss) == 2


def test_what_formats_carry_beside_turns() -> None:
    sample = sample_of({"instruction": "do", "input": "x", "output": "y", "history": [["q", "a"]], "system": "s"})
    said = [message["content"] for message in sample.messages]
    assert said == ["s", "q", "a", "do\nx", "y"]
    assert sample.fields == ("system", "history[0]", "history[0]", "instruction", "output")
    sample = sample_of({"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]})
    assert sample.loss == (False, False, False, None)
    sample = sample_of({"messages": [USER, {**ASSISTANT, "loss": 0}, USER, {**ASSISTANT, "weight": 1}], "id": 7})
    assert sample.loss == (None, False, None, True)
    assert sample.id == "7"
    sample = sample_of({"text": "plain"})
    assert (sample.prompt, sample.completion, sample.messages) == ("", "plain", ())


def test_reasoning_by_any_name_and_within_the_words() -> None:
    for name in ("reasoning_content", "reasoning", "thinking"):
        turn = sample_of({"messages": [USER, {**ASSISTANT, name: "\nso\n"}]}).messages[1]
        assert (turn["reasoning_content"], turn["content"]) == ("so", "a")
    for inline in ("<think>\nso\n</think>\n\na", " <think>so</think>a"):
        turn = sample_of({"messages": [USER, {"role": "assistant", "content": inline}]}).messages[1]
        assert (turn["reasoning_content"], turn["content"]) == ("so", "a")
    turn = sample_of({"messages": [USER, {"role": "assistant", "content": "<think>\n\n</think>\n\na"}]}).messages[1]
    assert turn == ASSISTANT


def test_tool_calls_in_the_ways_they_are_written() -> None:
    ways: list[list[dict[str, Any]]] = [
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [CALL]}],
        [USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": 1}}]}],
        [USER, {"role": "assistant", "function_call": {"name": "f", "arguments": '{"x": 1}'}}],
        [{"from": "human", "value": "q"}, {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'}],
    ]
    for turns in ways:
        name = "conversations" if "from" in turns[0] else "messages"
        sample = sample_of({name: turns, "tools": json.dumps([TOOL["function"]])})
        function = sample.messages[1]["tool_calls"][0]["function"]
        arguments = function["arguments"]
        assert function["name"] == "f"
        assert (json.loads(arguments) if isinstance(arguments, str) else arguments) == {"x": 1}
        assert sample.tools == (TOOL,)
    told = sample_of({"conversations": [*FROM, {"from": "observation", "value": "{}"}, FROM[1]]})
    assert [message["role"] for message in told.messages] == ["user", "assistant", "tool", "assistant"]


def messages(*turns: Any, **more: Any) -> dict[str, Any]:
    return {"messages": list(turns), **more}


@pytest.mark.parametrize(
    ("value", "field", "reason"),
    [
        (messages(USER), "messages[0].content", "last turn"),
        (
            messages(USER, ASSISTANT, {"role": "tool", "content": "x"}),
            "messages[2].content",
            "last turn, and the tool's",
        ),
        (messages(USER, {"role": "wizard", "content": "x"}), "messages[1].role", "'wizard', which is no role"),
        (messages(USER, {"content": "x"}), "messages[1].role", "is missing"),
        (messages(USER, {"role": 5, "content": "x"}), "messages[1].role", "no text but a number"),
        (messages(USER, "x"), "messages[1]", "no object but text"),
        (messages({"role": "user", "content": " \n"}, ASSISTANT), "messages[0].content", "is empty"),
        (messages({"role": "user"}, ASSISTANT), "messages[0].content", "is missing"),
        (messages(USER, {"role": "assistant", "content": ""}), "messages[1].content", "says nothing"),
        (messages(USER, {"role": "assistant", "content": None}), "messages[1].content", "says nothing"),
        (messages(USER, {"role": "assistant", "content": 5}), "messages[1].content", "no text but a number"),
        (messages(USER, {"role": "assistant", "content": "a\ud800"}), "messages[1].content", "half a character at 2"),
        (messages(USER, {**ASSISTANT, "reasoning": 5}), "messages[1].reasoning", "no text"),
        (messages(USER, {**ASSISTANT, "loss": 0.5}), "messages[1].loss", "neither 0 nor 1"),
        (messages({**USER, "loss": True}, ASSISTANT), "messages[0].loss", "only the assistant's"),
        (messages(USER, {**ASSISTANT, "content": "so</think>a"}), "messages[1].content", "does not begin with"),
        (messages(USER, {**ASSISTANT, "content": "<think>so"}), "messages[1].content", "never closes"),
        (
            messages(USER, {"role": "assistant", "content": "<think>x</think>a", "reasoning_content": "y"}),
            "messages[1].content",
            "too",
        ),
        (messages(USER, {"role": "assistant", "tool_calls": [{}]}), "messages[1].tool_calls[0]", "no function name"),
        (
            messages(USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{x"}]}),
            "messages[1].tool_calls[0]",
            "arguments are not JSON",
        ),
        (
            messages(USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[1]"}]}),
            "messages[1].tool_calls[0]",
            "are a list, not an object",
        ),
        (messages({**USER, "tool_calls": [CALL]}, ASSISTANT), "messages[0].tool_calls", "message of the user"),
        (
            messages({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, ASSISTANT),
            "messages[0].content[0]",
            "'image_url', and only text",
        ),
        (messages({"role": "user", "content": ["x"]}, ASSISTANT), "messages[0].content[0]", "has no type"),
        (messages(USER, ASSISTANT, tools=[5]), "tools[0]", "is no tool"),
        (messages(USER, ASSISTANT, tools="x"), "tools", "text that is not JSON"),
        (messages(USER, ASSISTANT, tools=[{"name": "f", "x": float("nan")}]), "tools[0]", "is not JSON"),
        (messages(USER, ASSISTANT, tools=[FUNCTION | {"parameters": [1]}]), "tools[0]", "parameters that are a list"),
        (
            messages(USER, ASSISTANT, tools=[{"type": "function", "function": FUNCTION | {"parameters": PROPERTIES}}]),
            "tools[0]",
            "properties are a list, not an object",
        ),
        (
            messages(USER, ASSISTANT, tools=[FUNCTION, FUNCTION | {"parameters": {"properties": {"a": 1}}}]),
            "tools[1]",
            "a property is no object",
        ),
        (messages(USER, ASSISTANT, id=1.5), "id", "neither text nor a whole number"),
        (messages({"role": "system", "content": "s"}, USER, ASSISTANT, system="t"), "system", "of its own"),
        ({"messages": 5}, "messages", "no list but a number"),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt"}]},
            "conversations[1].value",
            "says nothing",
        ),
        ({"instruction": "x", "output": " "}, "output", "is empty"),
        ({"instruction": "x", "output": "y", "history": [["a"]]}, "history[0]", "no pair"),
        ({"prompt": "x", "completion": 5}, "completion", "no list but a number"),
        ({"text": 5}, "text", "no text but a number"),
        ({"text": "   "}, "text", "is empty"),
        ({"messages": [USER, ASSISTANT], "images": ["x.png"]}, "images", "only text can be learned"),
        ({"prompt": "x", "chosen": "a", "rejected": "b"}, "chosen", "preference tuning"),
        ({"input_ids": [1, 2], "labels": [1, 2]}, "input_ids", "token ids"),
        ({"question": "x", "answer": "y"}, "", "no known format; its fields: 'answer', 'question'"),
    ],
)
def test_bad_records_name_field_and_reason(value: dict[str, Any], field: str, reason: str) -> None:
    with pytest.raises(RecordError) as caught:
        sample_of(value)
    assert caught.value.field == field
    assert reason in caught.value.reason
    assert (caught.value.where, caught.value.row) == ("item 1", 1)
    assert caught.value.message.startswith("item 1: ")


def test_most_records_decide_and_the_others_are_told_what_they_lack() -> None:
    records = [Record(f"item {n}", n, messages(USER, ASSISTANT)) for n in range(1, 4)]
    odd = Record("item 4", 4, {"text": "x"})
    form = recognise([odd, *records])
    assert form.name == "messages"
    with pytest.raises(RecordError, match="messages is missing, and the data is of the format messages"):
        form.sample(odd)
    with pytest.raises(RecordError, match="no records"):
        recognise([])


def test_the_message_of_an_error_never_quotes_the_record() -> None:
    for value in ({"messages": [{"role": "user", "content": "secret"}]}, {"conversations": "secret words"}):
        with pytest.raises(RecordError) as caught:
            sample_of(value)
        assert "secret" not in str(caught.value)
