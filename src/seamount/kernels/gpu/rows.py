"""Row-wise Triton kernels: root-mean-square norms, SwiGLU, rotary embedding, cache writes, and several of them in one.

Called by `models` by way of `kernels.choice`. A slot below zero is written nowhere: that is how the filling rows of a
captured step leave the cache alone. The kernels pass in Triton's interpreter and compile for sm_90; they were never run
on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rms_norm_kernel(
    x,
    residual,
    weight,
    out,
    joined,
    eps,
    heads,
    x_token,
    x_head,
    residual_token,
    WIDTH: tl.constexpr,
    WIDTH_PAD: tl.constexpr,
    ADD: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH_PAD)
    inside = column < WIDTH
    wide = tl.load(x + row // heads * x_token + row % heads * x_head + column, mask=inside, other=0.0)
    if ADD:
        wide = wide.to(tl.float32) + tl.load(residual + row * residual_token + column, mask=inside, other=0.0).to(
            tl.float32
        )
        wide = wide.to(x.dtype.element_ty)
        tl.store(joined + row * WIDTH + column, wide, mask=inside)
    wide = wide.to(tl.float32)
    # 1 / sqrt instead of rsqrt: exact in every mode of the compiler and in the interpreter.
    wide = wide * (1.0 / tl.sqrt(tl.sum(wide * wide, 0) / WIDTH + eps))
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    # Rounded before the weight is applied, as in the reference.
    scaled = factor * wide.to(x.dtype.element_ty).to(tl.float32)
    tl.store(out + row * WIDTH + column, scaled.to(out.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `reference.rms_norm`; `x [..., C]` has at most three axes, the last of stride 1."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch_norm(x, x, weight, out, out, eps, add=False)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return `x + residual [T, C]` and its `rms_norm`, in one pass."""
    joined, out = torch.empty(2, *x.shape, dtype=x.dtype, device=x.device)
    _launch_norm(x, residual, weight, out, joined, eps, add=True)
    return joined, out


def _launch_norm(
    x: Tensor, residual: Tensor, weight: Tensor, out: Tensor, joined: Tensor, eps: float, *, add: bool
) -> None:
    width, num_rows = x.shape[-1], x.numel() // x.shape[-1]
    heads = x.shape[1] if x.dim() == 3 else 1
    if num_rows:
        _rms_norm_kernel[(num_rows,)](
            x,
            residual,
            weight,
            out,
            joined,
            eps,
            heads,
            x.stride(0) if x.dim() > 1 else 0,
            x.stride(1) if x.dim() == 3 else 0,
            residual.stride(0) if residual.dim() > 1 else 0,
            WIDTH=width,
            WIDTH_PAD=triton.next_power_of_2(width),
            ADD=add,
            num_warps=8 if width > 2048 else 4,
            enable_fp_fusion=True,
        )


