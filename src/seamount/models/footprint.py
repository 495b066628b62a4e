"""How big a model is, from its config alone: parameters, bytes of weights, bytes of cache. Builds no tensors.

The engine sizes its cache with this and `ops.inspection` reports it. Counts follow `models.keymap`, so that
they cannot differ from what is loaded.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch

from .config import ModelConfig
from .keymap import Placement, expert_placements, layer_experts, layer_placements, outer_placements
from .network import cache_spec


def num_parameters(config: ModelConfig) -> int:
    """Trainable numbers of the network, MTP blocks included."""
    return _sum_layers(config, 0, config.num_layers + config.num_mtp_layers, active=False) + _count(
        outer_placements(config)
    )


def num_active_parameters(config: ModelConfig) -> int:
    """Parameters that one token passes through without MTP: its chosen experts only, and one row of the
    embedding.

    Of the embedding nothing is counted, unless it is the head as well: a look-up multiplies nothing.
    """
    layers = _sum_layers(config, 0, config.num_layers, active=True)
    head = config.vocab_size * config.hidden_size
    return layers + head + config.hidden_size


def weight_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Memory of all weights in `dtype`; the router's fp32 bias, which is no parameter, included."""
    total = num_parameters(config) * dtype.itemsize
    experts = config.experts
    if experts and experts.router == "sigmoid":
        num_layers = config.num_layers + config.num_mtp_layers - experts.num_dense_layers
        total += max(num_layers, 0) * experts.num_experts * torch.float32.itemsize
    return total


def cache_bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """Memory that one token of context takes in the paged cache, over all ordinary layers."""
    return cache_spec(config).values_per_token() * dtype.itemsize


def _sum_layers(config: ModelConfig, first: int, end: int, *, active: bool) -> int:
    """Layers of one kind are equal, so one of each is counted: a config may claim any number of them."""
    dense_end = config.experts.num_dense_layers if config.experts else end
    bounds = sorted({first, min(max(dense_end, first), end), min(config.num_layers, end), end})
    return sum((stop - start) * _layer(config, start, active=active) for start, stop in itertools.pairwise(bounds))


def _layer(config: ModelConfig, index: int, *, active: bool) -> int:
    total = _count(layer_placements(config, index))
    experts = layer_experts(config, index)
    if experts:
        passed = experts.num_chosen if active else experts.num_experts
        total += passed * _count(expert_placements(config, experts, index, 0))
    return total


def _count(parts: Iterable[Placement]) -> int:
    return sum(part.num_values for part in parts if part.kept_fp32 is not True)
