"""Shows an example to a person: its tokens as text, those that are learned set apart. `marked`, `as_text`, `as_plain`.

Called by `seamount data show` and by dry runs. What records hold is never let through as terminal control.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from itertools import groupby

from rich.text import Text

from seamount.models.prompt import PromptEncoder

from .example import Example

LEARNED, END_LEARNED = "⟦", "⟧"
MARKER, END_MARKER = "‹", "›"
_LEARNED_STYLE, _MARKER_STYLE = "black on green", "bold underline"


def marked(example: Example, encoder: PromptEncoder) -> Iterator[tuple[str, bool, bool]]:
    """Yield pieces of the example's text: visible text, whether it is learned, whether it is a marker."""
    markers = encoder.tokenizer.marker_ids
    tokens = zip(example.token_ids.tolist(), example.trained.tolist(), strict=True)
    for (is_learned, is_marker), run in groupby(tokens, lambda token: (token[1], token[0] in markers)):
        data = b"".join(encoder.token_bytes(token_id) for token_id, _ in run)
        yield _visible(data.decode("utf-8", "replace")), is_learned, is_marker


def as_text(example: Example, encoder: PromptEncoder) -> Text:
    """Return the example with what is learned on green ground; markers, not their letters, are bold and underlined."""
    text = Text()
    for piece, is_learned, is_marker in marked(example, encoder):
        styles = [_LEARNED_STYLE] * is_learned + [_MARKER_STYLE] * is_marker
        text.append(piece, " ".join(styles) or None)
    return text


def as_plain(example: Example, encoder: PromptEncoder) -> str:
    """Return the example with what is learned between ⟦ and ⟧ and markers between ‹ and ›, where no colours are."""
    found = []
    for is_learned, pieces in groupby(marked(example, encoder), lambda piece: piece[1]):
        text = "".join(f"{MARKER}{piece}{END_MARKER}" if is_marker else piece for piece, _, is_marker in pieces)
        found.append(f"{LEARNED}{text}{END_LEARNED}" if is_learned else text)
    return "".join(found)


def _visible(text: str) -> str:
    """Spell control and format characters, which could redraw a terminal or turn the direction of writing."""
    return "".join(_spelled(char) if unicodedata.category(char) in ("Cc", "Cf") else char for char in text)


def _spelled(char: str) -> str:
    return char if char in "\n\t\u200d" else char.encode("unicode_escape").decode()
