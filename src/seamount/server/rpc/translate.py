"""gRPC's requests in the HTTP API's words, checked by the HTTP API's own schemas.

Used by `methods`. Fields of a message have the names of the parameters that they are, so most of a request is taken
over as it stands, and every bound, every refusal and its words are those of `wire`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from google.protobuf.message import DecodeError, Message

from seamount.core.errors import InvalidRequestError
from seamount.server.door.body import strict_json, validated
from seamount.server.wire.bounds import MAX_NAMES
from seamount.server.wire.chat import MAX_MESSAGES, ChatRequest
from seamount.server.wire.common import MAX_TOKEN_IDS
from seamount.server.wire.completions import CompletionRequest
from seamount.server.wire.embeddings import EmbeddingRequest
from seamount.server.wire.tokens import DetokenizeRequest, TokenizeRequest

from . import seamount_pb2 as pb

M = TypeVar("M", bound=Message)

_ROLES = {
    pb.ROLE_SYSTEM: "system",
    pb.ROLE_DEVELOPER: "developer",
    pb.ROLE_USER: "user",
    pb.ROLE_ASSISTANT: "assistant",
    pb.ROLE_TOOL: "tool",
}
_MODES = {pb.ToolChoice.MODE_NONE: "none", pb.ToolChoice.MODE_AUTO: "auto", pb.ToolChoice.MODE_REQUIRED: "required"}


def parse(kind: type[M], data: bytes) -> M:
    """Read a message.

    Raises:
        InvalidRequestError: the bytes are none of that kind, or it has fields that this server does not know: whoever
            set them expects something of them.
    """
    try:
        message = kind.FromString(data)
    except DecodeError as cause:
        raise InvalidRequestError(
            f"The message cannot be read as {kind.DESCRIPTOR.full_name}.", code="invalid_body"
        ) from cause
    size = message.ByteSize()
    message.DiscardUnknownFields()
    if message.ByteSize() != size:
        raise InvalidRequestError(
            f"{kind.DESCRIPTOR.full_name} has fields that this server does not know.",
            hint="The server's reflection service tells which it knows.",
            code="unknown_parameter",
        )
    return message


def chat_request(message: pb.ChatRequest, *, stream: bool) -> ChatRequest:
    """Return a chat in the HTTP API's words.

    Raises:
        InvalidRequestError: a field has a value that it may not have.
    """
    return validated(ChatRequest, {**_fields(message), **_streaming(stream)})


def completion_request(message: pb.CompletionRequest, *, stream: bool) -> CompletionRequest:
    """Return a completion in the HTTP API's words.

    Raises:
        InvalidRequestError: a field has a value that it may not have.
    """
    return validated(CompletionRequest, {**_fields(message), **_streaming(stream)})


def embed_request(message: pb.EmbedRequest) -> EmbeddingRequest:
    """Return texts to embed in the HTTP API's words.

    Raises:
        InvalidRequestError: a field has a value that it may not have.
    """
    return validated(EmbeddingRequest, _fields(message))


def tokenize_request(message: pb.TokenizeRequest) -> TokenizeRequest:
    """Return a text, or a chat, whose tokens are asked for, in the HTTP API's words.

    Raises:
        InvalidRequestError: a field has a value that it may not have.
    """
    return validated(TokenizeRequest, _fields(message))


def detokenize_request(message: pb.DetokenizeRequest) -> DetokenizeRequest:
    """Return tokens whose text is asked for in the HTTP API's words.

    Raises:
        InvalidRequestError: a field has a value that it may not have.
    """
    # No tokens are a list without any, which the encoding does not tell from none given.
    return validated(DetokenizeRequest, {"tokens": [], **_fields(message)})


def _streaming(stream: bool) -> dict[str, Any]:
    return {"stream": True, "stream_options": {"include_usage": True}} if stream else {"stream": False}


def _fields(message: Message) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for field, value in message.ListFields():
        if field.is_repeated and len(value) > _MOST.get(field.name, MAX_NAMES):
            raise _too_many(field.name, _MOST.get(field.name, MAX_NAMES))
        convert = _CONVERT.get(field.name)
        fields[field.name] = value if convert is None else convert(value)
    return fields


def _messages(messages: Sequence[pb.Message]) -> list[dict[str, Any]]:
    if sum(len(message.tool_calls) for message in messages) > MAX_NAMES:
        raise _too_many("tool_calls", MAX_NAMES)
    return [_message(message) for message in messages]


def _message(message: pb.Message) -> dict[str, Any]:
    fields: dict[str, Any] = {field.name: value for field, value in message.ListFields()}
    if message.role:
        fields["role"] = _ROLES.get(message.role, str(message.role))
    if message.tool_calls:
        fields["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    return fields


def _tool(number: int, tool: pb.Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name, **{field.name: value for field, value in tool.ListFields()}}
    if tool.HasField("parameters"):
        function["parameters"] = _json(tool.parameters, f"tools[{number}].function.parameters")
    return {"type": "function", "function": function}


def _tool_choice(choice: pb.ToolChoice) -> Any:
    if choice.WhichOneof("choice") == "function":
        return {"type": "function", "function": {"name": choice.function}}
    return _MODES.get(choice.mode, str(choice.mode))


def _response_format(wanted: pb.ResponseFormat) -> dict[str, Any]:
    kind = wanted.WhichOneof("type")
    if kind != "json_schema":
        return {"type": kind}
    named: dict[str, Any] = {field.name: value for field, value in wanted.json_schema.ListFields()}
    named["schema"] = _json(wanted.json_schema.schema, "response_format.json_schema.schema")
    return {"type": kind, "json_schema": named}


def _structured_outputs(wanted: pb.StructuredOutputs) -> dict[str, Any]:
    kind = wanted.WhichOneof("outputs")
    if kind is None:
        return {}
    return {kind: list(wanted.choice.texts) if kind == "choice" else getattr(wanted, kind)}


def _template_value(value: pb.TemplateValue) -> Any:
    kind = value.WhichOneof("value")
    return None if kind is None else getattr(value, kind)


def _prompt(prompt: pb.Prompt) -> Any:
    kind = prompt.WhichOneof("prompt")
    return list(prompt.token_ids.ids) if kind == "token_ids" else prompt.text if kind == "text" else None


def _json(text: str, where: str) -> Any:
    try:
        return strict_json(text)
    except (ValueError, RecursionError) as cause:
        raise InvalidRequestError(f"{where} is text that is no JSON.", param=where) from cause


def _too_many(name: str, most: int) -> InvalidRequestError:
    return InvalidRequestError(f"{name} has more than {most} entries.", param=name, code="body_too_complex")


# How many entries a field may have before they are looked at, one by one, in Python.
_MOST = {"messages": MAX_MESSAGES, "tokens": MAX_TOKEN_IDS}
# Fields that are not spelled as in JSON.
_CONVERT: Mapping[str, Callable[[Any], Any]] = {
    "messages": _messages,
    "prompt": lambda given: given if isinstance(given, str) else [_prompt(prompt) for prompt in given],
    "input": lambda given: [_prompt(prompt) for prompt in given],
    "tools": lambda tools: [_tool(number, tool) for number, tool in enumerate(tools)],
    "tool_choice": _tool_choice,
    "response_format": _response_format,
    "structured_outputs": _structured_outputs,
    "chat_template_kwargs": lambda given: {name: _template_value(value) for name, value in given.items()},
    "tokens": list,
    "stop": list,
    "stop_token_ids": list,
    "logit_bias": lambda biases: {str(token_id): bias for token_id, bias in biases.items()},
}
