"""Puts a request in Anthropic's words into those of a chat: a `ChatRequest`, which `chat.answer` knows how to answer.

Called by `messages`. Pure, but that it asks the encoder how its model's reasoning is switched; knows nothing of HTTP.
"""

from __future__ import annotations

import json
from itertools import groupby
from typing import Any

from seamount.core.errors import InvalidRequestError
from seamount.server.chat.thinking import thinking_switches
from seamount.server.door.body import validated
from seamount.server.encoder import Encoder
from seamount.server.wire.chat import (
    AssistantMessage,
    ChatRequest,
    Message,
    SystemMessage,
    TextPart,
    ToolMessage,
    UserMessage,
)
from seamount.server.wire.messages import (
    CountRequest,
    JsonFormat,
    MessageRequest,
    MessageTool,
    MessageToolChoice,
    TextBlock,
    Thinking,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
)
from seamount.server.wire.structured import parse_response_format
from seamount.server.wire.tools import (
    CalledFunction,
    FunctionDefinition,
    NamedFunction,
    NamedToolChoice,
    Tool,
    ToolCall,
)

_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
Block = TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock


def to_chat(body: CountRequest, encoder: Encoder) -> ChatRequest:
    """Return the chat that means the same. Neighbouring turns of one role become one, as Anthropic's API has it.

    Raises:
        InvalidRequestError: it asks for reasoning, tools or a shape that cannot be had.
    """
    fields: dict[str, Any] = {
        "messages": _messages(body),
        "tools": [_tool(tool) for tool in body.tools] if body.tools else None,
        **_choice(body.tool_choice, has_tools=bool(body.tools)),
        "chat_template_kwargs": _switches(body.thinking, encoder) or None,
        "response_format": _shape(body.answer_format),
    }
    if isinstance(body, MessageRequest):
        fields |= {name: getattr(body, name) for name in ("max_tokens", "temperature", "top_k", "top_p")}
        fields["stop"] = body.stop_sequences or None
    given = {name: value for name, value in fields.items() if value is not None}
    return validated(ChatRequest, {"model": body.model, **given})


def _messages(body: CountRequest) -> list[Message]:
    found: list[Message] = []
    if body.system:
        found.append(SystemMessage(role="system", content=_parts(_blocks(body.system))))
    for role, turns in groupby(body.messages, key=lambda turn: turn.role):
        blocks = [block for turn in turns for block in _blocks(turn.content)]
        if role == "assistant":
            found.append(_assistant(blocks))
        elif role == "system":
            found.append(SystemMessage(role="system", content=_parts(blocks)))
        else:
            found += _user(blocks)
    return found


def _blocks(content: str | list[Any]) -> list[Block]:
    return [TextBlock(type="text", text=content)] if isinstance(content, str) else content


def _parts(blocks: list[Block]) -> list[TextPart]:
    return [TextPart(type="text", text=block.text) for block in blocks if isinstance(block, TextBlock)]


def _user(blocks: list[Block]) -> list[Message]:
    """Return a message per tool's result and per stretch of text between them, in the order in which they came."""
    found: list[Message] = []
    for is_text, some in groupby(blocks, key=lambda block: isinstance(block, TextBlock)):
        if is_text:
            found.append(UserMessage(role="user", content=_parts(list(some))))
        else:
            found += [_result(block) for block in some if isinstance(block, ToolResultBlock)]
    return found or [UserMessage(role="user", content="")]


def _result(block: ToolResultBlock) -> ToolMessage:
    text = "\n".join(part.text for part in _parts(_blocks(block.content or "")))
    # No chat template has a place for it, and the model must know.
    text = f"Error: {text}" if block.is_error else text
    return ToolMessage(role="tool", tool_call_id=block.tool_use_id, content=text)


def _assistant(blocks: list[Block]) -> AssistantMessage:
    # An answer's text is one in a chat, whatever calls stood between: so it was generated, so it is found in the cache.
    text = "".join(block.text for block in blocks if isinstance(block, TextBlock))
    reasoning = "".join(block.thinking for block in blocks if isinstance(block, ThinkingBlock))
    calls = [_call(block) for block in blocks if isinstance(block, ToolUseBlock)]
    return AssistantMessage(
        role="assistant", content=text or None, reasoning_content=reasoning or None, tool_calls=calls or None
    )


def _call(block: ToolUseBlock) -> ToolCall:
    arguments = json.dumps(block.input, ensure_ascii=False)
    return ToolCall(id=block.id, type="function", function=CalledFunction(name=block.name, arguments=arguments))


def _tool(tool: MessageTool) -> Tool:
    given: dict[str, Any] = {"description": tool.description, "strict": tool.strict}
    given = {name: value for name, value in given.items() if value is not None}
    # Checked already, under the name that the caller knows it by.
    function = FunctionDefinition.model_construct(
        {"name", "parameters", *given}, name=tool.name, parameters=tool.input_schema, **given
    )
    return Tool(type="function", function=function)


def _choice(choice: MessageToolChoice | None, *, has_tools: bool) -> dict[str, Any]:
    if choice is None:
        return {}
    if choice.type == "any" and not has_tools:
        raise InvalidRequestError("tool_choice is 'any', and there are no tools.", param="tool_choice")
    asked: dict[str, Any] = {"tool_choice": _CHOICES.get(choice.type)}
    if choice.name is not None:
        asked["tool_choice"] = NamedToolChoice(type="function", function=NamedFunction(name=choice.name))
    if choice.disable_parallel_tool_use is not None:
        asked["parallel_tool_calls"] = not choice.disable_parallel_tool_use
    return asked


def _switches(thinking: Thinking | None, encoder: Encoder) -> dict[str, bool]:
    """Return the template's arguments that a wish about reasoning stands for."""
    if thinking is None:
        return {}
    if thinking.type == "adaptive":  # which leaves it to the model, as is done
        return dict(encoder.thinking_switches(on=True) or {})
    return thinking_switches(encoder, on=thinking.type == "enabled", param="thinking")


def _shape(shape: JsonFormat | None) -> dict[str, Any] | None:
    if shape is None:
        return None
    asked = {"type": "json_schema", "json_schema": {"name": "answer", "schema": shape.json_schema}}
    try:
        parse_response_format(asked)
    except InvalidRequestError as error:  # told in the caller's words
        there, here = "response_format.json_schema", "output_config.format"
        param = (error.param or "").replace(there, here)
        raise InvalidRequestError(error.message.replace(there, here), hint=error.hint, param=param) from error
    return asked
