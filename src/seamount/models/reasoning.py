"""Splits a model's text into reasoning and answer, while it streams.

Called by `models.prompt` for the engine and the server. Knows the two tags and nothing of tokens, templates
or wire formats.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"
REASONING_TAGS = (THINK_OPEN, THINK_CLOSE)


@dataclass(frozen=True)
class Delta:
    """Text that became certain: at most one of the two is long, both may be empty."""

    reasoning: str = ""
    content: str = ""


class ReasoningParser:
    """A state machine over one answer's text.

    Reasoning runs from an opening tag at the very start (or from the first character, where the prompt
    already ends in the tag) to the first closing tag; everything else is content. The tags are dropped, and
    so are the newlines that touch them. An opening tag that repeats the prompt's is dropped too, so tags
    never come out doubled. Text that may still turn into a tag is held back. Invariant: how the text is cut
    into pushes does not change the totals.

    Args:
        starts_in_reasoning: the prompt ends inside the reasoning (`EncodedPrompt.starts_in_reasoning`).
    """

    def __init__(self, *, starts_in_reasoning: bool) -> None:
        self._starts_in_reasoning = starts_in_reasoning
        self._held = ""
        self._state: Literal["start", "reasoning", "content"] = "start"
        self._at_edge = False  # just behind a tag: newlines are dropped

    def push(self, text: str) -> Delta:
        """Take the next piece of text and return what became certain."""
        self._held += text
        reasoning = ""
        if self._state == "start" and not self._leave_start(final=False):
            return Delta()
        if self._state == "reasoning":
            reasoning = self._take_reasoning()
        if self._state == "content":
            return Delta(reasoning, self._take_content())
        return Delta(reasoning)

    def flush(self) -> Delta:
        """Return what was held back; the answer is over."""
        if self._state == "start":
            self._leave_start(final=True)
        held, self._held = self._held, ""
        if self._at_edge:
            held = held.lstrip("\n")
        return Delta(reasoning=held) if self._state == "reasoning" else Delta(content=held)

    def _leave_start(self, *, final: bool) -> bool:
        """Decide what the text begins with; False while that is open."""
        body = self._held.lstrip(" \r\n\t")
        if not final and len(body) < len(THINK_OPEN) and THINK_OPEN.startswith(body):
            return False
        if body.startswith(THINK_OPEN):
            self._held = body[len(THINK_OPEN) :]
            self._state, self._at_edge = "reasoning", True
        else:
            self._state = "reasoning" if self._starts_in_reasoning else "content"
            self._at_edge = self._starts_in_reasoning
        return True

    def _take_reasoning(self) -> str:
        self._drop_edge_newlines()
        before, tag, after = self._held.partition(THINK_CLOSE)
        if tag:
            self._held = after
            self._state, self._at_edge = "content", True
            return before.rstrip("\n")
        keep = _tail_that_may_be_tag(before)
        certain = before[: len(before) - keep].rstrip("\n")
        self._held = before[len(certain) :]
        return certain

    def _take_content(self) -> str:
        self._drop_edge_newlines()
        content, self._held = self._held, ""
        return content

    def _drop_edge_newlines(self) -> None:
        if self._at_edge:
            self._held = self._held.lstrip("\n")
            self._at_edge = not self._held


def _tail_that_may_be_tag(text: str) -> int:
    """Return the length of the longest end of `text` that begins the closing tag."""
    for length in range(min(len(text), len(THINK_CLOSE) - 1), 0, -1):
        if text.endswith(THINK_CLOSE[:length]):
            return length
    return 0
