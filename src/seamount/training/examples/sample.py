"""What a record says, whatever format it was written in: `Sample`. Made by `formats`, read by `rendering`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .record import RecordError


@dataclass(frozen=True, slots=True)
class Sample:
    """A conversation, or plain text.

    Attributes:
        where, row: as of the `Record`.
        id: what the record calls itself, where it does.
        messages: OpenAI's, reasoning in `reasoning_content` and never within `content`; empty for plain text.
        fields: for each message the path of the field that it comes from.
        loss: for each message whether the record wants it learned; None where it does not say.
        tools: OpenAI's schemas.
        prompt, completion: plain text to read, and to learn; for a format without turns.
    """

    where: str
    row: int
    id: str | None = None
    messages: tuple[dict[str, Any], ...] = ()
    fields: tuple[str, ...] = ()
    loss: tuple[bool | None, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    prompt: str = ""
    completion: str = ""

    def error(self, field: str, reason: str, *, hint: str | None = None, is_overlong: bool = False) -> RecordError:
        """Return the error that names this record and one of its fields."""
        return RecordError(self.where, self.row, field, reason, hint=hint, is_overlong=is_overlong)

    def learned_text(self) -> str:
        """Return what assistants say in it, or its plain text: for guessing its language."""
        said = (m.get("content") or "" for m in self.messages if m["role"] == "assistant")
        return "\n".join([*said, self.completion])
