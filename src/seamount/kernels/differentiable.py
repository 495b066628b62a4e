"""The routed experts and causal attention in the form that training wants: differentiable, and compilable as one graph.

Chosen by `kernels.choice` where gradients flow. Same meaning as in `reference`; what differs is that the grouping of
rows by expert, whose sizes depend on data, hides in operators that `torch.compile` treats as opaque, and that every
gradient is a gather instead of a scatter. Shapes: T tokens, C width, E experts, A chosen per token, N = T * A choices,
P padded rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Experts' rows are padded to a multiple of this: the CPU's matrix library prepares itself for each new shape, which
# takes longer than the product, and without padding nearly every product has a shape of its own.
_ROW_MULTIPLE = 128

# Rows sorted by group and the groups' sizes, to the rows' products.
GroupedProduct = Callable[[Tensor, Tensor], Tensor]


@torch.library.custom_op("seamount::grouped_linear", mutates_args=())
def grouped_linear(x: Tensor, weight: Tensor, sizes: Tensor) -> Tensor:
    """Linear map of rows `x [P, K]` that lie sorted by group: `sizes [E]` rows each, `weight [E, M, K]`; `[P, M]`.

    Rows behind the last group are left undefined.
    """
    out = x.new_empty(x.shape[0], weight.shape[1])
    for rows, result, matrix in zip(*_split(sizes, x, out), weight, strict=True):
        torch.mm(rows, matrix.T, out=result)
    return out


@torch.library.custom_op("seamount::grouped_linear_backward", mutates_args=())
def grouped_linear_backward(grad: Tensor, x: Tensor, weight: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `grouped_linear` with respect to x and weight, given `grad [P, M]`."""
    grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
    parts = _split(sizes, grad, x, grad_x)
    for grad_rows, rows, grad_x_rows, matrix, grad_matrix in zip(*parts, weight, grad_weight, strict=True):
        torch.mm(grad_rows, matrix, out=grad_x_rows)
        torch.mm(grad_rows.T, rows, out=grad_matrix)
    return grad_x, grad_weight


@torch.library.custom_op("seamount::grouped_linear_grad_input", mutates_args=())
def grouped_linear_grad_input(grad: Tensor, weight: Tensor, sizes: Tensor) -> Tensor:
    """Gradient of `grouped_linear` with respect to x alone, of a weight that is frozen."""
    grad_x = grad.new_empty(grad.shape[0], weight.shape[2])
    for grad_rows, grad_x_rows, matrix in zip(*_split(sizes, grad, grad_x), weight, strict=True):
        torch.mm(grad_rows, matrix, out=grad_x_rows)
    return grad_x


@torch.library.custom_op("seamount::spread_rows", mutates_args=())
def spread_rows(x: Tensor, places: Tensor, sources: Tensor) -> Tensor:
    """Put row n of `x [N, K]` at `places[n]` of `[P, K]`; other rows, where `sources [P]` is -1, become zero."""
    return x.index_select(0, sources.clamp(min=0)).mul_((sources >= 0).unsqueeze(1))


@torch.library.custom_op("seamount::collect_rows", mutates_args=())
def collect_rows(x: Tensor, places: Tensor, sources: Tensor) -> Tensor:
    """Undo `spread_rows`: row n of the result is row `places[n]` of `x [P, K]`."""
    return x.index_select(0, places)


