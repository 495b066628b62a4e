"""Schemas of tools: those that a request offers, the choice among them, calls in messages, answers and chunks.

Called by `wire.chat` and `chat.tools`. Tools come from strangers and end up in prompts and grammars, so names, sizes
and schemas are checked here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from seamount.core.errors import InvalidRequestError
from seamount.engine.grammar_schema import enforceable

from .bounds import simple_json
from .common import Text, WireModel, unicode_text

MAX_TOOLS = 128
MAX_DESCRIPTION_CHARS = 16_384
MAX_SCHEMA_CHARS = 65_536
MAX_SCHEMA_DEPTH = 32
_TYPES = frozenset({"null", "boolean", "integer", "number", "string", "array", "object"})
_SCHEMAS_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_SCHEMA_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SCHEMAS = ("additionalProperties", "contains", "propertyNames", "not", "if", "then", "else")

Name = Annotated[Text, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]


def _parameters(schema: dict[str, Any]) -> dict[str, Any]:
    """Refuse what is no JSON schema of an object, or too large or deep to work with."""
    _check_schema(schema, "#", 0)
    if schema.get("type", "object") != "object":
        raise _bad("#/type", "must be 'object': arguments are one")
    try:
        text = json.dumps(schema, ensure_ascii=False)
    except RecursionError as cause:
        raise _bad("#", "is nested too deeply") from cause
    if len(unicode_text(text)) > MAX_SCHEMA_CHARS:
        raise _bad("#", f"must have at most {MAX_SCHEMA_CHARS} characters as JSON")
    return schema


def _check_schema(schema: Any, where: str, depth: int) -> None:
    """Check the parts of a schema that decide its shape; other keywords are for the model to read."""
    where = where if len(where) <= 200 else f"{where[:100]}...{where[-100:]}"
    if depth > MAX_SCHEMA_DEPTH:
        raise _bad(where, f"is nested more than {MAX_SCHEMA_DEPTH} deep")
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise _bad(where, "must be a JSON schema: an object")
    kinds = schema.get("type", "object")
    names = kinds if isinstance(kinds, list) else [kinds]
    if not names or not all(isinstance(name, str) and name in _TYPES for name in names):
        raise _bad(f"{where}/type", f"must be one or several of {', '.join(sorted(_TYPES))}")
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise _bad(f"{where}/required", "must be a list of names")
    if not isinstance(schema.get("enum", []), list):
        raise _bad(f"{where}/enum", "must be a list of values")
    for key in ("pattern", "$ref", "format", "description", "title"):
        if not isinstance(schema.get(key, ""), str):
            raise _bad(f"{where}/{key}", "must be text")
    for place, part in _subschemas(schema, where):
        _check_schema(part, place, depth + 1)


def _subschemas(schema: Mapping[str, Any], where: str) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = [(f"{where}/{key}", schema[key]) for key in _SCHEMAS if key in schema]
    for key in _SCHEMAS_BY_NAME:
        named = schema.get(key, {})
        if not isinstance(named, dict):
            raise _bad(f"{where}/{key}", "must be an object of schemas")
        found += [(f"{where}/{key}/{name}", part) for name, part in named.items()]
    for key in _SCHEMA_LISTS:
        listed = schema.get(key, [])
        if not isinstance(listed, list):
            raise _bad(f"{where}/{key}", "must be a list of schemas")
        found += [(f"{where}/{key}/{number}", part) for number, part in enumerate(listed)]
    items = schema.get("items")
    if isinstance(items, list):  # as it was before draft 2020-12
        found += [(f"{where}/items/{number}", part) for number, part in enumerate(items)]
    elif "items" in schema:
        found.append((f"{where}/items", items))
    return found


def _bad(where: str, problem: str) -> PydanticCustomError:
    return PydanticCustomError("tool_schema", "{where} {problem}", {"where": where, "problem": problem})


Parameters = Annotated[dict[str, Any], AfterValidator(_parameters)]


class FunctionDefinition(WireModel):
    """A function that the model may call."""

    name: Name
    description: Text | None = Field(None, max_length=MAX_DESCRIPTION_CHARS)
    parameters: Parameters | None = Field(None, description="JSON schema of the arguments object.")
    strict: bool | None = Field(None, description="Refuse a schema that cannot be enforced where a call is forced.")


class Tool(WireModel):
    """A tool that the model may use: a function."""

    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(WireModel):
    """The function to call."""

    name: Text


class NamedToolChoice(WireModel):
    """Makes the model call one function."""

    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedToolChoice


class CalledFunction(WireModel):
    """Which function was called, and with what."""

    name: Text
    arguments: Annotated[Text, AfterValidator(simple_json)] = Field(description="JSON, as the model wrote it.")


class ToolCall(WireModel):
    """One tool call of an answer."""

    id: Text
    type: Literal["function"]
    function: CalledFunction


class CalledFunctionDelta(WireModel):
    """What a chunk adds to a call: its name first, then pieces of its arguments."""

    name: str | None = None
    arguments: str | None = None


class ToolCallDelta(WireModel):
    """A chunk's part of one call; `id`, `type` and name come first, once."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: CalledFunctionDelta


