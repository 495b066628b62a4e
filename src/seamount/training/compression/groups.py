"""Linear layers that share an input, and what comes before them that can take over a scale of that input.

Dividing a norm's scale, or the rows of the matrix before, and multiplying the columns of the matrices behind changes
nothing in full precision, and lets salient inputs be rounded more finely (arXiv 2306.00978, section 3.2). Names are
those of a layer's checkpoint tensors without "model.layers.N.". Called by `layer`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from seamount.models.config import ModelConfig

from .search import input_scales

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class NormBefore:
    """Norms whose outputs, side by side, are the input; `also` are matrices behind them that are not rounded."""

    norms: tuple[str, ...]
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class RowsBefore:
    """A matrix whose rows make the input.

    Attributes:
        name: of the matrix, without ".weight".
        rows: `[S]`, which rows of it make scales of their own.
        source_of: `[K]`, the place in `rows` of what each input is made from.
        is_kept: the matrix stays in 16 bits, so scales are powers of two, which change no digit of it.
    """

    name: str
    rows: Tensor
    source_of: Tensor
    is_kept: bool = False


@dataclass(frozen=True)
class Group:
    """Linear layers with one input.

    Attributes:
        module: the network's module that receives the input.
        linears: names without ".weight".
    """

    module: str
    linears: tuple[str, ...]
    before: NormBefore | RowsBefore


@dataclass(frozen=True)
class Scales:
    """One candidate: `of_source` divides what comes before, `of_input [K]` multiplies the columns behind."""

    of_source: Tensor
    of_input: Tensor


def attention_groups(config: ModelConfig) -> Iterator[Group]:
    """The groups of an attention part."""
    attn, latent = "self_attn", config.latent
    norm = NormBefore(("input_layernorm.weight",))
    if latent is None:
        yield Group(f"{attn}.qkv_proj", (f"{attn}.q_proj", f"{attn}.k_proj", f"{attn}.v_proj"), norm)
        # A key-value head's channel serves all its query heads, so they share a scale.
        channels = torch.arange(config.num_kv_heads * config.head_dim)
        heads = channels.view(config.num_kv_heads, 1, config.head_dim)
        source_of = heads.expand(-1, config.num_heads // config.num_kv_heads, -1).flatten()
        yield Group(f"{attn}.o_proj", (f"{attn}.o_proj",), RowsBefore(f"{attn}.v_proj", channels, source_of))
        return
    down = f"{attn}.kv_a_proj_with_mqa"
    if latent.q_lora_rank is None:
        yield Group(down, (f"{attn}.q_proj", down), norm)
    else:
        yield Group(down, (f"{attn}.q_a_proj", down), norm)
        yield Group(f"{attn}.q_b_proj", (f"{attn}.q_b_proj",), NormBefore((f"{attn}.q_a_layernorm.weight",)))
    per_head = latent.qk_nope_head_dim + latent.v_head_dim
    rows = torch.arange(config.num_heads * per_head).view(-1, per_head)[:, latent.qk_nope_head_dim :].flatten()
    values = RowsBefore(f"{attn}.kv_b_proj", rows, torch.arange(len(rows)), is_kept=True)
    yield Group(f"{attn}.o_proj", (f"{attn}.o_proj",), values)


def input_group(*, has_experts: bool) -> Group:
    """What shares the norm before the feed-forward network: gate and up, or those of the shared experts; the router."""
    norms = ("post_attention_layernorm.weight",)
    if has_experts:
        shared = ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj")
        return Group("mlp.gate", shared, NormBefore(norms, also=("mlp.gate.weight",)))
    return Group("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj"), NormBefore(norms))


def down_group(prefix: str, inner: int) -> Group:
    """Down of a feed-forward network or an expert of `inner` channels, whose names begin with `prefix`."""
    channels = torch.arange(inner)
    return Group(f"{prefix}down_proj", (f"{prefix}down_proj",), RowsBefore(f"{prefix}up_proj", channels, channels))


def join_group() -> Group:
    """What joins embedding and hidden state in a block of multi-token prediction."""
    return Group("eh_proj", ("eh_proj",), NormBefore(("enorm.weight", "hnorm.weight")))


def candidates(group: Group, weights: Weights, magnitude: Tensor, norm_dtype: torch.dtype) -> list[Scales]:
    """Scales to try for inputs of mean `magnitude [K]`; the first changes nothing.

    Args:
        norm_dtype: as which norms are stored: scales are those that they can take over to the digit.
    """
    before = group.before
    if isinstance(before, NormBefore):
        norm = torch.cat([weights[name] for name in before.norms])
        return [_exact(scales, norm, norm_dtype) for scales in input_scales(magnitude)]
    counts = torch.bincount(before.source_of, minlength=len(before.rows))
    of_source = torch.zeros(len(before.rows)).index_add_(0, before.source_of, magnitude) / counts
    found = []
    for scales in input_scales(of_source):
        if before.is_kept:
            scales = torch.exp2(scales.log2().round())
        found.append(Scales(scales, scales[before.source_of]))
    return found


def _exact(scales: Tensor, norm: Tensor, dtype: torch.dtype) -> Scales:
    """The nearest scales by which `norm` can be divided without rounding once it is stored as `dtype`."""
    stored = (norm / scales).to(dtype).float()
    usable = stored.isfinite() & (stored != 0) & (norm != 0)
    exact = torch.where(usable, norm / stored, 1.0)
    return Scales(exact, exact)


def fold(group: Group, weights: Weights, scales: Scales, norm_dtype: torch.dtype) -> None:
    """Divide what comes before and multiply what comes behind, in place; the layer's function stays the same."""
    before = group.before
    if isinstance(before, NormBefore):
        sizes = [weights[name].shape[0] for name in before.norms]
        for name, part in zip(before.norms, scales.of_source.split(sizes), strict=True):
            weights[name].copy_((weights[name] / part).to(norm_dtype))
        behind = [*before.also, *(f"{name}.weight" for name in group.linears)]
    else:
        weights[f"{before.name}.weight"][before.rows] /= scales.of_source.unsqueeze(1)
        if f"{before.name}.bias" in weights:
            weights[f"{before.name}.bias"][before.rows] /= scales.of_source
        behind = [f"{name}.weight" for name in group.linears]
    for name in behind:
        if name in weights:
            weights[name] *= scales.of_input
