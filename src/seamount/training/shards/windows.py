"""Plain text becomes examples: windows of bounded length over documents of any length. Called by `build`.

A document is encoded as `Renderer` does a short one, with the token that ends it. Windows overlap by one token, which
is only read in the second: so every token but the document's first is learned exactly once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from seamount.core.errors import InvalidRequestError
from seamount.models.prompt import PromptEncoder
from seamount.training.examples.example import Example
from seamount.training.examples.plain import encode_plain
from seamount.training.examples.record import RecordError
from seamount.training.examples.sample import Sample

# What the tokenizer makes of a text takes a hundred times its size while it is at work.
_PIECE_CHARS = 2**18


def text_windows(
    encoder: PromptEncoder, samples: Sequence[Sample], max_length: int
) -> list[list[Example] | RecordError]:
    """For each plain text, the windows of at most `max_length` tokens over it, or why there are none."""
    try:
        documents = _documents(encoder, [sample.completion for sample in samples])
    except InvalidRequestError as cause:
        if len(samples) > 1:
            return [made for sample in samples for made in text_windows(encoder, [sample], max_length)]
        reason = f"cannot be rendered: {cause.message.rstrip('.')}"
        return [sample.error("", reason, hint=cause.hint) for sample in samples]
    return [list(_windows(tokens, max_length)) for tokens in documents]


def _documents(encoder: PromptEncoder, texts: Sequence[str]) -> list[np.ndarray]:
    """Tokens of each text, int32, with the one that ends it."""
    cut = [list(_pieces(text)) for text in texts]
    first = encode_plain(encoder, [pieces[0] for pieces in cut])
    found = []
    for pieces, ids in zip(cut, first, strict=True):
        parts = [np.array(ids, dtype=np.int32)]
        for piece in pieces[1:]:  # one by one, for what they take
            parts.append(np.array(encode_plain(encoder, [piece], inside=True)[0], dtype=np.int32))
        found.append(np.concatenate([*parts, np.array(encoder.eos_token_ids[:1], dtype=np.int32)]))
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
