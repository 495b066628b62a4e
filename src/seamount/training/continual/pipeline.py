"""Learning tasks one after the other: `ContinualLearning`, which `seamount tune` uses for recipes with `tasks`.

What one task does is in `learning`, what is kept in `versions`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from seamount.core.errors import ConfigError
from seamount.models.locate import model_name
from seamount.training.tuning.distributed import World, failure_of_others, forget_failures, note_failure
from seamount.training.tuning.log import RunLog
from seamount.training.tuning.network import tunable, write_result
from seamount.training.tuning.pipeline import Silent, Watcher

from .accuracy import Accuracy
from .learning import Learner, network_of, part
from .recipe import ContinualRecipe, from_fields
from .tasks import Task, prepare_tasks
from .versions import Version, Versions

_RECIPE = "recipe.yaml"
_FIXED = ("model", "adapter", "seed", "precision")


class ContinualLearning:
    """Learn tasks one after the other, and keep the earlier ones.

    `ContinualLearning.load(model).train(tasks=[{"data": "support.jsonl", "task_id": "support"}, ...])`

    Args:
        recipe: whose `output` is the run's folder; a run that is there goes on.
    """

    def __init__(self, recipe: ContinualRecipe) -> None:
        self.recipe = recipe
        self._versions = Versions(recipe.output)
        self._learner: Learner | None = None

    @classmethod
    def load(
        cls,
        model: str | Path,
        *,
        output: str | Path | None = None,
        method: Literal["full", "lora", "qlora"] | None = None,
        **fields: Any,
    ) -> ContinualLearning:
        """Begin with a model, or go on with a run.

        Args:
            model: name of an embedded model, a model's folder, or the folder of an earlier run.
            output: the run's folder; None is `runs/` and the model's name with "-continual".
            method: what is trained; None is all weights, or what the run was begun with.
            fields: of the recipe: sections as dicts, or a section's field by itself, as in `learning_rate=1e-4,
                epochs=3, memory_buffer_size=256`.

        Raises:
            ConfigError: a field is wrong or unknown.
        """
        run = Path(model)
        if Versions(run).exist:
            begun = ContinualRecipe.from_file(run / _RECIPE).model_dump(mode="json")
            fields, model, output = {**begun, **fields}, begun["model"], run
            method = method or ("full" if begun["adapter"] is None else begun["adapter"]["method"])
        if method in (None, "full"):
            fields["adapter"] = None
        elif method in ("lora", "qlora"):
            fields["adapter"] = {**(fields.get("adapter") or {}), "method": method}
        else:
            raise ConfigError(f"There is no method {method!r}.", hint="Methods are full, lora and qlora.")
        folder = output or Path("runs") / f"{model_name(tunable(str(model)))}-continual"
        return cls(from_fields({**fields, "model": str(model), "output": str(folder)}))

    @classmethod
    def from_recipe(cls, path: str | Path, **fields: Any) -> ContinualLearning:
        """A recipe file's run.

        Args:
            fields: change the recipe's, as in `load`.

        Raises:
            ConfigError: the file cannot be read, or a field is wrong or unknown.
        """
        return cls(from_fields({**ContinualRecipe.from_file(Path(path)).model_dump(mode="json"), **fields}))

    def train(
        self,
        tasks: Sequence[Mapping[str, Any]] | None = None,
        memory_buffer_size: int | None = None,
        elastic_weight_consolidation: bool | None = None,
        *,
        watcher: Watcher | None = None,
    ) -> Accuracy:
        """Learn tasks in their order; those that the current version knows already are not learned again.

        A run that was killed, called again in the same way, goes on where it was, and comes to the same weights.

        Args:
            tasks: each with `task_id`, `data` and, where there are, held-out records as `evaluation`; both are files or
                iterables of dicts. None takes the recipe's.
            memory_buffer_size, elastic_weight_consolidation: see `ContinualSection`; None is the recipe's.
            watcher: told what goes on.

        Returns:
            The accuracy matrix of the tasks that are finished; it is in `accuracy.json` too.

        Raises:
            ConfigError: a task id occurs twice, a task was learned with other data, or the run was begun with another
                recipe.
            InvalidRequestError: data is bad or empty.
            CheckpointError: a version or a checkpoint is damaged, or cannot be written.
            RankFailedError: another rank failed.
        """
        watcher = watcher or Silent()
        changes = {
            "memory_buffer_size": memory_buffer_size,
            "elastic_weight_consolidation": elastic_weight_consolidation,
        }
        self.recipe = recipe = _changed(self.recipe, {k: v for k, v in changes.items() if v is not None})
        given = [task.model_dump() for task in recipe.tasks] if tasks is None else list(tasks)
        world = World.join(recipe.device)
        self._learner = learner = Learner(recipe, self._versions, world, watcher)
        try:
            if world.is_main:
                self._begin()
            world.wait()
            watcher.stage("Reading the data")
            for task in self._unknown(prepare_tasks(recipe, given)):
                learner.learn(task)
                if learner.stopped:
                    break
                if world.is_main:
                    self._note()
            return self.accuracy()
        except RuntimeError as error:
            failure = failure_of_others(recipe.output, world, error)
            if failure is None:
                note_failure(recipe.output, world, error)
                raise
            learner.save()
            raise failure from error
        except BaseException as error:
            note_failure(recipe.output, world, error)
            raise
        finally:
            self._learner = None
            world.leave()

    def stop(self) -> None:
        """End `train` after the step that is being done, with a checkpoint. A signal's handler may call it."""
        if self._learner is not None:
            self._learner.stop()

    def versions(self) -> list[Version]:
        """The model as it was, and a version for each task that was learned; none where no run was begun."""
        return self._versions.all() if self._versions.exist else []

    def accuracy(self) -> Accuracy:
        """The accuracy matrix of the current version and those that it was made of."""
        self._check_exists()
        lineage = self._versions.lineage()
        return Accuracy(tuple(v.task_id for v in lineage), tuple(v.accuracy for v in lineage))

    def rollback(self, version: int) -> Version:
        """Make a version current, with its weights, Fisher information and memory. Nothing is deleted.

        Raises:
            NotFoundError: there is no such version.
            CheckpointError: it is damaged; the current one stays.
        """
        self._check_exists()
        chosen = self._versions.make_current(version)
        self.accuracy().write(self.recipe.output)
        return replace(chosen, is_current=True)

    def export(self, folder: str | Path, version: int | None = None) -> Path:
        """Write a version as an adapter, or as a model, for `seamount serve`.

        Args:
            version: None is the current one.

        Returns:
            `folder/adapter` or `folder/model`.

        Raises:
            NotFoundError, CheckpointError: see `rollback`.
        """
        self._check_exists()
        number = (self._versions.current() if version is None else self._versions.find(version)).number
        tensors, _ = self._versions.load(number)
        tuned = network_of(self.recipe, tensors, torch.device("cpu"))
        Path(folder).mkdir(parents=True, exist_ok=True)
        return write_result(self.recipe, tuned, part(tensors, "weights."), Path(folder))

    def _check_exists(self) -> None:
        if not self._versions.exist:
            raise ConfigError(f"{self.recipe.output} holds no run.", hint="Call train first.")

    def _begin(self) -> None:
        """Make the run's folder, or see that the run there is this recipe's."""
        recipe, folder = self.recipe, self.recipe.output
        if self._versions.exist:
            begun, now = (r.model_dump(mode="json") for r in (ContinualRecipe.from_file(folder / _RECIPE), recipe))
            other = [name for name in _FIXED if begun[name] != now[name]]
            if begun["continual"]["memory_buffer_size"] != now["continual"]["memory_buffer_size"]:
                other.append("memory_buffer_size")
            if other:
                raise ConfigError(
                    f"{folder} holds a run that was begun with another {other[0]}.",
                    hint="Give what it was begun with, or another output folder.",
                )
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"{_RECIPE}.tmp"
        partial.write_text(recipe.to_yaml(), encoding="utf-8")
        partial.replace(folder / _RECIPE)
        forget_failures(folder)
        self._versions.begin()
        self.accuracy().write(folder)

    def _unknown(self, tasks: Sequence[Task]) -> list[Task]:
        """Those tasks that the current version does not know."""
        known = {version.task_id: version.data for version in self._versions.lineage()}
        for task in tasks:
            if known.get(task.task_id, task.data.train.digest) != task.data.train.digest:
                raise ConfigError(
                    f"Task {task.task_id!r} was learned already, with other data.",
                    hint="Give a new task_id, or roll back to a version that does not know it.",
                )
        return [task for task in tasks if task.task_id not in known]

    def _note(self) -> None:
        """Write the accuracy down, where a person and a report look for it."""
        accuracy, versions = self.accuracy(), self.versions()
        accuracy.write(self.recipe.output)
        log = RunLog(self.recipe.output)
        skills = dict(zip(accuracy.tasks, accuracy.matrix[-1], strict=True))
        step = sum(version.num_steps for version in versions)
        log.evaluation({"step": step, "phase": "after", "accuracy": accuracy.average, "skills": skills})
        log.event(f"version {versions[-1].number} of {versions[-1].parent}: {versions[-1].task_id}")
        log.close()


def _changed(recipe: ContinualRecipe, changes: Mapping[str, Any]) -> ContinualRecipe:
    """The recipe with fields of `continual` replaced, checked anew."""
    raw = recipe.model_dump(mode="json")
    raw["continual"] |= changes
    return ContinualRecipe.checked(raw, where="ContinualLearning.train")
