"""A learning rate that follows measured drift: the more remembered answers move away, the smaller the steps.

Called by the trainer through `objective`. It must not know how a loss is computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor


class Drift:
    """How far the loss on remembered examples has risen since the task began, and what that makes of the rate.

    The rate is multiplied by 1 / (1 + rise / tolerance): 1 without drift, a half where the rise is the tolerance, and
    up again when replay has brought the loss down.

    Args:
        measure: the loss on remembered examples now, in nats per trained token; the same number on every rank.
        tolerance: in nats per trained token.
        every_steps: how often it is measured.
    """

    def __init__(self, measure: Callable[[], float], *, tolerance: float, every_steps: int) -> None:
        self._measure, self._tolerance, self._every_steps = measure, tolerance, every_steps
        self._begin = self.rise = math.nan

    def factor(self, step: int) -> float:
        """By what the learning rate of step number `step`, from 0, is multiplied; measures when it is time."""
        if step % self._every_steps == 0:
            loss = self._measure()
            if step == 0:
                self._begin = loss
            self.rise = max(loss - self._begin, 0.0)
        return 1.0 / (1.0 + self.rise / self._tolerance)

    def state(self) -> Mapping[str, Tensor]:
        """What a checkpoint must hold."""
        return {"drift": torch.tensor([self._begin, self.rise], dtype=torch.float64)}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from `state`."""
        self._begin, self.rise = tensors["drift"].tolist()