@triton.jit
def _swiglu_kernel(gate_up, out, row_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    gate = tl.load(gate_up + row * row_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * row_stride + WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    # Rounded after the SiLU, as in the reference.
    gate = (gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * WIDTH + column, (gate * up).to(out.dtype.element_ty), mask=inside)


def swiglu(gate_up: Tensor) -> Tensor:
    """See `reference.swiglu`."""
    width = gate_up.shape[-1] // 2
    flat = gate_up.reshape(-1, 2 * width)
    out = torch.empty(flat.shape[0], width, dtype=gate_up.dtype, device=gate_up.device)
    block = min(1024, triton.next_power_of_2(width))
    if out.numel():
        _swiglu_kernel[(flat.shape[0], triton.cdiv(width, block))](
            flat, out, flat.stride(0), WIDTH=width, BLOCK=block, enable_fp_fusion=True
        )
    return out.view(*gate_up.shape[:-1], width)


@triton.jit
def _rotate(
    source,
    target,
    cos,
    sin,
    norm,
    eps,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    NORMED: tl.constexpr,
):
    """Rotate one head's 2 * HALF columns at `source`, if NORMED their norm, into `target`, laid out in halves."""
    column = tl.arange(0, HALF_PAD)
    inside = column < HALF
    if INTERLEAVED:
        at_first = 2 * column
        at_second = 2 * column + 1
    else:
        at_first = column
        at_second = HALF + column
    first = tl.load(source + at_first, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + at_second, mask=inside, other=0.0).to(tl.float32)
    if NORMED:
        # Rounded where the reference rounds.
        kind: tl.constexpr = source.dtype.element_ty
        factor = 1.0 / tl.sqrt((tl.sum(first * first, 0) + tl.sum(second * second, 0)) / (2 * HALF) + eps)
        first_weight = tl.load(norm + at_first, mask=inside, other=0.0).to(tl.float32)
        second_weight = tl.load(norm + at_second, mask=inside, other=0.0).to(tl.float32)
        first = (first_weight * (first * factor).to(kind).to(tl.float32)).to(kind).to(tl.float32)
        second = (second_weight * (second * factor).to(kind).to(tl.float32)).to(kind).to(tl.float32)
    c = tl.load(cos + column, mask=inside, other=0.0)
    s = tl.load(sin + column, mask=inside, other=0.0)
    tl.store(target + column, (first * c - second * s).to(target.dtype.element_ty), mask=inside)
    tl.store(target + HALF + column, (second * c + first * s).to(target.dtype.element_ty), mask=inside)


@triton.jit
def _rotary_kernel(
    x,
    out,
    cos,
    sin,
    x_token,
    x_head,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    source = x + token * x_token + head * x_head
    target = out + (token * HEADS + head) * 2 * HALF
    c = cos + token * HALF
    _rotate(source, target, c, sin + token * HALF, x, 0.0, HALF, HALF_PAD, INTERLEAVED, False)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """See `reference.apply_rotary`; the last axis of x has stride 1, and `cos, sin` are contiguous."""
    num_tokens, num_heads, width = x.shape
    out = torch.empty(num_tokens, num_heads, width, dtype=x.dtype, device=x.device)
    if out.numel():
        _rotary_kernel[(num_tokens, num_heads)](
            x,
            out,
            cos,
            sin,
            x.stride(0),
            x.stride(1),
            HEADS=num_heads,
            HALF=width // 2,
            HALF_PAD=triton.next_power_of_2(width // 2),
            INTERLEAVED=interleaved,
            num_warps=1,
            enable_fp_fusion=True,
        )
    return out


@triton.jit
def _write_kernel(cache, slots, values, cache_slot, value_row, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    if slot < 0:
        return
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    value = tl.load(values + row * value_row + column, mask=inside, other=0.0)
    tl.store(cache + slot * cache_slot + column, value.to(cache.dtype.element_ty), mask=inside)


def write_cache(cache: Tensor, slots: Tensor, values: Tensor) -> None:
    """See `reference.write_cache`; rows whose slot is negative are left out."""
    flat = values.flatten(1)
    num_rows, width = flat.shape
    block = min(1024, triton.next_power_of_2(width))
    if num_rows:
        _write_kernel[(num_rows, triton.cdiv(width, block))](
            cache,
            slots,
            flat,
            cache.stride(0),
            flat.stride(0),
            WIDTH=width,
            BLOCK=block,
            enable_fp_fusion=True,
        )


@triton.jit
def _rotate_and_cache_kernel(
    qkv,
    out,
    key_cache,
    value_cache,
    slots,
    cos,
    sin,
    q_norm,
    k_norm,
    eps,
    row_stride,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
    NORMED: tl.constexpr,
):
    # Axis 1: the query heads, then the key heads, each of which also copies its value.
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    source = qkv + token * row_stride + head * 2 * HALF
    c = cos + token * HALF
    s = sin + token * HALF
    if head < HEADS:
        target = out + (token * HEADS + head) * 2 * HALF
        _rotate(source, target, c, s, q_norm, eps, HALF, HALF_PAD, False, NORMED)
    else:
        slot = tl.load(slots + token).to(tl.int64)
        if slot >= 0:
            place = (slot * KV_HEADS + head - HEADS) * 2 * HALF
            _rotate(source, key_cache + place, c, s, k_norm, eps, HALF, HALF_PAD, False, NORMED)
            column = tl.arange(0, 2 * HALF_PAD)
            inside = column < 2 * HALF
            value = tl.load(source + KV_HEADS * 2 * HALF + column, mask=inside, other=0.0)
            tl.store(value_cache + place + column, value.to(value_cache.dtype.element_ty), mask=inside)


def rotate_and_cache(
    qkv: Tensor,
    num_heads: int,
    angles: tuple[Tensor, Tensor],
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    cache: tuple[Tensor, Tensor],
    slots: Tensor,
) -> Tensor:
    """See `reference.rotate_and_cache`, of which this is all in one pass; heads and caches are contiguous."""
    num_tokens, num_all, width = qkv.shape
    num_kv_heads = (num_all - num_heads) // 2
    out = torch.empty(num_tokens, num_heads, width, dtype=qkv.dtype, device=qkv.device)
    q_norm, k_norm = (qkv, qkv) if norms is None else norms
    if num_tokens:
        _rotate_and_cache_kernel[(num_tokens, num_heads + num_kv_heads)](
            qkv,
            out,
            *cache,
            slots,
            *angles,
            q_norm,
            k_norm,
            eps,
            qkv.stride(0),
            HEADS=num_heads,
            KV_HEADS=num_kv_heads,
            HALF=width // 2,
            HALF_PAD=triton.next_power_of_2(width // 2),
            NORMED=norms is not None,
            num_warps=1,
            enable_fp_fusion=True,
        )
    return out


@triton.jit
def _latent_rotate_and_cache_kernel(
    q,
    compressed,
    weight,
    out,
    cache,
    slots,
    cos,
    sin,
    eps,
    q_token,
    q_head,
    row_stride,
    cache_slot,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
    RANK: tl.constexpr,
    RANK_PAD: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    # Axis 1: the query heads, then one program for the latent and the key that all heads share.
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    c = cos + token * HALF
    s = sin + token * HALF
    if head < HEADS:
        target = out + (token * HEADS + head) * 2 * HALF
        _rotate(q + token * q_token + head * q_head, target, c, s, q, 0.0, HALF, HALF_PAD, INTERLEAVED, False)
    else:
        slot = tl.load(slots + token).to(tl.int64)
        if slot >= 0:
            source = compressed + token * row_stride
            target = cache + slot * cache_slot
            column = tl.arange(0, RANK_PAD)
            inside = column < RANK
            wide = tl.load(source + column, mask=inside, other=0.0).to(tl.float32)
            wide = wide * (1.0 / tl.sqrt(tl.sum(wide * wide, 0) / RANK + eps))
            factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
            scaled = factor * wide.to(compressed.dtype.element_ty).to(tl.float32)
            tl.store(target + column, scaled.to(cache.dtype.element_ty), mask=inside)
            _rotate(source + RANK, target + RANK, c, s, q, 0.0, HALF, HALF_PAD, INTERLEAVED, False)


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
    """What latent attention does between its projections and the context, in one pass.

    `rms_norm` with `weight [R]` of the latent, the first R columns of `compressed [T, R + Dr]`; `apply_rotary` of the
    others, the key that all heads share, and of `q_rope [T, H, Dr]`; `write_cache` of latent and key to
    `cache [num_slots, R + Dr]`. Returns the rotated queries.
    """
    num_tokens, num_heads, width = q_rope.shape
    rank = weight.shape[0]
    out = torch.empty(num_tokens, num_heads, width, dtype=q_rope.dtype, device=q_rope.device)
    if num_tokens:
        _latent_rotate_and_cache_kernel[(num_tokens, num_heads + 1)](
            q_rope,
            compressed,
            weight,
            out,
            cache,
            slots,
            *angles,
            eps,
            q_rope.stride(0),
            q_rope.stride(1),
            compressed.stride(0),
            cache.stride(0),
            HEADS=num_heads,
            HALF=width // 2,
            HALF_PAD=triton.next_power_of_2(width // 2),
            RANK=rank,
            RANK_PAD=triton.next_power_of_2(rank),
            INTERLEAVED=interleaved,
            num_warps=1,
            enable_fp_fusion=True,
        )
    return out
