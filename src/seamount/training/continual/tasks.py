"""The tasks that a caller gives, checked and made into examples. Called by `pipeline` and `estimate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seamount.core.errors import ConfigError
from seamount.models.prompt import PromptEncoder
from seamount.training.tuning.network import tunable
from seamount.training.tuning.prepare import Prepared, prepare

from .recipe import ContinualRecipe, check_ids
from .versions import Version

_NEEDED, _OPTIONAL = ("data", "task_id"), ("evaluation",)


@dataclass(frozen=True, slots=True)
class Task:
    """A task whose examples are made, number `number`, from 1, of `num_tasks` that were given."""

    task_id: str
    data: Prepared
    number: int
    num_tasks: int

    @property
    def name(self) -> str:
        """For people who watch."""
        return f"{self.task_id} (task {self.number} of {self.num_tasks})"


def prepare_tasks(recipe: ContinualRecipe, given: Sequence[Mapping[str, Any]]) -> list[Task]:
    """Make the examples of all tasks, so that what is bad about the last is known before the first is learned.

    Raises:
        ConfigError: there is no task, a field is missing or unknown, or a task id occurs twice.
        InvalidRequestError: data is bad or empty.
    """
    if not given:
        raise ConfigError("There are no tasks.", hint="Give tasks=[{'data': ..., 'task_id': ...}].")
    for place, task in enumerate(given, 1):
        _check(place, task)
    check_ids([task["task_id"] for task in given])
    encoder = PromptEncoder.from_folder(tunable(recipe.model))
    try:
        prepared = [_prepared(recipe, encoder, task) for task in given]
    finally:
        encoder.close()
    ids = [task["task_id"] for task in given]
    return [Task(ids[place], data, place + 1, len(given)) for place, data in enumerate(prepared)]


def unknown(tasks: Sequence[Task], lineage: Sequence[Version]) -> list[Task]:
    """Those tasks that the versions do not know. Raises ConfigError: one was learned with other data."""
    known = {version.task_id: version.data for version in lineage}
    for task in tasks:
        if known.get(task.task_id, task.data.train.digest) != task.data.train.digest:
            raise ConfigError(
                f"Task {task.task_id!r} was learned already, with other data.",
                hint="Give a new task_id, or roll back to a version that does not know it.",
            )
    return [task for task in tasks if task.task_id not in known]


def _check(place: int, task: Mapping[str, Any]) -> None:
    if not isinstance(task, Mapping):
        raise ConfigError(f"Task {place} is {type(task).__name__}.", hint="Give each as {'data': ..., 'task_id': ...}.")
    missing = [name for name in _NEEDED if task.get(name) is None]
    unknown = sorted(set(task) - {*_NEEDED, *_OPTIONAL})
    if missing or unknown:
        what = f"has no {missing[0]}" if missing else f"has a field {unknown[0]!r}, which is not known"
        raise ConfigError(f"Task {place} {what}.", hint="A task has data, task_id and, if wanted, evaluation.")
    if not isinstance(task["task_id"], str) or not task["task_id"]:
        raise ConfigError(f"The task_id of task {place} is empty, or no text.")


def _prepared(recipe: ContinualRecipe, encoder: PromptEncoder, task: Mapping[str, Any]) -> Prepared:
    train, evaluation = (_source(task.get(name)) for name in ("data", "evaluation"))
    held_out = evaluation if evaluation != () else None
    return prepare(recipe.data, encoder, recipe.seed, train=train, evaluation=held_out)


def _source(source: Any) -> Any:
    """A path by itself, or several, as `prepare` takes them."""
    if isinstance(source, str | Path):
        return (Path(source),)
    if isinstance(source, list | tuple) and source and all(isinstance(part, str | Path) for part in source):
        return tuple(Path(part) for part in source)
    return () if source is None else source
