"""Scales, rounds and writes the matrices of one layer; what `layer` and `experts` share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from seamount.models.keymap import Placement

from .files import ShardWriter
from .groups import Group, Scales, Weights, candidates, fold
from .plan import Format, Method
from .search import InputStatistics, best_shrink, scale_errors

# Clipping what makes attention scores hurts more than the error of their outputs tells (AWQ's code leaves it out too).
_NEVER_CLIPPED = ("q_proj", "k_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa")

# Errors of matrices that are not at hand, for each candidate of a group's scales.
ErrorsElsewhere = Callable[[list[Tensor]], Tensor]


@dataclass(frozen=True)
class Rounder:
    """How a layer's matrices are rounded, and where they go.

    Attributes:
        form, method: see `plan`.
        writer: of the layer's shard.
        norm_dtype: as which norms are stored.
        tell: told numbers of weights as they are done.
    """

    form: Format
    method: Method
    writer: ShardWriter
    norm_dtype: torch.dtype
    tell: Callable[[int], None]

    def scale(
        self,
        group: Group,
        weights: Weights,
        places: Mapping[str, Placement],
        statistics: InputStatistics,
        elsewhere: ErrorsElsewhere | None = None,
    ) -> Scales:
        """Fold the scales of least output error into `weights`, in place, and into the statistics."""
        found = candidates(group, weights, statistics.magnitude, self.norm_dtype)
        of_input = [scales.of_input for scales in found]
        errors = torch.zeros(len(found), dtype=torch.float64) if elsewhere is None else elsewhere(of_input)
        for name in (f"{linear}.weight" for linear in group.linears):
            if name in weights and self.form.rounds(places[name]):
                errors += scale_errors(weights[name], statistics, of_input, self.form.rounding)
        best = found[int(errors.argmin())]
        fold(group, weights, best, self.norm_dtype)
        statistics.rescale(best.of_input)
        return best

    def round(self, place: Placement, weight: Tensor, statistics: InputStatistics | None) -> None:
        """Clip where it helps, round and write one matrix; `weight` becomes what its rounded form means."""
        shrink = None
        if statistics is not None and not place.key.removesuffix(".weight").endswith(_NEVER_CLIPPED):
            shrink = best_shrink(weight, statistics, self.form.rounding)
        rounded = self.form.rounding.round(weight, shrink)
        for name, values in self.form.encode(place.key, rounded).items():
            self.writer.write(name, values)
        weight.copy_(rounded.dequantize())
        self.tell(place.num_values)
