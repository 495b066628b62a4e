"""The parts that every family is built from: norm, feed-forward network, grouped-query and latent attention, experts.

Parameter names equal those of the checkpoints, so that the key map stays short. `forward` takes the batch and its
layer's part of the cache explicitly; with no cache, sequences attend within themselves, and everything is
differentiable. Attention and feed-forward parts take the norm before them and add to the residual themselves, since
packed weights do all three in one pass.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from seamount import kernels

from .batch import Batch
from .config import ExpertsConfig, LatentConfig, ModelConfig
from .linear import Linear
from .rotary import softmax_scale

# The norms inside latent attention have this epsilon whatever the config says, in every released implementation.
_LATENT_NORM_EPS = 1e-6

Angles = tuple[Tensor, Tensor]


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned scale."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return kernels.rms_norm(x, self.weight, self.eps)


class FeedForward(nn.Module):
    """SwiGLU network; gate and up are one product."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, bias: bool) -> None:
        super().__init__()
        self.gate_up_proj = Linear(hidden_size, 2 * intermediate_size, bias=bias)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: Tensor, *, norm: RMSNorm | None = None, add_to: Tensor) -> Tensor:
        """Return `add_to` plus the network of x, normed first where `norm` is given."""
        gate_up, down = self.gate_up_proj.packed, self.down_proj.packed
        if gate_up is not None and down is not None:
            weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
            return kernels.packed_feed_forward(x, gate_up, down, weight, eps, add_to)
        return self.down_proj(self.gate_up_proj(x, norm=norm, gated=True), add_to=add_to)


