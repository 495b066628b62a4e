"""The routers as one Triton kernel each way: scores, limits to groups, choice of the experts, their weights.

Called by `models` by way of `kernels.choice`. The reference needs several kernels for what is a few numbers per token;
in a decode step that costs more than the arithmetic. Among equal scores the lowest expert is chosen. The kernels pass
in Triton's interpreter and compile for sm_90; they were never run on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _logits_kernel(
    x,
    weight,
    out,
    x_row,
    E: tl.constexpr,
    WIDTH: tl.constexpr,
    EXPERTS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    expert = tl.program_id(1) * EXPERTS + tl.arange(0, EXPERTS)
    total = tl.zeros([EXPERTS, DEPTH], dtype=tl.float32)
    for start in range(0, WIDTH, DEPTH):
        k = start + tl.arange(0, DEPTH)
        row = tl.load(x + token * x_row + k, mask=k < WIDTH, other=0.0).to(tl.float32)
        part = tl.load(
            weight + expert[:, None] * WIDTH + k[None, :], mask=(expert < E)[:, None] & (k < WIDTH)[None, :], other=0.0
        )
        total += part.to(tl.float32) * row[None, :]
    tl.store(out + token * E + expert, tl.sum(total, 1), mask=expert < E)


def router_logits(x: Tensor, weight: Tensor) -> Tensor:
    """fp32 logits `[T, E]` of `x [T, C]` by `weight [E, C]`, multiplied and added in fp32 whatever the dtypes."""
    num_tokens, width = x.shape
    num_experts, block = weight.shape[0], 4
    out = torch.empty(num_tokens, num_experts, dtype=torch.float32, device=x.device)
    if num_tokens:
        _logits_kernel[(num_tokens, triton.cdiv(num_experts, block))](
            x,
            weight,
            out,
            x.stride(0),
            E=num_experts,
            WIDTH=width,
            EXPERTS=block,
            DEPTH=min(512, triton.next_power_of_2(width)),
            enable_fp_fusion=True,
        )
    return out


@triton.jit
def _route_kernel(
    logits,
    bias,
    weights,
    ids,
    scale,
    GROUPS: tl.constexpr,
    GROUPS_PAD: tl.constexpr,
    SIZE: tl.constexpr,
    SIZE_PAD: tl.constexpr,
    CHOSEN_GROUPS: tl.constexpr,
    CHOSEN: tl.constexpr,
    CHOSEN_PAD: tl.constexpr,
    SIGMOID: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    # Experts lie as [groups, experts of a group]; -inf marks what is no expert or can no longer be chosen.
    token = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS_PAD)
    member = tl.arange(0, SIZE_PAD)
    expert = group[:, None] * SIZE + member[None, :]
    real = (group < GROUPS)[:, None] & (member < SIZE)[None, :]
    logit = tl.load(logits + token * (GROUPS * SIZE) + expert, mask=real, other=float("-inf"))
    if SIGMOID:
        score = 1.0 / (1.0 + tl.exp(-logit))
        ranking = score + tl.load(bias + expert, mask=real, other=0.0).to(tl.float32)
    else:
        score = tl.exp(logit - tl.max(tl.max(logit, 1), 0))
        score = score / tl.sum(tl.sum(score, 1), 0)
        ranking = score
    ranking = tl.where(real, ranking, float("-inf"))
    if CHOSEN_GROUPS < GROUPS:
        group_score = tl.max(ranking, 1)
        if SIGMOID:
            first = tl.min(tl.where(ranking == group_score[:, None], member[None, :], SIZE_PAD), 1)
            rest = tl.where(member[None, :] == first[:, None], float("-inf"), ranking)
            group_score += tl.max(rest, 1)
        allowed = tl.zeros([GROUPS_PAD], dtype=tl.int32)
        for _ in tl.static_range(CHOSEN_GROUPS):
            best = tl.max(group_score, 0)
            at = tl.min(tl.where(group_score == best, group, GROUPS_PAD), 0)
            allowed = tl.where(group == at, 1, allowed)
            group_score = tl.where(group == at, float("-inf"), group_score)
        ranking = tl.where((allowed == 1)[:, None], ranking, float("-inf"))
    place = tl.arange(0, CHOSEN_PAD)
    chosen = tl.zeros([CHOSEN_PAD], dtype=tl.int32)
    weight = tl.zeros([CHOSEN_PAD], dtype=tl.float32)
    for i in tl.static_range(CHOSEN):
        best = tl.max(tl.max(ranking, 1), 0)
        at = tl.min(tl.min(tl.where((ranking == best) & real, expert, GROUPS * SIZE), 1), 0)
        here = expert == at
        chosen = tl.where(place == i, at, chosen)
        weight = tl.where(place == i, tl.sum(tl.sum(tl.where(here & real, score, 0.0), 1), 0), weight)
        ranking = tl.where(here, float("-inf"), ranking)
    if NORMALIZE:
        weight = weight / (tl.sum(weight, 0) + 1e-20)
    tl.store(weights + token * CHOSEN + place, weight * scale, mask=place < CHOSEN)
    tl.store(ids + token * CHOSEN + place, chosen.to(tl.int64), mask=place < CHOSEN)


def route_softmax(
    logits: Tensor, num_chosen: int, *, num_groups: int, num_chosen_groups: int, scale: float
) -> tuple[Tensor, Tensor]:
    """See `reference.route_softmax`."""
    return _route(logits, None, num_chosen, num_groups, num_chosen_groups, scale, normalize=False)


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
    """See `reference.route_sigmoid`."""
    return _route(logits, bias, num_chosen, num_groups, num_chosen_groups, scale, normalize=normalize)


def _route(
    logits: Tensor,
    bias: Tensor | None,
    num_chosen: int,
    num_groups: int,
    num_chosen_groups: int,
    scale: float,
    *,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    num_tokens, num_experts = logits.shape
    # Without a limit the groups mean nothing, and one long row is the better shape.
    groups = num_groups if num_chosen_groups < num_groups else 1
    weights = torch.empty(num_tokens, num_chosen, dtype=torch.float32, device=logits.device)
    ids = torch.empty(num_tokens, num_chosen, dtype=torch.int64, device=logits.device)
    if num_tokens:
        _route_kernel[(num_tokens,)](
            logits,
            logits if bias is None else bias,
            weights,
            ids,
            scale,
            GROUPS=groups,
            GROUPS_PAD=triton.next_power_of_2(groups),
            SIZE=num_experts // groups,
            SIZE_PAD=triton.next_power_of_2(num_experts // groups),
            CHOSEN_GROUPS=min(num_chosen_groups, groups),
            CHOSEN=num_chosen,
            CHOSEN_PAD=triton.next_power_of_2(num_chosen),
            SIGMOID=bias is not None,
            NORMALIZE=normalize,
            num_warps=1,
            enable_fp_fusion=True,
        )
    return weights, ids
