"""Follows JSON that arrives in pieces: where an object ends, and where it stops being JSON.

Called by `models.tools_parser`. Builds no values: a call's arguments are passed on as the model wrote them.
"""

from __future__ import annotations

import json
import re

_WHITESPACE = " \t\r\n"
_SCALAR_CHARS = frozenset("+-.0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
_SCALAR = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?|true|false|null", re.ASCII)
_MAX_SCALAR_CHARS = 512
_IN_STRING = re.compile(r'[^"\\]*')


class JsonFollower:
    """A state machine over one JSON object (RFC 8259), fed from its opening brace on.

    More lenient than the standard in one thing: strings may hold control characters, which models write.

    Attributes:
        done: the object's closing brace was met.
        broken: the text is no JSON; what was taken before is the beginning of some.
    """

    def __init__(self) -> None:
        self.done = False
        self.broken = False
        self._open: list[str] = []
        self._wants = "value"  # or "first key", "key", "colon", "first item", "next"
        self._in_string = False
        self._escaped = False
        self._scalar = ""

    def feed(self, text: str, start: int = 0) -> int:
        """Take text from `start` on; return the position behind what was taken: all of it, unless done or broken."""
        position = start
        while position < len(text) and not self.done and not self.broken:
            if self._in_string:
                position = self._string(text, position)
            elif self._scalar and text[position] in _SCALAR_CHARS and len(self._scalar) < _MAX_SCALAR_CHARS:
                self._scalar += text[position]
                position += 1
            elif self._scalar:
                self.broken = not _SCALAR.fullmatch(self._scalar)
                self._scalar, self._wants = "", "next"
            else:
                self._token(text[position])
                position += not self.broken
        return position

    def _string(self, text: str, position: int) -> int:
        if self._escaped:
            self._escaped = False
            return position + 1
        found = _IN_STRING.match(text, position)
        position = found.end() if found else position
        if position == len(text):
            return position
        if text[position] == "\\":
            self._escaped = True
        else:
            self._in_string = False
            self._wants = "colon" if self._wants in ("first key", "key") else "next"
        return position + 1

    def _token(self, char: str) -> None:
        wants = self._wants
        if char in _WHITESPACE:
            return
        if char == '"' and wants in ("value", "first item", "first key", "key"):
            self._in_string = True
        elif wants in ("value", "first item") and char in "{[":
            self._open.append(char)
            self._wants = "first key" if char == "{" else "first item"
        elif wants in ("value", "first item") and char in _SCALAR_CHARS:
            self._scalar = char
        elif wants == "colon" and char == ":":
            self._wants = "value"
        elif wants == "next" and char == ",":
            self._wants = "key" if self._open[-1] == "{" else "value"
        elif (char == "}" and wants in ("next", "first key")) or (char == "]" and wants in ("next", "first item")):
            self._close(char)
        else:
            self.broken = True

    def _close(self, char: str) -> None:
        if self._open[-1] != ("{" if char == "}" else "["):
            self.broken = True
            return
        self._open.pop()
        self._wants = "next"
        self.done = not self._open


def members(text: str) -> list[tuple[str, str]] | None:
    """Return the names and the values' own text of a JSON object that `JsonFollower` followed to its end.

    None where Python's parser cannot read it, or a name stands twice.
    """
    decoder = json.JSONDecoder(strict=False)
    found: dict[str, str] = {}
    position = _skip(text, 1)
    try:
        while text[position] != "}":
            name, position = decoder.raw_decode(text, position)
            start = _skip(text, _skip(text, position) + 1)
            _, position = decoder.raw_decode(text, start)
            if name in found:
                return None
            found[name] = text[start:position]
            position = _skip(text, position)
            if text[position] == ",":
                position = _skip(text, position + 1)
    except (ValueError, RecursionError):
        return None
    return list(found.items())


def _skip(text: str, position: int) -> int:
    while text[position] in _WHITESPACE:
        position += 1
    return position