class Attention(nn.Module):
    """Grouped-query attention (Qwen2, Qwen3, Llama); caches a key and a value per key-value head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = (
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
        )
        self.scale = config.head_dim**-0.5
        self.norm_eps = config.norm_eps
        width = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        self.qkv_proj = Linear(config.hidden_size, width, bias=config.qkv_bias)
        self.o_proj = Linear(config.num_heads * config.head_dim, config.hidden_size, bias=config.output_bias)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(
        self, x: Tensor, norm: RMSNorm, angles: Angles, batch: Batch, cache: tuple[Tensor, ...] | None
    ) -> Tensor:
        """Return `x` plus the attention of its norm."""
        qkv = self.qkv_proj(x, norm=norm).unflatten(-1, (-1, self.head_dim))
        if cache is None or batch.cached is None:
            q, k, v = qkv.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
            q, k = self._rotate(q, self.q_norm, angles), self._rotate(k, self.k_norm, angles)
            out = kernels.causal_attention(q, k, v, batch.query_starts, self.scale)
        else:
            norms = None if self.q_norm is None or self.k_norm is None else (self.q_norm.weight, self.k_norm.weight)
            keys, values = cache
            q = kernels.rotate_and_cache(
                qkv, self.num_heads, angles, norms, self.norm_eps, (keys, values), batch.cached.slots
            )
            out = kernels.paged_attention(q, keys, values, batch.cached.pages, self.scale)
        return self.o_proj(out.flatten(1), add_to=x)

    @staticmethod
    def _rotate(x: Tensor, norm: RMSNorm | None, angles: Angles) -> Tensor:
        return kernels.apply_rotary(x if norm is None else norm(x), *angles, interleaved=False)


class LatentAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434); caches one latent and one rotated key per token."""

    def __init__(self, config: ModelConfig, latent: LatentConfig) -> None:
        super().__init__()
        self.latent, self.num_heads = latent, config.num_heads
        self.scale = softmax_scale(config.rope, config.head_dim)
        self.up_packed: tuple[kernels.PackedStack, kernels.PackedStack] | None = None
        width = config.num_heads * config.head_dim
        if latent.q_lora_rank is None:
            self.q_proj = Linear(config.hidden_size, width, bias=False)
        else:
            self.q_a_proj = Linear(config.hidden_size, latent.q_lora_rank, bias=config.qkv_bias)
            self.q_a_layernorm = RMSNorm(latent.q_lora_rank, _LATENT_NORM_EPS)
            self.q_b_proj = Linear(latent.q_lora_rank, width, bias=False)
        self.kv_a_proj_with_mqa = Linear(
            config.hidden_size, latent.kv_lora_rank + latent.qk_rope_head_dim, bias=config.qkv_bias
        )
        self.kv_a_layernorm = RMSNorm(latent.kv_lora_rank, _LATENT_NORM_EPS)
        self.kv_b_proj = Linear(
            latent.kv_lora_rank, config.num_heads * (latent.qk_nope_head_dim + latent.v_head_dim), bias=False
        )
        self.o_proj = Linear(config.num_heads * latent.v_head_dim, config.hidden_size, bias=config.output_bias)

    def forward(
        self, x: Tensor, norm: RMSNorm, angles: Angles, batch: Batch, cache: tuple[Tensor, ...] | None
    ) -> Tensor:
        """Return `x` plus the attention of its norm."""
        widths = self.latent
        if self.up_packed is None:
            normed, own_norm = norm(x), None
        else:
            normed, own_norm = x, norm
        if widths.q_lora_rank is None:
            q = self.q_proj(normed, norm=own_norm)
        else:
            q = self.q_b_proj(self.q_a_proj(normed, norm=own_norm), norm=self.q_a_layernorm)
        q = q.unflatten(-1, (self.num_heads, -1))
        compressed = self.kv_a_proj_with_mqa(normed, norm=own_norm)
        if self.up_packed is not None and cache is not None and batch.cached is not None:
            out = kernels.packed_latent_attention(
                q,
                compressed,
                self.kv_a_layernorm.weight,
                self.kv_a_layernorm.eps,
                angles,
                self.up_packed,
                cache[0],
                batch.cached.slots,
                batch.cached.pages,
                self.scale,
                interleaved=widths.interleaved,
            )
            return self.o_proj(out.flatten(1), add_to=x)
        q_nope, q_rope = q.split((widths.qk_nope_head_dim, widths.qk_rope_head_dim), dim=-1)
        if cache is None or batch.cached is None:
            q_rope = kernels.apply_rotary(q_rope, *angles, interleaved=widths.interleaved)
            latent, k_rope = compressed.split((widths.kv_lora_rank, widths.qk_rope_head_dim), dim=-1)
            latent = self.kv_a_layernorm(latent)
            k_rope = kernels.apply_rotary(k_rope.unsqueeze(1), *angles, interleaved=widths.interleaved)
            out = self._expanded(q_nope, q_rope, latent, k_rope, batch)
        else:
            q_rope = kernels.latent_rotate_and_cache(
                q_rope,
                compressed,
                self.kv_a_layernorm.weight,
                self.kv_a_layernorm.eps,
                angles,
                cache[0],
                batch.cached.slots,
                interleaved=widths.interleaved,
            )
            up_key, up_value = self.up_projections()
            out = kernels.latent_attention(q_nope, q_rope, cache[0], up_key, up_value, batch.cached.pages, self.scale)
        return self.o_proj(out.flatten(1), add_to=x)

    def up_projections(self) -> tuple[Tensor, Tensor]:
        """What expands latents: to keys `[H, Dn, R]` and to values `[H, Dv, R]`; parts of `kv_b_proj`'s weight."""
        up = self.kv_b_proj.whole_weight().unflatten(0, (self.num_heads, -1))
        up_key, up_value = up.split((self.latent.qk_nope_head_dim, self.latent.v_head_dim), dim=1)
        return up_key, up_value

    def use_packed(self, up_key: kernels.PackedStack, up_value: kernels.PackedStack) -> None:
        """Attend with packed up-projections from now on: per head `[R, Dn]` and `[Dv, R]`; drops `kv_b_proj`."""
        self.up_packed = (up_key, up_value)
        del self.kv_b_proj.weight

    def _expanded(self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, batch: Batch) -> Tensor:
        expanded = self.kv_b_proj(latent).unflatten(-1, (self.num_heads, -1))
        k_nope, v = expanded.split((self.latent.qk_nope_head_dim, self.latent.v_head_dim), dim=-1)
        k = torch.cat((k_nope, k_rope.expand(-1, self.num_heads, -1)), dim=-1)
        q = torch.cat((q_nope, q_rope), dim=-1)
        return kernels.causal_attention(q, k, v, batch.query_starts, self.scale)


