"""How big a model is, from its config alone: parameters, bytes of weights, bytes of cache. Builds no tensors.

The engine sizes its cache with this and `ops.inspection` reports it. Counts follow `models.keymap`, so that
they cannot differ from what is loaded.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable

import torch

from seamount import kernels

from .config import ModelConfig
from .keymap import Placement, expert_placements, layer_experts, layer_placements, outer_placements
from .network import cache_spec


def num_parameters(config: ModelConfig) -> int:
    """Trainable numbers of the network, MTP blocks included."""
    num_layers = config.num_layers + config.num_mtp_layers
    layers = _sum_layers(config, 0, num_layers, lambda index: _layer(config, index, _count, active=False))
    return layers + _count(outer_placements(config))


def num_active_parameters(config: ModelConfig) -> int:
    """Parameters that one token passes through without MTP: its chosen experts only, and one row of the
    embedding.

    Of the embedding nothing is counted, unless it is the head as well: a look-up multiplies nothing.
    """
    layers = _sum_layers(config, 0, config.num_layers, lambda index: _layer(config, index, _count, active=True))
    head = config.vocab_size * config.hidden_size
    return layers + head + config.hidden_size


def weight_bytes(config: ModelConfig, dtype: torch.dtype, quantization: str = "none") -> int:
    """Memory of all weights, MTP blocks included: as `dtype`, or with matrices in 8 or 4 bits and the rest as `dtype`.

    A tied head counts twice where it is packed: the table is read by rows, the head by columns.
    """
    kept = _count_bytes(outer_placements(config), dtype, "none")
    if quantization in ("int8", "int4"):
        kept += config.vocab_size * config.hidden_size * (1 if config.tie_embeddings else 1 - dtype.itemsize)
    return kept + _sum_layers(
        config,
        0,
        config.num_layers + config.num_mtp_layers,
        lambda index: _layer(config, index, lambda parts: _count_bytes(parts, dtype, quantization), active=False),
    )


def cache_bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """Memory that one token of context takes in the paged cache, over all ordinary layers."""
    return cache_spec(config).values_per_token() * dtype.itemsize


def _sum_layers(config: ModelConfig, first: int, end: int, of_layer: Callable[[int], int]) -> int:
    """Layers of one kind are equal, so one of each is counted: a config may claim any number of them."""
    dense_end = config.experts.num_dense_layers if config.experts else end
    bounds = sorted({first, min(max(dense_end, first), end), min(config.num_layers, end), end})
    return sum((stop - start) * of_layer(start) for start, stop in itertools.pairwise(bounds))


def _layer(config: ModelConfig, index: int, count: Callable[[Iterable[Placement]], int], *, active: bool) -> int:
    total = count(layer_placements(config, index))
    experts = layer_experts(config, index)
    if experts:
        passed = experts.num_chosen if active else experts.num_experts
        total += passed * count(expert_placements(config, experts, index, 0))
    return total


def _count(parts: Iterable[Placement]) -> int:
    return sum(part.num_values for part in parts if part.kept_fp32 is not True)


def _count_bytes(parts: Iterable[Placement], dtype: torch.dtype, quantization: str) -> int:
    return sum(math.ceil(part.num_values * _bytes_per_value(part, dtype, quantization)) for part in parts)


def _bytes_per_value(part: Placement, dtype: torch.dtype, quantization: str) -> float:
    if part.kept_fp32 is True:
        return torch.float32.itemsize
    if quantization not in ("int8", "int4") or len(part.shape) == 1 or ".kv_b_proj" in part.key:
        return dtype.itemsize
    if part.kept_fp32 is None:
        return torch.float32.itemsize
    # An fp32 factor per output; for int4, a multiplier and a zero level of one byte per group as well.
    scale = torch.float32.itemsize / part.shape[-1]
    return 1 + scale if quantization == "int8" else 0.5 + 2 / kernels.DEFAULT_GROUP + scale
