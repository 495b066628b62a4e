"""Typed, bounded reading of one JSON object from an untrusted checkpoint, for `models.config`."""

from __future__ import annotations

import math
from typing import Any

from seamount.core.errors import CheckpointError


class Fields:
    """Reads fields of `raw`; every error names the source and the field.

    A field that is null counts as absent. Fields without a default are required.
    """

    def __init__(self, raw: dict[str, Any], where: str) -> None:
        self.raw = raw
        self.where = where

    def text(self, name: str, default: str | None = None) -> str:
        value = self._get(name, default)
        if not isinstance(value, str):
            raise self._bad(name, "must be a string")
        return value

    def boolean(self, name: str, *, default: bool) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self._bad(name, "must be true or false")
        return value

    def integer(self, name: str, low: int, high: int, *, default: int | None = None) -> int:
        value = self._get(name, default)
        return self._integer(name, value, low, high)

    def optional_integer(self, name: str, low: int, high: int) -> int | None:
        value = self.raw.get(name)
        return None if value is None else self._integer(name, value, low, high)

    def integers(self, name: str, low: int, high: int) -> tuple[int, ...]:
        """One integer or a list of them; absent gives none."""
        value = self.raw.get(name)
        values = value if isinstance(value, list) else [] if value is None else [value]
        return tuple(self._integer(name, item, low, high) for item in values)

    def number(self, name: str, low: float, high: float, *, default: float | None = None) -> float:
        value = self._get(name, default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or (isinstance(value, float) and not math.isfinite(value)):
            raise self._bad(name, "must be a number")
        if not low <= value <= high:  # before any arithmetic: an integer may be beyond all floats
            raise self._bad(name, f"is {value!s:.40}; it must lie in [{low:g}, {high:g}]")
        return float(value)

    def optional_number(self, name: str, low: float, high: float) -> float | None:
        return None if self.raw.get(name) is None else self.number(name, low, high)

    def table(self, name: str) -> Fields | None:
        """A nested object; absent or empty gives None."""
        value = self.raw.get(name)
        if value is not None and not isinstance(value, dict):
            raise self._bad(name, "must be an object")
        return Fields(value, f"{self.where}: {name}") if value else None

    def _get(self, name: str, default: Any) -> Any:
        value = self.raw.get(name)
        if value is None:
            value = default
        if value is None:
            raise CheckpointError(f"{self.where}: the field {name!r} is missing.")
        return value

    def _integer(self, name: str, value: Any, low: int, high: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._bad(name, "must be an integer")
        if not low <= value <= high:
            raise self._bad(name, f"is {value!s:.40}; it must lie in [{low}, {high}]")
        return value

    def _bad(self, name: str, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {name} {problem}.")
