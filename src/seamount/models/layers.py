"""The parts that every family is built from: norm, feed-forward network, grouped-query and latent attention, experts.

Parameter names equal those of the checkpoints, so that the key map stays short. `forward` takes the batch and its
layer's part of the cache explicitly; with no cache, sequences attend within themselves, and everything is
differentiable.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seamount import kernels

from .batch import Batch
from .config import ExpertsConfig, LatentConfig, ModelConfig
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
        self.gate_up_proj = nn.Linear(hidden_size, 2 * intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(kernels.swiglu(self.gate_up_proj(x)))


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
        width = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.num_heads * config.head_dim, config.hidden_size, bias=config.output_bias)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, angles: Angles, batch: Batch, cache: tuple[Tensor, ...] | None) -> Tensor:
        heads = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim))
        q, k, v = heads.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        q = kernels.apply_rotary(self.q_norm(q), *angles, interleaved=False)
        k = kernels.apply_rotary(self.k_norm(k), *angles, interleaved=False)
        if cache is None or batch.slots is None:
            out = kernels.causal_attention(q, k, v, batch.query_starts, self.scale)
        else:
            keys, values = cache
            kernels.write_cache(keys, batch.slots, k)
            kernels.write_cache(values, batch.slots, v)
            out = kernels.paged_attention(
                q,
                keys,
                values,
                batch.block_tables,
                batch.query_starts,
                batch.context_lens,
                batch.block_size,
                self.scale,
            )
        return self.o_proj(out.flatten(1))


class LatentAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434); caches one latent and one rotated key per token."""

    def __init__(self, config: ModelConfig, latent: LatentConfig) -> None:
        super().__init__()
        self.latent, self.num_heads = latent, config.num_heads
        self.scale = softmax_scale(config.rope, config.head_dim)
        width = config.num_heads * config.head_dim
        if latent.q_lora_rank is None:
            self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        else:
            self.q_a_proj = nn.Linear(config.hidden_size, latent.q_lora_rank, bias=config.qkv_bias)
            self.q_a_layernorm = RMSNorm(latent.q_lora_rank, _LATENT_NORM_EPS)
            self.q_b_proj = nn.Linear(latent.q_lora_rank, width, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(
            config.hidden_size, latent.kv_lora_rank + latent.qk_rope_head_dim, bias=config.qkv_bias
        )
        self.kv_a_layernorm = RMSNorm(latent.kv_lora_rank, _LATENT_NORM_EPS)
        self.kv_b_proj = nn.Linear(
            latent.kv_lora_rank, config.num_heads * (latent.qk_nope_head_dim + latent.v_head_dim), bias=False
        )
        self.o_proj = nn.Linear(config.num_heads * latent.v_head_dim, config.hidden_size, bias=config.output_bias)

    def forward(self, x: Tensor, angles: Angles, batch: Batch, cache: tuple[Tensor, ...] | None) -> Tensor:
        widths = self.latent
        q = self.q_proj(x) if widths.q_lora_rank is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q = q.unflatten(-1, (self.num_heads, -1))
        q_nope, q_rope = q.split((widths.qk_nope_head_dim, widths.qk_rope_head_dim), dim=-1)
        q_rope = kernels.apply_rotary(q_rope, *angles, interleaved=widths.interleaved)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split((widths.kv_lora_rank, widths.qk_rope_head_dim), dim=-1)
        latent = self.kv_a_layernorm(latent)
        k_rope = kernels.apply_rotary(k_rope.unsqueeze(1), *angles, interleaved=widths.interleaved)
        if cache is None or batch.slots is None:
            out = self._expanded(q_nope, q_rope, latent, k_rope, batch)
        else:
            kernels.write_cache(cache[0], batch.slots, torch.cat((latent, k_rope.squeeze(1)), dim=-1))
            up = self.kv_b_proj.weight.unflatten(0, (self.num_heads, -1))
            up_key, up_value = up.split((widths.qk_nope_head_dim, widths.v_head_dim), dim=1)
            out = kernels.latent_attention(
                q_nope,
                q_rope,
                cache[0],
                up_key,
                up_value,
                batch.block_tables,
                batch.query_starts,
                batch.context_lens,
                batch.block_size,
                self.scale,
            )
        return self.o_proj(out.flatten(1))

    def _expanded(self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, batch: Batch) -> Tensor:
        expanded = self.kv_b_proj(latent).unflatten(-1, (self.num_heads, -1))
        k_nope, v = expanded.split((self.latent.qk_nope_head_dim, self.latent.v_head_dim), dim=-1)
        k = torch.cat((k_nope, k_rope.expand(-1, self.num_heads, -1)), dim=-1)
        q = torch.cat((q_nope, q_rope), dim=-1)
        return kernels.causal_attention(q, k, v, batch.query_starts, self.scale)


class Router(nn.Module):
    """Scores experts in fp32 and chooses `num_chosen` of them per token."""

    def __init__(self, hidden_size: int, config: ExpertsConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, hidden_size))
        self.e_score_correction_bias: Tensor
        if config.router == "sigmoid":
            self.register_buffer("e_score_correction_bias", torch.zeros(config.num_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return weights `[T, A]` and expert ids `[T, A]` for `x [T, C]`."""
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.weight.float())
        c = self.config
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


class Experts(nn.Module):
    """Weights of all routed experts of a layer: `gate_up_proj [E, 2I, C]`, `down_proj [E, C, I]`."""

    def __init__(self, hidden_size: int, config: ExpertsConfig) -> None:
        super().__init__()
        width = config.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(config.num_experts, 2 * width, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(config.num_experts, hidden_size, width))

    def forward(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return kernels.run_experts(x, weights, ids, self.gate_up_proj, self.down_proj)


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

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.gate(x)
        out = self.experts(x, weights, ids)
        return out if self.shared_experts is None else out + self.shared_experts(x)
