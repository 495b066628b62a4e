"""The learning rate of each step, and how many steps a run has. Pure. Called by `trainer`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .recipe import ScheduleSection


@dataclass(slots=True)
class Plateau:
    """What a plateau schedule remembers between evaluations; kept in checkpoints.

    Attributes:
        best: the lowest loss so far; None before the first evaluation.
        num_bad: evaluations since then.
        share: of the highest rate, now.
    """

    best: float | None = None
    num_bad: int = 0
    share: float = 1.0


class Schedule:
    """The learning rate over a run.

    Args:
        peak: the highest rate.
        num_steps: of the whole run.
    """

    def __init__(self, section: ScheduleSection, peak: float, num_steps: int) -> None:
        self._section, self._peak = section, peak
        self.num_steps = num_steps
        self._num_warmup = math.ceil(section.warmup_share * num_steps)
        self.plateau = Plateau()

    def rate(self, step: int) -> float:
        """The learning rate of step number `step`, from 0."""
        section = self._section
        if step < self._num_warmup:
            return self._peak * (step + 1) / (self._num_warmup + 1)
        done = (step - self._num_warmup) / max(self.num_steps - self._num_warmup, 1)
        match section.kind:
            case "cosine":
                share = section.final_share + (1 - section.final_share) * (1 + math.cos(math.pi * done)) / 2
            case "linear":
                share = 1 - (1 - section.final_share) * done
            case "plateau":
                share = max(self.plateau.share, section.final_share)
            case _:
                share = 1.0
        return self._peak * share

    def evaluated(self, loss: float) -> None:
        """Note the loss of an evaluation; on a plateau the rate falls."""
        plateau, section = self.plateau, self._section
        if plateau.best is None or loss < plateau.best:
            plateau.best, plateau.num_bad = loss, 0
            return
        plateau.num_bad += 1
        if section.kind == "plateau" and plateau.num_bad >= section.plateau_patience:
            plateau.share *= section.plateau_factor
            plateau.num_bad = 0


def num_steps(section: ScheduleSection, steps_per_epoch: float) -> int:
    """How many steps a run of this schedule has; at least one."""
    return section.steps or max(math.ceil(section.epochs * steps_per_epoch - 1e-9), 1)
