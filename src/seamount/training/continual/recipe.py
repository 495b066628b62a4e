"""What continual learning adds to a recipe: the tasks, and how earlier ones are kept. Called by `pipeline`, and by
`seamount tune` for recipes that have `tasks`. It must not know tensors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from pydantic import Field, model_validator

from seamount.core.errors import ConfigError
from seamount.training.tuning.recipe import MANY_EXAMPLES, MANY_STEPS, Paths, Section, TuneRecipe


class ContinualSection(Section):
    """How earlier tasks are kept while a new one is learned.

    Attributes:
        memory_buffer_size: examples of all tasks so far that are remembered; 0 remembers none, and nothing is replayed.
        replay_share: of each step's examples, those that are remembered ones; at least one of both kinds.
        elastic_weight_consolidation: hold those weights that earlier tasks need (EWC).
        ewc_weight: of that pull. Lambda is this over the square of the learning rate, where the Fisher information of
            each task adds up to 1: so 1 has weights that are, weighed by it, a learning rate away from where they were
            cost half a nat per token; it means the same for all weights and adapters, small rates and large ones.
        ewc_decay: what earlier tasks' Fisher information is multiplied by when another is added; 1 forgets none.
        fisher_examples: of each task, from which its Fisher information is measured.
        drift_tolerance: nats per token by which the loss on remembered examples has risen when the learning rate is
            half of the schedule's; None lets it be.
        drift_every_steps, drift_examples: how often that is measured, and on how many.
    """

    memory_buffer_size: int = Field(ge=0, le=2**24, default=1024)
    replay_share: float = Field(gt=0, lt=1, default=0.5)
    elastic_weight_consolidation: bool = True
    ewc_weight: float = Field(gt=0, le=1e9, default=1.0)
    ewc_decay: float = Field(gt=0, le=1, default=1.0)
    fisher_examples: int = Field(gt=0, le=MANY_EXAMPLES, default=256)
    drift_tolerance: float | None = Field(gt=0, le=1e6, default=0.1)
    drift_every_steps: int = Field(gt=0, le=MANY_STEPS, default=20)
    drift_examples: int = Field(gt=0, le=MANY_EXAMPLES, default=64)


class TaskSection(Section):
    """One task.

    Attributes:
        task_id: its name in versions and reports.
        data: files of records, or a folder made by `seamount data build`.
        evaluation: held-out files that the accuracy is measured on. Without any it is `data.evaluation_share` of the
            data, or, where that is 0, the training examples themselves.
    """

    task_id: str = Field(min_length=1)
    data: Paths = Field(min_length=1)
    evaluation: Paths = ()


class ContinualRecipe(TuneRecipe):
    """A run of several tasks. `schedule` is each task's; `data` holds for each, but for its files.

    Attributes:
        tasks: in the order in which they are learned.
    """

    continual: ContinualSection = ContinualSection()
    tasks: tuple[TaskSection, ...] = ()

    @model_validator(mode="after")
    def _can_go_on(self) -> ContinualRecipe:
        if self.data.train or self.data.evaluation:
            raise ValueError("data.train, data.evaluation: each of `tasks` has its own `data` and `evaluation`")
        if self.strategy == "fsdp":
            raise ValueError("strategy: fsdp is not for continual learning; ddp is")
        if self.continual.memory_buffer_size and self.batch.examples < 2:
            raise ValueError("batch.examples: a step holds new and remembered examples, 2 at least")
        if not self.data.scored:
            raise ValueError("data.scored: the accuracy of each task is measured, on 1 example at least")
        check_ids([task.task_id for task in self.tasks])
        return self


def check_ids(task_ids: list[str]) -> None:
    """Raise ConfigError where a task id occurs twice."""
    twice = [task_id for task_id, count in Counter(task_ids).items() if count > 1]
    if twice:
        raise ConfigError(f"Two tasks have the id {twice[0]!r}.", hint="Give each task an id of its own.")


def from_fields(fields: dict[str, Any]) -> ContinualRecipe:
    """The recipe of these fields; one of a section may stand without it, as in `learning_rate=1e-4`.

    Raises:
        ConfigError: names each wrong field.
    """
    raw = dict(fields)
    sections = {
        name: info.annotation
        for name, info in ContinualRecipe.model_fields.items()
        if isinstance(info.annotation, type) and issubclass(info.annotation, Section)
    }
    for name in [name for name in raw if name not in ContinualRecipe.model_fields]:
        homes = [home for home, section in sections.items() if name in section.model_fields]
        given = raw.get(homes[0], {}) if len(homes) == 1 else None
        if isinstance(given, Section | Mapping):
            raw[homes[0]] = {**_plain(given), name: raw.pop(name)}
    return ContinualRecipe.checked(raw, where="ContinualLearning.load")


def _plain(section: Section | Mapping[str, Any]) -> dict[str, Any]:
    return section.model_dump() if isinstance(section, Section) else dict(section)
