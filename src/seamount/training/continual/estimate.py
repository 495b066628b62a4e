"""What a run of tasks would do, before it does it: for `seamount tune --dry-run` of recipes with `tasks`.

Time and memory are measured as for one task: the first steps are really computed, with what holds earlier tasks, and
forgotten. Nothing is written.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import torch

from seamount.training.tuning.distributed import World
from seamount.training.tuning.estimate import TRIED_STEPS, Plan
from seamount.training.tuning.network import open_network
from seamount.training.tuning.pipeline import Silent, Watcher
from seamount.training.tuning.schedule import num_steps
from seamount.training.tuning.trainer import Trainer

from .ewc import Penalty
from .mixing import MixedOrder
from .objective import ContinualObjective
from .recipe import ContinualRecipe
from .tasks import Task, prepare_tasks, unknown
from .versions import Versions


@dataclass(frozen=True, slots=True)
class TaskPlan:
    """What would be done for one task.

    Attributes:
        data: counts of its examples, as in `Plan`.
        num_remembered: examples of earlier tasks that are replayed beside.
        num_steps: 0 where the task was learned already.
    """

    task_id: str
    data: dict[str, Any]
    num_remembered: int
    num_steps: int


@dataclass(frozen=True, slots=True)
class TasksPlan:
    """What a run of tasks would do: `plan` for all of them (its data is the first task's), `tasks` for each."""

    plan: Plan
    tasks: tuple[TaskPlan, ...]


def plan_tasks(recipe: ContinualRecipe, watcher: Watcher | None = None) -> TasksPlan:
    """Prepare all tasks and try the first steps.

    Raises:
        SeamountError: the run could not begin or go on; see `ContinualLearning.train`.
    """
    watcher = watcher or Silent()
    world = World.join(recipe.device)
    watcher.stage("Reading the data")
    tasks = prepare_tasks(recipe, [task.model_dump() for task in recipe.tasks])
    planned = _planned(recipe, tasks)
    watcher.stage("Loading the model")
    tuned = open_network(recipe, world.device, watcher.loading)
    watcher.stage(f"Trying {TRIED_STEPS} steps")
    first = tasks[0].data
    trainer = Trainer(recipe, tuned.model, first.train, world=world, objective=_objective(recipe, tuned.model))
    tuned.model.train()
    records = [trainer.step() for _ in range(TRIED_STEPS)]
    plan = Plan(
        groups=tuned.groups,
        num_weights=tuned.num_weights,
        precision=str(tuned.dtype).removeprefix("torch."),
        data=dict(first.facts),
        num_steps=sum(task.num_steps for task in planned),
        seconds_per_step=statistics.median(record.seconds for record in records),
        memory_bytes=records[-1].memory_bytes,
        example=first.train.example(0),
    )
    return TasksPlan(plan, planned)


def _planned(recipe: ContinualRecipe, tasks: list[Task]) -> tuple[TaskPlan, ...]:
    """Each task's steps, as `learning` will count them."""
    versions, section = Versions(recipe.output), recipe.continual
    lineage = versions.lineage() if versions.exist else []
    new = {task.task_id for task in unknown(tasks, lineage)}
    num_seen = lineage[-1].num_seen if lineage else 0
    found = []
    for task in tasks:
        count = num_remembered = 0
        if task.task_id in new:
            num_new, num_remembered = len(task.data.train), min(num_seen, section.memory_buffer_size)
            order = MixedOrder(num_new, num_remembered, recipe.batch.examples, section.replay_share, recipe.seed)
            count = num_steps(recipe.schedule, order.steps_per_epoch)
            num_seen += num_new
        found.append(TaskPlan(task.task_id, dict(task.data.facts), num_remembered, count))
    return tuple(found)


def _objective(recipe: ContinualRecipe, model: torch.nn.Module) -> ContinualObjective:
    """That of a later task, with a pull of no strength: it takes the same time and memory."""
    penalty = None
    if recipe.continual.elastic_weight_consolidation:
        trained = {name: p.detach().float() for name, p in model.named_parameters() if p.requires_grad}
        information = {name: torch.zeros_like(tensor) for name, tensor in trained.items()}
        penalty = Penalty(0.0, information, {name: tensor.clone() for name, tensor in trained.items()})
    return ContinualObjective(penalty, None, recipe.experts.mtp_weight)
