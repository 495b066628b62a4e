"""What a request says of its answer's shape, in the field's spellings, as one `Grammar`.

Called by `wire.completions` and `wire.chat`. Two spellings: OpenAI's `response_format` (text, json_object,
json_schema), and vLLM's `structured_outputs` for what OpenAI's cannot say (regex, grammar, choice). vLLM's older
`guided_*` are unknown parameters here. A schema is looked through here, so that its faults are told before a model is
asked; whether a pattern or grammar compiles shows in the engine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from seamount.core.errors import InvalidRequestError
from seamount.core.sampling import Grammar, GrammarKind
from seamount.engine.grammar_schema import enforceable

from .bounds import TOO_COMPLEX, is_too_complex

MAX_CHOICES = 1024
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")

RESPONSE_FORMAT = Annotated[
    dict[str, Any] | None,
    Field(
        description="{'type': 'text'}, {'type': 'json_object'}, or {'type': 'json_schema', 'json_schema': {'name', "
        "'schema', 'strict'}}. A schema is always enforced; keywords that cannot be are refused."
    ),
]
STRUCTURED_OUTPUTS = Annotated[
    dict[str, Any] | None,
    Field(description="One of {'json': schema}, {'json_object': true}, {'regex'}, {'grammar'}, {'choice': [texts]}."),
]


def parse_response_format(value: Any) -> Grammar | None:
    """Return what OpenAI's `response_format` asks for; None where the answer is free text.

    `strict` may be given and changes nothing: a schema is enforced in any case.

    Raises:
        InvalidRequestError: it is malformed, or its schema cannot be enforced; `param` names the place.
    """
    if value is None:
        return None
    where = "response_format"
    given = _object(value, where)
    kind = given.get("type")
    if kind == "text" or kind == "json_object":
        _only(given, {"type"}, where)
        return Grammar("json_object") if kind == "json_object" else None
    if kind != "json_schema":
        raise _bad(f"{where}.type", "must be text, json_object or json_schema")
    _only(given, {"type", "json_schema"}, where)
    where += ".json_schema"
    named = _object(given.get("json_schema"), where)
    _only(named, {"name", "description", "schema", "strict"}, where)
    name = named.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise _bad(f"{where}.name", "must be 1 to 64 letters, digits, underscores or dashes")
    if not isinstance(named.get("strict"), bool | None):
        raise _bad(f"{where}.strict", "must be true or false")
    return _schema(named.get("schema"), f"{where}.schema")


def parse_structured_outputs(value: Any) -> Grammar | None:
    """Return what vLLM's `structured_outputs` asks for; None where nothing is given.

    Raises:
        InvalidRequestError: it is malformed, names none or several shapes, or cannot be enforced; `param` names the
            place.
    """
    if value is None:
        return None
    where = "structured_outputs"
    given = {key: item for key, item in _object(value, where).items() if item is not None}
    _only(given, {"json", "json_object", "regex", "grammar", "choice"}, where)
    if len(given) != 1:
        raise _bad(where, "must name one of json, json_object, regex, grammar and choice")
    ((key, item),) = given.items()
    where += f".{key}"
    if key == "json":
        return _schema(_parsed(item, where) if isinstance(item, str) else item, where)
    if key == "json_object":
        if item is not True:
            raise _bad(where, "must be true")
        return Grammar("json_object")
    if key == "choice":
        return _grammar("ebnf", _choice(item, where), where)
    return _grammar("regex" if key == "regex" else "ebnf", item, where)


def parse_grammar(response_format: Any, structured_outputs: Any) -> Grammar | None:
    """Return the one grammar that a request's two fields ask for.

    Raises:
        InvalidRequestError: as for each of them, or both ask for something.
    """
    first, second = parse_response_format(response_format), parse_structured_outputs(structured_outputs)
    if first is not None and second is not None:
        raise _bad("structured_outputs", "cannot be used together with response_format")
    return first or second


def _schema(schema: Any, where: str) -> Grammar:
    if not isinstance(schema, dict):
        raise _bad(where, "must be a JSON schema: an object")
    try:
        kept = enforceable(schema)
    except InvalidRequestError as error:
        raise InvalidRequestError(f"{where}: {error.message}", hint=error.hint, param=where) from error
    return _grammar("json_schema", json.dumps(kept, ensure_ascii=False), where)


def _choice(texts: Any, where: str) -> str:
    if not isinstance(texts, list) or not 0 < len(texts) <= MAX_CHOICES:
        raise _bad(where, f"must be a list of 1 to {MAX_CHOICES} texts")
    if not all(isinstance(text, str) and text for text in texts):
        raise _bad(where, "must hold texts that are not empty")
    # Lark spells strings as JSON does, but for one control character.
    spelled = (json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f") for text in texts)
    return "start: " + " | ".join(spelled)


def _grammar(kind: GrammarKind, text: Any, where: str) -> Grammar:
    try:
        return Grammar(kind, text)
    except InvalidRequestError as error:
        raise InvalidRequestError(f"{where}: {error.message}", param=where) from error


def _parsed(text: str, where: str) -> Any:
    if is_too_complex(text):
        raise _bad(where, f"holds {TOO_COMPLEX}")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _bad(where, "is text that is no JSON") from error


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _bad(where, "must be an object")
    return value


def _only(given: Mapping[str, Any], known: set[str], where: str) -> None:
    unknown = next((key for key in given if key not in known), None)
    if unknown is not None:
        raise InvalidRequestError(
            f"Unknown parameter: {where}.{unknown:.80}.", param=f"{where}.{unknown:.80}", code="unknown_parameter"
        )


def _bad(where: str, problem: str) -> InvalidRequestError:
    return InvalidRequestError(f"{where} {problem}.", param=where)
