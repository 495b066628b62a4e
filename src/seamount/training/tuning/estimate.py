"""What a run would do, before it does it: what is trained, on what, how long, in how much memory. For `--dry-run`.

Time and memory are measured, not guessed: the first steps are really computed, and forgotten.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from seamount.models.prompt import PromptEncoder
from seamount.training.examples.example import Example

from .distributed import World
from .network import open_network, tunable
from .pipeline import MakeObjective, Silent, Watcher
from .prepare import prepare
from .recipe import TuneRecipe
from .trainer import Trainer

TRIED_STEPS = 3


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run would do.

    Attributes:
        groups: trained weights by part of the network; num_weights: all weights, trained or not.
        data: counts of the examples.
        num_steps: of the whole run.
        seconds_per_step: measured, the median of a few.
        memory_bytes: most that was held while they were computed; on a GPU, of its memory.
        example: the first of the data.
    """

    groups: dict[str, int]
    num_weights: int
    precision: str
    data: dict[str, Any]
    num_steps: int
    seconds_per_step: float
    memory_bytes: int
    example: Example

    @property
    def seconds(self) -> float:
        """Of the whole run's steps, without evaluations."""
        return self.num_steps * self.seconds_per_step


def plan(recipe: TuneRecipe, watcher: Watcher | None = None, *, objective: MakeObjective | None = None) -> Plan:
    """Prepare a run and try its first steps; nothing is written.

    Args:
        objective: see `pipeline.tune`.

    Raises:
        SeamountError: the run could not begin; see `pipeline.tune`.
    """
    watcher = watcher or Silent()
    world = World.join(recipe.device)
    try:
        return _tried(recipe, world, watcher if world.is_main else Silent(), objective)
    finally:
        world.leave()


def _tried(recipe: TuneRecipe, world: World, watcher: Watcher, objective: MakeObjective | None) -> Plan:
    watcher.stage("Reading the data")
    encoder = PromptEncoder.from_folder(tunable(recipe.model))
    try:
        data = prepare(recipe.data, encoder, recipe.seed)
    finally:
        encoder.close()
    watcher.stage("Loading the model")
    tuned = open_network(recipe, world.device, watcher.loading)
    watcher.stage(f"Trying {TRIED_STEPS} steps")
    made = None if objective is None else objective(data, world)
    trainer = Trainer(recipe, tuned.model, data.train, world=world, objective=made)
    tuned.model.train()
    records = [trainer.step() for _ in range(TRIED_STEPS)]
    return Plan(
        groups=tuned.groups,
        num_weights=tuned.num_weights,
        precision=str(tuned.dtype).removeprefix("torch."),
        data=dict(data.facts),
        num_steps=trainer.num_steps,
        seconds_per_step=statistics.median(record.seconds for record in records),
        memory_bytes=records[-1].memory_bytes,
        example=data.train.example(0),
    )
