"""The loss of a micro-batch: cross-entropy over its trained tokens, and what is added for experts and the MTP block.

Called by `trainer`, by continual learning and by distillation. Only rows from which a trained token is guessed meet the
head, a piece at a time: logits of a whole batch over a vocabulary of 150,000 would be the largest tensor of a step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from seamount.models.network import CausalLM
from seamount.training.shards.packing import MicroBatch

_ROWS_AT_ONCE = 1024
_ROW_MULTIPLE = 128


class Guesses(NamedTuple):
    """Which rows guess which tokens.

    Attributes:
        rows: `[N]` int64, rows of the micro-batch.
        targets: `[N]` int64, the tokens that stand behind them.
    """

    rows: Tensor
    targets: Tensor


def guesses(micro: MicroBatch, ahead: int = 1) -> Guesses:
    """The rows from which a trained token of the same example lies `ahead` tokens further, and those tokens."""
    inside = micro.positions >= ahead
    places = (micro.trained & inside).nonzero().squeeze(1)
    return Guesses(places - ahead, micro.token_ids[places])


def head_weight(model: CausalLM) -> Tensor:
    """`[V, C]`: the matrix that makes logits."""
    return model.embed_tokens.weight if model.lm_head is None else model.lm_head.weight


def causal_loss(model: CausalLM, micro: MicroBatch) -> Tensor:
    """Sum of the cross-entropies of the micro-batch's trained tokens: a scalar in fp32."""
    hidden = model.hidden_states(micro.batch(), None)
    found = guesses(micro)
    return cross_entropy(model.norm(hidden.index_select(0, found.rows)), head_weight(model), found.targets)


def causal_and_mtp_loss(model: CausalLM, micro: MicroBatch, mtp_weight: float) -> Tensor:
    """As `causal_loss`, plus `mtp_weight` times the loss of the first MTP block.

    The block guesses one token further, within the same example; its input is the model's normed hidden state and the
    token that follows (arXiv 2412.19437, section 2.2).
    """
    batch = micro.batch()
    hidden = model.norm(model.hidden_states(batch, None))
    head, near, far = head_weight(model), guesses(micro), guesses(micro, 2)
    loss = cross_entropy(hidden.index_select(0, near.rows), head, near.targets)
    following = F.pad(micro.token_ids[1:], (0, 1))  # at an example's end another one's; no guess is made from there
    further = model.mtp_hidden(hidden, following, batch)
    return loss + mtp_weight * cross_entropy(further.index_select(0, far.rows), head, far.targets)


def cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Sum of the cross-entropies of `targets [N]` under `hidden [N, C]` times `head [V, C]`: a scalar in fp32."""

    def piece(logits: Tensor, first: int) -> Tensor:
        wanted = targets[first : first + logits.shape[0]].unsqueeze(1)
        highest = logits.amax(dim=-1, keepdim=True)
        chosen = logits.gather(1, wanted) - highest
        weights = logits.sub_(highest).exp_()
        sums = weights.sum(dim=-1, keepdim=True)
        loss = (sums.log() - chosen).sum()
        weights.div_(sums).scatter_add_(1, wanted, torch.full_like(sums, -1.0))
        return loss

    return sum_through_head(hidden, head, piece)


def sum_through_head(hidden: Tensor, head: Tensor, piece: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Sum of a loss of the logits `hidden [N, C]` times `head [V, C]`, which never exist all at once: a scalar in fp32.

    Args:
        piece: is given the logits `[n, V]` in fp32 from row number `first` on; returns their summed loss, and leaves
            its gradient with respect to the logits in their place.
    """
    return _HeadLoss.apply(hidden, head, piece)


def filled_up(rows: Tensor) -> Tensor:
    """`rows [N, C]` and, on a CPU, zeros below them, so that few numbers of rows occur.

    The matrix library prepares itself for each new shape, which takes as long as the product of so few rows.
    """
    missing = -rows.shape[0] % _ROW_MULTIPLE if rows.device.type == "cpu" else 0
    return F.pad(rows, (0, 0, 0, missing)) if missing else rows


class _HeadLoss(torch.autograd.Function):
    """Product with the head and loss in one, a piece of the rows at a time; gradients are made on the way."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, piece: Callable[[Tensor, int], Tensor]) -> Tensor:
        wants_hidden, wants_head = hidden.requires_grad, head.requires_grad
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_head = torch.zeros_like(head, dtype=torch.float32) if wants_head else None
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, hidden.shape[0], _ROWS_AT_ONCE):
            count = min(hidden.shape[0] - start, _ROWS_AT_ONCE)
            rows = filled_up(hidden[start : start + count])
            logits = F.linear(rows, head).float()
            total += piece(logits[:count], start)
            if grad_hidden is None and grad_head is None:
                continue
            logits[count:] = 0.0
            slope = logits.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[start : start + count] = (slope @ head)[:count]
            if grad_head is not None:
                grad_head += slope.T @ rows
        ctx.grads = (grad_hidden, None if grad_head is None else grad_head.to(head.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (upstream,), (grad_hidden, grad_head) = grads, ctx.grads
        ctx.grads = ()
        scaled = [None if g is None else g.mul_(upstream.to(g.dtype)) for g in (grad_hidden, grad_head)]
        return scaled[0], scaled[1], None
