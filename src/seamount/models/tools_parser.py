"""Finds tool calls in an answer's text while it streams: `ToolCallParser` and its events.

Called by `models.tools` for the server. Knows the syntax that it is given (`models.tools_formats`), nothing of tokens,
templates or wire formats.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal
from uuid import uuid4

from .tools_formats import CallSyntax, Opening, Place
from .tools_json import JsonFollower, members
from .tools_syntax import MAX_SPACE, is_name

_WHITESPACE = " \t\r\n"


@dataclass(frozen=True)
class ContentDelta:
    """Text of the answer that belongs to no call."""

    text: str


@dataclass(frozen=True)
class CallStarted:
    """A call begins; calls are numbered from 0, and one ends before the next begins."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class ArgumentDelta:
    """A piece of a call's arguments, as the model wrote them."""

    index: int
    text: str


@dataclass(frozen=True)
class CallEnded:
    """A call's arguments are complete, or the answer's end cut them off."""

    index: int


ToolEvent = ContentDelta | CallStarted | ArgumentDelta | CallEnded


def new_call_id() -> str:
    """Return an id for a call, unique everywhere."""
    return f"call_{uuid4().hex[:24]}"


class ToolCallParser:
    """A state machine over one answer's text, reasoning taken out before.

    A call counts from where its arguments begin: with its opening mark, a name and the brace of an object. What does
    not come so far is content, all of it. From there on its arguments are passed on as they are written; they end with
    their closing brace, or, where they turn out to be no JSON, at the format's closing mark. Marks and the whitespace
    between calls belong to no event. Invariant: how the text is cut into pushes does not change the events, once
    neighbours of one kind are joined.

    An answer that its length cuts off may end inside a call's head, which is then no event either: with a mark that
    says enough by itself, or, in an answer that must call, with any beginning of one.

    Args:
        syntax: how the model writes calls.
        names: the offered tools.
        must_call: the answer was made to be calls and nothing else.
        new_id: makes ids of calls.
    """

    def __init__(
        self,
        syntax: CallSyntax,
        names: Collection[str],
        *,
        must_call: bool = False,
        new_id: Callable[[], str] = new_call_id,
    ) -> None:
        self._syntax = syntax
        self._names = frozenset(names)
        self._must_call = must_call
        self._new_id = new_id
        self._triggers = [opening.trigger for opening in syntax.openings]
        if syntax.section_end is not None:
            self._triggers.append(syntax.section_end)
        self._held = ""
        self._state: Literal["text", "wrapper", "arguments", "broken", "closing"] = "text"
        self._place: Place = "start"
        self._in_section = False  # behind a call whose section has not been closed
        self._num_calls = 0
        self._follower = JsonFollower()
        self._opening = syntax.openings[0]
        self._at = 0  # in state "wrapper", where in the held text its trigger is,
        self._brace = 0  # its object begins,
        self._followed = 0  # and how far it was followed
        self._closing = syntax.closing
        self._cut = False
        self._events: list[ToolEvent] = []

    def push(self, text: str) -> list[ToolEvent]:
        """Take the next piece of text and return what became certain."""
        self._held += text
        return self._run(final=False)

    def flush(self, *, cut: bool = False) -> list[ToolEvent]:
        """Return what was held back; the answer is over. A call that is open ends.

        Args:
            cut: it ended at the limit of its length, not where the model would have ended it.
        """
        self._cut = cut
        return self._run(final=True)

    def _run(self, *, final: bool) -> list[ToolEvent]:
        steps = {
            "text": self._take_text,
            "wrapper": self._take_wrapper,
            "arguments": self._take_arguments,
            "broken": self._take_broken,
            "closing": self._take_closing,
        }
        while steps[self._state](final):
            pass
        events, self._events = self._events, []
        return events

    # Each step takes what it can of the held text and returns whether the next one can go on without more text.

    def _take_text(self, final: bool) -> bool:
        at = self._find_trigger()
        if at < 0:
            if final and self._place == "after" and not self._held.strip(_WHITESPACE):
                self._held = ""
            drops = final and self._cut and self._must_call
            self._emit_content(len(self._held) - (0 if final and not drops else self._num_undecided()))
            if drops:
                self._held = ""
            return False
        start = self._space_before(at)
        if start > 0:
            # Text in front may change the place, and with it what can begin here: look again.
            self._emit_content(start)
            return True
        section_end = self._syntax.section_end
        if section_end is not None and self._in_section and self._held.startswith(section_end, at):
            self._held = self._held[at + len(section_end) :]
            self._in_section = False
            return True
        for opening in self._openings():
            if not self._held.startswith(opening.trigger, at):
                continue
            found = opening.syntax.match(self._held, at)
            if found is not None:
                name = found[found.lastindex or 0]
                if self._is_callable(opening, name):
                    self._start_call(name)
                    self._held = self._held[found.end() :]
                    self._follower, self._state = JsonFollower(), "arguments"
                    return True
            elif opening.syntax.may_match(self._held, at) and (not final or self._drops(opening)):
                if final:
                    self._held = ""
                return False
            elif opening.wrapper is not None and (prefix := opening.wrapper.match(self._held, at)) is not None:
                self._opening, self._at, self._brace = opening, at, prefix.end()
                self._followed = prefix.end()
                self._follower, self._state = JsonFollower(), "wrapper"
                return True
        self._emit_content(at + 1)
        return True

    def _take_wrapper(self, final: bool) -> bool:
        """Wait for the whole object that holds name and arguments."""
        self._followed = self._follower.feed(self._held, self._followed)
        if not (self._follower.done or self._follower.broken or final):
            return False
        if not (self._follower.done or self._follower.broken) and self._drops(self._opening):
            self._held = ""
            return False
        call = _named_call(self._held[self._brace : self._followed]) if self._follower.done else None
        if call is None or not self._is_callable(self._opening, call[0]):
            self._state = "text"
            self._emit_content(self._at + 1)
            return True
        self._held = self._held[self._followed :]
        self._start_call(call[0])
        self._emit(ArgumentDelta(self._num_calls - 1, call[1]))
        self._end_call("closing")
        self._closing = self._syntax.wrapper_closing
        return True

    def _take_arguments(self, final: bool) -> bool:
        taken = self._follower.feed(self._held)
        self._emit_arguments(taken)
        if self._follower.broken:
            self._state = "broken"
            return True
        if self._follower.done:
            self._end_call("closing")
            self._closing = self._syntax.closing
            return True
        if final:
            self._end_call("text")
        return False

    def _take_broken(self, final: bool) -> bool:
        mark = self._syntax.end
        at = -1 if mark is None else self._held.find(mark)
        if mark is not None and at >= 0:
            self._emit_arguments(at)
            self._held = self._held[len(mark) :]
            self._end_call("text")
            return True
        self._emit_arguments(len(self._held) - (0 if final or mark is None else _overlap(self._held, mark)))
        if final:
            self._end_call("text")
        return False

    def _take_closing(self, final: bool) -> bool:
        self._state = "text"
        found = self._closing.match(self._held, 0)
        if found is not None:
            self._held = self._held[found.end() :]
        elif self._closing.may_match(self._held, 0):
            if not final:
                self._state = "closing"
                return False
            self._held = ""  # a closing that the answer's end cut off
        return True

    def _openings(self) -> list[Opening]:
        return [opening for opening in self._syntax.openings if self._place in opening.places]

    def _find_trigger(self) -> int:
        """Return where the first text stands that may begin or close something here, -1 where none does."""
        triggers = [opening.trigger for opening in self._openings()]
        if self._in_section and self._syntax.section_end is not None:
            triggers.append(self._syntax.section_end)
        return min((at for trigger in triggers if (at := self._held.find(trigger)) >= 0), default=-1)

    def _num_undecided(self) -> int:
        """Return how many last characters may still belong to a call: the beginning of a trigger, space before it."""
        length = max(_overlap(self._held, trigger) for trigger in self._triggers)
        return len(self._held) - self._space_before(len(self._held) - length)

    def _space_before(self, end: int) -> int:
        """Return where the whitespace in front of `end` begins that belongs to a call there."""
        start = end
        while start > 0 and end - start < MAX_SPACE and self._held[start - 1] in _WHITESPACE:
            start -= 1
        return start

    def _drops(self, opening: Opening) -> bool:
        """Whether the head of a call is dropped, now that the answer is over."""
        return self._cut and (self._must_call or not opening.known_only)

    def _is_callable(self, opening: Opening, name: str) -> bool:
        return is_name(name) and (name in self._names or not opening.known_only)

    def _start_call(self, name: str) -> None:
        self._emit(CallStarted(self._num_calls, self._new_id(), name))
        self._num_calls += 1

    def _end_call(self, state: Literal["text", "closing"]) -> None:
        self._emit(CallEnded(self._num_calls - 1))
        self._state, self._place = state, "after"
        self._in_section = self._syntax.section_end is not None

    def _emit_content(self, length: int) -> None:
        text, self._held = self._held[:length], self._held[length:]
        if text:
            self._emit(ContentDelta(text))
        if text.strip(_WHITESPACE):
            self._place = "text"

    def _emit_arguments(self, length: int) -> None:
        text, self._held = self._held[:length], self._held[length:]
        if text:
            self._emit(ArgumentDelta(self._num_calls - 1, text))

    def _emit(self, event: ToolEvent) -> None:
        """Add an event, joined with the last one where both are text of one kind."""
        last = self._events[-1] if self._events else None
        if isinstance(event, ContentDelta) and isinstance(last, ContentDelta):
            self._events[-1] = ContentDelta(last.text + event.text)
        elif isinstance(event, ArgumentDelta) and isinstance(last, ArgumentDelta):
            self._events[-1] = ArgumentDelta(event.index, last.text + event.text)
        else:
            self._events.append(event)


def _named_call(text: str) -> tuple[str, str] | None:
    """Return name and arguments' text of a JSON object that is a call; None when it is none.

    A call without arguments has none: the empty object.
    """
    found = members(text)
    if found is None:
        return None
    values = dict(found)
    names = set(values)
    arguments = [values[key] for key in ("arguments", "parameters") if key in values]
    if not names <= {"name", "arguments", "parameters", "type", "id"} or len(arguments) > 1:
        return None
    name = values.get("name", "")
    if arguments and not arguments[0].startswith("{"):
        return None
    return name[1:-1], (arguments[0] if arguments else "{}")


def _overlap(text: str, mark: str) -> int:
    """Return the length of the longest end of `text` that is a proper beginning of `mark`."""
    for length in range(min(len(text), len(mark) - 1), 0, -1):
        if text.endswith(mark[:length]):
            return length
    return 0
