"""One task: from the current version to the next. Called by `pipeline`.

It reads as a task goes: a network with the version's weights, steps over new and remembered examples, Fisher
information, accuracy, memory, version. A task begins from its parent on the disk, and is measured on a network of its
own, whether the run was interrupted or not; so both give the same weights, to the bit.
"""

from __future__ import annotations

import gc
import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seamount.models.network import CausalLM
from seamount.training.examples.example import Example
from seamount.training.shards.dataset import Dataset, ExampleList
from seamount.training.tuning.distributed import World
from seamount.training.tuning.network import Tuned, open_network
from seamount.training.tuning.pipeline import Quiet, Watcher
from seamount.training.tuning.schedule import num_steps
from seamount.training.tuning.state import CheckpointStore
from seamount.training.tuning.trainer import Trainer

from .accuracy import num_right
from .drift import Drift
from .ewc import Penalty, fisher, joined
from .journal import TaskLog
from .mixing import MixedData, MixedOrder
from .objective import ContinualObjective, loss_of
from .recipe import ContinualRecipe
from .reservoir import Reservoir
from .stored import from_tensors, to_tensors
from .tasks import Task
from .versions import Version, Versions

_LEARNING = "learning"


class Learner:
    """Makes versions.

    Args:
        watcher: told what goes on, on the main rank.

    Attributes:
        stopped: whether it was asked to stop, here or on another rank.
        tuned: what is trained, once a task has begun: `groups`, `num_weights` and `precision`.
    """

    def __init__(self, recipe: ContinualRecipe, versions: Versions, world: World, watcher: Watcher) -> None:
        self._recipe, self._versions, self._world = recipe, versions, world
        self._watcher = watcher if world.is_main else Quiet(watcher)
        self._trainer: Trainer | None = None
        self.stopped = False
        self.tuned: dict[str, Any] = {}

    def stop(self) -> None:
        """End after the step that is being done, with a checkpoint."""
        self.stopped = True
        if self._trainer is not None:
            self._trainer.stop_requested = True

    def save(self) -> None:
        """Write a checkpoint of this moment, where a task is being learned; on the main rank."""
        if self._trainer is not None and self._world.is_main:
            self._trainer.save()

    def learn(self, task: Task) -> bool:
        """Make a version of the current one. Returns False where it was stopped on the way."""
        parent = self._versions.current()
        known, _ = self._versions.load(parent.number)
        made = self._train(task, parent, known)
        if made is None:
            self.stopped = True
            return False
        weights, count = made
        self._watcher.stage(f"Measuring {task.name}")
        tensors, accuracy, num_seen = self._measured(task, parent, known, weights)
        if self._world.is_main:
            number, digest = len(self._versions.all()), task.data.train.digest
            version = Version(number, task.task_id, parent.number, digest, accuracy, num_seen, count)
            self._versions.add(version, tensors)
            shutil.rmtree(self._recipe.output / _LEARNING, ignore_errors=True)
        self.stopped = self._world.sums(float(self.stopped))[0] > 0  # all ranks end after the same task
        return True

    def _train(self, task: Task, parent: Version, known: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int] | None:
        """Do a task's steps; return the weights, under the names that versions have, and how many steps they took."""
        recipe, world, section = self._recipe, self._world, self._recipe.continual
        self._watcher.stage(f"Learning {task.name}")
        tuned = network_of(recipe, known, world.device)
        precision = str(tuned.dtype).removeprefix("torch.")
        self.tuned = {"num_weights": tuned.num_weights, "groups": tuned.groups, "precision": precision}
        remembered = ExampleList(from_tensors(known, "memory"))
        data: Dataset = MixedData(task.data.train, remembered) if len(remembered) else task.data.train
        order = MixedOrder(
            len(task.data.train), len(remembered), recipe.batch.examples, section.replay_share, recipe.seed
        )
        count = num_steps(recipe.schedule, order.steps_per_epoch)
        anchor, information = (part(known, prefix, world.device) for prefix in ("weights.", "fisher."))
        pulls = section.elastic_weight_consolidation and information
        penalty = Penalty(section.ewc_weight / recipe.learning_rate**2, information, anchor) if pulls else None
        drift = self._drift(tuned.model, remembered)
        folder = _learning_folder(recipe.output, parent, task.task_id)
        store = CheckpointStore(folder, full_every=recipe.saving.full_every, keep=recipe.saving.keep)
        log = TaskLog(recipe, self._versions, task, order.steps_per_epoch, self._watcher)
        trainer = Trainer(
            recipe.model_copy(update={"schedule": recipe.schedule.model_copy(update={"steps": count})}),
            tuned.model,
            data,
            world=world,
            evaluation=task.data.evaluation,
            objective=ContinualObjective(penalty, drift, recipe.experts.mtp_weight),
            store=store,
            order=order.step,
            on_step=log.step,
            on_evaluation=log.evaluation,
        )
        _begin_at(trainer, anchor)
        if store.steps():
            trainer.restore()
        if world.is_main:
            log.open(trainer.position.step)
        self._trainer = trainer  # from here on there is something to stop, and to rescue
        trainer.stop_requested = self.stopped
        try:
            self._watcher.began(tuned, task.data, trainer)
            trainer.run()
        finally:
            log.close(finished=trainer.position.step == count)
        self._trainer = None
        if trainer.position.step < count:
            return None
        weights = {f"weights.{name}": tensor for name, tensor in trainer.final_weights().items()}
        return weights | _routers(recipe, tuned.model), count

    def _measured(
        self, task: Task, parent: Version, known: Mapping[str, Tensor], weights: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], tuple[float, ...], int]:
        """All tensors of the version with these weights, its accuracy on each task, and the examples seen so far."""
        recipe, section, world = self._recipe, self._recipe.continual, self._world
        gc.collect()  # the trainer and its network, which hooks hold in a circle
        model = network_of(recipe, weights, world.device).model
        tensors, train = dict(weights), task.data.train
        tensors |= {name: tensor for name, tensor in known.items() if name.startswith("fisher.")}
        if section.elastic_weight_consolidation:
            new = fisher(model, train, section.fisher_examples, seed=recipe.seed, world=world)
            summed = joined(part(known, "fisher.", world.device), new, section.ewc_decay)
            tensors |= {f"fisher.{name}": tensor for name, tensor in summed.items()}
        asked = [from_tensors(known, f"evaluation.{index}") for index in range(len(parent.accuracy))]
        held_out = train if task.data.evaluation is None else task.data.evaluation
        asked.append(_spread(held_out, recipe.data.scored))
        accuracy = []
        for index, examples in enumerate(asked):
            micro_tokens = recipe.batch.micro_tokens
            right = num_right(model, ExampleList(examples), micro_tokens=micro_tokens, world=world)
            accuracy.append(right / len(examples))
            tensors |= to_tensors(examples, f"evaluation.{index}")
        remembered = tuple(from_tensors(known, "memory"))
        memory = Reservoir(section.memory_buffer_size, recipe.seed, remembered, parent.num_seen)
        memory = memory.extended(len(train), train.example)
        return tensors | to_tensors(memory.kept, "memory"), tuple(accuracy), memory.num_seen

    def _drift(self, model: CausalLM, remembered: ExampleList) -> Drift | None:
        section = self._recipe.continual
        if section.drift_tolerance is None or not len(remembered):
            return None
        watched = ExampleList(_spread(remembered, section.drift_examples))
        measure = loss_of(model, watched, micro_tokens=self._recipe.batch.micro_tokens, world=self._world)
        return Drift(measure, tolerance=section.drift_tolerance, every_steps=section.drift_every_steps)


