"""Looks through a JSON schema before it is compiled: what cannot be enforced is refused by place, never ignored.

Called by `grammar` for every schema, and by the server's wire, which wants to refuse before the engine is asked. Plain
values only: it knows neither tokens nor the grammar library, but for what that library can enforce (draft 2020-12, the
part below). Bounds are on depth, size and numbers, so that whatever comes of a schema stays in proportion to its text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from seamount.core.errors import InvalidRequestError

MAX_DEPTH = 32
MAX_NODES = 10_000
MAX_COUNT = 10_000
MAX_PATTERN_CHARS = 4096
# Beyond it a double does not hold every integer, and the library computes bounds in doubles.
MAX_NUMBER = 2**53

FORMATS = frozenset(
    {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"},
)
_TYPES = frozenset({"null", "boolean", "integer", "number", "string", "array", "object"})
# They describe and do not decide what is valid. `discriminator` is OpenAPI's hint beside a oneOf that decides.
_ANNOTATIONS = frozenset(
    {
        "$comment",
        "contentEncoding",
        "contentMediaType",
        "default",
        "deprecated",
        "description",
        "discriminator",
        "examples",
        "readOnly",
        "title",
        "writeOnly",
    }
)
_AT_ROOT = frozenset({"$schema", "$id"})
_HINTS = {
    "nullable": "Write 'type': ['string', 'null'] instead.",
    "uniqueItems": "Leave it out, or ask for it in the prompt.",
    "minProperties": "List the properties in 'required' instead.",
}


def enforceable(schema: Any, *, loosely: bool = False) -> Any:
    """Return the schema without annotations; all that remains will be enforced.

    Args:
        loosely: let a value fit several schemas of a `oneOf`, which cannot be enforced where it may.

    Raises:
        InvalidRequestError: a keyword is unknown or cannot be enforced, a value is wrong, or a limit is exceeded; the
            message names the place as a JSON pointer.
    """
    return _Walk(loosely).schema(schema, "#", depth=0)


class _Walk:
    """One walk through a schema, which counts what it sees."""

    def __init__(self, loosely: bool) -> None:
        self._loosely = loosely
        self._num_nodes = 0
        self._keywords: dict[str, Callable[[Any, str, int], Any]] = {
            "$defs": self._schemas_by_name,
            "definitions": self._schemas_by_name,
            "properties": self._schemas_by_name,
            "patternProperties": self._schemas_by_pattern,
            "items": self._items,
            "additionalProperties": self.schema,
            "anyOf": self._schemas,
            "oneOf": self._schemas,
            "allOf": self._schemas,
            "prefixItems": self._schemas,
            "$ref": _reference,
            "type": _type,
            "const": self._value,
            "enum": self._enum,
            "required": self._required,
            "pattern": _pattern,
            "format": _format,
            "multipleOf": _multiple,
            **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), _number),
            **dict.fromkeys(("minLength", "maxLength", "minItems", "maxItems", "maxProperties"), _count),
            "minProperties": _min_properties,
        }

    def schema(self, schema: Any, where: str, depth: int) -> Any:
        """Return what decides of a schema at any depth."""
        self._enter(where, depth)
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise _bad(where, "a schema must be an object or a boolean")
        kept: dict[str, Any] = {}
        for key, value in schema.items():
            if key in _ANNOTATIONS or (not depth and key in _AT_ROOT):
                continue
            check = self._keywords.get(key)
            if check is None:
                raise _bad(where, f"the keyword {key[:80]!r} cannot be enforced", hint=_HINTS.get(key))
            name = "anyOf" if self._loosely and key == "oneOf" and "anyOf" not in schema else key
            kept[name] = check(value, f"{where}/{_escaped(key)}", depth + 1)
        return kept

    def _enter(self, where: str, depth: int) -> None:
        self._num_nodes += 1
        if depth > MAX_DEPTH:
            raise _bad(where, f"it is nested more than {MAX_DEPTH} deep")
        if self._num_nodes > MAX_NODES:
            raise _bad(where, f"the schema has more than {MAX_NODES} parts")

    def _schemas(self, value: Any, where: str, depth: int) -> list[Any]:
        if not isinstance(value, list) or not value:
            raise _bad(where, "must be a list of schemas")
        return [self.schema(item, f"{where}/{number}", depth) for number, item in enumerate(value)]

    def _schemas_by_name(self, value: Any, where: str, depth: int) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise _bad(where, "must be an object of schemas")
        return {name: self.schema(item, f"{where}/{_escaped(name)}", depth) for name, item in value.items()}

    def _schemas_by_pattern(self, value: Any, where: str, depth: int) -> dict[str, Any]:
        kept = self._schemas_by_name(value, where, depth)
        for name in kept:
            _pattern(name, where, depth)
        return kept

    def _items(self, value: Any, where: str, depth: int) -> Any:
        if isinstance(value, list):
            raise _bad(where, "must be one schema", hint="A schema for each place is spelled 'prefixItems'.")
        return self.schema(value, where, depth)

    def _enum(self, value: Any, where: str, depth: int) -> list[Any]:
        if not isinstance(value, list) or not value:
            raise _bad(where, "must be a list of values")
        return [self._value(item, f"{where}/{number}", depth) for number, item in enumerate(value)]

    def _required(self, value: Any, where: str, depth: int) -> list[str]:
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise _bad(where, "must be a list of names")
        for _ in value:
            self._enter(where, depth)
        return value

    def _value(self, value: Any, where: str, depth: int) -> Any:
        """Check a JSON value that the output may have to hold."""
        self._enter(where, depth)
        if isinstance(value, dict):
            for name, item in value.items():
                self._value(item, f"{where}/{_escaped(name)}", depth + 1)
        elif isinstance(value, list):
            for number, item in enumerate(value):
                self._value(item, f"{where}/{number}", depth + 1)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            _number(value, where, depth)
        return value


def _type(value: Any, where: str, depth: int) -> Any:
    names = value if isinstance(value, list) else [value]
    if not names or not all(isinstance(name, str) and name in _TYPES for name in names):
        raise _bad(where, f"must be one or several of {', '.join(sorted(_TYPES))}")
    return value


def _reference(value: Any, where: str, depth: int) -> str:
    if not isinstance(value, str) or not (value == "#" or value.startswith("#/")):
        raise _bad(where, "must point into this schema, as '#/$defs/NAME' does")
    return value


def _pattern(value: Any, where: str, depth: int) -> str:
    if not isinstance(value, str) or len(value) > MAX_PATTERN_CHARS:
        raise _bad(where, f"must be a pattern of at most {MAX_PATTERN_CHARS} characters")
    return value


def _format(value: Any, where: str, depth: int) -> str:
    if not isinstance(value, str) or value not in FORMATS:
        raise _bad(where, f"must be one of {', '.join(sorted(FORMATS))}")
    return value


def _number(value: Any, where: str, depth: int) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_NUMBER:
        raise _bad(where, "must be a number between -2^53 and 2^53")
    return value


def _multiple(value: Any, where: str, depth: int) -> float:
    if _number(value, where, depth) <= 0:
        raise _bad(where, "must be above 0")
    return value


def _count(value: Any, where: str, depth: int) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_COUNT:
        raise _bad(where, f"must be a whole number between 0 and {MAX_COUNT}")
    return value


def _min_properties(value: Any, where: str, depth: int) -> int:
    # Names that the schema does not list may come twice, so that more than one cannot be counted.
    if _count(value, where, depth) > 1:
        raise _bad(where, "cannot be enforced above 1", hint=_HINTS["minProperties"])
    return value


def _escaped(name: str) -> str:
    """A name as part of a JSON pointer (RFC 6901), cut to a readable length."""
    return name[:80].replace("~", "~0").replace("/", "~1")


def _bad(where: str, problem: str, *, hint: str | None = None) -> InvalidRequestError:
    if len(where) > 240:
        where = f"{where[:120]}...{where[-120:]}"
    return InvalidRequestError(f"JSON schema at {where}: {problem}.", hint=hint)
