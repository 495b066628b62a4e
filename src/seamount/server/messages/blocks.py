"""One answer as Anthropic's content blocks, while it comes: the deltas of a chat become events, and add up to blocks.

Used by `messages`. A state machine; it knows the chat's deltas and nothing of connections or of the engine.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic_core import from_json

from seamount.server.wire.chat import ChatDelta
from seamount.server.wire.messages import AnswerBlock, TextBlock, ThinkingBlock, ToolUseBlock
from seamount.server.wire.tools import ToolCallDelta

Event = dict[str, Any]
"""One event of a stream, as it is spelled in JSON; its `type` is the event's name too."""


@dataclass
class _Block:
    """A block that is being written."""

    kind: Literal["text", "thinking", "tool_use"]
    head: dict[str, Any]
    pieces: list[str] = field(default_factory=list)

    def whole(self) -> AnswerBlock:
        text = "".join(self.pieces)
        if self.kind == "text":
            return TextBlock(type="text", text=text)
        if self.kind == "thinking":
            return ThinkingBlock(type="thinking", thinking=text, signature="")
        return ToolUseBlock(type="tool_use", id=self.head["id"], name=self.head["name"], input=parse_input(text))


class Blocks:
    """The blocks of one answer, one behind the other: each ends where the next begins.

    Space before a text block's first letter is held back, so that there is none of space alone, as between two calls.

    Args:
        shows_thinking: else reasoning has its block, and no text.
    """

    def __init__(self, *, shows_thinking: bool = True) -> None:
        self._shows_thinking = shows_thinking
        self._blocks: list[_Block] = []
        self._is_open = False
        self._space = ""

    def take(self, delta: ChatDelta) -> list[Event]:
        """Return the events that a delta makes."""
        events: list[Event] = []
        if delta.reasoning:
            events += self._begin("thinking", {"thinking": "", "signature": ""})
            if self._shows_thinking:
                events.append(self._add("thinking_delta", "thinking", delta.reasoning))
        if delta.content:
            events += self._text(delta.content)
        for call in delta.tool_calls or ():
            events += self._call(call)
        return events

    def end(self) -> list[Event]:
        """Return the event that ends the last block; the answer is over."""
        if not self._is_open:
            return []
        self._is_open = False
        return [{"type": "content_block_stop", "index": len(self._blocks) - 1}]

    def content(self) -> list[AnswerBlock]:
        """Return the blocks, as far as they have come."""
        return [block.whole() for block in self._blocks]

    def _text(self, text: str) -> list[Event]:
        if not (self._is_open and self._blocks[-1].kind == "text"):
            text, self._space = self._space + text, ""
            if not text.strip():
                self._space = text
                return []
        return [*self._begin("text", {"text": ""}), self._add("text_delta", "text", text)]

    def _call(self, call: ToolCallDelta) -> list[Event]:
        events: list[Event] = []
        if call.id is not None:
            events += self.end()
            events += self._begin("tool_use", {"id": call.id, "name": call.function.name, "input": {}})
        if call.function.arguments:
            events.append(self._add("input_json_delta", "partial_json", call.function.arguments))
        return events

    def _begin(self, kind: Literal["text", "thinking", "tool_use"], head: dict[str, Any]) -> list[Event]:
        """Open a block, unless one of this kind is open."""
        if self._is_open and self._blocks[-1].kind == kind:
            return []
        events = self.end()
        self._space = ""
        self._blocks.append(_Block(kind, head))
        self._is_open = True
        block = {"type": kind, **head}
        return [*events, {"type": "content_block_start", "index": len(self._blocks) - 1, "content_block": block}]

    def _add(self, kind: str, name: str, text: str) -> Event:
        self._blocks[-1].pieces.append(text)
        delta = {"type": kind, name: text}
        return {"type": "content_block_delta", "index": len(self._blocks) - 1, "delta": delta}


def parse_input(text: str) -> dict[str, Any]:
    """Return a call's arguments as an object: of those that were cut off what there is, of what is no JSON nothing.

    Clients that add a stream up do the same.
    """
    try:
        found = from_json(text, allow_inf_nan=False, allow_partial="trailing-strings")
        json.dumps(found, allow_nan=False)  # a number may be beyond all bounds without that name
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
