"""What one forward pass works on, and what a model asks the engine to keep for it between passes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """What a model caches: `shapes` per token and layer, in `num_layers` layers.

    Latent attention stores one vector (kv_lora_rank + qk_rope_head_dim values); grouped-query attention a key and a
    value per key-value head. The engine allocates from this and knows nothing else of the cache.
    """

    num_layers: int
    shapes: tuple[tuple[int, ...], ...]

    def values_per_token(self) -> int:
        """Numbers stored per token over all layers."""
        return self.num_layers * sum(math.prod(shape) for shape in self.shapes)

    def allocate(self, num_slots: int, dtype: torch.dtype, device: torch.device) -> Cache:
        """Return memory for `num_slots` tokens, not set: a slot is written before it is read."""
        return [
            tuple(torch.empty(num_slots, *shape, dtype=dtype, device=device) for shape in self.shapes)
            for _ in range(self.num_layers)
        ]


Cache = list[tuple[Tensor, ...]]


@dataclass(frozen=True, slots=True)
class Batch:
    """The new tokens of several sequences, laid one after the other.

    Attributes:
        token_ids, positions: `[T]` int64.
        query_starts: S + 1 row offsets; sequence s owns rows `query_starts[s]:query_starts[s+1]`.
        context_lens: tokens of each sequence once this pass has written its own.
        slots: `[T]` int64, where each token's cache entry goes; None where there is no cache (training).
        block_tables: per sequence, an int64 tensor of its block numbers, in order, covering its context.
        block_size: tokens per block.
    """

    token_ids: Tensor
    positions: Tensor
    query_starts: tuple[int, ...]
    context_lens: tuple[int, ...]
    slots: Tensor | None = None
    block_tables: tuple[Tensor, ...] = ()
    block_size: int = 1

    @classmethod
    def without_cache(cls, token_ids: Tensor) -> Batch:
        """A batch of whole sequences of one length, `token_ids [S, L]`, that attend within themselves (training)."""
        rows, length = token_ids.shape
        positions = torch.arange(length, device=token_ids.device).repeat(rows)
        starts = tuple(range(0, rows * length + 1, length))
        return cls(token_ids.reshape(-1), positions, starts, (length,) * rows)
