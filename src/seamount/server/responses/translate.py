"""Puts a response's request into a chat's words: items become messages, and the chat's complaints become the request's.

Used by `answer`. Knows both wire formats and nothing of the engine, of events or of the database.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from seamount.core.errors import InvalidRequestError, RequestError
from seamount.server.wire.chat import (
    AssistantMessage,
    ChatRequest,
    DeveloperMessage,
    Message,
    SystemMessage,
    ToolMessage,
    UserMessage,
)
from seamount.server.wire.common import StreamOptions
from seamount.server.wire.responses import MAX_ITEMS, ResponsesRequest, ResponseTool, ResponseToolChoice
from seamount.server.wire.responses_items import (
    FunctionCallItem,
    FunctionResultItem,
    InputText,
    Item,
    MessageItem,
    OutputMessage,
    OutputText,
    ReasoningItem,
    ReasoningText,
    SummaryText,
)
from seamount.server.wire.tools import (
    CalledFunction,
    FunctionDefinition,
    NamedFunction,
    NamedToolChoice,
    Tool,
    ToolCall,
)

_PREFIXES: dict[type, str] = {
    MessageItem: "msg",
    OutputMessage: "msg",
    ReasoningItem: "rs",
    FunctionCallItem: "fc",
    FunctionResultItem: "fco",
}
# What the chat calls things, and what they are called here; longer names first.
_WORDS = (
    ("response_format.json_schema", "text.format"),
    ("response_format", "text.format"),
    ("max_completion_tokens", "max_output_tokens"),
    ("reasoning_effort", "reasoning.effort"),
)


def new_id(prefix: str) -> str:
    """Return an id that nothing else has."""
    return f"{prefix}_{uuid4().hex}"


def conversation(given: Sequence[Item], before: Sequence[Item] = ()) -> list[Item]:
    """Return the whole conversation: `before` as it is, then what was given, in one spelling, each with an id.

    Raises:
        InvalidRequestError: it is too long, a call has no result, or a result no call.
    """
    items = list(before)
    taken = {item.id for item in items}
    for item in given:
        settled = _settled(item)
        # Pages of items are told apart by ids, so one that comes a second time gets another.
        if settled.id is None or settled.id in taken:
            settled.id = new_id(_PREFIXES[type(settled)])
        taken.add(settled.id)
        items.append(settled)
    if len(items) > MAX_ITEMS:
        raise InvalidRequestError(
            f"The conversation has {len(items)} items; at most {MAX_ITEMS} are allowed.",
            hint="Begin a new one, with what matters of this one.",
            param="input",
        )
    _check_calls(items)
    return items


def chat_request(body: ResponsesRequest, items: Sequence[Item]) -> ChatRequest:
    """Return the chat that asks for the same answer, as a stream that ends with usage.

    Raises:
        InvalidRequestError: parameters contradict each other.
    """
    fields: dict[str, Any] = {
        "model": body.model,
        "messages": _messages(body.instructions, items),
        # A last message of the assistant is part of the conversation, not the beginning of the answer.
        "continue_final_message": False,
        "stream": True,
        "stream_options": StreamOptions(include_usage=True),
        "max_completion_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "parallel_tool_calls": body.parallel_tool_calls,
        "reasoning_effort": body.reasoning.effort if body.reasoning is not None else None,
        "chat_template_kwargs": body.chat_template_kwargs,
        "tools": [_tool(tool) for tool in body.tools] if body.tools else None,
        "tool_choice": _choice(body.tool_choice),
        "response_format": _format(body),
    }
    if (count := body.num_logprobs) is not None:
        fields |= {"logprobs": True, "top_logprobs": count}
    return ChatRequest(**fields)


def in_our_words(error: RequestError) -> RequestError:
    """Return an error of the chat's with the names that this request has for things."""
    param = error.param
    if param is not None:
        param = re.sub(r"^(tools\[\d+\])\.function", r"\1", _renamed(param))
        param = "input" + param.removeprefix("messages") if param.startswith("messages") else param
    hint = None if error.hint is None else _renamed(error.hint)
    return type(error)(_renamed(error.message), hint=hint, code=error.code, retry_after=error.retry_after, param=param)


def _renamed(text: str) -> str:
    for theirs, ours in _WORDS:
        text = text.replace(theirs, ours)
    return text


