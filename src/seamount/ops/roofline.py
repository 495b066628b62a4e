"""What a step cannot do without: the bytes that it must read and the operations that it must do.

Divided by the time it took and by the machine's measured rates (`ops.ceiling`), these give the share of the ceiling
(the roofline model: Williams, Waterman and Patterson, 2009). Pure arithmetic over facts; called by the benchmark.

Everything is counted from below, so that a share is never flattered: activations are left out, a look-up in the
embedding counts as nothing, and so does what an implementation reads or computes twice.
"""

from __future__ import annotations

from dataclasses import dataclass

from seamount.core.requests import ModelFacts
from seamount.models.config import ModelConfig

_DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
# Weights that take less than this many bytes per parameter are no longer 16 bits wide, or 8.
_LEAST_16_BIT, _LEAST_8_BIT = 1.5, 0.9


@dataclass(frozen=True, kw_only=True)
class ModelWork:
    """The sizes of a loaded model that its work follows from.

    Attributes:
        weight_bytes_per_parameter: of those that are multiplied, scales included.
        precision: of the weights: `int4`, `int8`, or the dtype.
        num_fixed_parameters: that every token passes through, head included, routed experts not.
        num_head_parameters: of the output head, a part of the fixed ones.
        num_expert_parameters: of one routed expert of one layer.
        num_expert_layers: layers that have routed experts.
        num_experts, num_chosen: routed experts of a layer, and those that a token passes through.
        num_layers: that have attention.
        decode_ops_per_pair, prefill_ops_per_pair: operations of one layer's attention for one query and one key.
        cache_bytes_per_token: over all layers.
    """

    weight_bytes_per_parameter: float
    precision: str
    num_fixed_parameters: int
    num_head_parameters: int
    num_expert_parameters: int
    num_expert_layers: int
    num_experts: int
    num_chosen: int
    num_layers: int
    decode_ops_per_pair: int
    prefill_ops_per_pair: int
    cache_bytes_per_token: int

    @classmethod
    def of(cls, config: ModelConfig, facts: ModelFacts, *, is_packed: bool) -> ModelWork:
        """Derive it from the checkpoint's config and from what was really loaded.

        Args:
            is_packed: the compiled kernels hold the matrices; a tied head is then there twice (`models.footprint`).
        """
        per_parameter = _bytes_per_parameter(config, facts, has_table=is_packed or not config.tie_embeddings)
        experts = config.experts
        expert_size = 3 * config.hidden_size * experts.intermediate_size if experts else 0
        num_expert_layers = max(config.num_layers - experts.num_dense_layers, 0) if experts else 0
        num_chosen = experts.num_chosen if experts else 0
        decode_pair, prefill_pair = _ops_per_pair(config)
        return cls(
            weight_bytes_per_parameter=per_parameter,
            precision=_precision(per_parameter, facts.dtype),
            num_fixed_parameters=facts.num_active_parameters - num_expert_layers * num_chosen * expert_size,
            num_head_parameters=config.vocab_size * config.hidden_size,
            num_expert_parameters=expert_size,
            num_expert_layers=num_expert_layers,
            num_experts=experts.num_experts if experts else 0,
            num_chosen=num_chosen,
            num_layers=config.num_layers,
            decode_ops_per_pair=decode_pair,
            prefill_ops_per_pair=prefill_pair,
            cache_bytes_per_token=facts.cache_bytes_per_token,
        )

    @property
    def matrix_precision(self) -> str:
        """The precision whose matrix rate bounds the products: weights of 4 bits are multiplied as 8."""
        return "int8" if self.precision == "int4" else self.precision

    @property
    def num_active_parameters(self) -> int:
        """Parameters that one token passes through."""
        routed = self.num_expert_layers * self.num_chosen * self.num_expert_parameters
        return self.num_fixed_parameters + routed

    def distinct_experts(self, num_tokens: int) -> float:
        """Experts of a layer that a step of so many tokens is expected to need: `E (1 - (1 - A / E)^T)`.

        E experts, of which each of T tokens chooses A independently and evenly. Trained routers are less even, so
        that they need fewer.
        """
        if not self.num_experts:
            return 0.0
        return self.num_experts * (1.0 - (1.0 - self.num_chosen / self.num_experts) ** num_tokens)

    def decode_bytes(self, num_sequences: int, context_tokens: float) -> float:
        """Bytes that a decode step must read: each weight that is needed once, and each cached token once.

        Args:
            context_tokens: distinct cached tokens of all sequences together.
        """
        routed = self.num_expert_layers * self.distinct_experts(num_sequences) * self.num_expert_parameters
        weights = (self.num_fixed_parameters + routed) * self.weight_bytes_per_parameter
        return weights + context_tokens * self.cache_bytes_per_token

    def decode_ops(self, num_sequences: int, context_tokens: float) -> float:
        """Operations of a decode step: two per active parameter and sequence, and attention over the contexts.

        Args:
            context_tokens: of all sequences together, shared ones counted for each.
        """
        attention = self.num_layers * self.decode_ops_per_pair * context_tokens
        return 2.0 * self.num_active_parameters * num_sequences + attention

    def prefill_ops(self, num_sequences: int, prompt_tokens: int, cached_tokens: int) -> float:
        """Operations of the prompts of so many equal sequences, whose first `cached_tokens` each are in the cache.

        Two per active parameter and token, the head for the last token only, and causal attention: the token at
        position p (from 1) is a query to p keys.
        """
        num_new = prompt_tokens - cached_tokens
        pairs = (prompt_tokens * (prompt_tokens + 1) - cached_tokens * (cached_tokens + 1)) // 2
        body = 2.0 * (self.num_active_parameters - self.num_head_parameters) * num_new
        attention = self.num_layers * self.prefill_ops_per_pair * pairs
        return num_sequences * (body + attention + 2.0 * self.num_head_parameters)


def _bytes_per_parameter(config: ModelConfig, facts: ModelFacts, *, has_table: bool) -> float:
    """Bytes of the weights that are multiplied over their number.

    An embedding beside the head (`has_table`) is only looked up in, so it is left out, at the dtype's width; where it
    is stored narrower, the result is too small rather than too large.
    """
    table = config.vocab_size * config.hidden_size
    multiplied = facts.weight_bytes - (table * _DTYPE_BYTES[facts.dtype] if has_table else 0)
    return max(multiplied, 0) / (facts.num_parameters - (0 if config.tie_embeddings else table))


def _precision(bytes_per_parameter: float, dtype: str) -> str:
    if bytes_per_parameter >= _LEAST_16_BIT:
        return dtype
    return "int8" if bytes_per_parameter >= _LEAST_8_BIT else "int4"


def _ops_per_pair(config: ModelConfig) -> tuple[int, int]:
    """Operations per layer for one query token and one key token, over all heads: in decode, and in prefill.

    A score and its share of the mix take a multiply-add per value of key and value. Latent attention (arXiv
    2405.04434, section 2.1) decodes on the latents themselves, rank + rotary wide for the score and rank wide for the
    mix; for long chunks it expands keys and values first, which its weights' own operations cover.
    """
    latent = config.latent
    if latent is None:
        both = 2 * config.num_heads * 2 * config.head_dim
        return both, both
    absorbed = 2 * config.num_heads * (2 * latent.kv_lora_rank + latent.qk_rope_head_dim)
    expanded = 2 * config.num_heads * (latent.qk_nope_head_dim + latent.qk_rope_head_dim + latent.v_head_dim)
    return absorbed, expanded
