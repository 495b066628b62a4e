"""How big a model is, from its config alone: parameters, bytes of weights, bytes of cache. Builds no tensors.

The engine sizes its cache with this and `ops.inspection` reports it. Counts follow `models.keymap`, so that
they cannot differ from what is loaded.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import torch

from seamount import kernels

from .config import ModelConfig
from .keymap import Placement, expert_placements, layer_experts, layer_placements, outer_placements
from .network import cache_spec
from .precision import EMBEDDING, HEAD, UP_PROJECTION, Precision, is_gated

_FP32 = torch.float32.itemsize
# Rows that a feed-forward network takes at a time (`native/linear.cpp`).
_BLOCK_ROWS = 512
# Steps of up to so many tokens are recorded and replayed on a CPU: what Python costs a longer one is little beside its
# products, and results of recorded steps stay allocated.
REPLAYED_TOKENS = 64
# What torch and the kernels take at first use, whatever the model.
_FIXED_BYTES = 40 * 10**6


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


def weight_bytes(
    config: ModelConfig,
    places: Iterable[Placement],
    precision: Precision,
    is_fp32: Callable[[Placement], bool] = lambda place: place.kept_fp32 is True,
) -> int:
    """Memory of all weights once they are loaded.

    A tied head counts twice where it is packed: the table is read by rows, the head by columns.

    Args:
        places: of all checkpoint tensors.
        is_fp32: which of them are fp32 whatever the precision says.
    """
    by_parameter: dict[str, list[Placement]] = {}
    for place in places:
        by_parameter.setdefault(place.parameter, []).append(place)
    if precision.is_packed and config.tie_embeddings and config.has_head:
        by_parameter[HEAD] = by_parameter[EMBEDDING]
    total = 0
    for parameter, group in by_parameter.items():
        if precision.is_packed and len(group[0].shape) > 1 and parameter != EMBEDDING:
            total += _packed_bytes(config, parameter, group, precision)
            continue
        # Beside packed matrices, norms and biases are fp32.
        wide = any(map(is_fp32, group)) or (precision.is_packed and parameter != EMBEDDING)
        size = torch.float32.itemsize if wide else precision.dtype.itemsize
        total += size * sum(place.num_values for place in group)
    return total


def _packed_bytes(config: ModelConfig, parameter: str, group: list[Placement], precision: Precision) -> int:
    storage = precision.storage_of(parameter, group)

    def matrix(num_outputs: int, num_inputs: int, *, gated: bool = False) -> int:
        return kernels.packed_num_bytes(storage.kind, num_outputs, num_inputs, group=storage.group, gated=gated)

    columns = group[0].shape[-1]
    if config.latent is not None and parameter.endswith(UP_PROJECTION):
        widths = config.latent
        keys = matrix(widths.kv_lora_rank, widths.qk_nope_head_dim)
        return config.num_heads * (keys + matrix(widths.v_head_dim, widths.kv_lora_rank))
    gated = is_gated(parameter)
    if len(group[0].shape) == 3:  # all experts as one tensor
        return group[0].shape[0] * matrix(group[0].shape[1], columns, gated=gated)
    num_experts = len({place.expert for place in group})
    return num_experts * matrix(sum(place.shape[0] for place in group) // num_experts, columns, gated=gated)


def workspace_bytes(config: ModelConfig, *, step_tokens: int, num_sequences: int) -> int:
    """Memory beside weights and cache that the largest step holds; buffers for loading are gone by then, and smaller.

    What the process holds before it loads weights (interpreter, torch, tokenizer) is not free then, and not counted.
    Counts what the compiled kernels keep between layers (see `kernels/native`): fp32 activations, rows packed for a
    product (at most two bytes a value), feed-forward networks in blocks of rows, experts' rows all at once. Results of
    replayed steps have memory of their own, which stays.

    Args:
        step_tokens: most tokens of one step.
        num_sequences: most sequences whose logits are held at once.
    """
    width, heads, tokens = config.hidden_size, config.num_heads, step_tokens
    total = tokens * _activations(config) * _FP32 + tokens * max(width, heads * config.head_dim) * 2
    dense = min(tokens, _BLOCK_ROWS) * config.intermediate_size * (_FP32 + 2)
    if config.experts:
        experts = config.experts
        chosen = tokens * experts.num_chosen + 15 * experts.num_experts  # each expert's rows in whole tiles of 16
        dense = max(dense, chosen * (width * (_FP32 + 2) + experts.intermediate_size * (_FP32 + 2)))
    guessing = 1 + min(config.num_mtp_layers, 1)
    replayed = replayed_bytes(config, min(guessing * num_sequences, REPLAYED_TOKENS))
    logits = (
        (1 + min(config.num_mtp_layers, 1)) * num_sequences * config.vocab_size * _FP32
    )  # a step's, and its guesses'
    return _FIXED_BYTES + total + dense + replayed + logits


def replayed_bytes(config: ModelConfig, num_tokens: int = REPLAYED_TOKENS) -> int:
    """Memory for the results of a replayed step: activations within a layer, and logits of all its tokens."""
    return num_tokens * (_activations(config) + config.vocab_size) * _FP32


def _activations(config: ModelConfig) -> int:
    """Numbers per token that live between the kernels of a layer."""
    rows = 4 * config.hidden_size  # residual, its norm, and the result of a product
    if config.latent:
        latent = config.latent
        entry = latent.kv_lora_rank + latent.qk_rope_head_dim
        per_head = config.head_dim + entry + latent.kv_lora_rank + latent.v_head_dim
        return rows + 2 * entry + config.num_heads * per_head
    return rows + (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim


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
