"""What users hand over, row by row: `Record`, and what is wrong with one: `RecordError`.

The words that `reading`, `formats`, `rendering` and `stream` share. Knows no file and no model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from seamount.core.errors import InvalidRequestError


@dataclass(frozen=True, slots=True)
class Record:
    """One row.

    Attributes:
        where: for people: "file.jsonl:12", "file.parquet row 12" or "item 12".
        row: its number within its source, from 1.
        value: its fields.
    """

    where: str
    row: int
    value: dict[str, Any]


class RecordError(InvalidRequestError):
    """A record cannot be learned from. The message never quotes what the record says.

    Attributes:
        where, row: as of the `Record`; row 0 is the source as a whole.
        field: path of the field to blame, such as `messages[2].content`; empty where it is the whole row.
        reason: what is wrong with it.
        is_overlong: it is only too long, which the caller may allow for.
    """

    code = "bad_record"

    def __init__(
        self,
        where: str,
        row: int = 0,
        field: str = "",
        reason: str = "",
        *,
        hint: str | None = None,
        is_overlong: bool = False,
        **rest: Any,
    ) -> None:
        message = f"{where}: {f'{field} ' if field else ''}{reason}." if reason else where
        super().__init__(message, hint=hint, **rest)
        self.where = where
        self.row = row
        self.field = field
        self.reason = reason
        self.is_overlong = is_overlong

    def to_fields(self) -> dict[str, str | int | None]:
        """Return the error as plain fields, for a report."""
        return {
            "where": self.where,
            "row": self.row,
            "field": self.field,
            "reason": self.reason,
            "hint": self.hint,
        }
