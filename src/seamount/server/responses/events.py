"""One response as it comes: a chat's chunks become output items, and the events that tell them.

Used by `answer`. A whole answer is what its events add up to, so there is no second way to make one. Knows
both wire formats, nothing of connections, of the engine or of the database.

The events of an item, as OpenAI's streams have them: `output_item.added`; for text and reasoning `content_part.added`;
deltas; what the deltas add up to; `content_part.done`; `output_item.done`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from seamount.core.errors import SeamountError
from seamount.server.errors import error_body
from seamount.server.wire.chat import ChatChunk, ChatDelta, FinishReason
from seamount.server.wire.common import ErrorObject, Usage
from seamount.server.wire.responses import (
    IncompleteDetails,
    InputTokensDetails,
    OutputTokensDetails,
    ResponseObject,
    ResponseUsage,
)
from seamount.server.wire.responses_items import (
    FunctionCallItem,
    OutputItem,
    OutputMessage,
    OutputText,
    ReasoningItem,
    ReasoningText,
)
from seamount.server.wire.tools import ToolCallDelta

from .translate import new_id

Event = dict[str, Any]
Kind = Literal["message", "reasoning", "function_call"]
_PREFIXES: dict[Kind, str] = {"message": "msg", "reasoning": "rs", "function_call": "fc"}
# The part that text of a kind stands in, which is also the name of its events.
_PARTS: dict[Kind, str] = {"message": "output_text", "reasoning": "reasoning_text"}


@dataclass
class _Open:
    """The output item that is being written.

    Attributes:
        index: its place in the output.
        pieces: its text, or its arguments.
    """

    kind: Kind
    id: str
    index: int
    call_id: str = ""
    name: str = ""
    pieces: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)

    @property
    def part(self) -> dict[str, Any]:
        """The part that holds the text."""
        text = "".join(self.pieces)
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        # A copy: what is told of the part now does not change with what is written to it later.
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(self.logprobs)}

    def item(self, status: Literal["completed", "incomplete"]) -> OutputItem:
        """Return the item as it is at its end."""
        text = "".join(self.pieces)
        if self.kind == "function_call":
            return FunctionCallItem(
                type="function_call", id=self.id, call_id=self.call_id, name=self.name, arguments=text, status=status
            )
        if self.kind == "reasoning":
            thought = ReasoningText(type="reasoning_text", text=text)
            return ReasoningItem(type="reasoning", id=self.id, summary=[], content=[thought], status=status)
        said = OutputText(type="output_text", text=text, annotations=[], logprobs=self.logprobs)
        return OutputMessage(type="message", id=self.id, role="assistant", content=[said], status=status)

    def begun(self) -> dict[str, Any]:
        """Return the item as it is at its beginning."""
        plain: dict[str, Any] = {"id": self.id, "type": self.kind, "status": "in_progress"}
        if self.kind == "function_call":
            return plain | {"call_id": self.call_id, "name": self.name, "arguments": ""}
        if self.kind == "reasoning":
            return plain | {"summary": [], "content": []}
        return plain | {"role": "assistant", "content": []}


class ResponseWriter:
    """Writes one response.

    Attributes:
        response: as far as it has come; complete after `end`.
    """

    def __init__(self, response: ResponseObject) -> None:
        self.response = response
        self._num_events = 0
        self._has_begun = False
        self._open: _Open | None = None
        self._finish: FinishReason | None = None
        self._waiting: list[dict[str, Any]] = []

    def begin(self) -> list[Event]:
        """Return the events that begin the response; none where it has begun."""
        if self._has_begun:
            return []
        self._has_begun = True
        return [self._whole("response.created"), self._whole("response.in_progress")]

    def take(self, chunk: ChatChunk) -> list[Event]:
        """Return the events that a chunk brings."""
        events = self.begin()
        if chunk.usage is not None:
            self.response.usage = _usage(chunk.usage)
        for choice in chunk.choices:
            entries = choice.logprobs.content if choice.logprobs is not None else []
            events += self._take(choice.delta, [entry.model_dump() for entry in entries])
            self._finish = choice.finish_reason or self._finish
        return events

    def end(self, now_s: int) -> list[Event]:
        """Return the events that end the last item, and complete the response; `last` then tells that."""
        response, was_cut = self.response, self._finish == "length"
        events = self.begin() + self._close("incomplete" if was_cut else "completed")
        if not was_cut and not any(item.type != "reasoning" for item in response.output):
            events += self._start("message") + self._close("completed")  # said nothing, which is an answer too
        response.status = "incomplete" if was_cut else "completed"
        response.completed_at = None if was_cut else now_s
        response.incomplete_details = IncompleteDetails(reason="max_output_tokens") if was_cut else None
        return events

    def last(self) -> Event:
        """Return the last event of a response that ended."""
        return self._whole(f"response.{self.response.status}")

    def fail(self, error: SeamountError) -> list[Event]:
        """Return the events that tell that there will be no more: items that were not ended are left out."""
        events = self.begin()
        self.response.status = "failed"
        self.response.error = ErrorObject(**error_body(error))
        self.response.store = False
        return [*events, self._whole("response.failed")]

    def _take(self, delta: ChatDelta, entries: list[dict[str, Any]]) -> list[Event]:
        """Write what a delta adds.

        Log-probabilities come with tokens, and tokens can come before their text is certain. They wait for it, and
        belong to the text if that is what comes; tokens of reasoning, of calls and of the marks round them are dropped,
        and so are those of the end, which have no text.
        """
        events: list[Event] = []
        if delta.reasoning_content:
            events += self._write("reasoning", delta.reasoning_content)
            self._waiting, entries = [], []
        if delta.content:
            was_text = self._open is None or self._open.kind == "message"
            events += self._write("message", delta.content, (self._waiting if was_text else []) + entries)
            self._waiting, entries = [], []
        for call in delta.tool_calls or ():
            events += self._write_call(call)
            self._waiting, entries = [], []
        self._waiting += entries
        return events

    def _write(self, kind: Kind, text: str, logprobs: list[dict[str, Any]] | None = None) -> list[Event]:
        events: list[Event] = []
        if self._open is None or self._open.kind != kind:
            events += self._close("completed") + self._start(kind)
        events.append(self._add(text, logprobs))
        return events

    def _write_call(self, call: ToolCallDelta) -> list[Event]:
        events: list[Event] = []
        if call.id is not None:  # the first of a call's deltas
            name = call.function.name or ""
            events += self._close("completed") + self._start("function_call", call_id=call.id, name=name)
        if call.function.arguments:
            events.append(self._add(call.function.arguments))
        return events

    def _start(self, kind: Kind, *, call_id: str = "", name: str = "") -> list[Event]:
        index = len(self.response.output)
        self._open = opened = _Open(kind, new_id(_PREFIXES[kind]), index, call_id, name)
        events = [self._event("response.output_item.added", output_index=index, item=opened.begun())]
        if kind in _PARTS:
            events.append(self._event("response.content_part.added", **_place(opened), part=opened.part))
        return events

    def _add(self, text: str, logprobs: list[dict[str, Any]] | None = None) -> Event:
        opened = self._opened()
        opened.pieces.append(text)
        if opened.kind == "function_call":
            return self._event("response.function_call_arguments.delta", **_place(opened), delta=text)
        if opened.kind == "reasoning":
            return self._event("response.reasoning_text.delta", **_place(opened), delta=text)
        opened.logprobs += logprobs or []
        return self._event("response.output_text.delta", **_place(opened), delta=text, logprobs=logprobs or [])

    def _close(self, status: Literal["completed", "incomplete"]) -> list[Event]:
        if self._open is None:
            return []
        opened, self._open = self._open, None
        text, place = "".join(opened.pieces), _place(opened)
        if opened.kind == "function_call":
            name = "response.function_call_arguments.done"
            events = [self._event(name, **place, name=opened.name, arguments=text)]
        else:
            more = {"logprobs": opened.logprobs} if opened.kind == "message" else {}
            events = [
                self._event(f"response.{_PARTS[opened.kind]}.done", **place, text=text, **more),
                self._event("response.content_part.done", **place, part=opened.part),
            ]
        item = opened.item(status)
        self.response.output.append(item)
        plain = item.model_dump(exclude_unset=True)
        events.append(self._event("response.output_item.done", output_index=opened.index, item=plain))
        return events

    def _opened(self) -> _Open:
        if self._open is None:
            raise RuntimeError("a delta came for no item")
        return self._open

    def _whole(self, kind: str) -> Event:
        return self._event(kind, response=self.response.model_dump(mode="json", exclude_unset=True))

    def _event(self, kind: str, **fields: Any) -> Event:
        event = {"type": kind, "sequence_number": self._num_events, **fields}
        self._num_events += 1
        return event


def _place(opened: _Open) -> dict[str, Any]:
    """Return where a delta goes."""
    place: dict[str, Any] = {"item_id": opened.id, "output_index": opened.index}
    return place if opened.kind == "function_call" else {**place, "content_index": 0}


def _usage(usage: Usage) -> ResponseUsage:
    cached, thought = usage.prompt_tokens_details, usage.completion_tokens_details
    return ResponseUsage(
        input_tokens=usage.prompt_tokens,
        input_tokens_details=InputTokensDetails(cached_tokens=cached.cached_tokens if cached else 0),
        output_tokens=usage.completion_tokens,
        output_tokens_details=OutputTokensDetails(reasoning_tokens=thought.reasoning_tokens if thought else 0),
        total_tokens=usage.total_tokens,
    )
