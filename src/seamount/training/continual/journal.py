"""What a run of tasks writes down for people: the steps of all tasks in one log, accuracy and facts.

Called by `learning` while a task is learned, and by `pipeline` when it has been.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from seamount.training.tuning.distributed import World
from seamount.training.tuning.log import RunLog
from seamount.training.tuning.pipeline import Watcher
from seamount.training.tuning.surroundings import surroundings
from seamount.training.tuning.trainer import EvaluationRecord, StepRecord

from .accuracy import Accuracy, replace_file
from .recipe import ContinualRecipe
from .tasks import Task
from .versions import Versions

_FACTS, REPORT_NAME = "facts.json", "report.html"


@dataclass(frozen=True, slots=True)
class TaskRecord(StepRecord):
    """A step of task number `task_number`, from 1, of `num_tasks`; `task` is its id."""

    task: str
    task_number: int
    num_tasks: int


class TaskLog:
    """Notes the steps of a task behind those of all versions before, and tells them; `open` only on the main rank."""

    def __init__(
        self, recipe: ContinualRecipe, versions: Versions, task: Task, steps_per_epoch: float, watcher: Watcher
    ) -> None:
        self._recipe, self._task, self._steps_per_epoch = recipe, task, steps_per_epoch
        self._offset = sum(version.num_steps for version in versions.all())
        self._watcher = watcher
        self._log: RunLog | None = None

    def open(self, step: int) -> None:
        """The task goes on behind this step of its own."""
        tracking = self._recipe.tracking
        self._log = RunLog(
            self._recipe.output,
            tensorboard=tracking.tensorboard,
            mlflow=tracking.mlflow,
            recipe=self._recipe.model_dump(mode="json"),
            tell=self._watcher.stage,
        )
        self._log.rewind(self._offset + step)

    def step(self, record: StepRecord) -> None:
        """A step was done."""
        task = self._task
        fields = asdict(record) | {"epoch": record.step / self._steps_per_epoch}
        told = TaskRecord(**fields, task=task.task_id, task_number=task.number, num_tasks=task.num_tasks)
        if self._log is not None:
            place = {"step": self._offset + record.step, "num_steps": self._offset + record.num_steps}
            self._log.step(asdict(told) | place)
        self._watcher.step(told)

    def evaluation(self, record: EvaluationRecord) -> None:
        """Held-out examples of the task were looked at."""
        if self._log is not None:
            self._log.evaluation({"step": self._offset + record.step, "phase": "during", "loss": record.loss})
        self._watcher.evaluation(record)

    def close(self, *, finished: bool) -> None:
        """The task is over, or was stopped."""
        if self._log is not None:
            self._log.close(finished=finished)


def facts_of(recipe: ContinualRecipe, world: World, tuned: Mapping[str, Any]) -> dict[str, Any]:
    """What a report says of the network and the machine."""
    place = {"ranks": world.size, "device": str(world.device), "threads": torch.get_num_threads()}
    return {"model": recipe.model, **tuned, **place, **surroundings(world.device)}


def note(recipe: ContinualRecipe, accuracy: Accuracy, versions: Versions, facts: Mapping[str, Any]) -> None:
    """A task has become a version: write down the accuracy, and what a report says besides.

    Raises:
        OSError, CapacityError: they cannot be written; the version stands.
    """
    accuracy.write(recipe.output)
    made, lineage = versions.all(), versions.lineage()
    before = [0, *(version.num_seen for version in lineage)]
    data = {
        version.task_id: {
            "num_examples": version.num_seen - seen,
            "num_steps": version.num_steps,
            "version": version.number,
            "digest": version.data,
        }
        for version, seen in zip(lineage, before, strict=False)
    }
    replace_file(recipe.output / _FACTS, {**facts, "data": data})
    log = RunLog(recipe.output)
    skills = dict(zip(accuracy.tasks, accuracy.matrix[-1], strict=True))
    step = sum(version.num_steps for version in made)
    log.evaluation({"step": step, "phase": "after", "accuracy": accuracy.average, "skills": skills})
    log.event(f"{made[-1].task_id}: version {made[-1].number}, made of version {made[-1].parent}")
    log.close()
