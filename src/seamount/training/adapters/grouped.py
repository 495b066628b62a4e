"""The product of sorted rows with frozen experts, and what low-rank matrices beside them add, as one operation.

Used by `layers` where gradients flow. One pass over the experts does all that an expert's rows need, while they are in
the cache; done as three products and a sum it takes longer, by a tenth to a half (docs/log.md). A frozen weight has no
gradient, so of the rows only what the low-rank part needs is kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def multiply(
    x: Tensor,
    sizes: Tensor,
    weight: Callable[[int], Tensor],
    width: int,
    adapter: tuple[Tensor, Tensor] | None,
    dropped: Tensor | None = None,
) -> Tensor:
    """Return `x W^T + d A^T B^T [P, N]`, expert by expert.

    Args:
        x: rows `[P, C]` that lie sorted by expert, `sizes [E]` of each; of rows behind the last expert nothing is said.
        weight: an expert's number to its frozen matrix `[N, C]`, in the type of x; called again for the gradients.
        width: N.
        adapter: A `[E, r, C]` and B `[E, N, r]` in the type of x, scaled; None: nothing is added.
        dropped: `[P, C]`, d; None where it is x.
    """
    a, b = (None, None) if adapter is None else adapter
    out: Tensor = _Grouped.apply(x, dropped, a, b, sizes.tolist(), weight, width)
    return out


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
        counts: list[int],
        weight: Callable[[int], Tensor],
        width: int,
    ) -> Tensor:
        out = x.new_empty(x.shape[0], width)
        inner = None if a is None else x.new_empty(x.shape[0], a.shape[1])
        given = x if dropped is None else dropped
        for expert, rows in _ranges(counts):
            torch.mm(x[rows], weight(expert).T, out=out[rows])
            if inner is not None and a is not None and b is not None:
                torch.mm(given[rows], a[expert].T, out=inner[rows])
                out[rows].addmm_(inner[rows], b[expert].T)
        ctx.counts, ctx.weight, ctx.columns, ctx.has_own = counts, weight, x.shape[1], dropped is not None
        ctx.save_for_backward(*(() if inner is None else (given, a, b, inner)))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0].contiguous()
        grad_x = grad.new_empty(grad.shape[0], ctx.columns)
        nothing = (None, None, None)
        if not ctx.saved_tensors:
            for expert, rows in _ranges(ctx.counts):
                torch.mm(grad[rows], ctx.weight(expert), out=grad_x[rows])
            return grad_x, None, None, None, *nothing
        given, a, b, inner = ctx.saved_tensors
        grad_a, grad_b = torch.zeros_like(a), torch.zeros_like(b)
        grad_given = torch.empty_like(grad_x) if ctx.has_own else grad_x
        for expert, rows in _ranges(ctx.counts):
            grad_inner = grad[rows] @ b[expert]
            torch.mm(grad[rows], ctx.weight(expert), out=grad_x[rows])
            if ctx.has_own:
                torch.mm(grad_inner, a[expert], out=grad_given[rows])
            else:
                grad_x[rows].addmm_(grad_inner, a[expert])
            torch.mm(grad_inner.T, given[rows], out=grad_a[expert])
            torch.mm(grad[rows].T, inner[rows], out=grad_b[expert])
        return grad_x, grad_given if ctx.has_own else None, grad_a, grad_b, *nothing


def _ranges(counts: list[int]) -> list[tuple[int, slice]]:
    """The experts that have rows, and where these lie."""
    ends = list(itertools.accumulate(counts))
    return [(e, slice(end - count, end)) for e, (end, count) in enumerate(zip(ends, counts, strict=True)) if count]
