"""Tools on the wire: what is accepted, what is refused by name, and what a request means by its parameters together."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from seamount.core.errors import InvalidRequestError
from seamount.server.errors import validation_error
from seamount.server.wire.chat import ChatRequest
from seamount.server.wire.tools import MAX_SCHEMA_CHARS, MAX_SCHEMA_DEPTH, MAX_TOOLS

USER = {"role": "user", "content": "hi"}
BEGUN = {"role": "assistant", "content": "Once "}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


def chat(**fields) -> ChatRequest:
    return ChatRequest(**{"model": "m", "messages": [USER], **fields})


def tool(name="f", **function) -> dict:
    return {"type": "function", "function": {"name": name, **function}}


def named(name="f") -> dict:
    return {"type": "function", "function": {"name": name}}


def problem(**fields) -> InvalidRequestError:
    with pytest.raises(ValidationError) as caught:
        chat(**fields)
    errors = [{**error, "loc": ("body", *error["loc"])} for error in caught.value.errors()]
    return validation_error(errors)


def nested(depth: int) -> dict:
    schema: dict = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


@pytest.mark.parametrize(
    ("tools", "param"),
    [
        (0, "tools"),
        ({}, "tools"),
        ([5], "tools[0]"),
        ([{}], "tools[0]"),
        ([{"type": "function"}], "tools[0].function"),
        ([{"type": "custom", "custom": {"name": "f"}}], "tools[0]"),
        ([{"type": "function", "function": {}}], "tools[0].function.name"),
        ([tool("")], "tools[0].function.name"),
        ([tool("two words")], "tools[0].function.name"),
        ([tool("f\n")], "tools[0].function.name"),
        ([tool("n" * 65)], "tools[0].function.name"),
        ([tool("é")], "tools[0].function.name"),
        ([tool(description=5)], "tools[0].function.description"),
        ([tool(description="x" * 20_000)], "tools[0].function.description"),
        ([tool(strict="yes")], "tools[0].function.strict"),
        ([tool(color="red")], "tools[0].function.color"),
        ([tool(parameters=[])], "tools[0].function.parameters"),
        ([tool()] * (MAX_TOOLS + 1), "tools"),
    ],
)
def test_wrong_tools_are_refused_and_named(tools, param):
    assert problem(tools=tools).param.startswith(param)


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"type": "string"}, "#/type must be 'object'"),
        ({"type": "thing"}, "#/type must be one or several"),
        ({"type": 5}, "#/type must be one or several"),
        ({"type": []}, "#/type must be one or several"),
        ({"properties": []}, "#/properties must be an object of schemas"),
        ({"properties": {"a": 5}}, "#/properties/a must be a JSON schema"),
        ({"properties": {"a": {"type": "objekt"}}}, "#/properties/a/type must be one or several"),
        ({"properties": {"a": {"items": 5}}}, "#/properties/a/items must be a JSON schema"),
        ({"properties": {"a": {"items": [True, 5]}}}, "#/properties/a/items/1 must be a JSON schema"),
        ({"required": "city"}, "#/required must be a list of names"),
        ({"required": [1]}, "#/required must be a list of names"),
        ({"properties": {"a": {"enum": "x"}}}, "#/properties/a/enum must be a list"),
        ({"properties": {"a": {"pattern": {}}}}, "#/properties/a/pattern must be text"),
        ({"anyOf": {}}, "#/anyOf must be a list of schemas"),
        ({"anyOf": [True, "x"]}, "#/anyOf/1 must be a JSON schema"),
        ({"additionalProperties": "no"}, "#/additionalProperties must be a JSON schema"),
        ({"description": "x" * MAX_SCHEMA_CHARS}, "# must have at most"),
        (nested(MAX_SCHEMA_DEPTH + 1), "is nested more than"),
        ({"default": "\ud800"}, "must be valid Unicode"),
    ],
)
def test_what_is_no_schema_of_an_object_is_refused_by_its_place(parameters, words):
    error = problem(tools=[tool(parameters=parameters)])
    assert error.param == "tools[0].function.parameters"
    assert words in error.message


@pytest.mark.parametrize(
    "parameters",
    [{}, CITY, nested(MAX_SCHEMA_DEPTH), {**CITY, "additionalProperties": False, "$defs": {"x": True}, "x-own": [1]}],
)
def test_schemas_that_clients_send_are_taken_as_they_are(parameters):
    use = chat(tools=[tool(parameters=parameters)]).tool_use()
    assert use is not None
    assert use.tools == [tool(parameters=parameters)]


def test_templates_see_the_tools_as_they_were_sent_but_for_strict():
    use = chat(tools=[tool(description="Does it.", strict=True, parameters=CITY), tool("g")]).tool_use()
    assert use is not None
    assert use.tools == [tool(description="Does it.", parameters=CITY), tool("g")]


@pytest.mark.parametrize(
    ("fields", "forced", "several", "callable_names"),
    [
        ({}, False, True, ["f", "g"]),
        ({"tool_choice": "auto"}, False, True, ["f", "g"]),
        ({"tool_choice": None, "parallel_tool_calls": False}, False, False, ["f", "g"]),
        ({"tool_choice": "required"}, True, True, ["f", "g"]),
        ({"tool_choice": "required", "parallel_tool_calls": False}, True, False, ["f", "g"]),
        ({"tool_choice": named("g")}, True, False, ["g"]),
    ],
)
def test_what_the_three_parameters_mean_together(fields, forced, several, callable_names):
    use = chat(tools=[tool("f"), tool("g")], **fields).tool_use()
    assert use is not None
    assert (use.forced, use.several, list(use.callable)) == (forced, several, callable_names)
    assert len(use.tools) == 2


@pytest.mark.parametrize(
    "fields",
    [{}, {"tools": []}, {"tool_choice": "none", "tools": [tool()]}, {"tool_choice": "auto"}, {"tool_choice": "none"}],
)
def test_nothing_can_be_called(fields):
    assert chat(**fields).tool_use() is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [tool(), tool()]}, "tools[1].function.name"),
        ({"tools": [tool()], "tool_choice": named("g")}, "tool_choice"),
        ({"tool_choice": named()}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
    ],
)
def test_contradictions_are_refused_and_named(fields, param):
    with pytest.raises(InvalidRequestError) as caught:
        chat(**fields).tool_use()
    assert caught.value.param == param


@pytest.mark.parametrize("choice", [0, "any", {}, {"type": "function"}, {"type": "custom", "custom": {"name": "f"}}])
def test_a_choice_that_is_none_is_refused(choice):
    assert problem(tools=[tool()], tool_choice=choice).param.startswith("tool_choice")


def test_what_is_enforced_of_arguments():
    loose = {"type": "object", "properties": {"a": {"not": {"type": "string"}}}}
    use = chat(
        tools=[tool("a", parameters=CITY), tool("b", parameters=loose), tool("c"), tool("d", parameters={})]
    ).tool_use()
    assert use is not None
    assert use.schemas() == {
        "a": CITY,
        "b": {"type": "object"},  # cannot be enforced: the model is told, and no more
        "c": {"type": "object", "properties": {}, "additionalProperties": False},
        "d": {"type": "object"},
    }
    one_of = {"type": "object", "properties": {"oneOf": {"oneOf": [{"type": "integer"}, {"type": "number"}]}}}
    either = {"type": "object", "properties": {"oneOf": {"anyOf": [{"type": "integer"}, {"type": "number"}]}}}
    for is_strict, enforced in ((None, either), (False, either), (True, one_of)):
        offered = chat(tools=[tool("a", parameters=one_of, strict=is_strict)]).tool_use()
        assert offered is not None
        assert offered.schemas() == {"a": enforced}
    strict = chat(tools=[tool("b", parameters=loose, strict=True)]).tool_use()
    assert strict is not None
    with pytest.raises(InvalidRequestError, match="'b'.*'not'") as caught:
        strict.schemas()
    assert caught.value.param == "tools"


def test_strict_without_a_forced_call_is_listed_as_ignored():
    assert chat(tools=[tool(strict=True)]).ignored() == ["tools.function.strict"]
    assert chat(tools=[tool(strict=True)], tool_choice="required").ignored() == []
    assert chat(tools=[tool(strict=False)]).ignored() == []


def test_an_answer_that_a_client_sends_back_whole_is_taken():
    message = {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "tool_calls": [CALL],
        "reasoning": "r",
        "reasoning_content": "r",
    }
    body = chat(messages=[USER, message, {"role": "tool", "content": "42", "tool_call_id": "1"}])
    assert body.template_messages()[1] == {
        "role": "assistant",
        "content": None,
        "reasoning_content": "r",
        "tool_calls": [CALL],
    }


@pytest.mark.parametrize(
    ("fields", "continues"),
    [
        ({"messages": [USER]}, False),
        ({"messages": [USER, BEGUN]}, None),
        ({"messages": [USER, BEGUN], "continue_final_message": True, "add_generation_prompt": False}, True),
        ({"messages": [USER, BEGUN], "continue_final_message": False}, False),
        ({"messages": [USER, BEGUN], "add_generation_prompt": False}, None),
        ({"messages": [USER, {**BEGUN, "prefix": True}]}, True),
        ({"messages": [USER, {**BEGUN, "prefix": False}]}, False),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}]}, False),
        ({"messages": [BEGUN]}, False),
    ],
)
def test_when_the_last_message_is_continued(fields, continues):
    assert chat(**fields).continues is continues


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": [USER], "continue_final_message": True}, "messages"),
        ({"messages": [USER], "add_generation_prompt": False}, "add_generation_prompt"),
        (
            {"messages": [USER, BEGUN], "continue_final_message": False, "add_generation_prompt": False},
            "add_generation_prompt",
        ),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [CALL], "prefix": True}]}, "messages"),
    ],
)
def test_wishes_to_continue_that_cannot_be_met_are_refused(fields, param):
    with pytest.raises(InvalidRequestError) as caught:
        _ = chat(**fields).continues
    assert caught.value.param == param
