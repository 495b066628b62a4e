"""Checks chat messages and brings them into the shape that a template reads.

Called by `models.prompt`. Pure functions over plain values; knows the message schema (OpenAI's) and the
dialects of templates, not tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from seamount.core.errors import InvalidRequestError

from .reasoning import THINK_CLOSE, THINK_OPEN

_ROLES = ("system", "user", "assistant", "tool")
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
_CONTENT_IS_NONE = re.compile(r"content(['\"]\])?\s+is\s+(not\s+)?none")
_ARGUMENTS_TOJSON = re.compile(r"arguments(['\"]\])?\s*\|\s*(tojson|items)")
_ARGUMENTS_MAY_BE_TEXT = re.compile(r"arguments(['\"]\])?\s+is\s+(not\s+)?(string|mapping)")


def prepare_messages(messages: Sequence[Mapping[str, Any]], source: str) -> list[dict[str, Any]]:
    """Return the messages as the template with this source wants them; the caller's are not changed.

    Content parts of type text are joined by newlines. Keys whose value is None are left out, as
    `transformers` does, but for the content of a tool call where the template asks whether it is none.
    Reasoning is given under all names that templates read. Tool call arguments become an object or JSON text,
    whichever the template writes. `developer` becomes `system` where the template does not know it.

    Raises:
        InvalidRequestError: a message is malformed, or of a role that the template does not know; names the
            message.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise InvalidRequestError("messages must be a list with at least one message.", param="messages")
    return [_prepare(message, f"messages[{index}]", source) for index, message in enumerate(messages)]


def check_beginning(messages: Sequence[Mapping[str, Any]]) -> None:
    """Refuse what cannot be continued.

    Raises:
        InvalidRequestError: the last message is not the assistant's, makes calls, or stands alone.
    """
    if messages[-1]["role"] != "assistant" or messages[-1].get("tool_calls") or len(messages) < 2:
        raise InvalidRequestError(
            "Only an assistant's message without tool calls, behind another message, can be continued.",
            param="messages",
        )


def begin_answer(prompt: str, message: Mapping[str, Any]) -> tuple[str, bool]:
    """Return the prompt with an answer's beginning behind it, and whether that ends in the reasoning.

    Content ends the reasoning that the prompt opens, unless it begins with the opening tag itself.

    Raises:
        InvalidRequestError: the message has reasoning, and the prompt opens none.
    """
    reasoning, content = message.get("reasoning_content") or "", message.get("content") or ""
    bare = content.lstrip()
    if not prompt.rstrip().endswith(THINK_OPEN):
        if reasoning:
            raise InvalidRequestError(
                "The last message has reasoning, and the prompt opens none, so it cannot be continued.",
                hint="Leave it out, or switch thinking on.",
                param="messages",
            )
        return prompt + content, bare.startswith(THINK_OPEN) and THINK_CLOSE not in bare
    if not reasoning and bare.startswith(THINK_OPEN):
        content = bare.removeprefix(THINK_OPEN)
        return prompt.rstrip() + content, THINK_CLOSE not in content
    if not content:
        return prompt + reasoning, True
    # Templates that write a newline behind the opening tag write them round the closing one too.
    close = f"\n{THINK_CLOSE}\n\n" if prompt.endswith("\n") else THINK_CLOSE
    return prompt + reasoning + close + content, False


def with_system_text(messages: Sequence[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """Return the messages with more said in the system's, which is put in front where there is none."""
    if messages and messages[0]["role"] == "system":
        said = messages[0].get("content") or ""
        return [{**messages[0], "content": f"{said}\n\n{text}" if said else text}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def _prepare(message: Mapping[str, Any], where: str, source: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise _bad(where, "must be an object with role and content")
    prepared = {str(key): value for key, value in message.items()}
    prepared["role"] = _role(prepared.get("role"), where, source)
    calls = prepared.get("tool_calls")
    if calls is not None:
        prepared["tool_calls"] = _tool_calls(calls, where, source)
    content = prepared.get("content")
    if content is None and not calls and prepared["role"] != "assistant":
        raise _bad(where, "has no content")
    if content is not None:
        prepared["content"] = _content_text(content, where)
    reasoning = next((prepared[name] for name in _REASONING_FIELDS if prepared.get(name) is not None), None)
    if reasoning is not None:
        if not isinstance(reasoning, str):
            raise _bad(where, "has a reasoning_content that is not a string")
        prepared = {"thinking": reasoning, **prepared, "reasoning_content": reasoning}
    keeps_none = not content and bool(calls) and _CONTENT_IS_NONE.search(source) is not None
    kept = {key: value for key, value in prepared.items() if value is not None}
    if keeps_none:
        kept["content"] = None
    elif content is None and not calls:
        kept["content"] = ""
    return kept


def _role(role: Any, where: str, source: str) -> str:
    if not isinstance(role, str):
        raise _bad(where, "has no role")
    if role == "developer" and "developer" not in source:
        return "system"
    known_to_template = re.fullmatch(r"[A-Za-z_-]{1,32}", role) and re.search(rf"['\"]{role}['\"]", source)
    if role not in _ROLES and not known_to_template:
        raise _bad(where, f"has the role {role[:40]!r}, which the chat template does not know")
    return role


def _content_text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise _bad(where, "has a content that is neither text nor a list of parts")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if not isinstance(part, Mapping) or kind != "text" or not isinstance(part.get("text"), str):
            raise _bad(where, f"has a content part of type {str(kind)[:40]!r}; this model takes text only")
        texts.append(part["text"])
    return "\n".join(texts)


def _tool_calls(calls: Any, where: str, source: str) -> list[dict[str, Any]]:
    if not isinstance(calls, Sequence) or isinstance(calls, str | bytes):
        raise _bad(where, "has tool_calls that are not a list")
    prepared = []
    for call in calls:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(call, Mapping) or not isinstance(function, Mapping):
            raise _bad(where, "has a tool call without function")
        if not isinstance(function.get("name"), str):
            raise _bad(where, "has a tool call without function name")
        arguments = _arguments(function.get("arguments"), where, source)
        prepared.append({**call, "function": {**function, "arguments": arguments}})
        prepared[-1].setdefault("type", "function")
    return prepared


def _arguments(arguments: Any, where: str, source: str) -> Any:
    """Return arguments as JSON text or as an object, whichever the template writes."""
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, str | Mapping):
        raise _bad(where, "has tool call arguments that are neither JSON text nor an object")
    if "arguments" not in source or _ARGUMENTS_MAY_BE_TEXT.search(source):
        return arguments
    wants_object = _ARGUMENTS_TOJSON.search(source) is not None
    if wants_object and isinstance(arguments, str):
        try:
            return json.loads(arguments or "{}")
        except (ValueError, RecursionError) as cause:
            raise _bad(where, f"has tool call arguments that are not JSON ({cause})") from cause
    if not wants_object and isinstance(arguments, Mapping):
        try:
            return json.dumps(arguments, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError) as cause:
            raise _bad(where, f"has tool call arguments that are not JSON ({cause})") from cause
    return arguments


def _bad(where: str, problem: str) -> InvalidRequestError:
    return InvalidRequestError(f"{where} {problem}.", param="messages")
