"""The routed experts as grouped matrix products: sorted by expert, gate-up with SiLU, down, a sum in fixed order.

`_plan` sorts and cuts the choices into tiles of rows that share an expert, on the device, so that nothing has to be
read back and a CUDA graph can replay it. The number of tiles is bounded from the shapes alone; programs beyond the last
tile end at once. Called by `models` by way of `kernels.choice`. The kernels pass in Triton's interpreter and compile
for sm_90; they were never run on a GPU.

Shapes: T tokens, A experts chosen for each, N = T * A choices, E experts, C width, I width inside an expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

# Up to this many choices one program plans, by counting; more are sorted by torch, in several kernels.
_MOST_PLANNED = 1024
_CHUNK = tl.constexpr(32)


@dataclass(frozen=True, slots=True)
class _Plan:
    """Choices sorted by expert and cut into tiles; int32 on the device, tiles beyond `num_tiles [1]` undefined.

    Attributes:
        order: `[N]`, the choice at each sorted place.
        expert, first, end: `[most_tiles]`, a tile's expert, and its sorted places `first:first + rows` cut at `end`.
        rows: rows of a tile.
    """

    order: Tensor
    expert: Tensor
    first: Tensor
    end: Tensor
    num_tiles: Tensor
    rows: int


@triton.jit(do_not_specialize=["num_choices"])
def _plan_kernel(
    ids,
    order,
    tile_expert,
    tile_first,
    tile_end,
    num_tiles,
    num_choices,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    N_PAD: tl.constexpr,
    ROWS: tl.constexpr,
):
    # A stable sort by counting: a choice's place is the number of choices with a smaller expert, or the same one and
    # an earlier index.
    choice = tl.arange(0, N_PAD)
    live = choice < num_choices
    key = tl.load(ids + choice, mask=live, other=E_PAD).to(tl.int32) * N_PAD + choice
    expert = tl.arange(0, E_PAD)
    rank = tl.zeros([N_PAD], dtype=tl.int32)
    counts = tl.zeros([E_PAD], dtype=tl.int32)
    for start in range(0, num_choices, _CHUNK):
        other = start + tl.arange(0, _CHUNK)
        other_id = tl.load(ids + other, mask=other < num_choices, other=E_PAD).to(tl.int32)
        rank += tl.sum(((other_id * N_PAD + other)[None, :] < key[:, None]).to(tl.int32), 1)
        counts += tl.sum((other_id[None, :] == expert[:, None]).to(tl.int32), 1)
    tl.store(order + rank, choice, mask=live)
    end = tl.cumsum(counts, 0)
    tiles = (counts + ROWS - 1) // ROWS
    first_tile = tl.cumsum(tiles, 0) - tiles
    tl.store(num_tiles, tl.sum(tiles, 0))
    for i in range((num_choices + ROWS - 1) // ROWS):
        there = i < tiles
        tl.store(tile_expert + first_tile + i, expert, mask=there)
        tl.store(tile_first + first_tile + i, end - counts + i * ROWS, mask=there)
        tl.store(tile_end + first_tile + i, end, mask=there)


def _plan(ids: Tensor, num_experts: int) -> _Plan:
    num_choices, device = ids.numel(), ids.device
    rows = 16 if num_choices <= 16 * num_experts else 64
    # Each expert begins at most one tile that is not full.
    most_tiles = min(num_choices, num_choices // rows + num_experts)
    if num_choices > _MOST_PLANNED:
        return _sorted_plan(ids, num_experts, rows, most_tiles)
    order = torch.empty(num_choices, dtype=torch.int32, device=device)
    expert, first, end = torch.empty(3, most_tiles, dtype=torch.int32, device=device)
    num_tiles = torch.empty(1, dtype=torch.int32, device=device)
    _plan_kernel[(1,)](
        ids,
        order,
        expert,
        first,
        end,
        num_tiles,
        num_choices,
        E=num_experts,
        E_PAD=triton.next_power_of_2(num_experts),
        N_PAD=triton.next_power_of_2(num_choices),
        ROWS=rows,
        enable_fp_fusion=True,
    )
    return _Plan(order, expert, first, end, num_tiles, rows)


def _sorted_plan(ids: Tensor, num_experts: int, rows: int, most_tiles: int) -> _Plan:
    flat = ids.flatten().to(torch.int32)
    in_order, order = flat.sort(stable=True)
    each = torch.arange(num_experts, device=ids.device, dtype=torch.int32)
    ends = torch.searchsorted(in_order, each, right=True, out_int32=True)
    starts = torch.searchsorted(in_order, each, right=False, out_int32=True)
    tile_ends = ((ends - starts + rows - 1) // rows).cumsum(0, dtype=torch.int32)
    tile = torch.arange(most_tiles, device=ids.device, dtype=torch.int32)
    expert = torch.searchsorted(tile_ends, tile, right=True, out_int32=True).clamp_(max=num_experts - 1)
    before = torch.cat((tile_ends.new_zeros(1), tile_ends[:-1]))
    first = starts[expert] + (tile - before[expert]) * rows
    return _Plan(order.to(torch.int32), expert, first, ends[expert], tile_ends[-1:], rows)


@triton.jit
def _gate_up_kernel(
    x,
    gate_up,
    out,
    order,
    tile_expert,
    tile_first,
    tile_end,
    num_tiles,
    x_row,
    CHOSEN: tl.constexpr,
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """SwiGLU of one tile's rows and COLUMNS of the inner width; written at the sorted places of `out [N, I]`."""
    tile = tl.program_id(0)
    if tile >= tl.load(num_tiles):
        return
    expert = tl.load(tile_expert + tile).to(tl.int64)
    place = tl.load(tile_first + tile) + tl.arange(0, ROWS)
    live = place < tl.load(tile_end + tile)
    token = (tl.load(order + place, mask=live, other=0) // CHOSEN).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    weight_rows = gate_up + (expert * 2 * INNER + column[:, None]) * WIDTH
    gate = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    up = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for start in range(0, WIDTH, DEPTH):
        k = start + tl.arange(0, DEPTH)
        rows = tl.load(x + token[:, None] * x_row + k[None, :], mask=live[:, None] & (k < WIDTH)[None, :], other=0.0)
        shown = (column < INNER)[:, None] & (k < WIDTH)[None, :]
        gate_tile = tl.load(weight_rows + k[None, :], mask=shown, other=0.0)
        up_tile = tl.load(weight_rows + INNER * WIDTH + k[None, :], mask=shown, other=0.0)
        gate += tl.dot(rows, tl.trans(gate_tile), input_precision="ieee")
        up += tl.dot(rows, tl.trans(up_tile), input_precision="ieee")
    value = gate / (1.0 + tl.exp(-gate)) * up
    target = out + place.to(tl.int64)[:, None] * INNER + column[None, :]
    tl.store(target, value.to(out.dtype.element_ty), mask=live[:, None] & (column < INNER)[None, :])


@triton.jit
def _down_kernel(
    inner,
    down,
    out,
    order,
    tile_expert,
    tile_first,
    tile_end,
    num_tiles,
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """The down projection of one tile's rows, COLUMNS wide; written at each choice's own row of `out [N, C]`."""
    tile = tl.program_id(0)
    if tile >= tl.load(num_tiles):
        return
    expert = tl.load(tile_expert + tile).to(tl.int64)
    place = tl.load(tile_first + tile) + tl.arange(0, ROWS)
    live = place < tl.load(tile_end + tile)
    choice = tl.load(order + place, mask=live, other=0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    weight_rows = down + (expert * WIDTH + column[:, None]) * INNER
    inner_rows = inner + place.to(tl.int64)[:, None] * INNER
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for start in range(0, INNER, DEPTH):
        k = start + tl.arange(0, DEPTH)
        rows = tl.load(inner_rows + k[None, :], mask=live[:, None] & (k < INNER)[None, :], other=0.0)
        tile_weight = tl.load(
            weight_rows + k[None, :], mask=(column < WIDTH)[:, None] & (k < INNER)[None, :], other=0.0
        )
        total += tl.dot(rows, tl.trans(tile_weight), input_precision="ieee")
    target = out + choice[:, None] * WIDTH + column[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=live[:, None] & (column < WIDTH)[None, :])


@triton.jit
def _sum_kernel(
    terms,
    weights,
    plus,
    out,
    plus_row,
    CHOSEN: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for i in range(CHOSEN):
        term = tl.load(terms + (token * CHOSEN + i) * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
        total += term * tl.load(weights + token * CHOSEN + i).to(tl.float32)
    total = total.to(out.dtype.element_ty)
    if ADD:
        other = tl.load(plus + token * plus_row + column, mask=inside, other=0.0)
        total = (total.to(tl.float32) + other.to(tl.float32)).to(out.dtype.element_ty)
    tl.store(out + token * WIDTH + column, total, mask=inside)


def run_experts(
    x: Tensor, weights: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor, plus: Tensor | None = None
) -> Tensor:
    """See `reference.run_experts`; all operands but x and plus are contiguous.

    A token's result does not depend on which others are in the batch, as long as as many choices fall to a tile: tiles
    grow from 16 to 64 rows once there are more than 16 choices per expert.

    Args:
        plus: `[T, C]` to add to the rounded sum: the residual, or the shared experts' output.
    """
    num_tokens, num_chosen = ids.shape
    num_experts, width, inner = down.shape
    out = torch.empty(num_tokens, width, dtype=x.dtype, device=x.device)
    if num_tokens == 0:
        return out
    plan = _plan(ids, num_experts)
    few, full = plan.rows == 16, x.element_size() > 2
    hidden = torch.empty(ids.numel(), inner, dtype=x.dtype, device=x.device)
    terms = torch.empty(ids.numel(), width, dtype=x.dtype, device=x.device)
    tiles = (plan.order, plan.expert, plan.first, plan.end, plan.num_tiles)
    num_tiles = plan.expert.shape[0]
    # Few rows: memory decides, so narrow tiles for many programs in flight. Many rows: the matrix units decide.
    columns = 32 if few else 64
    depth = 128 if few and not full else 32 if full else 64
    stages = 2 if full else 4 if few else 3
    _gate_up_kernel[(num_tiles, triton.cdiv(inner, columns))](
        x,
        gate_up,
        hidden,
        *tiles,
        x.stride(0),
        CHOSEN=num_chosen,
        WIDTH=width,
        INNER=inner,
        ROWS=plan.rows,
        COLUMNS=columns,
        DEPTH=depth,
        num_warps=4,
        num_stages=stages,
        enable_fp_fusion=True,
    )
    columns = 32 if few else 128
    _down_kernel[(num_tiles, triton.cdiv(width, columns))](
        hidden,
        down,
        terms,
        *tiles,
        WIDTH=width,
        INNER=inner,
        ROWS=plan.rows,
        COLUMNS=columns,
        DEPTH=depth,
        num_warps=4,
        num_stages=stages,
        enable_fp_fusion=True,
    )
    block = min(512, triton.next_power_of_2(width))
    _sum_kernel[(num_tokens, triton.cdiv(width, block))](
        terms,
        weights,
        out if plus is None else plus,
        out,
        0 if plus is None else plus.stride(0),
        CHOSEN=num_chosen,
        WIDTH=width,
        BLOCK=block,
        ADD=plus is not None,
        enable_fp_fusion=True,
    )
    return out