def network_of(recipe: ContinualRecipe, tensors: Mapping[str, Tensor], device: torch.device) -> Tuned:
    """The recipe's network with the weights of a version; as it was where there are none."""
    tuned = open_network(recipe, device)
    places = dict(tuned.model.named_parameters()) | dict(tuned.model.named_buffers())
    with torch.no_grad():
        for name, tensor in (part(tensors, "weights.") | part(tensors, "router.")).items():
            places[name].copy_(tensor)
    return tuned


def part(tensors: Mapping[str, Tensor], prefix: str, device: torch.device | None = None) -> dict[str, Tensor]:
    """Those tensors of a version whose names begin so, without that."""
    return {name.removeprefix(prefix): t.to(device) for name, t in tensors.items() if name.startswith(prefix)}


@torch.no_grad()
def _begin_at(trainer: Trainer, weights: Mapping[str, Tensor]) -> None:
    """Begin with these weights in fp32, of which a 16-bit network holds but the upper half."""
    for name, weight in weights.items():
        trainer.optimizer.masters[name].copy_(weight)
        if trainer.optimizer.average is not None:
            trainer.optimizer.average[name].copy_(weight)


def _routers(recipe: ContinualRecipe, model: CausalLM) -> dict[str, Tensor]:
    """The routers' balancing biases, where they are trained beside the weights."""
    if not recipe.experts.bias_rate:
        return {}
    biases = {name: buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")}
    return {f"router.{name}": bias.detach().clone() for name, bias in biases.items()}


def _spread(data: Dataset, most: int) -> list[Example]:
    """At most so many examples, spread over the data evenly."""
    chosen = np.linspace(0, len(data) - 1, min(most, len(data))).round().astype(int)
    return [data.example(int(index)) for index in chosen]


def _learning_folder(output: Path, parent: Version, task_id: str) -> Path:
    """Where the checkpoints of a task lie that is being learned from a version."""
    return output / _LEARNING / f"{parent.number}-{hashlib.sha256(task_id.encode()).hexdigest()[:12]}"
