"""Turns of a record, checked and brought into one form: OpenAI's messages. Called by `formats`; knows no model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from seamount.models.reasoning import THINK_CLOSE, THINK_OPEN

from .reading import kind_of, parse_json
from .record import Record, RecordError
from .sample import Sample

# ShareGPT's names among them, as they occur in published data.
_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bing", "bard"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function", "function_response", "tool_response"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "call"),
}
_REASONING = ("reasoning_content", "reasoning", "thinking")
_FLAGS = ("loss", "weight")
_PASSED_ON = ("name", "tool_call_id")


def bad(record: Record, field: str, reason: str, *, hint: str | None = None) -> RecordError:
    """Return the error that names a record and one of its fields."""
    return RecordError(record.where, record.row, field, reason, hint=hint)


def plain_text(record: Record, field: str, *, may_be_empty: bool = False) -> str:
    """Return a field that must be text; nothing where it may be empty and is not there.

    Raises:
        RecordError: it is no text, empty, or not Unicode.
    """
    value = record.value.get(field)
    if value is None and may_be_empty:
        return ""
    return _text(record, field, value, may_be_empty=may_be_empty)


class Turns:
    """The messages of one record while they are gathered."""

    def __init__(self, record: Record) -> None:
        self._record = record
        self._messages: list[dict[str, Any]] = []
        self._fields: list[str] = []
        self._loss: list[bool | None] = []

    def add(self, role: str, field: str, *, content: str | None = None) -> None:
        """Add a message whose words are a field's, or the given ones."""
        text = plain_text(self._record, field) if content is None else content
        self._add({"role": role, "content": text}, field, None)

    def add_system(self, field: str) -> None:
        """Add the system's words, if the field holds any."""
        if plain_text(self._record, field, may_be_empty=True).strip():
            self.add("system", field)

    def add_history(self, field: str) -> None:
        """Add pairs of question and answer, if the field holds any."""
        pairs = self._record.value.get(field)
        for number, pair in enumerate(self._list(field, pairs) if pairs else []):
            path = f"{field}[{number}]"
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise bad(self._record, path, "is no pair of question and answer")
            for role, text in zip(("user", "assistant"), pair, strict=True):
                self._add({"role": role, "content": _text(self._record, path, text)}, path, None)

    def add_messages(self, field: str, *, loss: bool | None = None) -> None:
        """Add a list of messages, OpenAI's or ShareGPT's; `loss` holds for those that do not say."""
        for number, message in enumerate(self._list(field, self._record.value.get(field))):
            path = f"{field}[{number}]"
            if not isinstance(message, Mapping):
                raise bad(self._record, path, f"is no object but {kind_of(message)}")
            self._add_message(message, path, loss)

    def sample(self, *, tools: str | None = None) -> Sample:
        """Return what was gathered.

        Raises:
            RecordError: it is no conversation that ends with an assistant's turn.
        """
        if not self._messages:
            raise bad(self._record, "", "holds no messages")
        if [message["role"] for message in self._messages].count("system") > 1 and "system" in self._fields:
            raise bad(self._record, "system", "is given, and the conversation has a system message of its own")
        if self._messages[-1]["role"] != "assistant":
            raise bad(
                self._record,
                self._fields[-1],
                f"is the last turn, and the {self._messages[-1]['role']}'s: there is no answer to learn",
            )
        return Sample(
            self._record.where,
            self._record.row,
            self._id(),
            tuple(self._messages),
            tuple(self._fields),
            tuple(self._loss),
            self._tools(tools) if tools else (),
        )

    def plain(self, prompt: str, completion: str) -> Sample:
        """Return plain text."""
        return Sample(self._record.where, self._record.row, self._id(), prompt=prompt, completion=completion)

    def _list(self, field: str, value: Any) -> list[Any] | tuple[Any, ...]:
        """Tables keep lists as JSON text."""
        if isinstance(value, str):
            try:
                value = parse_json(value)
            except ValueError as cause:
                raise bad(self._record, field, f"is text that is not JSON: {str(cause)[:100]}") from cause
        if hasattr(value, "tolist"):
            value = value.tolist()
        if not isinstance(value, list | tuple):
            raise bad(self._record, field, f"is no list but {kind_of(value)}")
        if not value:
            raise bad(self._record, field, "is empty")
        return value

    def _add_message(self, message: Mapping[str, Any], path: str, loss: bool | None) -> None:
        is_sharegpt = "from" in message
        role = self._role(message, f"{path}.{'from' if is_sharegpt else 'role'}")
        content_path = f"{path}.{'value' if is_sharegpt else 'content'}"
        content = _content(self._record, content_path, message.get("value" if is_sharegpt else "content"))
        if role == "call":
            calls = self._calls_in_text(content_path, content)
            role, content = "assistant", None
        else:
            calls = self._calls(path, message)
        if calls and role != "assistant":
            raise bad(self._record, f"{path}.tool_calls", f"stand in a message of the {role}")
        made: dict[str, Any] = {"role": role, "content": content}
        made |= {name: message[name] for name in _PASSED_ON if isinstance(message.get(name), str)}
        reasoning = [name for name in _REASONING if message.get(name) is not None]
        if reasoning:
            made["reasoning_content"] = _text(
                self._record, f"{path}.{reasoning[0]}", message[reasoning[0]], may_be_empty=True
            )
        if calls:
            made["tool_calls"] = calls
        flag = self._flag(message, path, role)
        self._add(made, content_path, loss if flag is None else flag)

    def _add(self, message: dict[str, Any], field: str, loss: bool | None) -> None:
        role, content = message["role"], message["content"]
        if role == "assistant":
            _take_reasoning_out(self._record, field, message)
            content = message["content"]
            if not (content or "").strip() and not message.get("tool_calls"):
                raise bad(self._record, field, "is empty: the assistant says nothing")
        elif content is None or (role == "user" and not content.strip()):
            raise bad(self._record, field, "is empty" if content is not None else "is missing")
        self._messages.append(message)
        self._fields.append(field)
        self._loss.append(loss)

    def _role(self, message: Mapping[str, Any], field: str) -> str:
        said = message.get(field.rpartition(".")[2])
        if said is None:
            raise bad(self._record, field, "is missing")
        if not isinstance(said, str):
            raise bad(self._record, field, f"is no text but {kind_of(said)}")
        role = _ROLES.get(said)
        if role is None:
            raise bad(
                self._record,
                field,
                f"is {said[:40]!r}, which is no role",
                hint="Roles are system, user, assistant and tool.",
            )
        return role

    def _flag(self, message: Mapping[str, Any], path: str, role: str) -> bool | None:
        name = next((name for name in _FLAGS if message.get(name) is not None), None)
        if name is None:
            return None
        if message[name] not in (0, 1):  # True and False are such
            raise bad(self._record, f"{path}.{name}", "is neither 0 nor 1, neither true nor false")
        if message[name] and role != "assistant":
            raise bad(self._record, f"{path}.{name}", f"wants the {role}'s words learned; only the assistant's are")
        return bool(message[name])

    def _calls(self, path: str, message: Mapping[str, Any]) -> list[dict[str, Any]]:
        field, calls = f"{path}.tool_calls", message.get("tool_calls")
        if message.get("function_call") is not None:
            field, calls = f"{path}.function_call", [message["function_call"]]
        if calls is None or calls in ("", []):
            return []
        return [self._call(f"{field}[{number}]", call) for number, call in enumerate(self._list(field, calls))]

    def _calls_in_text(self, field: str, text: str | None) -> list[dict[str, Any]]:
        try:
            value = parse_json(text or "")
        except ValueError as cause:
            raise bad(self._record, field, "is a call that is not JSON") from cause
        return [self._call(field, call) for call in (value if isinstance(value, list) else [value])]

    def _call(self, field: str, call: Any) -> dict[str, Any]:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
            raise bad(self._record, field, "is no call: it has no function name")
        arguments = function.get("arguments", function.get("parameters"))
        problem = ""
        try:
            value = parse_json(arguments) if isinstance(arguments, str) else arguments
            json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
            problem = "" if value is None or isinstance(value, Mapping) else f"are {kind_of(value)}"
        except (ValueError, TypeError, RecursionError):
            problem = "are not JSON"
        if problem:
            raise bad(self._record, field, f"is a call whose arguments {problem}, not an object")
        made = {"name": function["name"], "arguments": {} if arguments in (None, "") else arguments}
        call_id = call.get("id")
        return {**({"id": call_id} if isinstance(call_id, str) else {}), "type": "function", "function": made}

    def _tools(self, field: str) -> tuple[dict[str, Any], ...]:
        value = self._record.value.get(field)
        if value is None or value in ("", [], "[]"):
            return ()
        found = []
        for number, tool in enumerate(self._list(field, value)):
            path = f"{field}[{number}]"
            function = tool.get("function", tool) if isinstance(tool, Mapping) else None
            if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
                raise bad(self._record, path, "is no tool: it has no function name")
            try:
                json.dumps(function, ensure_ascii=False, allow_nan=False).encode()
            except (ValueError, TypeError, RecursionError) as cause:
                raise bad(self._record, path, f"is not JSON: {str(cause)[:100]}") from cause
            if problem := _schema_problem(function.get("parameters")):
                raise bad(self._record, path, problem, hint="parameters are a JSON schema, as in OpenAI's tools.")
            found.append({"type": "function", "function": {**function}})
        return tuple(found)

    def _id(self) -> str | None:
        value = self._record.value.get("id")
        if value is None or isinstance(value, str):
            return value
        if isinstance(value, bool) or not isinstance(value, int):
            raise bad(self._record, "id", f"is neither text nor a whole number but {kind_of(value)}")
        return str(value)


