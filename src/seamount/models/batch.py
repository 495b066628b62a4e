"""What one forward pass works on, and what a model asks the engine to keep for it between passes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from seamount.kernels import Pages, want_large_pages


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
        cache = [
            tuple(torch.empty(num_slots, *shape, dtype=dtype, device=device) for shape in self.shapes)
            for _ in range(self.num_layers)
        ]
        for layer in cache:
            for part in layer:
                want_large_pages(part)
        return cache


Cache = list[tuple[Tensor, ...]]


@dataclass(frozen=True, slots=True)
class Batch:
    """The new tokens of several sequences, laid one after the other.

    Attributes:
        token_ids, positions: `[T]` int64.
        query_starts: S + 1 row offsets; sequence s owns rows `query_starts[s]:query_starts[s+1]`.
        cached: where the batch lies in the cache; None where there is no cache (training).
    """

    token_ids: Tensor
    positions: Tensor
    query_starts: tuple[int, ...]
    cached: Cached | None = None

    @classmethod
    def without_cache(cls, token_ids: Tensor) -> Batch:
        """A batch of whole sequences of one length, `token_ids [S, L]`, that attend within themselves (training)."""
        rows, length = token_ids.shape
        positions = torch.arange(length, device=token_ids.device).repeat(rows)
        return cls(token_ids.reshape(-1), positions, tuple(range(0, rows * length + 1, length)))

    @classmethod
    def over_cache(cls, pieces: Sequence[Piece], block_size: int, device: torch.device | str = "cpu") -> Batch:
        """The batch in which each sequence of `pieces` goes on."""
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        starts, lengths = [0], []
        for new, first, blocks in pieces:
            places = range(first, first + len(new))
            token_ids += new
            positions += places
            slots += [blocks[p // block_size] * block_size + p % block_size for p in places]
            starts.append(len(token_ids))
            lengths.append(first + len(new))
        numbers = torch.tensor([token_ids, positions, slots], dtype=torch.int64, device=device)
        pages = Pages.of([blocks for _, _, blocks in pieces], starts, lengths, block_size, device)
        return cls(numbers[0], numbers[1], tuple(starts), Cached(numbers[2], pages))


# One sequence's share of a batch: its new tokens, the position of the first, and the blocks of its whole context.
Piece = tuple[Sequence[int], int, Sequence[int]]


@dataclass(frozen=True, slots=True)
class Cached:
    """Where a batch's tokens go in the cache, and where their contexts lie.

    Attributes:
        slots: `[T]` int64, where each token's cache entry goes.
        pages: the sequences' blocks.
    """

    slots: Tensor
    pages: Pages
