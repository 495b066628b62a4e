"""Where the sequences of a batch lie in the paged cache: what every attention over it needs to know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Pages:
    """S sequences with their blocks; block `b` owns slots `b * block_size : (b + 1) * block_size`.

    Numbers are held twice: as tensors on the device for kernels, and as tuples for code that runs on the host.

    Attributes:
        block_table: int32 `[S, B]`: each sequence's blocks in order, padded with 0.
        query_starts: int32 `[S + 1]`: sequence s owns rows `query_starts[s]:query_starts[s + 1]` of the batch.
        context_lens: int32 `[S]`: tokens of each sequence once this pass has written its own.
        starts, lengths: the same as Python numbers.
        block_size: tokens per block.
    """

    block_table: Tensor
    query_starts: Tensor
    context_lens: Tensor
    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    block_size: int

    @classmethod
    def of(
        cls,
        blocks: Sequence[Sequence[int]],
        starts: Sequence[int],
        lengths: Sequence[int],
        block_size: int,
        device: torch.device | str = "cpu",
    ) -> Pages:
        """Lay out the blocks of each sequence; those past its context are left out."""
        used = [-(-length // block_size) for length in lengths]
        width = max(used, default=1)
        table = [[*row[:count], *([0] * (width - count))] for row, count in zip(blocks, used, strict=True)]

        def tensor(values: Sequence[object]) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        return cls(
            tensor(table).reshape(len(table), width),
            tensor(starts),
            tensor(lengths),
            tuple(starts),
            tuple(lengths),
            block_size,
        )

    def blocks_of(self, sequence: int) -> Tensor:
        """The blocks that hold this sequence's context, in order."""
        return self.block_table[sequence, : -(-self.lengths[sequence] // self.block_size)]