def _schema_problem(parameters: Any) -> str:
    """Say in which way a tool's parameters are not what chat templates go through; nothing where they are."""
    if parameters is None:
        return ""
    if not isinstance(parameters, Mapping):
        return f"has parameters that are {kind_of(parameters)}, not an object"
    properties = parameters.get("properties")
    if properties is not None and not isinstance(properties, Mapping):
        return f"has parameters whose properties are {kind_of(properties)}, not an object"
    # Parquet fills up with null what other rows' tools have.
    if properties and not all(schema is None or isinstance(schema, Mapping | bool) for schema in properties.values()):
        return "has parameters of which a property is no object"
    return ""


def _text(record: Record, field: str, value: Any, *, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise bad(record, field, f"is no text but {kind_of(value)}")
    if not may_be_empty and not value.strip():
        raise bad(record, field, "is empty")
    try:
        value.encode()
    except UnicodeEncodeError as cause:
        raise bad(record, field, f"is not Unicode: it has half a character at {cause.start + 1}") from cause
    return value


def _content(record: Record, field: str, value: Any) -> str | None:
    """Return a message's words; parts of them are joined as a server does."""
    if value is None:
        return None
    if not isinstance(value, list | tuple):
        return _text(record, field, value, may_be_empty=True)
    texts = []
    for number, part in enumerate(value):
        path = f"{field}[{number}]"
        kind = part.get("type") if isinstance(part, Mapping) else None
        if not isinstance(part, Mapping) or not isinstance(kind, str):
            raise bad(record, path, "is no content part: it has no type")
        if kind != "text":
            raise bad(record, path, f"is of the type {kind[:40]!r}, and only text can be learned from")
        texts.append(_text(record, f"{path}.text", part.get("text"), may_be_empty=True))
    return "\n".join(texts)


def _take_reasoning_out(record: Record, field: str, message: dict[str, Any]) -> None:
    """Move reasoning that stands within the content, as raw outputs have it, to where it belongs."""
    content = message["content"]
    if content is not None and THINK_CLOSE in content:
        body = content.lstrip()
        if not body.startswith(THINK_OPEN):
            raise bad(
                record,
                field,
                f"holds {THINK_CLOSE} and does not begin with {THINK_OPEN}",
                hint="Put the reasoning into reasoning_content, or both tags round it.",
            )
        if message.get("reasoning_content"):
            raise bad(record, field, f"holds {THINK_OPEN}, and the turn has reasoning_content too")
        reasoning, _, content = body.removeprefix(THINK_OPEN).partition(THINK_CLOSE)
        message["reasoning_content"] = reasoning
    elif content is not None and content.lstrip().startswith(THINK_OPEN):
        raise bad(record, field, f"opens {THINK_OPEN} and never closes it")
    if "reasoning_content" in message:
        # Where they touch a tag, newlines are the template's.
        message["content"] = content if content is None else content.lstrip("\n")
        message["reasoning_content"] = message["reasoning_content"].strip("\n")
        if not message["reasoning_content"].strip():
            del message["reasoning_content"]
