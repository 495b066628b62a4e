"""Rounds weight matrices to few bits, and searches the scales and clips that make the rounding hurt least.

Called by `layer`, one matrix or one set of matrices with a common input at a time. Everything is
fp32. The error of a rounded matrix is the squared error of its outputs over the calibration tokens; scales follow
activation-aware quantization (AWQ; Lin et al., 2023, arXiv 2306.00978). Knows nothing of networks and files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from seamount.models.quantized import ChannelQuantized, GroupQuantized

# Points of the grids, as in the paper's own search: exponents 0 to 0.95, and ranges down to just over half.
_NUM_EXPONENTS = 20
_SHRINKS = tuple(1 - step / 20 for step in range(10))
# Rows that are rounded at once, which bounds the search's work space.
_ROWS = 1024
_SMALLEST_SCALE = 2.0**-24  # of fp16
_CODES = 15
_LARGEST_CODE = 127


@dataclass(frozen=True)
class Rounding:
    """How a matrix is rounded: 4 bits with a scale and a zero per `group_size` inputs, or 8 bits with a scale per row.

    `group_size` is None for 8 bits.
    """

    group_size: int | None

    def round(self, weight: Tensor, shrink: Tensor | None = None) -> GroupQuantized | ChannelQuantized:
        """Round `weight [N, K]` to nearest; without `shrink` no value moves by more than half a step.

        Args:
            shrink: `[N, G]`, the share of its range that each group keeps; what lies beyond is clipped.
        """
        if self.group_size is None:
            return _round_rows(weight, shrink)
        return _round_groups(weight, self.group_size, shrink)

    def error_of(self, weight: Tensor, shrink: Tensor | None = None) -> Tensor:
        """What rounding adds to each weight, `[N, K]`."""
        return self.round(weight, shrink).dequantize().sub_(weight)


def _round_groups(weight: Tensor, size: int, shrink: Tensor | None) -> GroupQuantized:
    groups = weight.unflatten(1, (-1, size))
    # With 0 inside the range, the zero is one of the codes.
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    if shrink is not None:
        low, high = low * shrink, high * shrink
    scales = _fp16_above((high - low) / _CODES).masked_fill_(high == low, 1.0)
    zeros = (-low / scales).round_()
    codes = (groups / scales.unsqueeze(-1)).round_().add_(zeros.unsqueeze(-1)).clamp_(0, _CODES)
    return GroupQuantized(codes.to(torch.uint8).flatten(1), scales, zeros, size)


def _round_rows(weight: Tensor, shrink: Tensor | None) -> ChannelQuantized:
    largest = weight.abs().amax(1)
    if shrink is not None:
        largest = largest * shrink.squeeze(1)
    scales = (largest / _LARGEST_CODE).masked_fill_(largest == 0, 1.0).clamp_(min=torch.finfo(torch.float32).tiny)
    codes = (weight / scales.unsqueeze(1)).round_().clamp_(-_LARGEST_CODE, _LARGEST_CODE)
    return ChannelQuantized(codes.to(torch.int8), scales)


def _fp16_above(values: Tensor) -> Tensor:
    """The least fp16 numbers not below `values`: scales are stored so, and a smaller one would clip."""
    half = values.to(torch.float16)
    above = torch.nextafter(half, torch.full_like(half, torch.inf))
    return torch.where(half.float() < values, above, half).float().clamp_(min=_SMALLEST_SCALE)


class InputStatistics:
    """What a linear layer's inputs over the calibration tokens say of an error in its weight.

    Holds the inputs themselves while there are fewer than their width, else their second moments `[K, K]`.

    Args:
        width: K.
        num_tokens: how many rows will be added.
    """

    def __init__(self, width: int, num_tokens: int) -> None:
        self._moments = torch.zeros(width, width) if num_tokens > width else None
        self._rows: list[Tensor] = []
        self._magnitude = torch.zeros(width)
        self.num_tokens = 0

    def add(self, x: Tensor) -> None:
        """Count the inputs `x [T, K]`."""
        self.num_tokens += x.shape[0]
        self._magnitude += x.abs().sum(0)
        if self._moments is None:
            self._rows.append(x.clone())
        else:
            self._moments.addmm_(x.T, x)

    @property
    def magnitude(self) -> Tensor:
        """Mean absolute value of each input `[K]`."""
        return self._magnitude / max(self.num_tokens, 1)

    def rescale(self, scales: Tensor) -> None:
        """From now on speak of the inputs divided by `scales [K]`."""
        self._magnitude /= scales
        for rows in self._rows:
            rows /= scales
        if self._moments is not None:
            self._moments.div_(scales).div_(scales.unsqueeze(1))

    def squared_error(self, delta: Tensor) -> Tensor:
        """Sum over tokens of the squared outputs of `delta [N, K]`; a scalar in fp64."""
        if self._moments is not None:
            return ((delta @ self._moments) * delta).sum(dtype=torch.float64)
        none = torch.zeros((), dtype=torch.float64)
        return sum(((rows @ delta.T).square_().sum(dtype=torch.float64) for rows in self._rows), none)

    def moments(self, size: int) -> Tensor:
        """Second moments within each run of `size` inputs, `[K / size, size, size]`."""
        if self._moments is not None:
            width = self._moments.shape[0]
            if size == width:
                return self._moments.unsqueeze(0)
            places = torch.arange(width).view(-1, size)
            return self._moments[places.unsqueeze(2), places.unsqueeze(1)]
        blocks = [rows.unflatten(1, (-1, size)).permute(1, 2, 0) for rows in self._rows]
        return torch.stack([block @ block.transpose(1, 2) for block in blocks]).sum(0)


def input_scales(magnitude: Tensor) -> list[Tensor]:
    """Candidate scales of the inputs, `magnitude [K]` to growing powers, each list item `[K]`; the first is all ones.

    Normalised as in the paper's code, so that the largest and the smallest scale lie equally far from 1.
    """
    candidates = []
    for step in range(_NUM_EXPONENTS):
        scales = magnitude.pow(step / _NUM_EXPONENTS).clamp(min=1e-4)
        candidates.append(scales / (scales.max() * scales.min()).sqrt())
    candidates[0] = torch.ones_like(magnitude)
    return candidates


def scale_errors(
    weight: Tensor, statistics: InputStatistics, candidates: Sequence[Tensor], rounding: Rounding
) -> Tensor:
    """Squared output error of `weight [N, K]` rounded after its columns took on each candidate `[K]`; fp64."""
    errors = torch.zeros(len(candidates), dtype=torch.float64)
    for place, scales in enumerate(candidates):
        for rows in weight.split(_ROWS):
            errors[place] += statistics.squared_error(rounding.error_of(rows * scales).div_(scales))
    return errors


def best_shrink(weight: Tensor, statistics: InputStatistics, rounding: Rounding) -> Tensor:
    """The share of its range `[N, G]` that each group of `weight [N, K]` should keep for the least output error.

    Groups are judged one by one, as if the others were exact.
    """
    size = rounding.group_size or weight.shape[1]
    moments = statistics.moments(size)
    found = []
    for rows in weight.split(_ROWS):
        best = torch.ones(rows.shape[0], weight.shape[1] // size)
        least = torch.full_like(best, torch.inf)
        for share in _SHRINKS:
            delta = rounding.error_of(rows, torch.full_like(best, share))
            by_group = delta.unflatten(1, (-1, size)).transpose(0, 1)  # [G, N, size]
            errors = (by_group @ moments).mul_(by_group).sum(-1).T
            better = errors < least
            least = torch.where(better, errors, least)
            best = best.masked_fill(better, share)
        found.append(best)
    return torch.cat(found)