def _settled(item: Item) -> Item:
    """Return an item with no more than is kept of it, its texts as parts."""
    if isinstance(item, MessageItem):
        parts = [InputText(type="input_text", text=text) for text in _texts(item.content)]
        return MessageItem(type="message", id=item.id, role=item.role, content=parts, status="completed")
    if isinstance(item, OutputMessage):
        said = [OutputText(type="output_text", text=text, annotations=[], logprobs=[]) for text in _texts(item.content)]
        status = item.status or "completed"
        return OutputMessage(type="message", id=item.id, role="assistant", content=said, status=status)
    if isinstance(item, ReasoningItem):
        thought: Sequence[ReasoningText | SummaryText] = item.content or item.summary
        content = [ReasoningText(type="reasoning_text", text=part.text) for part in thought]
        status = item.status or "completed"
        return ReasoningItem(type="reasoning", id=item.id, summary=[], content=content, status=status)
    if isinstance(item, FunctionCallItem):
        return FunctionCallItem(
            type="function_call",
            id=item.id,
            call_id=item.call_id,
            name=item.name,
            arguments=item.arguments,
            status=item.status or "completed",
        )
    output = item.output
    if not isinstance(output, str):
        output = [InputText(type="input_text", text=part.text) for part in output]
    return FunctionResultItem(
        type="function_call_output", id=item.id, call_id=item.call_id, output=output, status="completed"
    )


def _texts(content: str | Sequence[InputText | OutputText]) -> list[str]:
    return [content] if isinstance(content, str) else [part.text for part in content]


def _check_calls(items: Sequence[Item]) -> None:
    """Check that calls and results belong together: the model was made for conversations in which they do."""
    called: set[str] = set()
    returned: set[str] = set()
    for item in items:
        if isinstance(item, FunctionCallItem):
            called.add(item.call_id)
        elif isinstance(item, FunctionResultItem):
            if item.call_id not in called:
                raise InvalidRequestError(
                    f"No function_call with the call_id {item.call_id[:64]!r} comes before its function_call_output.",
                    param="input",
                )
            returned.add(item.call_id)
    for item in items:
        if isinstance(item, FunctionCallItem) and item.call_id not in returned:
            raise InvalidRequestError(
                f"There is no function_call_output for the function_call with the call_id {item.call_id[:64]!r}.",
                hint="Send what the function returned, or that it was not called.",
                param="input",
            )


@dataclass
class _Turn:
    """Items that the model made one after the other: they are one message of a chat."""

    reasoning: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)

    def takes(self, item: Item) -> bool:
        """Say whether an item belongs to it too. Text and reasoning after text begin another one, unless calls came."""
        if isinstance(item, ReasoningItem):
            return not self.texts and not self.calls
        if isinstance(item, OutputMessage):
            return not self.texts or bool(self.calls)
        return isinstance(item, FunctionCallItem)

    def take(self, item: ReasoningItem | OutputMessage | FunctionCallItem) -> None:
        if isinstance(item, ReasoningItem):
            self.reasoning += [part.text for part in item.content or ()]
        elif isinstance(item, OutputMessage):
            self.texts.append("\n".join(_texts(item.content)))
        else:
            function = CalledFunction(name=item.name, arguments=item.arguments)
            self.calls.append(ToolCall(id=item.call_id, type="function", function=function))

    def message(self) -> AssistantMessage:
        return AssistantMessage(
            role="assistant",
            content="".join(self.texts) or (None if self.calls else ""),
            reasoning_content="".join(self.reasoning) or None,
            tool_calls=self.calls or None,
        )


def _messages(instructions: str | None, items: Sequence[Item]) -> list[Message]:
    messages: list[Message] = []
    if instructions:
        messages.append(SystemMessage(role="system", content=instructions))
    turn: _Turn | None = None
    for item in items:
        if turn is not None and not turn.takes(item):
            messages.append(turn.message())
            turn = None
        if isinstance(item, MessageItem):
            messages.append(_message(item))
        elif isinstance(item, FunctionResultItem):
            output = "\n".join(_texts(item.output))
            messages.append(ToolMessage(role="tool", content=output, tool_call_id=item.call_id))
        else:
            turn = turn or _Turn()
            turn.take(item)
    if turn is not None:
        messages.append(turn.message())
    return messages


def _message(item: MessageItem) -> Message:
    text = "\n".join(_texts(item.content))
    if item.role == "user":
        return UserMessage(role="user", content=text)
    if item.role == "system":
        return SystemMessage(role="system", content=text)
    return DeveloperMessage(role="developer", content=text)


def _tool(tool: ResponseTool) -> Tool:
    given = {name: getattr(tool, name) for name in FunctionDefinition.model_fields if name in tool.model_fields_set}
    return Tool(type="function", function=FunctionDefinition(**given))


def _choice(choice: Any) -> Any:
    if not isinstance(choice, ResponseToolChoice):
        return choice
    return NamedToolChoice(type="function", function=NamedFunction(name=choice.name))


def _format(body: ResponsesRequest) -> dict[str, Any] | None:
    """Return the answer's shape as a chat spells it: what a schema comes with is one level further down there."""
    given = body.text.format if body.text is not None else None
    if given is None or given.get("type") != "json_schema":
        return given
    return {"type": "json_schema", "json_schema": {name: value for name, value in given.items() if name != "type"}}
