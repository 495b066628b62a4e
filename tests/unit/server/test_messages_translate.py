"""What a request in Anthropic's words means as a chat, and which are refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from seamount.core.errors import InvalidRequestError
from seamount.engine.fake_encoder import ByteEncoder
from seamount.server.errors import validation_error
from seamount.server.messages.translate import to_chat
from seamount.server.wire.chat import ChatRequest
from seamount.server.wire.messages import CountRequest, MessageRequest

USER = {"role": "user", "content": "hi"}
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
USE = {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Köln"}}
LONE = "\ud800"


def tool(name: str = "weather", **more: Any) -> dict[str, Any]:
    return {"name": name, "input_schema": CITY, **more}


def text(words: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": words, **more}


def request(**fields: Any) -> MessageRequest:
    return MessageRequest(**{"model": "m", "max_tokens": 9, "messages": [USER], **fields})


def chat(encoder: Any = None, **fields: Any) -> ChatRequest:
    return to_chat(request(**fields), encoder or ByteEncoder())


def template(*turns: dict[str, Any], **fields: Any) -> list[dict[str, Any]]:
    return chat(messages=list(turns), **fields).template_messages()


def problem(**fields: Any) -> InvalidRequestError:
    try:
        chat(**fields)
    except ValidationError as caught:
        return validation_error([{**error, "loc": ("body", *error["loc"])} for error in caught.errors()])
    except InvalidRequestError as caught:
        return caught
    raise AssertionError("was taken")


class Fixed(ByteEncoder):
    """A model that always thinks, or never does."""

    def __init__(self, *, thinks: bool) -> None:
        self.thinks = thinks

    def thinking_switches(self, *, on: bool) -> Any:
        return {} if on == self.thinks else None


def test_sampling_has_the_same_meaning():
    body = chat(temperature=0.5, top_p=0.25, top_k=7, stop_sequences=["a", "b"])
    sampling = body.sampling({})
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (9, 0.5, 0.25, 7)
    assert sampling.stop == ("a", "b")
    plain = chat(stop_sequences=[]).sampling({"temperature": 0.6, "top_k": 3})
    assert (plain.temperature, plain.top_k, plain.stop) == (0.6, 3, ())


@pytest.mark.parametrize(
    ("system", "read"),
    [("Be kind.", "Be kind."), ([text("Be kind."), text("Be brief.")], "Be kind.\nBe brief.")],
)
def test_the_system_prompt_comes_first(system, read):
    assert template(USER, system=system) == [{"role": "system", "content": read}, USER]


@pytest.mark.parametrize("system", [None, "", []])
def test_no_system_prompt_is_none(system):
    assert template(USER, system=system) == [USER]


def test_neighbours_of_one_role_become_one_turn():
    read = template(USER, {"role": "user", "content": [text("there")]}, {"role": "assistant", "content": "ho"})
    assert read == [{"role": "user", "content": "hi\nthere"}, {"role": "assistant", "content": "ho"}]


def test_a_tool_loop_keeps_its_order():
    results = [
        {"type": "tool_result", "tool_use_id": "t1", "content": "12 degrees"},
        {"type": "tool_result", "tool_use_id": "t2", "content": [text("a"), text("b")], "is_error": True},
        {"type": "tool_result", "tool_use_id": "t3"},
        text("And now?"),
    ]
    answer = [
        {"type": "thinking", "thinking": "hm", "signature": "sig"},
        text("Let me see."),
        {**USE, "caller": {"type": "direct"}},
        text("\nDone."),
        {**USE, "id": "t2", "input": {}},
    ]
    read = template(USER, {"role": "assistant", "content": answer}, {"role": "user", "content": results})
    assert read == [
        USER,
        {
            "role": "assistant",
            "content": "Let me see.\nDone.",
            "reasoning_content": "hm",
            "tool_calls": [
                {"id": "t1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Köln"}'}},
                {"id": "t2", "type": "function", "function": {"name": "weather", "arguments": "{}"}},
            ],
        },
        {"role": "tool", "tool_call_id": "t1", "content": "12 degrees"},
        {"role": "tool", "tool_call_id": "t2", "content": "Error: a\nb"},
        {"role": "tool", "tool_call_id": "t3", "content": ""},
        {"role": "user", "content": "And now?"},
    ]


def test_instructions_may_come_amid_the_conversation_and_a_turn_may_be_empty():
    read = template({"role": "user", "content": []}, {"role": "system", "content": "Now in verse."})
    assert read == [{"role": "user", "content": ""}, {"role": "system", "content": "Now in verse."}]


def test_a_last_turn_of_the_assistant_is_continued():
    assert chat(messages=[USER, {"role": "assistant", "content": "Once "}]).continues is None
    assert chat(messages=[USER]).continues is False


@pytest.mark.parametrize(
    ("choice", "forced", "several", "callable_names"),
    [
        (None, False, True, ["weather", "time"]),
        ({"type": "auto"}, False, True, ["weather", "time"]),
        ({"type": "auto", "disable_parallel_tool_use": True}, False, False, ["weather", "time"]),
        ({"type": "any"}, True, True, ["weather", "time"]),
        ({"type": "any", "disable_parallel_tool_use": True}, True, False, ["weather", "time"]),
        ({"type": "tool", "name": "time"}, True, False, ["time"]),
    ],
)
def test_tools_and_the_choice_among_them(choice, forced, several, callable_names):
    body = chat(tools=[tool(description="Tells it.", strict=False), tool("time", type="custom")], tool_choice=choice)
    use = body.tool_use()
    assert use is not None
    assert (use.forced, use.several, list(use.callable)) == (forced, several, callable_names)
    function = {"name": "weather", "description": "Tells it.", "parameters": CITY}
    assert use.tools[0] == {"type": "function", "function": function}
    assert use.tools[1] == {"type": "function", "function": {"name": "time", "parameters": CITY}}


def test_no_tool_may_be_used():
    assert chat(tools=[tool()], tool_choice={"type": "none"}).tool_use() is None


@pytest.mark.parametrize(
    ("thinking", "kwargs"),
    [
        (None, None),
        ({"type": "enabled", "budget_tokens": 2048}, {"thinking": True}),
        ({"type": "adaptive", "display": "summarized"}, {"thinking": True}),
        ({"type": "disabled"}, {"thinking": False}),
    ],
)
def test_thinking_is_switched_where_the_model_has_a_switch(thinking, kwargs):
    assert chat(thinking=thinking).chat_template_kwargs == kwargs


@pytest.mark.parametrize(
    ("thinks", "kind", "words"),
    [
        (True, "enabled", None),
        (True, "adaptive", None),
        (True, "disabled", "cannot be switched off"),
        (False, "disabled", None),
        (False, "adaptive", None),
        (False, "enabled", "does not think"),
    ],
)
def test_thinking_without_a_switch_is_what_the_model_does_or_is_refused(thinks, kind, words):
    encoder = Fixed(thinks=thinks)
    if words is None:
        assert chat(encoder, thinking={"type": kind}).chat_template_kwargs is None
    else:
        error = problem(encoder=encoder, thinking={"type": kind})
        assert words in error.message
        assert error.param == "thinking"


@pytest.mark.parametrize("field", ["output_config", "output_format"])
def test_the_answers_shape_goes_by_two_names(field):
    shape = {"type": "json_schema", "schema": CITY}
    body = chat(**{field: {"format": shape} if field == "output_config" else shape})
    grammar = body.sampling({}).grammar
    assert grammar is not None
    assert (grammar.kind, '"city"' in grammar.text) == ("json_schema", True)


def test_a_shape_that_cannot_be_enforced_is_told_in_the_callers_words():
    schema = {"type": "object", "properties": {"a": {"not": {"type": "string"}}}}
    error = problem(output_config={"format": {"type": "json_schema", "schema": schema}})
    assert error.param == "output_config.format.schema"
    assert error.message.startswith("output_config.format.schema: ")


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 2**31}, "max_tokens", "less than"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [USER] * 4097}, "messages", "at most 4096"),
        ({"color": 1}, "color", "Unknown parameter"),
        ({"temperature": "hot"}, "temperature", "valid number"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"top_k": -1}, "top_k", "greater than or equal to 0"),
        ({"stop_sequences": [""]}, "stop_sequences[0]", "at least 1"),
        ({"stop_sequences": ["x" * 257]}, "stop_sequences[0]", "at most 256"),
        ({"stop_sequences": ["x"] * 17}, "stop_sequences", "at most 16"),
        ({"system": LONE}, "system", "Unicode"),
        ({"system": [{"type": "image"}]}, "system[0]", "images are not supported"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0]", "'user', 'assistant', 'system'"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "required"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "x"}}]}]},
            "messages[0].content[0]",
            "images are not supported",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "messages[0].content[0]", "documents"),
        ({"messages": [{"role": "user", "content": [USE]}]}, "messages[0].content[0]", "'text', 'tool_result'"),
        (
            {"messages": [USER, {"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"}]}]},
            "messages[1].content[0]",
            "redacted",
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": [{**USE, "input": {"a": LONE}}]}]},
            "messages[1].content[0].tool_use.input",
            "Unicode",
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": [{**USE, "input": {"a": float("nan")}}]}]},
            "messages[1].content[0].tool_use.input",
            "must be JSON",
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "tool_result", "tool_use_id": "t", "content": [{"type": "image"}]}],
                    }
                ]
            },
            "messages[0].content[0].tool_result.content[0]",
            "images are not supported",
        ),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search", "max_uses": 3}]}, "tools[0].type", "custom"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema", "required"),
        ({"tools": [tool("two words")]}, "tools[0].name", "pattern"),
        ({"tools": [tool(input_schema={"type": "string"})]}, "tools[0].input_schema", "must be 'object'"),
        ({"tools": [tool(defer_loading=True)]}, "tools[0].defer_loading", "False"),
        ({"tools": [tool(), tool()]}, "tools[1].function.name", "Two tools"),
        ({"tools": [tool()] * 129}, "tools", "at most 128"),
        ({"tool_choice": {"type": "any"}}, "tool_choice", "there are no tools"),
        ({"tool_choice": {"type": "tool"}, "tools": [tool()]}, "tool_choice", "a name is given"),
        ({"tool_choice": {"type": "auto", "name": "weather"}, "tools": [tool()]}, "tool_choice", "a name is given"),
        ({"tool_choice": {"type": "sometimes"}, "tools": [tool()]}, "tool_choice.type", "'auto'"),
        ({"thinking": {"type": "enabled", "budget_tokens": 0}}, "thinking.budget_tokens", "greater than"),
        ({"container": "c"}, "container", "not supported"),
        ({"thread": {"type": "create"}}, "thread", "send the whole conversation"),
        ({"fallbacks": "default"}, "fallbacks", "no other model"),
        ({"compaction": {"type": "summarize"}}, "compaction", "ask for a summary"),
        ({"thinking": {"type": "between_tools"}}, "thinking.type", "'enabled', 'disabled' or 'adaptive'"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers", "no request leaves this machine"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(fields, param, words):
    try:
        error = problem(**fields)
    except AssertionError:
        with pytest.raises(InvalidRequestError) as caught:
            chat(**fields).tool_use()
        error = caught.value
    assert error.param == param
    assert words in error.message


def test_what_asks_for_nothing_is_taken():
    body = request(
        container=None, mcp_servers=[], metadata={}, tools=[tool(defer_loading=False, allowed_callers=["direct"])]
    )
    assert body.ignored() == []


def test_everything_without_effect_is_named():
    marked = {"cache_control": {"type": "ephemeral"}}
    body = request(
        metadata={"user_id": "u"},
        service_tier="auto",
        thinking={"type": "enabled", "budget_tokens": 1024},
        output_config={"effort": "high", "task_budget": {"total": 9}},
        diagnostics={"previous_message_id": "msg_1"},
        context_management={"edits": []},
        tools=[tool(strict=True, input_examples=[{"city": "Rom"}])],
        system=[text("Be kind.", **marked)],
    )
    assert body.ignored() == [
        "cache_control",
        "context_management",
        "diagnostics",
        "metadata",
        "output_config.effort",
        "output_config.task_budget",
        "service_tier",
        "thinking.budget_tokens",
        "tools.input_examples",
        "tools.strict",
    ]
    assert request(tools=[tool(strict=True)], tool_choice={"type": "any"}).ignored() == []


@pytest.mark.parametrize(
    "fields",
    [
        {"cache_control": {"type": "ephemeral"}},
        {"tools": [tool(cache_control={"type": "ephemeral"})]},
        {"messages": [{"role": "user", "content": [text("x", cache_control={"type": "ephemeral", "ttl": "1h"})]}]},
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {
                            "type": "tool_result",
                            "tool_use_id": "t",
                            "content": [text("x", cache_control={"type": "ephemeral"})],
                        }
                    ],
                }
            ]
        },
    ],
)
def test_cache_control_is_named_wherever_it_stands(fields):
    assert request(**fields).ignored() == ["cache_control"]


def test_counting_takes_a_conversation_and_no_limit():
    fields = {"model": "m", "messages": [USER], "tools": [tool()], "thinking": {"type": "disabled"}}
    body = to_chat(CountRequest(**fields), ByteEncoder())
    assert (body.token_limit, body.chat_template_kwargs) == (None, {"thinking": False})
    with pytest.raises(ValidationError, match="max_tokens"):
        CountRequest(**fields, max_tokens=5)
