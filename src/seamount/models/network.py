"""The causal language model: embedding, decoder layers, final norm, head, and DeepSeek-V3's multi-token prediction.

One network serves the engine and training. Families differ in which attention and which feed-forward network a layer
has, and both follow from the config.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seamount import kernels

from .batch import Batch, Cache, CacheSpec
from .config import ModelConfig
from .layers import Angles, Attention, FeedForward, LatentAttention, MixtureOfExperts, RMSNorm
from .linear import Linear
from .rotary import Rotary


class DecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward, each with a residual."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = LatentAttention(config, config.latent) if config.latent else Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        experts = config.experts
        self.mlp: FeedForward | MixtureOfExperts
        if experts is not None and index >= experts.num_dense_layers:
            self.mlp = MixtureOfExperts(config.hidden_size, experts, bias=config.mlp_bias)
        else:
            self.mlp = FeedForward(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)

    def forward(self, x: Tensor, angles: Angles, batch: Batch, cache: tuple[Tensor, ...] | None) -> Tensor:
        x = self.self_attn(x, self.input_layernorm, angles, batch, cache)
        if isinstance(self.mlp, FeedForward):
            return self.mlp(x, norm=self.post_attention_layernorm, add_to=x)
        return self.mlp(x, self.post_attention_layernorm)


class MtpBlock(nn.Module):
    """One multi-token-prediction block (arXiv 2412.19437, section 2.2): guesses one token further than the head.

    It shares embedding and head with the model; `forward` returns hidden states ready for `CausalLM.logits`. Its
    input at a position is made of the model's hidden state there and of the token that follows (`join`).
    """

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.enorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.layer = DecoderLayer(config, index)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)

    def join(self, hidden: Tensor, next_embeddings: Tensor) -> Tensor:
        """Return the layer's input `[T, C]` for hidden states and embeddings `[T, C]`."""
        first, second = self.enorm, self.hnorm
        return self.eh_proj(kernels.join_norms(next_embeddings, first.weight, hidden, second.weight, first.eps))

    def forward(self, x: Tensor, angles: Angles, batch: Batch, cache: tuple[Tensor, ...] | None) -> Tensor:
        """Run the layer over what `join` returned, which a packed layer changes."""
        return self.norm(self.layer(x, angles, batch, cache))

    def fill(self, x: Tensor, angles: Angles, slots: Tensor, cache: tuple[Tensor, ...]) -> None:
        """Write what the layer's attention keeps of `x` to `slots`, and compute nothing more; x is not changed."""
        attention = self.layer.self_attn
        if not isinstance(attention, LatentAttention):
            raise TypeError(f"an MTP block attends by latents, not by {type(attention).__name__}")
        widths = attention.latent
        compressed = attention.kv_a_proj_with_mqa(x, norm=self.layer.input_layernorm)
        norm = attention.kv_a_layernorm
        kernels.cache_latent(compressed, norm.weight, norm.eps, angles, cache[0], slots, interleaved=widths.interleaved)


