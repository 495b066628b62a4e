"""Which checkpoint tensor fills which part of which network parameter, both ways.

Checkpoints store query, key, value, gate, up and each expert on their own; the network fuses them. A
`Placement` ties one checkpoint tensor to a contiguous part of one parameter: loading copies along it one way,
saving the other way, and `models.footprint` counts along it. Works from the config alone: holds no tensors
and no files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from .config import ExpertsConfig, LatentConfig, ModelConfig

_IGNORED_SUFFIX = "rotary_emb.inv_freq"
_MTP = "mtp."


@dataclass(frozen=True, slots=True)
class Placement:
    """Checkpoint tensor `key` of `shape` is `parameter`, or a part of it.

    Attributes:
        key: name in the checkpoint.
        parameter: name of a parameter or buffer of `CausalLM`.
        shape: of the checkpoint tensor.
        expert: index along the parameter's first axis; None when experts are not stacked or all stored as
            one.
        start_row: first row (after the expert axis) that the tensor fills; it fills `shape[0]` rows.
        kept_fp32: True: fp32 whatever the model's dtype. None: fp32 when stored so.
    """

    key: str
    parameter: str
    shape: tuple[int, ...]
    expert: int | None = None
    start_row: int = 0
    kept_fp32: bool | None = False

    def part_of(self, parameter: Tensor) -> Tensor:
        """The view of `parameter` that this tensor fills; contiguous."""
        whole = parameter if self.expert is None else parameter[self.expert]
        return whole[self.start_row : self.start_row + self.shape[0]]

    @property
    def num_values(self) -> int:
        """Numbers in the tensor."""
        return math.prod(self.shape)

    @property
    def is_of_mtp(self) -> bool:
        """Whether it belongs to a multi-token-prediction block."""
        return self.parameter.startswith(_MTP)


def placements(config: ModelConfig, is_stacked: Callable[[str], bool] = lambda key: False) -> Iterator[Placement]:
    """Every tensor that a checkpoint of this config holds, in the order of the network.

    Args:
        is_stacked: told the key of a layer's stacked expert tensor, says whether the checkpoint holds it (a
            spelling that newer transformers may write) in place of one tensor per expert.
    """
    yield from outer_placements(config)
    for index in range(config.num_layers + config.num_mtp_layers):
        yield from layer_placements(config, index)
        experts = layer_experts(config, index)
        if experts and is_stacked(f"model.layers.{index}.mlp.experts.gate_up_proj"):
            yield from _stacked_placements(config, experts, index)
        elif experts:
            for expert in range(experts.num_experts):
                yield from expert_placements(config, experts, index, expert)


def is_ignored(config: ModelConfig, key: str) -> bool:
    """Whether a checkpoint may hold this tensor although the network has no place for it."""
    return key.endswith(_IGNORED_SUFFIX) or key in shared_copies(config)


def shared_copies(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of second copies of embedding and head, which the network shares instead."""
    shape = (config.vocab_size, config.hidden_size)
    copies: dict[str, tuple[int, ...]] = {"lm_head.weight": shape} if config.tie_embeddings else {}
    for index in range(config.num_layers, config.num_layers + config.num_mtp_layers):
        copies[f"model.layers.{index}.embed_tokens.weight"] = shape
        copies[f"model.layers.{index}.shared_head.head.weight"] = shape
    return copies


def layer_experts(config: ModelConfig, index: int) -> ExpertsConfig | None:
    """The experts that layer `index` routes to; None for a dense layer."""
    return config.experts if config.experts and index >= config.experts.num_dense_layers else None


def outer_placements(config: ModelConfig) -> Iterator[Placement]:
    """Embedding, final norm and, where there is one, head."""
    table = (config.vocab_size, config.hidden_size)
    yield Placement("model.embed_tokens.weight", "embed_tokens.weight", table)
    yield Placement("model.norm.weight", "norm.weight", (config.hidden_size,))
    if config.has_head and not config.tie_embeddings:
        yield Placement("lm_head.weight", "lm_head.weight", table)


def layer_placements(config: ModelConfig, index: int) -> Iterator[Placement]:
    """One decoder layer without its routed experts; layers past the last ordinary one are MTP blocks."""
    names = _Names(config, index)
    width = config.hidden_size
    if index >= config.num_layers:
        block = f"{_MTP}{index - config.num_layers}"
        yield Placement(f"{names.key}.enorm.weight", f"{block}.enorm.weight", (width,))
        yield Placement(f"{names.key}.hnorm.weight", f"{block}.hnorm.weight", (width,))
        yield Placement(f"{names.key}.eh_proj.weight", f"{block}.eh_proj.weight", (width, 2 * width))
        yield Placement(f"{names.key}.shared_head.norm.weight", f"{block}.norm.weight", (width,))
    yield names.same("input_layernorm.weight", (width,))
    yield names.same("post_attention_layernorm.weight", (width,))
    yield from _latent_attention(config, config.latent, names) if config.latent else _attention(config, names)
    experts = layer_experts(config, index)
    if experts is None:
        yield from _feed_forward(names, "mlp", width, config.intermediate_size, bias=config.mlp_bias)
        return
    yield names.same("mlp.gate.weight", (experts.num_experts, width), kept_fp32=None)
    if experts.router == "sigmoid":
        yield names.same("mlp.gate.e_score_correction_bias", (experts.num_experts,), kept_fp32=True)
    if experts.num_shared:
        shared = experts.intermediate_size * experts.num_shared
        yield from _feed_forward(names, "mlp.shared_experts", width, shared, bias=config.mlp_bias)