@dataclass(frozen=True)
class ToolUse:
    """What a request lets the model do with tools; there is none where it may call nothing.

    Attributes:
        tools: as chat templates read them.
        callable: the functions that may be called, by name.
        forced: the answer must call at least one of them.
        several: it may make more than one call.
    """

    tools: list[dict[str, Any]]
    callable: dict[str, FunctionDefinition]
    forced: bool
    several: bool

    def schemas(self) -> dict[str, dict[str, Any]]:
        """Return what is enforced of the functions' arguments, by name.

        A schema that cannot be enforced stays with the model to follow, unless the function is strict; of a `oneOf`
        whose schemas overlap, that a value fits only one of them does.

        Raises:
            InvalidRequestError: a strict function's schema cannot be enforced.
        """
        return {name: _enforced(function) for name, function in self.callable.items()}


def _enforced(function: FunctionDefinition) -> dict[str, Any]:
    if function.parameters is None:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    try:
        kept = enforceable(function.parameters, loosely=not function.strict)
    except InvalidRequestError as error:
        if function.strict:
            raise InvalidRequestError(
                f"The strict function {function.name!r}: {error.message}", hint=error.hint, param="tools"
            ) from error
        kept = {}
    return {**kept, "type": "object"}


def tool_use(tools: list[Tool] | None, choice: ToolChoice | None, *, parallel: bool | None) -> ToolUse | None:
    """Return what the request's three parameters ask for together; None where nothing may be called.

    Raises:
        InvalidRequestError: two tools have one name, or the choice is of a tool that is not there.
    """
    offered: dict[str, FunctionDefinition] = {}
    for number, tool in enumerate(tools or ()):
        if tool.function.name in offered:
            raise InvalidRequestError(
                f"Two tools are called {tool.function.name!r}.", param=f"tools[{number}].function.name"
            )
        offered[tool.function.name] = tool.function
    if isinstance(choice, NamedToolChoice):
        name = choice.function.name
        if name not in offered:
            raise InvalidRequestError(
                f"tool_choice names {name[:64]!r}, which is none of the tools.", param="tool_choice"
            )
        offered = {name: offered[name]}
    elif choice == "required" and not offered:
        raise InvalidRequestError("tool_choice is 'required', and there are no tools.", param="tool_choice")
    if not tools or choice == "none":
        return None
    return ToolUse(
        tools=[tool.model_dump(exclude_unset=True, exclude={"function": {"strict"}}) for tool in tools],
        callable=offered,
        forced=choice == "required" or isinstance(choice, NamedToolChoice),
        # A function that is named is called once, as OpenAI's API does it.
        several=parallel is not False and not isinstance(choice, NamedToolChoice),
    )
