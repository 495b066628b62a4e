"""Keeps the text of messages from forging chat markers such as `<｜User｜>`.

Called by `models.prompt`, before and after the template renders. A marker in a message must reach the model
as the letters it is written with, never as the token that opens a turn. The first character of each such text
is swapped for a private one of the same length, which templates pass on untouched;
`TextTokenizer.encode_guarded` puts the letters back.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from seamount.core.errors import InvalidRequestError

from .reasoning import REASONING_TAGS

_MARKER_SHAPE = re.compile(r"<[|｜].*[|｜]>", re.DOTALL)
_PRIVATE_USE = range(0xF0000, 0xFFFFE)  # Unicode plane 15
_PRIVATE = re.compile("[\U000f0000-\U0010ffff]")


class MarkerGuard:
    """Guards against one tokenizer's control tokens: the special ones, and those shaped like DeepSeek's and
    Qwen's markers that the tokenizer does not flag. The reasoning tags stay live: histories carry them, and
    templates look for them.

    Args:
        added_tokens: texts of all added tokens.
        special_tokens: those among them that are special.
    """

    def __init__(self, added_tokens: Iterable[str], special_tokens: Iterable[str]) -> None:
        special = set(special_tokens)
        markers = [
            text
            for text in added_tokens
            if (text in special or _MARKER_SHAPE.fullmatch(text)) and text not in REASONING_TAGS and text.strip()
        ]
        markers.sort(key=len, reverse=True)
        self._marker = re.compile("|".join(map(re.escape, markers))) if markers else None
        self._prefixes = frozenset(text[:length] for text in markers for length in range(1, len(text)))
        self._firsts = frozenset(text[0] for text in markers)
        self._longest = max(map(len, markers), default=0)

    def guard(self, *values: Any) -> tuple[tuple[Any, ...], dict[str, str]]:
        """Return the values with markers in their strings disarmed, and placeholder to first character.

        Without a marker in any string the values come back as they are. A marker that a template would join
        from two strings is caught by its beginning at the end of the first.
        """
        firsts: set[str] = set()
        used: set[str] = set()

        def look(text: str) -> str:
            if not text.isascii():
                used.update(_PRIVATE.findall(text))
            firsts.update(text[position] for position in self._positions(text))
            return text

        _map_strings(values, look)
        if not firsts:
            return values, {}
        free = (chr(code) for code in _PRIVATE_USE if chr(code) not in used)
        swap = {first: next(free) for first in sorted(firsts)}

        def disarm(text: str) -> str:
            positions = self._positions(text)
            if not positions:
                return text
            chars = list(text)
            for position in positions:
                chars[position] = swap[chars[position]]
            return "".join(chars)

        return _map_strings(values, disarm), {placeholder: first for first, placeholder in swap.items()}

    def _positions(self, text: str) -> list[int]:
        """Return where markers begin, one that the text's end (or trailing space) cuts off included."""
        if self._marker is None or not any(first in text for first in self._firsts):
            return []
        found = [match.start() for match in self._marker.finditer(text)]
        body = text.rstrip()
        for length in range(1, min(len(body), self._longest - 1) + 1):
            if body[-length:] in self._prefixes and len(body) - length not in found:
                found.append(len(body) - length)
        return found


def _map_strings(value: Any, change: Callable[[str], str], depth: int = 0) -> Any:
    """Return the JSON-like value with every string, keys included, changed."""
    if depth > 64:
        raise InvalidRequestError("Messages, tools or template arguments are nested too deeply.")
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(str(key)): _map_strings(item, change, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_map_strings(item, change, depth + 1) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    return value
