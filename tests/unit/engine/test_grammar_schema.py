"""Schemas are looked through: what cannot be enforced is refused by place, and nothing is ignored that decides."""

from __future__ import annotations

from typing import Any

import pytest

from seamount.core.errors import InvalidRequestError
from seamount.engine.grammar_schema import MAX_COUNT, MAX_DEPTH, MAX_NODES, MAX_PATTERN_CHARS, enforceable

REFUSED: list[tuple[Any, str]] = [
    ({"not": {"type": "string"}}, "#: the keyword 'not'"),
    ({"properties": {"a": {"if": {}, "then": {}}}}, "#/properties/a: the keyword 'if'"),
    ({"items": {"uniqueItems": True}}, "#/items: the keyword 'uniqueItems'"),
    ({"contains": {}}, "'contains'"),
    ({"propertyNames": {}}, "'propertyNames'"),
    ({"dependentRequired": {}}, "'dependentRequired'"),
    ({"unevaluatedProperties": False}, "'unevaluatedProperties'"),
    ({"x-guidance": {"lenient": True}}, "'x-guidance'"),
    ({"nullable": True}, "'nullable'"),
    ({"$dynamicRef": "#a"}, "'$dynamicRef'"),
    ({"properties": {"a/b~": {"typo": 1}}}, "#/properties/a~1b~0: the keyword 'typo'"),
    ({"anyOf": [{}, {"$id": "x"}]}, "#/anyOf/1: the keyword '$id'"),
    ({"$ref": "https://example.com/a.json"}, "#/$ref: must point into this schema"),
    ({"type": "strnig"}, "#/type: must be one or several"),
    ({"type": []}, "#/type"),
    ({"properties": []}, "#/properties: must be an object"),
    ({"properties": {"a": 3}}, "#/properties/a: a schema must be"),
    ({"items": [{}]}, "#/items: must be one schema"),
    ({"anyOf": []}, "#/anyOf: must be a list"),
    ({"enum": []}, "#/enum: must be a list"),
    ({"required": "a"}, "#/required: must be a list"),
    ({"format": "regex"}, "#/format: must be one of"),
    ({"pattern": "a" * (MAX_PATTERN_CHARS + 1)}, "#/pattern: must be a pattern of at most"),
    ({"minLength": -1}, "#/minLength: must be a whole number"),
    ({"maxItems": MAX_COUNT + 1}, "#/maxItems: must be a whole number"),
    ({"minItems": 1.5}, "#/minItems"),
    ({"minItems": True}, "#/minItems"),
    ({"minProperties": 2}, "#/minProperties: cannot be enforced above 1"),
    ({"minimum": 2**53 + 1}, "#/minimum: must be a number"),
    ({"maximum": float("nan")}, "#/maximum"),
    ({"maximum": float("inf")}, "#/maximum"),
    ({"exclusiveMinimum": True}, "#/exclusiveMinimum"),
    ({"multipleOf": 0}, "#/multipleOf: must be above 0"),
    ({"const": {"a": [10**30]}}, "#/const/a/0: must be a number"),
    ({"enum": [1, float("inf")]}, "#/enum/1"),
    ("string", "#: a schema must be"),
    (None, "#: a schema must be"),
]


@pytest.mark.parametrize(("schema", "problem"), REFUSED, ids=[problem for _, problem in REFUSED])
def test_what_cannot_be_enforced_is_refused_by_place(schema: Any, problem: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        enforceable(schema)
    assert problem in caught.value.message


def test_annotations_go_and_all_else_stays_in_order() -> None:
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "https://example.com/point",
        "title": "Point",
        "type": "object",
        "properties": {
            "title": {"type": "string", "description": "a property may be called title", "minLength": 1},
            "default": {"$ref": "#/$defs/N"},
        },
        "required": ["title"],
        "additionalProperties": False,
        "$defs": {"N": {"enum": [1, {"title": "kept: it is a value"}], "deprecated": True}},
    }
    kept = enforceable(schema)
    assert kept == {
        "type": "object",
        "properties": {"title": {"type": "string", "minLength": 1}, "default": {"$ref": "#/$defs/N"}},
        "required": ["title"],
        "additionalProperties": False,
        "$defs": {"N": {"enum": [1, {"title": "kept: it is a value"}]}},
    }
    assert list(kept["properties"]) == ["title", "default"]
    assert enforceable(kept) == kept


@pytest.mark.parametrize("schema", [True, False, {}, {"items": False}, {"minLength": 3.0}])
def test_the_smallest_schemas_pass(schema: Any) -> None:
    assert enforceable(schema) == schema


def nested(depth: int, make: Any) -> Any:
    schema: Any = {"type": "null"}
    for _ in range(depth):
        schema = make(schema)
    return schema


@pytest.mark.parametrize(
    "make",
    [
        lambda inner: {"items": inner},
        lambda inner: {"properties": {"a": inner}},
        lambda inner: {"anyOf": [inner]},
        lambda inner: {"additionalProperties": inner},
        lambda inner: {"$defs": {"a": inner}},
    ],
)
def test_depth_is_bounded(make: Any) -> None:
    enforceable(nested(10, make))
    with pytest.raises(InvalidRequestError, match=f"more than {MAX_DEPTH} deep"):
        enforceable(nested(200, make))


def test_depth_of_values_is_bounded() -> None:
    value: Any = 1
    for _ in range(200):
        value = [value]
    with pytest.raises(InvalidRequestError, match="deep"):
        enforceable({"const": value})


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {str(i): {} for i in range(MAX_NODES)}},
        {"enum": list(range(MAX_NODES))},
        {"required": [str(i) for i in range(MAX_NODES)]},
        {"anyOf": [{"enum": list(range(100))}] * 101},
    ],
    ids=["properties", "enum", "required", "both"],
)
def test_size_is_bounded(schema: Any) -> None:
    with pytest.raises(InvalidRequestError, match=f"more than {MAX_NODES} parts"):
        enforceable(schema)


def test_a_place_far_down_is_cut_to_a_readable_length() -> None:
    deep = nested(12, lambda inner: {"properties": {"n" * 90: inner}})
    innermost = deep
    while "properties" in innermost:
        innermost = innermost["properties"]["n" * 90]
    innermost["typo"] = 1
    with pytest.raises(InvalidRequestError) as caught:
        enforceable(deep)
    assert len(caught.value.message) < 400
