"""Embeddings in the shared language: what a request may ask for, what a model offers, and how a vector travels.

Used by the engine, which makes them, and by the server and `LLM`, which hand them out; `models.pooling_config` says
what a checkpoint offers.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Literal

from .errors import ContextTooLongError, InvalidRequestError

PoolingName = Literal["last", "mean", "first"]


@dataclass(frozen=True, kw_only=True)
class EmbeddingParams:
    """Asks for one vector of a prompt, an embedding, in place of tokens that continue it.

    Attributes:
        dimensions: keep this many leading numbers of it; None keeps all. The model must have been trained for that.
    """

    dimensions: int | None = None


@dataclass(frozen=True, kw_only=True)
class EmbeddingFacts:
    """How a model that is made for embeddings makes one of a text's hidden states (after the final norm).

    Attributes:
        pooling: of which: the last token's, the first one's, or the mean of all.
        normalize: it is scaled to length 1.
        num_dimensions: numbers in it.
        shorter_dimensions: lengths at which its leading numbers are embeddings too (Matryoshka, arXiv 2205.13147).
            None: at none; empty: at every length.
        max_tokens: of a text.
    """

    pooling: PoolingName
    normalize: bool
    num_dimensions: int
    shorter_dimensions: tuple[int, ...] | None
    max_tokens: int

    def offers(self, dimensions: int) -> bool:
        """Say whether an embedding may have so many numbers."""
        shorter = self.shorter_dimensions
        if dimensions == self.num_dimensions:
            return True
        return shorter is not None and 0 < dimensions < self.num_dimensions and (not shorter or dimensions in shorter)


def check_embedding(facts: EmbeddingFacts | None, params: EmbeddingParams) -> EmbeddingFacts:
    """Return how the model makes embeddings.

    Raises:
        InvalidRequestError: it is not made for them, or not for so few or so many dimensions.
    """
    if facts is None:
        raise InvalidRequestError(
            "This model is not made for embeddings: it continues text.",
            hint="Serve a model that is, such as one whose folder has modules.json and 1_Pooling/config.json.",
            code="not_an_embedding_model",
            param="model",
        )
    if params.dimensions is not None and not facts.offers(params.dimensions):
        if facts.shorter_dimensions:
            offered = f"{', '.join(map(str, facts.shorter_dimensions))} or {facts.num_dimensions}"
        elif facts.shorter_dimensions is not None:
            offered = f"1 to {facts.num_dimensions}"
        else:
            offered = f"{facts.num_dimensions} only: its config.json does not say that it was trained for fewer"
        raise InvalidRequestError(
            f"dimensions is {params.dimensions}; this model offers {offered}.", param="dimensions"
        )
    return facts


def check_length(facts: EmbeddingFacts, num_tokens: int, *, param: str) -> None:
    """Check a text's length.

    Raises:
        ContextTooLongError: it has more tokens than the model takes; nothing is ever cut off.
    """
    if num_tokens > facts.max_tokens:
        raise ContextTooLongError(
            f"{param} has {num_tokens} tokens; this model embeds at most {facts.max_tokens}.",
            hint="Cut the text into parts, each with an embedding of its own.",
            param=param,
        )


def check_generates(generates: bool) -> None:
    """Check that a model can continue text.

    Raises:
        InvalidRequestError: it has no head.
    """
    if not generates:
        raise InvalidRequestError(
            "This model makes embeddings only: it has no head to continue text with.",
            hint="Use /v1/embeddings, or serve another model.",
            code="not_a_generative_model",
            param="model",
        )


def floats_of(embedding: bytes) -> list[float]:
    """Return the numbers of an embedding, which travels as float32, little-endian."""
    return list(struct.unpack(f"<{len(embedding) // 4}f", embedding))