class CausalLM(nn.Module):
    """A decoder-only language model of any supported family."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        # From a given tensor, because torch's own initialisation imports its compiler (seconds) on the meta device.
        table = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(table, freeze=False)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        own_head = config.has_head and not config.tie_embeddings
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False) if own_head else None
        self.is_packed = False
        self.mtp = nn.ModuleList(MtpBlock(config, config.num_layers + i) for i in range(config.num_mtp_layers))
        rotated = config.latent.qk_rope_head_dim if config.latent else config.head_dim
        self.rotary = Rotary(config.rope, rotated)

    @property
    def cache_spec(self) -> CacheSpec:
        """What the layers keep per token."""
        return cache_spec(self.config)

    def hidden_states(self, batch: Batch, cache: Cache | None) -> Tensor:
        """Run all layers; return `[T, C]` before the final norm."""
        return self._run_layers(self.embed(batch.token_ids), self.rotary.angles(batch.positions), batch, cache)

    def forward(self, batch: Batch, cache: Cache | None) -> Tensor:
        """Return normalised hidden states `[T, C]`; give the rows of interest to `logits`."""
        return self.norm(self.hidden_states(batch, cache))

    def forward_embedded(self, x: Tensor, angles: Angles, batch: Batch, cache: Cache) -> Tensor:
        """As `forward`, from embeddings `x [T, C]`, which packed layers change, and angles."""
        return self.norm(self._run_layers(x, angles, batch, cache))

    def logits(self, hidden: Tensor) -> Tensor:
        """Return fp32 logits `[N, vocab_size]` of normalised hidden states `[N, C]`."""
        if not self.config.has_head:
            raise ValueError("a model without a head has no logits")
        if self.lm_head is None:
            return F.linear(hidden, self.embed_tokens.weight).float()
        return self.lm_head(hidden).float()

    def embed(self, token_ids: Tensor) -> Tensor:
        """Embeddings `[T, C]`: in fp32 where the layers are packed, whose activations are."""
        x = self.embed_tokens(token_ids)
        return x.float() if self.is_packed else x

    def mtp_hidden(self, hidden: Tensor, next_token_ids: Tensor, batch: Batch) -> Tensor:
        """Hidden states `[T, C]` of the first MTP block without a cache (training).

        Args:
            hidden: `[T, C]` from `forward`, after the final norm: what the released MTP weights were trained on.
            next_token_ids: `[T]`, at each row the token that follows it; the block predicts the one after that.
        """
        joined = self.mtp_join(hidden, self.embed(next_token_ids))
        return self._mtp(joined, self.rotary.angles(batch.positions), batch, None)

    def mtp_join(self, hidden: Tensor, next_embeddings: Tensor) -> Tensor:
        """Input `[T, C]` of the first MTP block, from hidden states as of `mtp_hidden` and from `embed`."""
        return self._mtp.join(hidden, next_embeddings)

    def mtp_fill(self, joined: Tensor, angles: Angles, batch: Batch, cache: Cache) -> None:
        """Write what the first MTP block keeps of each row of `batch`, so that later rows can attend to it.

        Args:
            joined: `[T, C]` from `mtp_join`; not changed.
            angles: of the batch's positions.
        """
        if batch.cached is None:
            raise ValueError("the batch has no place in a cache")
        self._mtp.fill(joined, angles, batch.cached.slots, cache[self.config.num_layers])

    def mtp_guess(self, joined: Tensor, angles: Angles, batch: Batch, cache: Cache) -> Tensor:
        """Hidden states `[T, C]` of the first MTP block, which attends to its cache and writes to it.

        Args:
            joined: `[T, C]` from `mtp_join`; changed.
            angles: of the batch's positions.
        """
        return self._mtp(joined, angles, batch, cache[self.config.num_layers])

    def _run_layers(self, x: Tensor, angles: Angles, batch: Batch, cache: Cache | None) -> Tensor:
        for index, layer in enumerate(self.layers):
            x = layer(x, angles, batch, None if cache is None else cache[index])
        return x

    @property
    def _mtp(self) -> MtpBlock:
        return cast("MtpBlock", self.mtp[0])


def cache_spec(config: ModelConfig) -> CacheSpec:
    """What a model of this config caches per token; one layer more, the last, is its first MTP block's."""
    num_layers = config.num_layers + min(config.num_mtp_layers, 1)
    if config.latent:
        return CacheSpec(num_layers, ((config.latent.kv_lora_rank + config.latent.qk_rope_head_dim,),))
    shape = (config.num_kv_heads, config.head_dim)
    return CacheSpec(num_layers, (shape, shape))


def build_network(config: ModelConfig) -> CausalLM:
    """Return the network on the meta device: shapes and names, no memory. Loading or initialising gives it values."""
    with torch.device("meta"):
        return CausalLM(config)
