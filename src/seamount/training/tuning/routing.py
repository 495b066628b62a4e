"""Routers while a network is tuned: which experts they chose, kept for the balance and for recomputed activations.

Called by `trainer` and `activations`. A layer that is computed again in the backward pass must send its tokens to the
experts of the first time, whatever rounding says, and its choices must be counted once. It must not know the loss.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from seamount.models.layers import Router
from seamount.models.network import CausalLM


class Routers:
    """The routers of a network, and how many tokens each expert got since the last step.

    Args:
        balance_weight: of the sequence-wise balance loss; 0 adds none.
    """

    def __init__(self, model: CausalLM, *, balance_weight: float = 0.0) -> None:
        self._routers = {name: m for name, m in model.named_modules() if isinstance(m, Router)}
        self._loads: dict[str, Tensor] = {}
        self._balance_weight = balance_weight
        self._starts: tuple[int, ...] = ()
        self._num_real = 0
        self._scale = 1.0
        for name, router in self._routers.items():
            router.register_forward_hook(lambda *given, name=name: self._ran(name, *given))

    def begin(self, starts: tuple[int, ...], num_real: int, scale: float) -> None:
        """A micro-batch of these sequences follows, whose loss will be multiplied by `scale`.

        Args:
            num_real: tokens that count, the first ones; those behind them fill up.
        """
        self._starts, self._num_real, self._scale = starts, num_real, scale

    @property
    def biases(self) -> dict[str, Tensor]:
        """The balancing biases of those routers that have one, by router."""
        return {n: r.e_score_correction_bias for n, r in self._routers.items() if r.config.router == "sigmoid"}

    def loads(self) -> dict[str, Tensor]:
        """Tokens per expert since the last `balance`, int64 `[E]`, of routers that ran; live tensors."""
        return self._loads

    @torch.no_grad()
    def balance(self, rate: float) -> float:
        """Raise the bias of idle experts, lower that of busy ones (arXiv 2412.19437, section 2.1.2); forget the loads.

        Returns:
            The busiest expert's load over the mean, the worst layer's; 1.0 without routers.
        """
        worst = 1.0
        for name, load in self._loads.items():
            counts = load.float()
            worst = max(worst, float(counts.max() / counts.mean()))
            if rate and name in self.biases:
                self.biases[name].add_(torch.sign(counts.mean() - counts), alpha=rate)
        self._loads = {}
        return worst

    def _ran(self, name: str, router: Router, given: tuple[Tensor, ...], out: tuple[Tensor, Tensor]) -> Any:
        if not torch.is_grad_enabled():
            return None  # an evaluation
        weights, ids = out
        if router.pinned is None:  # else it is computed again, and was counted
            load = torch.bincount(ids.detach()[: self._num_real].flatten(), minlength=router.config.num_experts)
            self._loads[name] = self._loads[name] + load if name in self._loads else load
        if not self._balance_weight or not self._num_real or not router.weight.requires_grad:
            return None
        loss = self._balance_loss(router, given[0], ids) * (self._balance_weight * self._scale)
        return _AddLoss.apply(weights, loss), ids

    def _balance_loss(self, router: Router, x: Tensor, ids: Tensor) -> Tensor:
        """Sum over sequences, weighed by their lengths, of equation 17 to 20 of arXiv 2412.19437."""
        config = router.config
        scores = (x.float() @ router.weight.float().T).sigmoid()
        shares = scores / scores.sum(dim=-1, keepdim=True)
        chosen = torch.zeros_like(shares).scatter_(1, ids, 1.0)
        lengths = torch.tensor(self._starts).diff().tolist()
        lengths = [length for start, length in zip(self._starts, lengths, strict=False) if start < self._num_real]
        rows = sum(lengths)
        parts = zip(shares[:rows].split(lengths), chosen[:rows].split(lengths), strict=True)
        factor = config.num_experts / config.num_chosen
        return torch.stack([(s.mean(0) * c.mean(0)).sum() * factor * len(s) for s, c in parts]).sum()


class _AddLoss(torch.autograd.Function):
    """Passes `x` on; the backward pass also begins at `loss`, as if it had been added to the network's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (loss,) = ctx.saved_tensors
        return grads[0], torch.ones_like(loss)


def routers_of(module: nn.Module) -> list[Router]:
    """The routers inside a layer."""
    return [m for m in module.modules() if isinstance(m, Router)]