def expert_placements(config: ModelConfig, experts: ExpertsConfig, index: int, expert: int) -> Iterator[Placement]:
    """The three matrices of one routed expert."""
    names = _Names(config, index)
    inner, width = experts.intermediate_size, config.hidden_size
    key = f"{names.key}.mlp.experts.{expert}"
    fused, down = f"{names.parameter}.mlp.experts.gate_up_proj", f"{names.parameter}.mlp.experts.down_proj"
    yield Placement(f"{key}.gate_proj.weight", fused, (inner, width), expert, 0)
    yield Placement(f"{key}.up_proj.weight", fused, (inner, width), expert, inner)
    yield Placement(f"{key}.down_proj.weight", down, (width, inner), expert, 0)


def _stacked_placements(config: ModelConfig, experts: ExpertsConfig, index: int) -> Iterator[Placement]:
    names = _Names(config, index)
    count, inner, width = experts.num_experts, experts.intermediate_size, config.hidden_size
    yield names.same("mlp.experts.gate_up_proj", (count, 2 * inner, width))
    yield names.same("mlp.experts.down_proj", (count, width, inner))


class _Names:
    """The prefixes of one layer in checkpoint and network."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        self.key = f"model.layers.{index}"
        mtp = index - config.num_layers
        self.parameter = f"layers.{index}" if mtp < 0 else f"{_MTP}{mtp}.layer"

    def same(self, name: str, shape: tuple[int, ...], *, kept_fp32: bool | None = False) -> Placement:
        return Placement(f"{self.key}.{name}", f"{self.parameter}.{name}", shape, kept_fp32=kept_fp32)

    def linear(self, name: str, rows: int, columns: int, *, bias: bool = False) -> Iterator[Placement]:
        yield self.same(f"{name}.weight", (rows, columns))
        if bias:
            yield self.same(f"{name}.bias", (rows,))

    def fused(self, place: str, parts: dict[str, int], columns: int, *, bias: bool) -> Iterator[Placement]:
        """Linear layers, by key and number of rows, that are stored apart and stacked in the parameter
        `place`.
        """
        start = 0
        for name, rows in parts.items():
            for kind, shape in (("weight", (rows, columns)), ("bias", (rows,))):
                if kind == "weight" or bias:
                    key, parameter = f"{self.key}.{name}.{kind}", f"{self.parameter}.{place}.{kind}"
                    yield Placement(key, parameter, shape, start_row=start)
            start += rows


def _feed_forward(names: _Names, name: str, width: int, inner: int, *, bias: bool) -> Iterator[Placement]:
    parts = {f"{name}.gate_proj": inner, f"{name}.up_proj": inner}
    yield from names.fused(f"{name}.gate_up_proj", parts, width, bias=bias)
    yield from names.linear(f"{name}.down_proj", width, inner, bias=bias)


def _attention(config: ModelConfig, names: _Names) -> Iterator[Placement]:
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    parts = {"self_attn.q_proj": queries, "self_attn.k_proj": keys, "self_attn.v_proj": keys}
    yield from names.fused("self_attn.qkv_proj", parts, config.hidden_size, bias=config.qkv_bias)
    yield from names.linear("self_attn.o_proj", config.hidden_size, queries, bias=config.output_bias)
    if config.qk_norm:
        yield names.same("self_attn.q_norm.weight", (config.head_dim,))
        yield names.same("self_attn.k_norm.weight", (config.head_dim,))


def _latent_attention(config: ModelConfig, latent: LatentConfig, names: _Names) -> Iterator[Placement]:
    width, heads, rank = config.hidden_size, config.num_heads, latent.kv_lora_rank
    if latent.q_lora_rank is None:
        yield from names.linear("self_attn.q_proj", heads * config.head_dim, width)
    else:
        yield from names.linear("self_attn.q_a_proj", latent.q_lora_rank, width, bias=config.qkv_bias)
        yield names.same("self_attn.q_a_layernorm.weight", (latent.q_lora_rank,))
        yield from names.linear("self_attn.q_b_proj", heads * config.head_dim, latent.q_lora_rank)
    both = rank + latent.qk_rope_head_dim
    yield from names.linear("self_attn.kv_a_proj_with_mqa", both, width, bias=config.qkv_bias)
    yield names.same("self_attn.kv_a_layernorm.weight", (rank,))
    expanded = heads * (latent.qk_nope_head_dim + latent.v_head_dim)
    yield from names.linear("self_attn.kv_b_proj", expanded, rank)
    yield from names.linear("self_attn.o_proj", width, heads * latent.v_head_dim, bias=config.output_bias)