def run_experts(x: Tensor, weights: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """As `reference.run_experts`."""
    return run_grouped_experts(
        x,
        weights,
        ids,
        gate_up.shape[0],
        lambda rows, sizes: grouped_linear(rows, gate_up, sizes),
        lambda rows, sizes: grouped_linear(rows, down, sizes),
    )


def run_grouped_experts(
    x: Tensor, weights: Tensor, ids: Tensor, num_experts: int, gate_up: GroupedProduct, down: GroupedProduct
) -> Tensor:
    """As `reference.run_experts`, with the two products given: of rows `[P, K]` that lie sorted by expert, `sizes [E]`
    of each; rows behind the last group hold anything.
    """
    num_tokens, num_chosen = ids.shape
    flat = ids.flatten().long()
    counts = F.one_hot(flat, num_experts).sum(dim=0)
    sizes = (counts + _ROW_MULTIPLE - 1) // _ROW_MULTIPLE * _ROW_MULTIPLE
    # The n-th choice stands at its rank among its expert's choices, behind the padded rows of the experts before.
    order = flat.argsort(stable=True)
    ranks = torch.arange(order.shape[0], device=x.device) - (counts.cumsum(0) - counts)[flat[order]]
    places = torch.empty_like(order).scatter_(0, order, (sizes.cumsum(0) - sizes)[flat[order]] + ranks)
    num_padded = order.shape[0] + num_experts * _ROW_MULTIPLE
    sources = torch.full((num_padded,), -1, device=x.device, dtype=order.dtype)
    sources = sources.scatter(0, places, torch.arange(order.shape[0], device=x.device))
    repeated = x.unsqueeze(1).expand(-1, num_chosen, -1).reshape(num_tokens * num_chosen, -1)
    gate, up = gate_up(spread_rows(repeated, places, sources), sizes).chunk(2, dim=-1)
    terms = collect_rows(down(F.silu(gate) * up, sizes), places, sources)
    terms = terms.unflatten(0, (num_tokens, num_chosen))
    return (terms.float() * weights.float().unsqueeze(-1)).sum(dim=1).to(x.dtype)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, starts: Sequence[int], scale: float) -> Tensor:
    """As `reference.causal_attention`, for as many key heads as query heads and sequences of one length.

    Written out, because for short sequences the CPU's fused kernel has a backward pass several times slower than this
    one compiled.
    """
    num_rows, length = len(starts) - 1, starts[1] - starts[0]
    q, k, v = (t.reshape(num_rows, length, *t.shape[1:]).transpose(1, 2) for t in (q, k, v))
    allowed = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    scores = ((q * scale) @ k.transpose(-1, -2)).float().masked_fill(~allowed, float("-inf"))
    return (scores.softmax(dim=-1).to(v.dtype) @ v).transpose(1, 2).flatten(0, 1)


def _split(sizes: Tensor, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    rows = sizes.tolist()
    total = sum(rows)
    return [tensor[:total].split(rows) for tensor in tensors]


@grouped_linear.register_fake
def _(x: Tensor, weight: Tensor, sizes: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@grouped_linear_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


@grouped_linear_grad_input.register_fake
def _(grad: Tensor, weight: Tensor, sizes: Tensor) -> Tensor:
    return grad.new_empty(grad.shape[0], weight.shape[2])


@spread_rows.register_fake
def _(x: Tensor, places: Tensor, sources: Tensor) -> Tensor:
    return x.new_empty(sources.shape[0], x.shape[1])


@collect_rows.register_fake
def _(x: Tensor, places: Tensor, sources: Tensor) -> Tensor:
    return x.new_empty(places.shape[0], x.shape[1])


def _keep_for_linear(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, sizes = inputs
    # Of a frozen weight no gradient is formed, and then the rows are not needed again.
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, sizes)


def _linear_gradients(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:  # type: ignore[no-untyped-def]
    x, weight, sizes = ctx.saved_tensors
    if x is None:
        return grouped_linear_grad_input(grad.contiguous(), weight, sizes), None, None
    return *grouped_linear_backward(grad.contiguous(), x, weight, sizes), None


def _keep_for_rows(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, places, sources = inputs
    ctx.save_for_backward(places, sources)


def _spread_gradients(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
    return collect_rows(grad.contiguous(), *ctx.saved_tensors), None, None


def _collect_gradients(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
    return spread_rows(grad.contiguous(), *ctx.saved_tensors), None, None


grouped_linear.register_autograd(_linear_gradients, setup_context=_keep_for_linear)
spread_rows.register_autograd(_spread_gradients, setup_context=_keep_for_rows)
collect_rows.register_autograd(_collect_gradients, setup_context=_keep_for_rows)
