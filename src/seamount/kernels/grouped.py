"""The routed experts and causal attention in the form that training wants: differentiable, and compilable as one graph.

Called by `reference` where gradients flow. Same meaning as there; what differs is that the grouping of rows by expert, whose
sizes depend on data, hides in operators that `torch.compile` treats as opaque, and that every gradient is a gather instead
of a scatter. Shapes: T tokens, C width, E experts, A chosen per token, I expert width, N = T * A.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.library.custom_op("seamount::grouped_linear", mutates_args=())
def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Linear map of rows `x [N, K]` that lie sorted by group: `counts [E]` rows each, `weight [E, M, K]`; `[N, M]`."""
    out = x.new_empty(x.shape[0], weight.shape[1])
    for rows, result, matrix in zip(*_split(counts, x, out), weight, strict=True):
        torch.mm(rows, matrix.T, out=result)
    return out


@torch.library.custom_op("seamount::grouped_linear_backward", mutates_args=())
def grouped_linear_backward(grad: Tensor, x: Tensor, weight: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `grouped_linear` with respect to x and weight, given `grad [N, M]`."""
    grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
    parts = _split(counts, grad, x, grad_x)
    for grad_rows, rows, grad_x_rows, matrix, grad_matrix in zip(*parts, weight, grad_weight, strict=True):
        torch.mm(grad_rows, matrix, out=grad_x_rows)
        torch.mm(grad_rows.T, rows, out=grad_matrix)
    return grad_x, grad_weight


@torch.library.custom_op("seamount::take_rows", mutates_args=())
def take_rows(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """Rows `order [N]` of `x [N, K]`, where `order` is a permutation and `inverse` undoes it."""
    return x.index_select(0, order)


def run_experts(x: Tensor, weights: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """As `reference.run_experts`."""
    num_tokens, num_chosen = ids.shape
    flat = ids.flatten()
    order = flat.argsort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))
    counts = F.one_hot(flat, gate_up.shape[0]).sum(dim=0)
    repeated = x.unsqueeze(1).expand(-1, num_chosen, -1).reshape(num_tokens * num_chosen, -1)
    rows = take_rows(repeated, order, inverse)
    gate, up = grouped_linear(rows, gate_up, counts).chunk(2, dim=-1)
    terms = take_rows(grouped_linear(F.silu(gate) * up, down, counts), inverse, order)
    terms = terms.unflatten(0, (num_tokens, num_chosen))
    return (terms.float() * weights.float().unsqueeze(-1)).sum(dim=1).to(x.dtype)


def attend_rows(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention of `q, k [S, H, L, D]`, `v [S, H, L, Dv]`; returns `[S, H, L, Dv]`.

    Written out, because for short rows the CPU's fused kernel has a backward pass several times slower than this one
    compiled.
    """
    length = q.shape[2]
    allowed = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    scores = ((q * scale) @ k.transpose(-1, -2)).float().masked_fill(~allowed, float("-inf"))
    return scores.softmax(dim=-1).to(v.dtype) @ v


def _split(counts: Tensor, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    sizes = counts.tolist()
    return [tensor.split(sizes) for tensor in tensors]


@grouped_linear.register_fake
def _(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@grouped_linear_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


@take_rows.register_fake
def _(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    return x.new_empty(order.shape[0], x.shape[1])


def _keep_for_linear(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _linear_gradients(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[no-untyped-def]
    x, weight, counts = ctx.saved_tensors
    return *grouped_linear_backward(grad.contiguous(), x, weight, counts), None


def _keep_for_rows(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, order, inverse = inputs
    ctx.save_for_backward(order, inverse)


def _row_gradients(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
    order, inverse = ctx.saved_tensors
    return take_rows(grad.contiguous(), inverse, order), None, None


grouped_linear.register_autograd(_linear_gradients, setup_context=_keep_for_linear)
take_rows.register_autograd(_row_gradients, setup_context=_keep_for_rows)
