"""What a student minimises: cross-entropy with the data, and the divergence of its guesses from its teacher's.

Made by `pipeline`, called by the trainer. The teacher's part of a row's loss is the Kullback-Leibler divergence of both
distributions at a temperature T, times T squared, so that its gradients do not shrink with T (Hinton, Vinyals and Dean,
arXiv 1503.02531, section 2). Logits exist for a few rows at a time, the student's and the teacher's, and their gradient
is made on the way. It must not know where a teacher's word comes from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from seamount.models.network import CausalLM
from seamount.training.shards.packing import MicroBatch
from seamount.training.tuning.loss import causal_loss, filled_up, guesses, head_weight, sum_through_head
from seamount.training.tuning.trainer import Objective

_VALUES_AT_ONCE = 2**21


class Guide(Protocol):
    """A teacher's word on the rows of a micro-batch that guess a trained token, in their order."""

    def compare(self, log_q: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Compare the student with the teacher.

        Args:
            log_q: fp32 `[n, V]`, the student's log-probabilities at the temperature, of these rows.

        Returns:
            The rows' summed divergence, a scalar; and its gradient with respect to the student's logits divided by the
            temperature, `[n, V]`.
        """
        ...


class WholeGuide(Guide):
    """The teacher's whole distribution, from its hidden states.

    Args:
        hidden: `[N, C]`, normed; head: `[V', C]`. Tokens that only one of both heads has, which no text holds, have no
            chance with the teacher.
    """

    def __init__(self, hidden: Tensor, head: Tensor, temperature: float) -> None:
        self._hidden, self._head, self._temperature = hidden, head, temperature

    def compare(self, log_q: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """See `Guide.compare`."""
        size = log_q.shape[1]
        count = rows.stop - rows.start
        logits = F.linear(filled_up(self._hidden[rows]), self._head[:size])[:count].float().div_(self._temperature)
        log_p = torch.log_softmax(logits, dim=-1)
        known = log_q[:, : log_p.shape[1]]
        p = log_p.exp()
        divergence = (p * (log_p - known)).sum()
        slope = log_q.exp()
        slope[:, : p.shape[1]] -= p
        return divergence, slope


class TopGuide(Guide):
    """The teacher's k likeliest tokens, and the chance of all others together.

    The divergence is that of the two distributions over these k + 1 events. It never exceeds that of the whole ones
    (log-sum inequality), and leaves the student free in how it shares the rest out; cut off at k and scaled up instead,
    a teacher would seem surer than it is (arXiv 2503.16870, section 3).

    Args:
        token_ids: int64 `[N, k]`.
        log_p: fp32 `[N, k + 1]`, at the temperature; the last is that of the rest.
    """

    def __init__(self, token_ids: Tensor, log_p: Tensor) -> None:
        self.token_ids, self.log_p = token_ids, log_p

    def compare(self, log_q: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """See `Guide.compare`."""
        ids, log_p = self.token_ids[rows], self.log_p[rows]
        slope = log_q.exp()
        chosen = slope.gather(1, ids)
        others = slope.scatter(1, ids, 0.0).sum(dim=1, keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny)
        log_events = torch.cat((log_q.gather(1, ids), others.log()), dim=1)
        p = log_p.exp()
        divergence = torch.where(p > 0, p * (log_p - log_events), 0.0).sum()
        # Of the rest, a token's target is its share in what the student gives the rest.
        slope *= 1.0 - p[:, -1:] / others
        slope.scatter_(1, ids, chosen - p[:, :-1])
        return divergence, slope


class DistillationObjective(Objective):
    """Minimises `(1 - weight) * cross-entropy + weight * T**2 * divergence` per trained token.

    Evaluation examples are judged by their cross-entropy alone, which can be compared with that of other runs.

    Args:
        guide_of: gives the teacher's word on a micro-batch.
        weight: above 0, at most 1.
        temperature: T.
    """

    def __init__(self, guide_of: Callable[[MicroBatch], Guide], weight: float, temperature: float) -> None:
        self._guide_of, self._weight, self._temperature = guide_of, weight, temperature

    def loss(self, model: CausalLM, micro: MicroBatch) -> Tensor:
        """See `Objective.loss`."""
        if not model.training:
            return causal_loss(model, micro)
        found = guesses(micro)
        guide = self._guide_of(micro)
        hidden = model.norm(model.hidden_states(micro.batch(), None).index_select(0, found.rows))
        return distilled_loss(
            hidden, head_weight(model), found.targets, guide, weight=self._weight, temperature=self._temperature
        )


def distilled_loss(
    hidden: Tensor, head: Tensor, targets: Tensor, guide: Guide, *, weight: float, temperature: float
) -> Tensor:
    """Sum over rows of what `DistillationObjective` minimises, for `hidden [N, C]` times `head [V, C]`: fp32 scalar."""
    at_once = max(_VALUES_AT_ONCE // head.shape[0], 1)

    def piece(logits: Tensor, first: int) -> Tensor:
        total = logits.new_zeros(())
        for start in range(0, logits.shape[0], at_once):
            part = logits[start : start + at_once]
            rows = slice(first + start, first + start + part.shape[0])
            total += _mixed(part, targets[rows], guide, rows, weight, temperature)
        return total

    return sum_through_head(hidden, head, piece)


def _mixed(logits: Tensor, targets: Tensor, guide: Guide, rows: slice, weight: float, temperature: float) -> Tensor:
    """The loss of a few rows; their logits `[n, V]` become its gradient with respect to them."""
    log_q = torch.log_softmax(logits, dim=-1)
    softened = log_q if temperature == 1.0 else torch.log_softmax(logits / temperature, dim=-1)
    divergence, slope = guide.compare(softened, rows)
    loss = divergence * (weight * temperature**2)
    torch.mul(slope, weight * temperature, out=logits)
    if weight < 1.0:
        wanted = targets.unsqueeze(1)
        loss -= (1.0 - weight) * log_q.gather(1, wanted).sum()
        slope = log_q.exp_()
        slope.scatter_add_(1, wanted, torch.full_like(wanted, -1.0, dtype=slope.dtype))
        logits.add_(slope, alpha=1.0 - weight)
    return loss
