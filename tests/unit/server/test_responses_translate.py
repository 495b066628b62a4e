"""Items of a conversation as a chat's messages, and a chat's complaints in the words of the request."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from seamount.core.errors import ContextTooLongError, InvalidRequestError
from seamount.server.responses.translate import chat_request, conversation, in_our_words
from seamount.server.wire.responses import MAX_ITEMS, ResponsesRequest


def request(given: Any = "x", **fields: Any) -> ResponsesRequest:
    return ResponsesRequest.model_validate({"model": "m", "input": given, **fields})


def messages(*items: dict[str, Any], **fields: Any) -> list[dict[str, Any]]:
    body = request(list(items), **fields)
    chat = chat_request(body, conversation(body.input))
    return [message.model_dump(exclude_none=True) for message in chat.messages]


def call(call_id: str = "c", name: str = "f") -> dict[str, Any]:
    return {"type": "function_call", "call_id": call_id, "name": name, "arguments": "{}"}


def result(call_id: str = "c", output: Any = "done") -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": call_id, "output": output}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "output_text", "text": text}]}


def thought(text: str) -> dict[str, Any]:
    return {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": text}]}


def called(call_id: str = "c", name: str = "f") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": "{}"}}


def test_text_is_short_for_a_message_of_the_users():
    body = request("Hallo 一")
    (item,) = conversation(body.input)
    assert item.model_dump(exclude_unset=True, exclude={"id"}) == {
        "type": "message",
        "role": "user",
        "content": [{"type": "input_text", "text": "Hallo 一"}],
        "status": "completed",
    }
    assert item.id.startswith("msg_")


def test_roles_and_parts_become_messages():
    parts = [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]
    found = messages({"role": "developer", "content": "d"}, {"role": "user", "content": parts}, instructions="i")
    assert found == [
        {"role": "system", "content": "i"},
        {"role": "developer", "content": "d"},
        {"role": "user", "content": "a\nb"},
    ]


def test_what_the_model_made_in_one_go_is_one_message():
    items = [
        thought("hm"),
        said("Look."),
        call("1"),
        call("2", "g"),
        result("1"),
        result("2"),
        thought("so"),
        said("Ja."),
    ]
    assert messages(*items) == [
        {
            "role": "assistant",
            "content": "Look.",
            "reasoning_content": "hm",
            "tool_calls": [called("1"), called("2", "g")],
        },
        {"role": "tool", "content": "done", "tool_call_id": "1"},
        {"role": "tool", "content": "done", "tool_call_id": "2"},
        {"role": "assistant", "content": "Ja.", "reasoning_content": "so"},
    ]


def test_text_behind_a_call_joins_the_text_before_it():
    (message, _) = messages(said("Look."), call(), said(" There."), result())
    assert (message["content"], message["tool_calls"]) == ("Look. There.", [called()])


def test_two_answers_stay_two():
    assert [message["content"] for message in messages(said("a"), said("b"))] == ["a", "b"]
    both = messages(said("a"), thought("hm"), said("b"))
    assert [(message["content"], message.get("reasoning_content")) for message in both] == [("a", None), ("b", "hm")]


def test_reasoning_alone_is_an_answer_that_says_nothing():
    assert messages(thought("hm")) == [{"role": "assistant", "content": "", "reasoning_content": "hm"}]


def test_a_summary_stands_in_where_the_reasoning_is_not_there():
    item = {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "in short"}]}
    assert messages(item)[0]["reasoning_content"] == "in short"
    with pytest.raises(ValidationError, match="send the reasoning's text"):
        request([{**item, "encrypted_content": "gAAA"}])


def test_an_answer_at_the_end_is_not_begun_again():
    body = request([said("Once")])
    assert chat_request(body, conversation(body.input)).continues is False


def test_fields_become_a_chats():
    schema = {"type": "object"}
    tool = {"type": "function", "name": "f", "description": "d", "parameters": schema, "strict": True}
    body = request(
        tools=[tool],
        tool_choice={"type": "function", "name": "f"},
        text={"format": {"type": "json_schema", "name": "n", "schema": schema, "strict": True}},
        include=["message.output_text.logprobs"],
        top_logprobs=3,
        max_output_tokens=7,
        temperature=0.5,
        parallel_tool_calls=False,
    )
    chat = chat_request(body, conversation(body.input))
    assert chat.tools[0].model_dump() == {
        "type": "function",
        "function": {"name": "f", "description": "d", "parameters": schema, "strict": True},
    }
    assert chat.tool_choice.model_dump() == {"type": "function", "function": {"name": "f"}}
    assert chat.response_format == {
        "type": "json_schema",
        "json_schema": {"name": "n", "schema": schema, "strict": True},
    }
    assert (chat.logprobs, chat.top_logprobs, chat.max_completion_tokens) == (True, 3, 7)
    assert (chat.temperature, chat.parallel_tool_calls, chat.wants_usage) == (0.5, False, True)


def test_ids_are_kept_unless_they_come_twice():
    first = conversation(request([{**said("a"), "id": "msg_1"}, {**said("b"), "id": "msg_1"}]).input)
    assert first[0].id == "msg_1" != first[1].id
    more = conversation(request([{**said("c"), "id": "msg_1"}]).input, first)
    assert len({item.id for item in more}) == 3
    assert more[:2] == first


@pytest.mark.parametrize(
    ("items", "words"),
    [
        ([result("c")], "No function_call"),
        ([call("a"), result("b")], "No function_call"),
        ([call("a")], "There is no function_call_output"),
        ([call("a"), {"role": "user", "content": "x"}], "There is no function_call_output"),
    ],
)
def test_calls_and_results_belong_together(items, words):
    with pytest.raises(InvalidRequestError, match=words) as caught:
        conversation(request(items).input)
    assert caught.value.param == "input"


def test_a_conversation_has_an_end():
    before = conversation(request([said("a")] * 3).input)
    many = request([{"role": "user", "content": ""}] * (MAX_ITEMS - 2)).input
    with pytest.raises(InvalidRequestError, match=f"{MAX_ITEMS + 1} items"):
        conversation(many, before)
    whole = conversation(many[1:], before)
    body = request(instructions="one more")
    assert len(chat_request(body, whole).messages) == MAX_ITEMS + 1


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("messages", "input"),
        ("messages[3].content", "input[3].content"),
        ("tools[2].function.name", "tools[2].name"),
        ("response_format.json_schema.schema", "text.format.schema"),
        ("max_completion_tokens", "max_output_tokens"),
        ("temperature", "temperature"),
        (None, None),
    ],
)
def test_errors_name_what_was_sent(theirs, ours):
    told = in_our_words(
        ContextTooLongError("max_completion_tokens is 9.", hint="Set max_completion_tokens to 3.", param=theirs)
    )
    assert type(told) is ContextTooLongError
    assert (told.param, told.code) == (ours, "context_length_exceeded")
    assert (told.message, told.hint) == ("max_output_tokens is 9.", "Set max_output_tokens to 3.")


@pytest.mark.parametrize("bad", [float("nan"), "\ud800"])
@pytest.mark.parametrize("place", ["format", "tools"])
def test_what_could_not_be_repeated_in_the_answer_is_refused(bad, place):
    schema = {"type": "object", "default": bad}
    fields: dict[str, Any] = {
        "format": {"text": {"format": {"type": "json_schema", "name": "n", "schema": schema}}},
        "tools": {"tools": [{"type": "function", "name": "f", "parameters": schema}]},
    }[place]
    with pytest.raises(ValidationError):
        request(**fields)
