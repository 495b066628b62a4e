"""Quantizes the routed experts of one layer, reading one at a time. Called by `layer`.

All experts share the input scales, because they share the norm before them; each has its own inner scales. An expert is
judged by the tokens that were routed to it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from seamount import kernels
from seamount.models.config import ExpertsConfig
from seamount.models.keymap import Placement, expert_placements

from .files import Activations
from .groups import down_group
from .plan import CHUNK_TOKENS, Source
from .rounder import Rounder
from .search import InputStatistics, scale_errors

# An expert that saw fewer tokens is rounded to nearest: so few would be fitted, not learned from.
FEWEST_TOKENS = 16
_GATE, _UP, _DOWN = "gate_proj.weight", "up_proj.weight", "down_proj.weight"


@dataclass(frozen=True)
class Choice:
    """What a router chose: `weights` and `ids` of experts, `[T, A]`."""

    weights: Tensor
    ids: Tensor

    def of_expert(self, expert: int) -> tuple[Tensor, Tensor]:
        """The tokens of an expert and their weights."""
        tokens, slots = (self.ids == expert).nonzero(as_tuple=True)
        return tokens, self.weights[tokens, slots]


@dataclass(frozen=True)
class Routed:
    """The calibration's tokens: hidden states before the norm, and where the experts' results are added."""

    choice: Choice
    inputs: Activations
    outputs: Activations


@dataclass(frozen=True)
class Probe:
    """A few tokens on their way through the rounded layer: normed, and where the rounded experts' results are added."""

    choice: Choice
    inputs: Tensor
    outputs: Tensor


class RoutedExperts:
    """The experts of layer `index`.

    Args:
        norm: scale and epsilon of the norm before them, as they were before any folding.
        routed: None without calibration.

    Attributes:
        num_plain: experts that were rounded to nearest for lack of tokens.
    """

    def __init__(
        self,
        source: Source,
        index: int,
        config: ExpertsConfig,
        rounder: Rounder,
        norm: tuple[Tensor, float],
        routed: Routed | None,
    ) -> None:
        self._source, self._index, self._config, self._rounder = source, index, config, rounder
        self._norm, self._routed = norm, routed
        self.num_plain = 0

    def input_errors(self, candidates: list[Tensor]) -> Tensor:
        """Squared output errors of all gates and ups, rounded after each of the candidate input scales."""
        errors = torch.zeros(len(candidates), dtype=torch.float64)
        for expert in range(self._config.num_experts):
            places = self._places(expert)
            tokens = self._tokens(expert)
            if self._routed is not None and len(tokens) >= FEWEST_TOKENS:
                statistics = InputStatistics(places[_GATE].shape[1], len(tokens))
                for rows in tokens.split(CHUNK_TOKENS):
                    statistics.add(self._normed(self._routed, rows))
                for name in (_GATE, _UP):
                    weight = self._source.read(places[name])
                    errors += scale_errors(weight, statistics, candidates, self._rounder.form.rounding)
            self._rounder.tell(places[_GATE].num_values + places[_UP].num_values)
        return errors

    def finish(self, input_scales: Tensor | None, probe: Probe | None) -> None:
        """Scale, round and write all experts; add what they make of the tokens to the outputs.

        Args:
            input_scales: `[C]`, what the norm before was divided by; None where nothing is scaled.
        """
        for expert in range(self._config.num_experts):
            places = self._places(expert)
            weights = {name: self._source.read(place) for name, place in places.items()}
            tokens = self._tokens(expert)
            is_searched = input_scales is not None and len(tokens) >= FEWEST_TOKENS
            self.num_plain += input_scales is not None and not is_searched
            inputs, inner = (
                InputStatistics(places[name].shape[1], len(tokens)) if is_searched else None for name in (_GATE, _DOWN)
            )
            self._run(expert, weights, inputs, inner)
            if inner is not None:
                self._rounder.scale(down_group("", places[_DOWN].shape[1]), weights, places, inner)
            if input_scales is not None:
                weights[_GATE] *= input_scales
                weights[_UP] *= input_scales
            if inputs is not None and input_scales is not None:
                inputs.rescale(input_scales)
            for name, statistics in ((_GATE, inputs), (_UP, inputs), (_DOWN, inner)):
                self._rounder.round(places[name], weights[name], statistics)
            if probe is not None:
                rows, share = probe.choice.of_expert(expert)
                hidden = _hidden(probe.inputs[rows], weights)
                probe.outputs[rows] += share.unsqueeze(1) * F.linear(hidden, weights[_DOWN])

    def _tokens(self, expert: int) -> Tensor:
        return torch.empty(0, dtype=torch.int64) if self._routed is None else self._routed.choice.of_expert(expert)[0]

    def _run(
        self, expert: int, weights: dict[str, Tensor], inputs: InputStatistics | None, inner: InputStatistics | None
    ) -> None:
        """Send its tokens through the unrounded expert, and let the statistics see them."""
        if self._routed is None:
            return
        tokens, shares = self._routed.choice.of_expert(expert)
        for rows, share in zip(tokens.split(CHUNK_TOKENS), shares.split(CHUNK_TOKENS), strict=True):
            if not len(rows):
                continue
            x = self._normed(self._routed, rows)
            hidden = _hidden(x, weights)
            if inputs is not None and inner is not None:
                inputs.add(x)
                inner.add(hidden)
            self._routed.outputs.add(rows, share.unsqueeze(1) * F.linear(hidden, weights[_DOWN]))

    def _normed(self, routed: Routed, rows: Tensor) -> Tensor:
        weight, eps = self._norm
        return kernels.rms_norm(routed.inputs.read(rows), weight, eps)

    def _places(self, expert: int) -> dict[str, Placement]:
        """The expert's three matrices, by the last part of their names."""
        found = expert_placements(self._source.config, self._config, self._index, expert)
        return {place.key.partition(f".experts.{expert}.")[2]: place for place in found}


def _hidden(x: Tensor, weights: dict[str, Tensor]) -> Tensor:
    return F.silu(F.linear(x, weights[_GATE])).mul_(F.linear(x, weights[_UP]))
