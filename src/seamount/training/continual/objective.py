"""What is minimised while a later task is learned: the loss, EWC's pull, and a rate that follows drift.

Made by `pipeline`, called by the trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from seamount.models.network import CausalLM
from seamount.training.shards.dataset import Dataset
from seamount.training.shards.packing import MicroBatch, pack
from seamount.training.tuning.distributed import World
from seamount.training.tuning.loss import causal_and_mtp_loss, causal_loss
from seamount.training.tuning.optimizer import Optimizer
from seamount.training.tuning.trainer import Objective

from .drift import Drift
from .ewc import Penalty


class ContinualObjective(Objective):
    """The trainer's usual loss, with what keeps earlier tasks.

    Args:
        penalty, drift: None where there is nothing to keep, or it is not wanted.
        mtp_weight: of the multi-token-prediction block's loss.
    """

    def __init__(self, penalty: Penalty | None, drift: Drift | None, mtp_weight: float) -> None:
        self._penalty, self._drift, self._mtp_weight = penalty, drift, mtp_weight

    def loss(self, model: CausalLM, micro: MicroBatch) -> Tensor:
        """See `Objective.loss`."""
        return causal_and_mtp_loss(model, micro, self._mtp_weight) if self._mtp_weight else causal_loss(model, micro)

    def add_gradients(self, optimizer: Optimizer) -> None:
        """See `Objective.add_gradients`."""
        if self._penalty is not None:
            self._penalty.add_gradients(optimizer)

    def rate_factor(self, step: int) -> float:
        """See `Objective.rate_factor`."""
        return 1.0 if self._drift is None else self._drift.factor(step)

    def state(self) -> Mapping[str, Tensor]:
        """See `Objective.state`."""
        return {} if self._drift is None else self._drift.state()

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """See `Objective.load_state`."""
        if self._drift is not None:
            self._drift.load_state(tensors)


def loss_of(model: CausalLM, data: Dataset, *, micro_tokens: int, world: World) -> Callable[[], float]:
    """A function that gives the mean loss over the data's trained tokens now; all ranks must call it together."""
    examples = [(index, data.example(index)) for index in range(len(data))]
    micros = pack(examples, micro_tokens=micro_tokens, rank=world.rank, world_size=world.size)
    num_trained = int(data.num_trained.sum())

    @torch.no_grad()
    def measure() -> float:
        was_training = model.training
        model.eval()
        total = sum(float(causal_loss(model, micro.to(world.device))) for micro in micros)
        model.train(was_training)
        (total,) = world.sums(total)
        return total / num_trained

    return measure