class Router(nn.Module):
    """Scores experts in fp32 and chooses `num_chosen` of them per token.

    Attributes:
        pinned: `[T, A]` expert ids that are taken whatever the scores say; set by training where a layer is computed
            again, else None.
    """

    def __init__(self, hidden_size: int, config: ExpertsConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, hidden_size))
        self.packed: kernels.PackedMatrix | None = None
        self.pinned: Tensor | None = None
        self.e_score_correction_bias: Tensor
        if config.router == "sigmoid":
            self.register_buffer("e_score_correction_bias", torch.zeros(config.num_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return weights `[T, A]` and expert ids `[T, A]` for `x [T, C]`."""
        if self.packed is not None:
            logits = self.packed.multiply(x)
        else:
            logits = kernels.router_logits(x, self.weight)
        c = self.config
        if self.pinned is not None:
            sigmoid = c.router == "sigmoid"
            return kernels.weigh_experts(logits, self.pinned, sigmoid=sigmoid, normalize=c.normalize, scale=c.scale)
        if c.router == "softmax":
            return kernels.route_softmax(
                logits,
                c.num_chosen,
                num_groups=c.num_groups,
                num_chosen_groups=c.num_chosen_groups,
                scale=c.scale,
            )
        return kernels.route_sigmoid(
            logits,
            self.e_score_correction_bias,
            c.num_chosen,
            num_groups=c.num_groups,
            num_chosen_groups=c.num_chosen_groups,
            normalize=c.normalize,
            scale=c.scale,
        )

    def use_packed(self, matrix: kernels.PackedMatrix) -> None:
        """Score with `matrix` (fp32) from now on and drop the parameter."""
        self.packed = matrix
        del self.weight


class Experts(nn.Module):
    """Weights of all routed experts of a layer: `gate_up_proj [E, 2I, C]`, `down_proj [E, C, I]`."""

    def __init__(self, hidden_size: int, config: ExpertsConfig) -> None:
        super().__init__()
        width = config.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(config.num_experts, 2 * width, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(config.num_experts, hidden_size, width))
        self.packed: tuple[kernels.PackedStack, kernels.PackedStack] | None = None

    def forward(self, x: Tensor, weights: Tensor, ids: Tensor, residual: Tensor) -> Tensor:
        """Return `residual` plus the chosen experts' weighted sum for `x [T, C]`."""
        if self.packed is not None:
            return kernels.run_packed_experts(x, weights, ids, *self.packed, add_to=residual)
        return kernels.run_experts(x, weights, ids, self.gate_up_proj, self.down_proj, residual)

    def use_packed(self, gate_up: kernels.PackedStack, down: kernels.PackedStack) -> None:
        """Compute with packed experts from now on and drop the parameters."""
        self.packed = (gate_up, down)
        del self.gate_up_proj, self.down_proj


class MixtureOfExperts(nn.Module):
    """Routed experts plus the shared ones that see every token."""

    def __init__(self, hidden_size: int, config: ExpertsConfig, *, bias: bool) -> None:
        super().__init__()
        self.gate = Router(hidden_size, config)
        self.experts = Experts(hidden_size, config)
        self.shared_experts = (
            FeedForward(hidden_size, config.intermediate_size * config.num_shared, bias=bias)
            if config.num_shared
            else None
        )

    def forward(self, x: Tensor, norm: RMSNorm) -> Tensor:
        """Return `x` plus what the experts make of its norm."""
        normed = norm(x)
        weights, ids = self.gate(normed)
        out = self.experts(normed, weights, ids, x)
        return out if self.shared_experts is None else self.shared_experts(normed, add_to=out)
