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
from seamount.training.tuning.distributed import World
from seamount.training.tuning.failures import together
from seamount.training.tuning.lock import alone_in
from seamount.training.tuning.network import tunable, write_result
from seamount.training.tuning.pipeline import Silent, Watcher
from seamount.training.tuning.report import write_report

from .accuracy import Accuracy
from .journal import REPORT_NAME, facts_of, note
from .learning import Learner, network_of, part
from .recipe import ContinualRecipe, from_fields
from .tasks import prepare_tasks, unknown
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
    def of_run(cls, folder: str | Path) -> ContinualLearning:
        """The run in a folder.

        Raises:
            ConfigError: there is none.
        """
        if not Versions(Path(folder)).exist:
            raise ConfigError(f"{folder} holds no run of tasks.", hint="Name the output folder of such a run.")
        return cls.load(folder)

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
        resume: Literal["auto", "never"] = "auto",
        watcher: Watcher | None = None,
    ) -> Accuracy:
        """Learn tasks in their order; those that the current version knows already are not learned again.

        A run that was killed, called again in the same way, goes on where it was, and comes to the same weights.

        Args:
            tasks: each with `task_id`, `data` and, where there are, held-out records as `evaluation`; both are files or
                iterables of dicts. None takes the recipe's.
            memory_buffer_size, elastic_weight_consolidation: see `ContinualSection`; None is the recipe's.
            resume: `never` refuses a folder that holds a run.
            watcher: told what goes on; steps as `journal.TaskRecord`.

        Returns:
            The accuracy matrix of the tasks that are finished; it is in `accuracy.json` and the report too.

        Raises:
            ConfigError: a task id occurs twice, a task was learned with other data, the run was begun with another
                recipe, or must not be there.
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
            with together(recipe.output, world, learner.save):
                if world.is_main:
                    self._begin(resume)
                world.wait()
                watcher.stage("Reading the data")
                for task in unknown(prepare_tasks(recipe, given), self._versions.lineage()):
                    made = learner.learn(task)
                    if made and world.is_main:
                        note(recipe, self.accuracy(), self._versions, facts_of(recipe, world, learner.tuned))
                    if learner.stopped:
                        break
                if world.is_main:
                    write_report(recipe.output, recipe.output / REPORT_NAME)
                return self.accuracy()
        finally:
            self._learner = None

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
            ConfigError: another process works in the run's folder.
            NotFoundError: there is no such version.
            CheckpointError: it is damaged; the current one stays.
        """
        self._check_exists()
        folder = self.recipe.output
        with alone_in(folder):
            chosen = self._versions.make_current(version)
            self.accuracy().write(folder)
            write_report(folder, folder / REPORT_NAME)
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
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as cause:
            raise ConfigError(f"{folder} cannot be made: {cause.strerror}.", hint="Name another folder.") from cause
        return write_result(self.recipe, tuned, part(tensors, "weights."), Path(folder))

    def _check_exists(self) -> None:
        if not self._versions.exist:
            raise ConfigError(f"{self.recipe.output} holds no run.", hint="Call train first.")

    def _begin(self, resume: Literal["auto", "never"]) -> None:
        """Make the run's folder, or see that the run there is this recipe's."""
        recipe, folder = self.recipe, self.recipe.output
        if self._versions.exist:
            if resume == "never":
                hint = "Choose another output, or go on with --resume auto."
                raise ConfigError(f"{folder} holds a run already.", hint=hint)
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
        self._versions.begin()
        self.accuracy().write(folder)


def _changed(recipe: ContinualRecipe, changes: Mapping[str, Any]) -> ContinualRecipe:
    """The recipe with fields of `continual` replaced, checked anew."""
    raw = recipe.model_dump(mode="json")
    raw["continual"] |= changes
    return ContinualRecipe.checked(raw, where="ContinualLearning.train")
