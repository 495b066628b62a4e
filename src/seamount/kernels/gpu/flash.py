"""One Triton kernel for every attention over a paged cache; `attention` beside this gives it its operands.

Grouped-query attention, absorbed latent attention and expanded latent attention differ only in their operands: a score
is `q1 . k1 + q2 . k2` (the second part only for latents, where all heads share `k2`), and the values are `v`, which for
absorbed latents are the keys `k1` themselves, loaded once.

A program handles some query rows (new tokens times heads that share a key head) of one sequence. Which rows, and in
which order they meet the context, follows from that sequence alone, so a result does not depend on the batch. Sequences
with one new token are split over the context: the context's tiles are dealt in turn to `NUM_SPLITS` programs, whatever
the load, and `_combine_kernel` joins their parts in order. The grid does not depend on lengths, so that a CUDA graph of
a decode step stays valid while contexts grow.

Nothing here reads a value back from the GPU. The kernels pass in Triton's interpreter and compile for sm_90; they were
never run on a GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from seamount.kernels.pages import Pages

# Programs that share one sequence's context in decode, and the most parts that are joined. Part of what a result is:
# changing it changes last bits.
NUM_SPLITS = 16


# How many sequences there are changes from step to step and is no reason to compile again.
@triton.jit(do_not_specialize=["num_seqs"])
def _attend_kernel(
    q1,
    q2,
    k1,
    k2,
    v,
    out,
    part_max,
    part_sum,
    block_table,
    query_starts,
    context_lens,
    num_seqs,
    scale,
    q1_token,
    q1_head,
    q2_token,
    q2_head,
    k1_slot,
    k1_head,
    k2_slot,
    v_slot,
    v_head,
    table_row,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    D1: tl.constexpr,
    D1_PAD: tl.constexpr,
    D2: tl.constexpr,
    D2_PAD: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SEQS_PAD: tl.constexpr,
    SPLITS: tl.constexpr,
    VALUE_IS_KEY: tl.constexpr,
):
    # Axis 0: sequence (decode) or tile of new tokens; axis 1: key head and tile of its query heads; axis 2: split.
    place = tl.program_id(0)
    split = tl.program_id(2)
    if SPLITS > 1:
        seq = place
        tile = 0
    else:
        # Sequence s owns tiles from query_starts[s] // TOKENS + s on, which leaves it enough whatever its length.
        each = tl.arange(0, SEQS_PAD)
        first_tile = tl.load(query_starts + each, mask=each < num_seqs, other=0) // TOKENS + each
        seq = tl.sum(((first_tile <= place) & (each < num_seqs)).to(tl.int32)) - 1
        tile = place - (tl.load(query_starts + seq) // TOKENS + seq)
    row_start = tl.load(query_starts + seq)
    num_new = tl.load(query_starts + seq + 1) - row_start
    length = tl.load(context_lens + seq)
    if SPLITS > 1:
        if num_new != 1:
            return
    else:
        if num_new <= 1:
            return
    if tile * TOKENS >= num_new:
        return

    head_tiles: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    kv_head = (tl.program_id(1) // head_tiles).to(tl.int64)
    row = tl.arange(0, ROWS)
    token = tile * TOKENS + row // HEADS
    in_group = tl.program_id(1) % head_tiles * HEADS + row % HEADS
    live = (row // HEADS < TOKENS) & (token < num_new) & (in_group < GROUP)
    head = kv_head * GROUP + in_group
    flat = (row_start + token).to(tl.int64)
    position = length - num_new + token

    d1 = tl.arange(0, D1_PAD)
    q1_tile = tl.load(
        q1 + flat[:, None] * q1_token + head[:, None] * q1_head + d1[None, :],
        mask=live[:, None] & (d1 < D1)[None, :],
        other=0.0,
    )
    if D2 > 0:
        d2 = tl.arange(0, D2_PAD)
        q2_tile = tl.load(
            q2 + flat[:, None] * q2_token + head[:, None] * q2_head + d2[None, :],
            mask=live[:, None] & (d2 < D2)[None, :],
            other=0.0,
        )
    dv = tl.arange(0, DV_PAD)
    acc = tl.zeros([ROWS, DV_PAD], dtype=tl.float32)
    best = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)

    end = length - num_new + tl.minimum(tile * TOKENS + TOKENS, num_new)
    for start in range(split * KEYS, end, SPLITS * KEYS):
        key = start + tl.arange(0, KEYS)
        inside = key < end
        block = tl.load(block_table + seq.to(tl.int64) * table_row + key // BLOCK_SIZE, mask=inside, other=0)
        slot = block.to(tl.int64) * BLOCK_SIZE + key % BLOCK_SIZE
        k1_tile = tl.load(
            k1 + slot[:, None] * k1_slot + kv_head * k1_head + d1[None, :],
            mask=inside[:, None] & (d1 < D1)[None, :],
            other=0.0,
        )
        scores = tl.dot(q1_tile, tl.trans(k1_tile), input_precision="ieee")
        if D2 > 0:
            k2_tile = tl.load(
                k2 + slot[:, None] * k2_slot + d2[None, :],
                mask=inside[:, None] & (d2 < D2)[None, :],
                other=0.0,
            )
            scores += tl.dot(q2_tile, tl.trans(k2_tile), input_precision="ieee")
        seen = inside[None, :] & (key[None, :] <= position[:, None])
        scores = tl.where(seen, scores * scale, float("-inf"))
        higher = tl.maximum(best, tl.max(scores, 1))
        # A row may see nothing of a tile: subtracting -inf from itself would make NaN.
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - shift[:, None])
        kept = tl.exp2(best - shift)
        total = total * kept + tl.sum(weights, 1)
        best = higher
        if VALUE_IS_KEY:
            v_tile = k1_tile
        else:
            v_tile = tl.load(
                v + slot[:, None] * v_slot + kv_head * v_head + dv[None, :],
                mask=inside[:, None] & (dv < DV)[None, :],
                other=0.0,
            )
        acc = acc * kept[:, None] + tl.dot(weights.to(v_tile.dtype), v_tile, input_precision="ieee")

    shown = live[:, None] & (dv < DV)[None, :]
    if SPLITS > 1:
        # A split that got no tile leaves its part unwritten; _combine_kernel knows which those are.
        if split * KEYS < end:
            part = (seq * NUM_HEADS + head).to(tl.int64) * SPLITS + split
            tl.store(part_max + part, best, mask=live)
            tl.store(part_sum + part, total, mask=live)
            tl.store(out + part[:, None] * DV + dv[None, :], acc, mask=shown)
    else:
        divisor = tl.where(live, total, 1.0)
        where = (flat * NUM_HEADS + head)[:, None] * DV + dv[None, :]
        tl.store(out + where, (acc / divisor[:, None]).to(out.dtype.element_ty), mask=shown)


@triton.jit
def _combine_kernel(
    parts,
    part_max,
    part_sum,
    out,
    query_starts,
    context_lens,
    NUM_HEADS: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    KEYS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    seq = tl.program_id(0)
    head = tl.program_id(1)
    row_start = tl.load(query_starts + seq)
    if tl.load(query_starts + seq + 1) - row_start != 1:
        return
    split = tl.arange(0, SPLITS)
    written = split * KEYS < tl.load(context_lens + seq)
    part = (seq * NUM_HEADS + head).to(tl.int64) * SPLITS + split
    best = tl.load(part_max + part, mask=written, other=float("-inf"))
    factor = tl.exp2(best - tl.max(best, 0))
    total = tl.sum(tl.load(part_sum + part, mask=written, other=0.0) * factor, 0)
    dv = tl.arange(0, DV_PAD)
    values = tl.load(parts + part[:, None] * DV + dv[None, :], mask=written[:, None] & (dv < DV)[None, :], other=0.0)
    joined = tl.sum(values * factor[:, None], 0) / total
    where = (row_start.to(tl.int64) * NUM_HEADS + head) * DV + dv
    tl.store(out + where, joined.to(out.dtype.element_ty), mask=dv < DV)


@dataclass(frozen=True, slots=True)
class _Tiling:
    """How much one program takes: query heads, new tokens, rows of the matrix product, keys at a time."""

    heads: int
    tokens: int
    rows: int
    keys: int
    warps: int
    stages: int


def attend(
    q1: Tensor,
    k1: Tensor,
    v: Tensor | None,
    pages: Pages,
    scale: float,
    *,
    q2: Tensor | None = None,
    k2: Tensor | None = None,
) -> Tensor:
    """Causal attention of the new tokens of a flat batch to their paged contexts.

    Args:
        q1: `[T, H, D1]`; k1: `[num_slots, K, D1]`, H a multiple of K; last strides 1, others free.
        v: `[num_slots, K, Dv]`, or None where the values are k1.
        scale: multiplies the scores.
        q2: `[T, H, D2]`; k2: `[num_slots, D2]`, a part of the scores whose keys all heads share.
    Returns:
        `[T, H, Dv]` in q1's dtype.
    """
    num_tokens, num_heads, _ = q1.shape
    width = k1.shape[2] if v is None else v.shape[2]
    out = torch.empty(num_tokens, num_heads, width, dtype=q1.dtype, device=q1.device)
    num_seqs = pages.context_lens.shape[0]
    _decode(q1, k1, v, q2, k2, pages, scale, out)
    if num_tokens > num_seqs:
        tiling = _tiling(q1, k1, decode=False)
        grid = (num_tokens // tiling.tokens + num_seqs, _num_head_tiles(q1, k1, tiling), 1)
        _launch(grid, tiling, 1, q1, k1, v, q2, k2, pages, scale, out, out, out)
    return out


def _decode(
    q1: Tensor,
    k1: Tensor,
    v: Tensor | None,
    q2: Tensor | None,
    k2: Tensor | None,
    pages: Pages,
    scale: float,
    out: Tensor,
) -> None:
    num_seqs, num_heads, width = pages.context_lens.shape[0], q1.shape[1], out.shape[2]
    tiling = _tiling(q1, k1, decode=True)
    parts = torch.empty(num_seqs, num_heads, NUM_SPLITS, width, dtype=torch.float32, device=q1.device)
    part_max, part_sum = torch.empty(2, num_seqs, num_heads, NUM_SPLITS, dtype=torch.float32, device=q1.device)
    grid = (num_seqs, _num_head_tiles(q1, k1, tiling), NUM_SPLITS)
    _launch(grid, tiling, NUM_SPLITS, q1, k1, v, q2, k2, pages, scale, parts, part_max, part_sum)
    _combine_kernel[(num_seqs, num_heads)](
        parts,
        part_max,
        part_sum,
        out,
        pages.query_starts,
        pages.context_lens,
        NUM_HEADS=num_heads,
        DV=width,
        DV_PAD=triton.next_power_of_2(width),
        KEYS=tiling.keys,
        SPLITS=NUM_SPLITS,
        enable_fp_fusion=True,
    )


def _launch(
    grid: tuple[int, int, int],
    tiling: _Tiling,
    num_splits: int,
    q1: Tensor,
    k1: Tensor,
    v: Tensor | None,
    q2: Tensor | None,
    k2: Tensor | None,
    pages: Pages,
    scale: float,
    out: Tensor,
    part_max: Tensor,
    part_sum: Tensor,
) -> None:
    num_heads, width1 = q1.shape[1:]
    width2 = 0 if q2 is None else q2.shape[2]
    # What is absent is stood in for by k1 and never read.
    values, queries2, keys2 = k1 if v is None else v, q1 if q2 is None else q2, k1 if k2 is None else k2
    num_seqs = pages.context_lens.shape[0]
    _attend_kernel[grid](
        q1,
        queries2,
        k1,
        keys2,
        values,
        out,
        part_max,
        part_sum,
        pages.block_table,
        pages.query_starts,
        pages.context_lens,
        num_seqs,
        scale * math.log2(math.e),
        q1.stride(0),
        q1.stride(1),
        queries2.stride(0),
        queries2.stride(1),
        k1.stride(0),
        k1.stride(1),
        keys2.stride(0),
        values.stride(0),
        values.stride(1),
        pages.block_table.stride(0),
        NUM_HEADS=num_heads,
        GROUP=num_heads // k1.shape[1],
        BLOCK_SIZE=pages.block_size,
        D1=width1,
        D1_PAD=_padded(width1),
        D2=width2,
        D2_PAD=_padded(width2),
        DV=values.shape[2],
        DV_PAD=_padded(values.shape[2]),
        HEADS=tiling.heads,
        TOKENS=tiling.tokens,
        ROWS=tiling.rows,
        KEYS=tiling.keys,
        SEQS_PAD=1 if num_splits > 1 else triton.next_power_of_2(num_seqs),
        SPLITS=num_splits,
        VALUE_IS_KEY=v is None,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
        enable_fp_fusion=True,
    )


def _tiling(q1: Tensor, k1: Tensor, *, decode: bool) -> _Tiling:
    """Tiles that fit the registers and the shared memory of GPUs since Ampere; a function of shapes and dtype only."""
    group, wide, full = q1.shape[1] // k1.shape[1], q1.shape[2] > 256, q1.element_size() > 2
    heads = triton.next_power_of_2(group)
    if decode:
        heads = min(heads, 16)
        keys = 16 if wide and full else 32 if wide or full else 64
        # Two steps of the loop in flight: the pipeline counts the table's load and the keys' as a stage each.
        return _Tiling(heads, 1, 16, keys, 4, 3 if full else 5)
    rows = 16 if wide else 32 if full else 64
    heads = min(heads, rows)
    keys = 16 if wide and full else 32 if wide or full else 64
    return _Tiling(heads, rows // heads, rows, keys, 4, 2 if full else 3)


def _num_head_tiles(q1: Tensor, k1: Tensor, tiling: _Tiling) -> int:
    num_kv_heads = k1.shape[1]
    return num_kv_heads * -(-(q1.shape[1] // num_kv_heads) // tiling.heads)


def _padded(width: int) -> int:
    return max(16, triton.next_power_of_2(width))
