"""Plain text becomes examples: windows of bounded length over documents of any length. Called by `build`.

A document is encoded as `Renderer` does a short one, with the token that ends it. Windows overlap by one token, which
is only read in the second: so every token but the document's first is learned exactly once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from seamount.models.prompt import PromptEncoder
from seamount.training.examples.example import Example

# What the tokenizer makes of a text takes a hundred times its size while it is at work.
_PIECE_CHARS = 2**18


def text_windows(encoder: PromptEncoder, texts: Sequence[str], max_length: int) -> list[list[Example]]:
    """For each text, the windows of at most `max_length` tokens over it."""
    begin, end = encoder.encode_text(""), encoder.eos_token_ids[0]
    cut = [list(_pieces(text)) for text in texts]
    first = encoder.tokenizer.encode_many([(pieces[0], {}) for pieces in cut], inside=False)
    found = []
    for pieces, ids in zip(cut, first, strict=True):
        parts = [np.array(begin, dtype=np.int32), np.array(ids, dtype=np.int32)]
        for piece in pieces[1:]:
            parts.append(np.array(encoder.tokenizer.encode_inside(piece), dtype=np.int32))
        found.append(list(_windows(np.concatenate([*parts, np.array([end], dtype=np.int32)]), max_length)))
    return found


def _windows(tokens: np.ndarray, max_length: int) -> Iterator[Example]:
    for start in range(0, len(tokens) - 1, max_length - 1):
        window = tokens[start : start + max_length]
        yield Example(window, np.arange(len(window)) > 0)


def _pieces(text: str) -> Iterator[str]:
    """The text in pieces that are encoded one by one, cut where words end: rarely another token than without."""
    start = 0
    while len(text) - start > _PIECE_CHARS:
        end = start + _PIECE_CHARS
        space = max(text.rfind("\n", start + 1, end), text.rfind(" ", end - _PIECE_CHARS // 8, end))
        end = space if space > start else end
        yield text[start:end]
        start = end
    yield text[start:]
