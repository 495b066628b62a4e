"""Causal attention of sequences of many lengths where gradients flow on a CPU.

Chosen by `kernels.choice`; same meaning as in `reference`. Sequences of about one length are padded to the same and
attended together; lengths and numbers are rounded up to few values, because the CPU's matrix library prepares itself
for each new shape, which takes longer than the product. The attention itself is written out up to some length, with a
backward pass of its own: in bf16 torch's fused kernel takes two to four times as long there (docs/log.md). Shapes: T
tokens, H query heads, K key heads, N sequences of a group, L their length, P padded rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import differentiable

# Up to these lengths the written form is quicker than the fused kernel (two cores with AMX).
_MOST_WRITTEN = {torch.bfloat16: 640, torch.float32: 128}


class _Layout(NamedTuple):
    """Where each row goes in the padded form.

    Attributes:
        places: `[T]`, row of the padded form.
        sources: `[P]`, row of the flat form, -1 where there is none.
        groups: number of sequences and length of each group, in order; their products add up to P.
    """

    places: Tensor
    sources: Tensor
    groups: tuple[tuple[int, int], ...]


def causal_attention(q: Tensor, k: Tensor, v: Tensor, starts: Sequence[int], scale: float) -> Tensor:
    """As `reference.causal_attention`."""
    lengths = {end - start for start, end in itertools.pairwise(starts)}
    if len(lengths) == 1:
        return _attend_rows(q, k, v, len(starts) - 1, scale)
    layout = _layout(tuple(starts))
    padded = [differentiable.spread_rows(t.flatten(1), layout.places, layout.sources) for t in (q, k, v)]
    sizes = [count * length for count, length in layout.groups]
    parts = zip(*(p.split(sizes) for p in padded), strict=True)
    shapes = [t.shape[1:] for t in (q, k, v)]
    outs = []
    for (count, _), part in zip(layout.groups, parts, strict=True):
        rows = [p.unflatten(1, shape) for p, shape in zip(part, shapes, strict=True)]
        outs.append(_attend_rows(rows[0], rows[1], rows[2], count, scale).flatten(1))
    out = differentiable.collect_rows(torch.cat(outs), layout.places, layout.sources)
    return out.unflatten(1, (q.shape[1], v.shape[2]))


def _attend_rows(q: Tensor, k: Tensor, v: Tensor, count: int, scale: float) -> Tensor:
    """Attention of `count` sequences of one length; `[count * L, H, Dv]`."""
    length = q.shape[0] // count
    if length <= _MOST_WRITTEN.get(q.dtype, 0):
        return _Attention.apply(q, k, v, count, scale)
    rows_q, rows_k, rows_v = (t.reshape(count, length, *t.shape[1:]).transpose(1, 2) for t in (q, k, v))
    same_heads = q.shape[1] == k.shape[1]
    out = F.scaled_dot_product_attention(rows_q, rows_k, rows_v, is_causal=True, scale=scale, enable_gqa=not same_heads)
    return out.transpose(1, 2).reshape(q.shape[0], q.shape[1], v.shape[-1])


class _Attention(torch.autograd.Function):
    """Softmax attention as five products and two passes over the scores; keeps the scores' softmax."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, count: int, scale: float) -> Tensor:
        ctx.heads, ctx.scale = (count, q.shape[1], k.shape[1]), scale
        rows_q, rows_k, rows_v = (_by_key_head(t, count, k.shape[1]) for t in (q, k, v))
        length = rows_k.shape[1]
        mask = torch.full((length, length), float("-inf"), dtype=q.dtype).triu_(1).repeat(q.shape[1] // k.shape[1], 1)
        chances = torch.softmax(torch.baddbmm(mask, rows_q, rows_k.transpose(1, 2), alpha=scale), dim=-1)
        ctx.save_for_backward(rows_q, rows_k, rows_v, chances)
        return _by_token(torch.bmm(chances, rows_v), count, q.shape[1], k.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, chances = ctx.saved_tensors
        count, num_heads, num_kv_heads = ctx.heads
        grad = _by_key_head(grads[0], count, num_kv_heads)
        grad_v = torch.bmm(chances.transpose(1, 2), grad)
        slopes = torch.bmm(grad, v.transpose(1, 2))
        slopes = torch._softmax_backward_data(slopes, chances, -1, chances.dtype).mul_(ctx.scale)
        grad_q, grad_k = torch.bmm(slopes, k), torch.bmm(slopes.transpose(1, 2), q)
        return (
            _by_token(grad_q, count, num_heads, num_kv_heads),
            _by_token(grad_k, count, num_kv_heads, num_kv_heads),
            _by_token(grad_v, count, num_kv_heads, num_kv_heads),
            None,
            None,
        )


def _by_key_head(x: Tensor, count: int, num_kv_heads: int) -> Tensor:
    """`[N * L, H, D]` to `[N * K, H / K * L, D]`: the query heads of a key head one below the other."""
    rows = x.reshape(count, -1, num_kv_heads, x.shape[1] // num_kv_heads, x.shape[2])
    return rows.permute(0, 2, 3, 1, 4).reshape(count * num_kv_heads, -1, x.shape[2])


def _by_token(x: Tensor, count: int, num_heads: int, num_kv_heads: int) -> Tensor:
    """Undo `_by_key_head`: `[N * L, H, D]`."""
    rows = x.view(count, num_kv_heads, num_heads // num_kv_heads, -1, x.shape[-1])
    return rows.permute(0, 3, 1, 2, 4).reshape(-1, num_heads, x.shape[-1])


@lru_cache(maxsize=8)
def _layout(starts: tuple[int, ...]) -> _Layout:
    """How sequences are grouped by length and padded; the layers of a step share it."""
    by_length: dict[int, list[int]] = {}
    for number, (start, end) in enumerate(itertools.pairwise(starts)):
        by_length.setdefault(_rounded_length(end - start), []).append(number)
    places = torch.empty(starts[-1], dtype=torch.int64)
    shapes, base = [], 0
    for length, members in sorted(by_length.items()):
        for rank, number in enumerate(members):
            first = base + rank * length
            size = starts[number + 1] - starts[number]
            places[starts[number] : starts[number + 1]] = torch.arange(first, first + size)
        count = _rounded_count(len(members))
        shapes.append((count, length))
        base += count * length
    sources = torch.full((base,), -1, dtype=torch.int64)
    sources[places] = torch.arange(starts[-1])
    return _Layout(places, sources, tuple(shapes))


def _rounded_length(length: int) -> int:
    step = 16 if length <= 128 else 64 if length <= 512 else 128
    return -(-length // step) * step


def _rounded_count(count: int) -> int:
    step = 1 if count <= 4 else 4 if count <= 16 else 8
    return -(-count // step) * step
