"""Gathers one prompt's hidden states, step by step, into its embedding.

Made by `engine` for a request that asks for an embedding, and fed after each step. How a prompt is cut into steps
depends on what runs beside it and must not change a bit: sums go token by token, in the order of the prompt, and each
operation on a row depends on that row alone. Knows nothing of scheduling.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from seamount.core.embedding import EmbeddingFacts


class Pool:
    """What is known of one prompt's embedding.

    Args:
        facts: how the model makes embeddings.
        dimensions: leading numbers to keep; None keeps all.
    """

    def __init__(self, facts: EmbeddingFacts, dimensions: int | None) -> None:
        self._facts = facts
        self._dimensions = dimensions
        self._state: Tensor | None = None
        self._num_tokens = 0

    @property
    def needs_every_token(self) -> bool:
        """Whether hidden states of all tokens are needed, so that none may be left out for a cached prefix."""
        return self._facts.pooling != "last"

    def add(self, first: int, rows: Tensor) -> None:
        """Take the hidden states of the next tokens; those of the first one begin anew.

        Args:
            first: position of the first of them.
            rows: `[T, C]`, normalised; not kept.
        """
        pooling = self._facts.pooling
        if first == 0:
            self._state, self._num_tokens = None, 0
        self._num_tokens = first + len(rows)
        if pooling == "last" or self._state is None:
            row = rows[-1] if pooling == "last" else rows[0]
            self._state = row.to("cpu", torch.float64, copy=True)
            rows = rows[1:]
        if pooling == "mean":
            # Row by row, where one call that sums them all might group them by how many there are.
            for row in rows.to("cpu", torch.float64):
                self._state += row

    def embedding(self) -> bytes | None:
        """Return the embedding of the tokens so far, as `core.embedding.floats_of` reads it.

        None where it is not finite, or where there is nothing that could be scaled to length 1.
        """
        if self._state is None:
            raise RuntimeError("no hidden state was given")
        vector = self._state[: self._dimensions]
        if self._facts.pooling == "mean":
            vector = vector / self._num_tokens
        if self._facts.normalize:
            # fsum is exact, so its result has no order.
            length = math.sqrt(math.fsum(value * value for value in vector.tolist()))
            if length == 0.0:
                return None
            vector = vector / length
        rounded = vector.to(torch.float32)
        return rounded.numpy().astype("<f4").tobytes() if bool(rounded.isfinite().all()) else None
