"""Pieces of call syntax that tell a text that matches from one that still may: `Syntax`.

Called by `models.tools_formats` and `models.tools_parser`. A stream may stop anywhere, so every pattern comes with a
second one, made from it, for the texts that are its beginnings; Python's regular expressions cannot ask for that.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

MAX_SPACE = 64
# What a grammar lets stand between two tokens of JSON: what writers of JSON put there, a space, or a new line and how
# far it is indented. A model that is unsure would go on with free space for as long as it may.
JSON_SPACE = r" |\r?\n( {0,32}|\t{0,16})"


class Part(NamedTuple):
    """A piece that is no fixed text: a pattern, and the pattern of its beginnings (the empty one included)."""

    whole: str
    begun: str


Atom = str | Part
Alternatives = list[list[Atom]]

NAME_PATTERN = r"[A-Za-z0-9_.-]{1,64}"
NAME = Part(f"({NAME_PATTERN})", r"[A-Za-z0-9_.-]{0,64}")
SPACE = Part(rf"[ \t\r\n]{{0,{MAX_SPACE}}}", rf"[ \t\r\n]{{0,{MAX_SPACE}}}")
# Where arguments begin: an object that is empty or whose first key begins.
OBJECT = Part(rf'(?=\{{[ \t\r\n]{{0,{MAX_SPACE}}}["}}])', rf"(?:\{{[ \t\r\n]{{0,{MAX_SPACE}}})?")
BRACE = Part(r"(?=\{)", "")


def is_name(text: str) -> bool:
    """Return whether this can be the name of a function."""
    return re.fullmatch(NAME_PATTERN, text) is not None


class Syntax:
    """A sequence of atoms, some of them given as alternatives. At most one atom per way may be `NAME`.

    Args:
        parts: an atom, or a list of alternative sequences of atoms (`[[]]` added makes it optional).
    """

    def __init__(self, *parts: Atom | Alternatives) -> None:
        choices = [part if isinstance(part, list) else [[part]] for part in parts]
        ways = [list(itertools.chain(*way)) for way in itertools.product(*choices)]
        self._whole = re.compile("|".join("".join(map(_whole, way)) for way in ways))
        self._begun = re.compile("|".join(_begun(way) for way in ways))

    def match(self, text: str, start: int) -> re.Match[str] | None:
        """Return the match at `start`, if it is there in whole."""
        return self._whole.match(text, start)

    def may_match(self, text: str, start: int) -> bool:
        """Return whether all text from `start` on is a beginning of this."""
        return self._begun.fullmatch(text, start) is not None


def _whole(atom: Atom) -> str:
    return re.escape(atom) if isinstance(atom, str) else atom.whole


def _begun(way: Sequence[Atom]) -> str:
    if not way:
        return ""
    first, rest = way[0], way[1:]
    return f"(?:{_whole(first)}{_begun(rest)}|{_begun_atom(first)})" if rest else f"(?:{_begun_atom(first)})"


def _begun_atom(atom: Atom) -> str:
    if isinstance(atom, Part):
        return atom.begun
    pattern = ""
    for char in reversed(atom[:-1]):
        pattern = f"(?:{re.escape(char)}{pattern})?"
    return pattern
