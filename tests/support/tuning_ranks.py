"""What each rank of a distributed test runs, under torchrun: `tuning_ranks.py STRATEGY FOLDER [FAILING_RANK [DEVICE]]`.

Trains the small network of `tuning_site` and writes what the first rank saw to FOLDER/seen.json. The failing rank
cannot read its examples from the fourth step on.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import tuning_site as site

from seamount.core.errors import InvalidRequestError, SeamountError
from seamount.training.examples.example import Example
from seamount.training.shards.dataset import ExampleList
from seamount.training.tuning.distributed import World
from seamount.training.tuning.failures import failure_of_others, note_failure
from seamount.training.tuning.state import CheckpointStore
from seamount.training.tuning.trainer import StepRecord, Trainer


class Broken(ExampleList):
    """Cannot be read any more once `after` examples were taken."""

    def __init__(self, data: ExampleList, after: int) -> None:
        super().__init__([data.example(index) for index in range(len(data))])
        self._left = after

    def example(self, index: int) -> Example:
        self._left -= 1
        if self._left < 0:
            raise InvalidRequestError("The disk with the examples is gone.")
        return super().example(index)


def main() -> None:
    """Run one rank."""
    strategy, folder = sys.argv[1], Path(sys.argv[2])
    failing = int(sys.argv[3]) if len(sys.argv) > 3 else -1
    torch.set_num_threads(1)
    world = World.join(sys.argv[4] if len(sys.argv) > 4 else "cpu")
    records: list[StepRecord] = []
    losses: list[float] = []
    recipe = site.recipe(
        folder, strategy=strategy, activation_checkpointing=True, experts={"bias_rate": 0.01, "mtp_weight": 0.3}
    )
    store = CheckpointStore(folder / "checkpoints")
    data = site.examples()
    taken = Broken(data, 3 * recipe.batch.examples) if world.rank == failing else data
    trainer = Trainer(
        recipe,
        site.network().to(world.device),
        taken,
        world=world,
        store=store,
        evaluation=site.examples(seed=8),
        on_step=records.append,
        on_evaluation=lambda record: losses.append(record.loss),
    )
    try:
        trainer.run()
    except SeamountError as error:
        note_failure(folder, world, error)
        raise SystemExit(f"rank {world.rank}: {error}") from error
    except RuntimeError as error:
        if (failure := failure_of_others(folder, world, error)) is None:
            raise
        if strategy == "ddp" and world.is_main:
            trainer.save()
        raise SystemExit(f"rank {world.rank}: {failure}") from error
    weights = trainer.final_weights()
    if world.is_main:
        told = {
            "losses": [record.loss for record in records],
            "norms": [record.gradient_norm for record in records],
            "evaluations": losses,
            "sums": {name: float(tensor.double().sum()) for name, tensor in weights.items()},
            "size": world.size,
        }
        (folder / "seen.json").write_text(json.dumps(told), encoding="utf-8")
    world.leave()


if __name__ == "__main__":
    main()
