"""The field's spellings of an answer's shape: each becomes one grammar, or an error that names the place."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seamount.core.errors import InvalidRequestError
from seamount.core.sampling import MAX_GRAMMAR_CHARS, Grammar
from seamount.server.wire.structured import (
    MAX_CHOICES,
    parse_grammar,
    parse_response_format,
    parse_structured_outputs,
)

POINT = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"], "additionalProperties": False}


def schema_format(schema: Any = POINT, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "point", "schema": schema, **more}}


@pytest.mark.parametrize("value", [None, {"type": "text"}])
def test_free_text_needs_no_grammar(value: Any) -> None:
    assert parse_response_format(value) is None


def test_json_object() -> None:
    assert parse_response_format({"type": "json_object"}) == Grammar("json_object")


@pytest.mark.parametrize("more", [{}, {"strict": True}, {"strict": False}, {"strict": None, "description": "a point"}])
def test_a_schema_is_enforced_strict_or_not(more: dict[str, Any]) -> None:
    grammar = parse_response_format(schema_format(**more))
    assert grammar is not None and grammar.kind == "json_schema"
    assert json.loads(grammar.text) == POINT


REFUSED = [
    ("json", "response_format"),
    ([], "response_format"),
    ({}, "response_format.type"),
    ({"type": "xml"}, "response_format.type"),
    ({"type": "text", "json_schema": {}}, "response_format.json_schema"),
    ({"type": "json_object", "extra": 1}, "response_format.extra"),
    ({"type": "json_schema"}, "response_format.json_schema"),
    ({"type": "json_schema", "json_schema": {"schema": {}}}, "response_format.json_schema.name"),
    ({"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}, "response_format.json_schema.name"),
    ({"type": "json_schema", "json_schema": {"name": "a"}}, "response_format.json_schema.schema"),
    (schema_format(strict="yes"), "response_format.json_schema.strict"),
    (schema_format(strict=1), "response_format.json_schema.strict"),
    (schema_format(typo=1), "response_format.json_schema.typo"),
    (schema_format([]), "response_format.json_schema.schema"),
    (schema_format({"not": {}}), "response_format.json_schema.schema"),
    (schema_format({"const": "\ud800"}), "response_format.json_schema.schema"),
    (schema_format({"const": "x" * MAX_GRAMMAR_CHARS}), "response_format.json_schema.schema"),
]


@pytest.mark.parametrize(("value", "param"), REFUSED, ids=[param for _, param in REFUSED])
def test_a_wrong_response_format_is_refused_by_place(value: Any, param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse_response_format(value)
    assert caught.value.param == param
    assert param in caught.value.message


def test_a_schemas_fault_is_named_by_keyword_and_pointer() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse_response_format(schema_format({"properties": {"a": {"uniqueItems": True}}}))
    assert "#/properties/a" in caught.value.message and "'uniqueItems'" in caught.value.message


@pytest.mark.parametrize(
    ("value", "grammar"),
    [
        (None, None),
        ({"json": POINT}, Grammar("json_schema", json.dumps(POINT))),
        ({"json": json.dumps(POINT), "regex": None}, Grammar("json_schema", json.dumps(POINT))),
        ({"json_object": True}, Grammar("json_object")),
        ({"regex": "[ab]+"}, Grammar("regex", "[ab]+")),
        ({"grammar": 'start: "a"'}, Grammar("ebnf", 'start: "a"')),
        ({"choice": ["ja", 'ne"in\n', "\x7f"]}, Grammar("ebnf", 'start: "ja" | "ne\\"in\\n" | "\\u007f"')),
    ],
)
def test_structured_outputs(value: Any, grammar: Grammar | None) -> None:
    assert parse_structured_outputs(value) == grammar


@pytest.mark.parametrize(
    ("value", "param"),
    [
        ([], "structured_outputs"),
        ({}, "structured_outputs"),
        ({"regex": "a", "json": POINT}, "structured_outputs"),
        ({"structural_tag": "x"}, "structured_outputs.structural_tag"),
        ({"json_object": False}, "structured_outputs.json_object"),
        ({"json": "{"}, "structured_outputs.json"),
        ({"json": "[" * 100_000}, "structured_outputs.json"),
        ({"json": {"if": {}}}, "structured_outputs.json"),
        ({"regex": 3}, "structured_outputs.regex"),
        ({"regex": ""}, "structured_outputs.regex"),
        ({"grammar": "a" * (MAX_GRAMMAR_CHARS + 1)}, "structured_outputs.grammar"),
        ({"choice": []}, "structured_outputs.choice"),
        ({"choice": ["a", ""]}, "structured_outputs.choice"),
        ({"choice": ["a"] * (MAX_CHOICES + 1)}, "structured_outputs.choice"),
    ],
)
def test_wrong_structured_outputs_are_refused_by_place(value: Any, param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse_structured_outputs(value)
    assert caught.value.param == param


def test_only_one_of_the_two_fields_may_ask() -> None:
    assert parse_grammar({"type": "text"}, {"regex": "a"}) == Grammar("regex", "a")
    assert parse_grammar({"type": "json_object"}, None) == Grammar("json_object")
    with pytest.raises(InvalidRequestError, match="together"):
        parse_grammar({"type": "json_object"}, {"regex": "a"})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8) | st.sampled_from(sorted(POINT)), inner)
    ),
    max_leaves=20,
)


@given(json_values)
def test_whatever_is_sent_ends_in_a_grammar_or_in_a_typed_error(value: Any) -> None:
    for given_value in (value, schema_format(value)):
        try:
            parse_response_format(given_value)
        except InvalidRequestError as error:
            assert error.param is not None and error.param.startswith("response_format")
    try:
        parse_structured_outputs(value)
    except InvalidRequestError as error:
        assert error.param is not None and error.param.startswith("structured_outputs")
