"""Weights of few bits: the two forms that every quantized checkpoint is brought into.

Made by `models.quantized_formats` (AWQ, GPTQ, compressed-tensors), `models.gguf_blocks` (GGUF) and quantization at
load; kernels pack them. Nothing here knows a file format.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class GroupQuantized:
    """A matrix `[N, K]` in 4 bits; runs of `group_size` values of a row share a scale and a zero.

    Value = scale * (code - zero).

    Attributes:
        codes: uint8 `[N, K]`, each 0 to 15.
        scales: fp32 `[N, G]`, G = K / group_size rounded up.
        zeros: fp32 `[N, G]`, in code units; may be fractional or outside 0 to 15.
        group_size: values per group; the last group of a row may be shorter.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    group_size: int

    def dequantize(self) -> Tensor:
        """The values, fp32 `[N, K]`."""
        return _spread(self.scales, self) * (self.codes.float() - _spread(self.zeros, self))

    def rows(self, index: slice | Tensor) -> GroupQuantized:
        """Some of the rows, or all in another order."""
        return GroupQuantized(self.codes[index], self.scales[index], self.zeros[index], self.group_size)


@dataclass(frozen=True)
class ChannelQuantized:
    """A matrix `[N, K]` in 8 bits, symmetric, with a scale per row: value = scale * code.

    Attributes:
        codes: int8 `[N, K]`.
        scales: fp32 `[N]`.
    """

    codes: Tensor
    scales: Tensor

    def dequantize(self) -> Tensor:
        """The values, fp32 `[N, K]`."""
        return self.scales.unsqueeze(1) * self.codes.float()


def _spread(per_group: Tensor, weight: GroupQuantized) -> Tensor:
    """`[N, G]` to `[N, K]`."""
    return torch.repeat_interleave(per_group, weight.group_size, dim=1)[:, : weight.codes.shape[1]]
