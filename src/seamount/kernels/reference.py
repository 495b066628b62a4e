"""What each kernel means, in plain torch: the oracle of every faster implementation, and the fallback on every device.

Called by `models` only. Everything is differentiable but the paged operations. Shapes: T tokens of a flat batch, S
sequences in it, H query heads, K key-value heads, D head width, L context length of one sequence, R latent width,
E experts, A experts chosen per token.

A flat batch lays the new tokens of its sequences one after the other; `Pages` says which rows are whose, and where the
context lies.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .pages import Pages

FP8_BLOCK = 128


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square normalisation over the last axis, computed in fp32 (Zhang & Sennrich, 2019)."""
    if x.dtype == weight.dtype == torch.float32:
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def swiglu(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` where `gate_up [..., 2I]` holds the gate half, then the up half; returns `[..., I]`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """Rotate `x [T, H, D]` by per-token angles `cos, sin [T, D/2]` (Su et al., 2021).

    `interleaved` says how the D columns pair up: `(0, 1), (2, 3), ...` in DeepSeek's latent attention, else
    `(0, D/2), (1, D/2 + 1), ...`. Either way the result is laid out in halves: queries and keys only ever meet in dot
    products, so a layout that both share changes nothing.
    """
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    if interleaved:
        first, second = x[..., 0::2].float(), x[..., 1::2].float()
    else:
        first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def write_cache(cache: Tensor, slots: Tensor, values: Tensor) -> None:
    """Store `values [T, ...]` at `slots [T]` of `cache [num_slots, ...]`, in place."""
    cache.index_copy_(0, slots, values.to(cache.dtype))


def rotate_and_cache(
    qkv: Tensor,
    num_heads: int,
    angles: tuple[Tensor, Tensor],
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    cache: tuple[Tensor, Tensor],
    slots: Tensor,
) -> Tensor:
    """Split a fused projection into heads, rotate queries and keys, store keys and values.

    Args:
        qkv: `[T, H + 2K, D]`.
        norms: weights `[D]` of the norms on each query and key head (Qwen3), or None.
        cache: keys `[num_slots, K, D]` and values of the same shape; written at `slots [T]`.

    Returns:
        The rotated queries `[T, H, D]`.
    """
    num_kv_heads = (qkv.shape[1] - num_heads) // 2
    q, k, v = qkv.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    if norms is not None:
        q, k = rms_norm(q, norms[0], eps), rms_norm(k, norms[1], eps)
    write_cache(cache[0], slots, apply_rotary(k, *angles, interleaved=False))
    write_cache(cache[1], slots, v)
    return apply_rotary(q, *angles, interleaved=False)


def latent_rotate_and_cache(
    q_rope: Tensor,
    compressed: Tensor,
    weight: Tensor,
    eps: float,
    angles: tuple[Tensor, Tensor],
    cache: Tensor,
    slots: Tensor,
    *,
    interleaved: bool,
) -> Tensor:
    """What latent attention does between its projections and the context.

    Args:
        q_rope: `[T, H, Dr]`; compressed: `[T, R + Dr]`: the latent, and the key that all heads share.
        weight: `[R]`, with `eps`: the latent's norm.
        cache: `[num_slots, R + Dr]`; the normed latent and the rotated key are written at `slots [T]`.

    Returns:
        The rotated queries `[T, H, Dr]`.
    """
    rank = weight.shape[0]
    latent, key = compressed.split((rank, compressed.shape[1] - rank), dim=1)
    key = apply_rotary(key.unsqueeze(1), *angles, interleaved=interleaved).squeeze(1)
    write_cache(cache, slots, torch.cat((rms_norm(latent, weight, eps), key), dim=1))
    return apply_rotary(q_rope, *angles, interleaved=interleaved)


def router_logits(x: Tensor, weight: Tensor) -> Tensor:
    """fp32 logits `[T, E]` of `x [T, C]` by `weight [E, C]`, whatever the dtypes and whether autocast is on."""
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.float(), weight.float())


def causal_attention(q: Tensor, k: Tensor, v: Tensor, starts: Sequence[int], scale: float) -> Tensor:
    """Attention within each sequence of a flat batch that has no cache (training).

    Args:
        q: `[T, H, D]`; k: `[T, K, D]`; v: `[T, K, Dv]`, where H is a multiple of K.
        starts: S + 1 offsets of the sequences.

    Returns:
        `[T, H, Dv]`.
    """
    lengths = {end - start for start, end in itertools.pairwise(starts)}
    if len(lengths) == 1:
        rows = len(starts) - 1
        rows_q, rows_k, rows_v = (t.reshape(rows, -1, *t.shape[1:]).transpose(1, 2) for t in (q, k, v))
        same_heads = q.shape[1] == k.shape[1]
        out = F.scaled_dot_product_attention(
            rows_q, rows_k, rows_v, is_causal=True, scale=scale, enable_gqa=not same_heads
        )
        return out.transpose(1, 2).reshape(q.shape[0], q.shape[1], v.shape[-1])
    return torch.cat([_attend(q[a:b], k[a:b], v[a:b], scale) for a, b in itertools.pairwise(starts)], dim=0)


def paged_attention(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    pages: Pages,
    scale: float,
) -> Tensor:
    """Causal attention of new tokens to cached keys and values, their own included.

    Args:
        q: `[T, H, D]`.
        key_cache: `[num_slots, K, D]`; value_cache: `[num_slots, K, Dv]`.

    Returns:
        `[T, H, Dv]`.
    """
    out = q.new_empty(q.shape[0], q.shape[1], value_cache.shape[-1])
    keys, values = _as_blocks(key_cache, pages.block_size), _as_blocks(value_cache, pages.block_size)
    for s, length in enumerate(pages.lengths):
        rows = slice(pages.starts[s], pages.starts[s + 1])
        k, v = _gather(keys, pages.blocks_of(s), length), _gather(values, pages.blocks_of(s), length)
        out[rows] = _attend(q[rows], k, v, scale)
    return out


def latent_attention(
    q_nope: Tensor,
    q_rope: Tensor,
    latent_cache: Tensor,
    up_key: Tensor,
    up_value: Tensor,
    pages: Pages,
    scale: float,
) -> Tensor:
    """Multi-head latent attention over a cache of latents (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    Few new tokens are handled *absorbed*: the key up-projection moves to the query and the value up-projection to the
    output, so the context is read once, as latents. Many new tokens are handled *expanded*: keys and values of the
    context are formed once and shared by all of them. The choice is by the number of multiplications.

    Args:
        q_nope: `[T, H, Dn]`; q_rope: `[T, H, Dr]`, already rotated.
        latent_cache: `[num_slots, R + Dr]`: the normalised latent, then the rotated shared key.
        up_key: `[H, Dn, R]`; up_value: `[H, Dv, R]`.

    Returns:
        `[T, H, Dv]`.
    """
    width_nope, width_rope, rank = q_nope.shape[-1], q_rope.shape[-1], up_key.shape[-1]
    width_value = up_value.shape[1]
    # Multiplications per head: absorbed n*L*(2R + Dr) against expanded L*R*(Dn + Dv) + n*L*(Dn + Dr + Dv).
    saved_per_query = 2 * rank - width_nope - width_value
    most_absorbed = rank * (width_nope + width_value) // saved_per_query if saved_per_query > 0 else 2**62
    out = q_nope.new_empty(q_nope.shape[0], q_nope.shape[1], width_value)
    blocks = _as_blocks(latent_cache, pages.block_size)
    for s, length in enumerate(pages.lengths):
        rows = slice(pages.starts[s], pages.starts[s + 1])
        context = _gather(blocks, pages.blocks_of(s), length)
        latent, k_rope = context.split((rank, width_rope), dim=-1)
        nope, rope = q_nope[rows], q_rope[rows]
        if nope.shape[0] <= most_absorbed:
            q = torch.cat((torch.einsum("thd,hdr->thr", nope, up_key), rope), dim=-1)
            mixed = _attend_shared(q, context, latent, scale)
            out[rows] = torch.einsum("thr,hvr->thv", mixed, up_value)
        else:
            k_nope = torch.einsum("lr,hdr->lhd", latent, up_key)
            k = torch.cat((k_nope, k_rope.unsqueeze(1).expand(-1, k_nope.shape[1], -1)), dim=-1)
            v = torch.einsum("lr,hvr->lhv", latent, up_value)
            out[rows] = _attend(torch.cat((nope, rope), dim=-1), k, v, scale)
    return out


def route_softmax(
    logits: Tensor, num_chosen: int, *, num_groups: int, num_chosen_groups: int, scale: float
) -> tuple[Tensor, Tensor]:
    """DeepSeek-V2's router: softmax scores, groups ranked by their best expert, weights not renormalised.

    Args:
        logits: `[T, E]` in fp32.
        num_groups, num_chosen_groups: equal when experts are not limited to groups.

    Returns:
        weights `[T, A]` and expert ids `[T, A]`.
    """
    scores = logits.softmax(dim=-1)
    ranking = scores.detach()  # the choice has no gradient
    if num_chosen_groups < num_groups:
        best = ranking.unflatten(-1, (num_groups, -1)).amax(dim=-1)
        ranking = ranking.masked_fill(~_group_mask(best, num_chosen_groups, ranking.shape[-1]), 0.0)
    ids = ranking.topk(num_chosen, dim=-1).indices
    return scores.gather(1, ids) * scale, ids


def route_sigmoid(
    logits: Tensor,
    bias: Tensor,
    num_chosen: int,
    *,
    num_groups: int,
    num_chosen_groups: int,
    normalize: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """DeepSeek-V3's router (arXiv 2412.19437, section 2.1.2): sigmoid scores; the bias chooses and never weighs.

    Groups are ranked by the sum of their two best biased scores.

    Args:
        logits: `[T, E]` in fp32; bias: `[E]`.

    Returns:
        weights `[T, A]` and expert ids `[T, A]`.
    """
    scores = logits.sigmoid()
    ranking = scores.detach() + bias  # the choice has no gradient
    if num_chosen_groups < num_groups:
        best = ranking.unflatten(-1, (num_groups, -1)).topk(2, dim=-1).values.sum(dim=-1)
        ranking = ranking.masked_fill(~_group_mask(best, num_chosen_groups, ranking.shape[-1]), float("-inf"))
    ids = ranking.topk(num_chosen, dim=-1).indices
    weights = scores.gather(1, ids)
    if normalize:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return weights * scale, ids


def weigh_experts(
    logits: Tensor, ids: Tensor, *, sigmoid: bool, normalize: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """The weights that the routers above give experts `ids [T, A]`, whoever chose them; and the ids."""
    weights = (logits.sigmoid() if sigmoid else logits.softmax(dim=-1)).gather(1, ids)
    if sigmoid and normalize:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return weights * scale, ids


def run_experts(x: Tensor, weights: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The routed experts' weighted sum: each token goes through its A experts, a SwiGLU network each.

    Args:
        x: `[T, C]`; weights, ids: `[T, A]`; gate_up: `[E, 2I, C]`; down: `[E, C, I]`.

    Returns:
        `[T, C]` in x's dtype; a token's terms are added in fp32 in the order of `ids`, whatever else is in the batch.
    """
    return run_each_expert(
        x,
        weights,
        ids,
        gate_up.shape[0],
        lambda rows, expert: F.linear(swiglu(F.linear(rows, gate_up[expert])), down[expert]),
    )


def run_each_expert(
    x: Tensor, weights: Tensor, ids: Tensor, num_experts: int, network: Callable[[Tensor, int], Tensor]
) -> Tensor:
    """`run_experts` with the experts given as a function of rows `[N, C]` and an expert's number, to `[N, C]`."""
    num_tokens, num_chosen = ids.shape
    order = ids.flatten().argsort(stable=True)
    counts = torch.bincount(ids.flatten(), minlength=num_experts).tolist()
    parts = []
    for expert, rows in enumerate(x[order // num_chosen].split(counts)):
        if rows.shape[0]:
            parts.append(network(rows, expert))
    flat = torch.cat(parts)
    terms = torch.empty_like(flat).index_copy(0, order, flat).unflatten(0, (num_tokens, num_chosen))
    return torch.einsum("tac,ta->tc", terms.float(), weights.float()).to(x.dtype)


def dequantize_fp8_blocks(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Expand an FP8 e4m3 weight `[N, M]` with one fp32 factor per 128 x 128 block `[ceil(N/128), ceil(M/128)]`."""
    rows, columns = weight.shape
    wide = scale.repeat_interleave(FP8_BLOCK, 0)[:rows].repeat_interleave(FP8_BLOCK, 1)[:, :columns]
    return (weight.float() * wide).to(dtype)


def _as_blocks(cache: Tensor, block_size: int) -> Tensor:
    return cache.view(-1, block_size, *cache.shape[1:])


def _gather(blocks: Tensor, table: Tensor, length: int) -> Tensor:
    return blocks.index_select(0, table).flatten(0, 1)[:length]


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention of the last `q.shape[0]` positions of one context to all of it, causally."""
    num_new, length = q.shape[0], k.shape[0]
    mask = _causal_mask(num_new, length, q.device) if 1 < num_new < length else None
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1).unsqueeze(0),
        k.transpose(0, 1).unsqueeze(0),
        v.transpose(0, 1).unsqueeze(0),
        attn_mask=mask,
        is_causal=1 < num_new == length,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out.squeeze(0).transpose(0, 1)


def _attend_shared(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """As `_attend`, with one key `[L, D]` and value `[L, Dv]` head that all query heads share."""
    num_new, num_heads, _ = q.shape
    length = k.shape[0]
    scores = (q.flatten(0, 1) @ k.T).float().unflatten(0, (num_new, num_heads)) * scale
    if num_new > 1:
        scores = scores.masked_fill(~_causal_mask(num_new, length, q.device).unsqueeze(1), float("-inf"))
    return (scores.softmax(dim=-1).to(v.dtype).flatten(0, 1) @ v).unflatten(0, (num_new, num_heads))


def _causal_mask(num_new: int, length: int, device: torch.device) -> Tensor:
    positions = torch.arange(length, device=device)
    return positions <= positions[length - num_new :, None]


def _group_mask(group_scores: Tensor, num_chosen_groups: int, num_experts: int) -> Tensor:
    chosen = group_scores.topk(num_chosen_groups, dim=-1).indices
    mask = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(1, chosen, True)
    return mask.repeat_interleave(num_experts // group_scores.shape[-1], dim=-1)
