"""One answer of a chat as it comes: the engine's text becomes reasoning, content and tool calls in the wire's words.

Used by `chat`. Knows the parsers and the wire's deltas, nothing of events, requests or the engine.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from seamount.core.requests import Chunk
from seamount.models.reasoning import ReasoningParser
from seamount.models.tools import ArgumentDelta, CallStarted, ContentDelta, ToolCallParser, ToolEvent
from seamount.server.usage import ReasoningCount
from seamount.server.wire.chat import ChatDelta, ChatMessage, ContentLogprob, FinishReason
from seamount.server.wire.tools import CalledFunction, CalledFunctionDelta, ToolCall, ToolCallDelta


@dataclass
class Choice:
    """One of `n` answers, as far as it has come.

    Attributes:
        reasoning_parser: takes the reasoning out.
        tool_parser: takes tool calls out of the rest; None where the model may call nothing: its text is content then.
        several_calls: pass on more than the first call.
    """

    reasoning_parser: ReasoningParser
    tool_parser: ToolCallParser | None = None
    several_calls: bool = True
    has_begun: bool = False
    num_reasoning_tokens: int = 0
    reasoning: str = ""
    content: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    logprobs: list[ContentLogprob] = field(default_factory=list)
    last: Chunk | None = None
    _counted: ReasoningCount = field(default_factory=ReasoningCount)

    def take(self, chunk: Chunk) -> list[ChatDelta]:
        """Return what a chunk adds, in the order in which it is to be sent; nothing while text is held back."""
        final = chunk.finish_reason is not None
        split = self.reasoning_parser.push(chunk.text)
        reasoning, content = split.reasoning, split.content
        if final:
            rest = self.reasoning_parser.flush()
            reasoning, content = reasoning + rest.reasoning, content + rest.content
            self.last = chunk
        self.num_reasoning_tokens += self._counted.add(
            len(chunk.token_ids), reasoning=bool(reasoning), content=bool(content)
        )
        if final:
            self.num_reasoning_tokens += self._counted.end()
        return self._deltas(reasoning, self._events(content, final=final))

    def finish_reason(self) -> FinishReason | None:
        """Return the wire's word for how the answer ended; None before its end."""
        reason = self.last.finish_reason if self.last is not None else None
        if reason == "stop":
            return "tool_calls" if self.calls else "stop"
        return "length" if reason == "length" else None  # the service raises for the engine's other reasons

    def message(self) -> ChatMessage:
        """Return the whole answer, from what the deltas added up to."""
        message = ChatMessage(role="assistant", content=self.content, refusal=None)
        if self.reasoning:
            message.reasoning_content = message.reasoning = self.reasoning
        if self.calls:
            message.content = self.content or None
            message.tool_calls = self.calls
        return message

    def _events(self, content: str, *, final: bool) -> list[ToolEvent]:
        if self.tool_parser is None:
            return [ContentDelta(content)] if content else []
        events = self.tool_parser.push(content) if content else []
        if final:
            events += self.tool_parser.flush(cut=self.last is not None and self.last.finish_reason == "length")
        return events

    def _deltas(self, reasoning: str, events: list[ToolEvent]) -> list[ChatDelta]:
        deltas: list[ChatDelta] = []
        if reasoning:
            self.reasoning += reasoning
            deltas.append(ChatDelta(reasoning_content=reasoning, reasoning=reasoning))
        for event in events:
            if isinstance(event, ContentDelta):
                self.content += event.text
                # Content joins the reasoning before it in one chunk; calls stand alone.
                if not deltas or deltas[-1].tool_calls:
                    deltas.append(ChatDelta())
                deltas[-1].content = (deltas[-1].content or "") + event.text
            elif isinstance(event, CallStarted) and (self.several_calls or not event.index):
                self.calls.append(_new_call(event))
                deltas.append(_call_delta(_started(event)))
            elif isinstance(event, ArgumentDelta) and event.index < len(self.calls):
                self.calls[event.index].function.arguments += event.text
                arguments = CalledFunctionDelta(arguments=event.text)
                deltas.append(_call_delta(ToolCallDelta(index=event.index, function=arguments)))
        return deltas


def _new_call(event: CallStarted) -> ToolCall:
    return ToolCall(id=event.id, type="function", function=CalledFunction(name=event.name, arguments=""))


def _started(event: CallStarted) -> ToolCallDelta:
    function = CalledFunctionDelta(name=event.name, arguments="")
    return ToolCallDelta(index=event.index, id=event.id, type="function", function=function)


def _call_delta(call: ToolCallDelta) -> ChatDelta:
    return ChatDelta(tool_calls=[call])
