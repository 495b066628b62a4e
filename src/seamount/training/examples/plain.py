"""Plain text becomes tokens: `encode_plain`.

Called by `rendering` for short texts and by `shards.windows` for documents of any length, so that both make the same of
one. Whatever people wrote, a marker in it is letters, as in a message: only what serving or training itself puts there
is a control token. Knows no records.
"""

from __future__ import annotations

from collections.abc import Sequence

from seamount.models.prompt import PromptEncoder


def encode_plain(encoder: PromptEncoder, texts: Sequence[str], *, inside: bool = False) -> list[tuple[int, ...]]:
    """Return each text's tokens.

    Args:
        inside: the texts stand behind others; else each begins as a raw prompt does (`PromptEncoder.encode_text`).

    Raises:
        InvalidRequestError: a text holds a special token's, which the tokenizer cannot write as letters.
    """
    begin = () if inside else encoder.encode_text("")
    found = encoder.tokenizer.encode_many([encoder.disarm(text) for text in texts], inside=inside)
    return [(*begin, *ids) for ids in found] if begin else found
