"""The loop that tunes a network: batches in, changed weights out. Called by `pipeline`, `continual`, `distillation`.

`Trainer.run` reads as the loop does: examples, micro-batches, gradients, update, balance, record, evaluation,
checkpoint. What a step does is a function of the recipe, the data and the state that checkpoints hold; so a run that
was killed goes on to the same weights, to the bit, on the same machine with the same number of threads and ranks. It
must not know what the examples say, nor how anything is shown.
"""

from __future__ import annotations

import hashlib
import math
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from seamount.core.errors import CheckpointError, ConfigError, EngineError
from seamount.models.memory import keep_freed
from seamount.models.network import CausalLM
from seamount.training.shards.dataset import Dataset
from seamount.training.shards.order import Order
from seamount.training.shards.packing import MicroBatch, pack

from .activations import checkpoint_activations
from .distributed import World, whole
from .loss import causal_and_mtp_loss, causal_loss
from .optimizer import Optimizer
from .recipe import TuneRecipe
from .routing import Routers
from .schedule import Plateau, Schedule, num_steps
from .state import CheckpointStore

_EVALUATED_AT_ONCE = 64
_TIMES_A_RUN = 10
_TOKEN_MULTIPLE = 128
# Of a recipe, what a run may go on without: where it writes, on what it runs, and how its work is cut.
_FREE: Any = {
    "output": True,
    "device": True,
    "strategy": True,
    "activation_checkpointing": True,
    "saving": True,
    "tracking": True,
    "data": True,  # its examples have a digest of their own
    "tasks": True,
    "batch": {"micro_tokens"},
    "schedule": {"steps", "epochs"},  # the number of steps that comes of them is compared
}


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What one step did.

    Attributes:
        step: its number, from 1; epoch: passes over the data so far.
        loss: mean over the step's trained tokens, of all ranks, before the update.
        gradient_norm: before clipping; not a number where fp16 overflowed and the step was left out.
        imbalance: the busiest expert's load over the mean, the worst layer's; 1.0 without experts.
        num_tokens, num_trained_tokens: of the step, over all ranks.
        memory_bytes: most that this process has held so far; on a GPU, of its memory.
    """

    step: int
    num_steps: int
    epoch: float
    loss: float
    learning_rate: float
    gradient_norm: float
    imbalance: float
    num_tokens: int
    num_trained_tokens: int
    tokens_per_s: float
    seconds: float
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class EvaluationRecord:
    """The mean loss over the evaluation examples' trained tokens, after `step` steps."""

    step: int
    loss: float


@dataclass(slots=True)
class Position:
    """Where a run is; saved with each checkpoint."""

    step: int = 0
    num_tokens: int = 0
    num_trained_tokens: int = 0
    evaluation_loss: float | None = None


class DivergedError(EngineError):
    """The loss, or what it does to the weights, is no number any more."""

    code = "training_diverged"


class Objective:
    """What is minimised; continual learning and distillation have others.

    Attributes:
        rules: what it does beyond the recipe that the trainer knows, as text; a run goes on by the same ones only.
    """

    rules = ""

    def loss(self, model: CausalLM, micro: MicroBatch) -> Tensor:
        """Return the sum of the losses of the micro-batch's trained tokens: a scalar in fp32."""
        return causal_loss(model, micro)

    def add_gradients(self, optimizer: Optimizer) -> None:
        """Add what does not depend on the step's data to the masters' gradients, which are means by now."""

    def rate_factor(self, step: int) -> float:
        """By what the schedule's learning rate is multiplied."""
        return 1.0

    def state(self) -> Mapping[str, Tensor]:
        """Tensors of the objective that a checkpoint must hold."""
        return {}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from `state`."""


class _WithMtp(Objective):
    def __init__(self, weight: float) -> None:
        self._weight = weight

    def loss(self, model: CausalLM, micro: MicroBatch) -> Tensor:
        return causal_and_mtp_loss(model, micro, self._weight)


class _LossModule(nn.Module):
    """Network and objective as one module, whose `forward` is the whole computation: what FSDP wraps."""

    def __init__(self, model: CausalLM, objective: Objective) -> None:
        super().__init__()
        self.model, self._objective = model, objective

    def forward(self, micro: MicroBatch) -> Tensor:
        return self._objective.loss(self.model, micro)


class Trainer:
    """One run of a recipe over a network whose trainable parameters are marked by `requires_grad`.

    Args:
        model: on the world's device; weights that are trained are changed in place.
        data, evaluation: what is learned from, and what the loss is told on; `evaluation` may be None.
        store: where checkpoints go; None keeps none.
        order: which examples each step takes; None is the recipe's, over `data`.
        on_step, on_evaluation: told what happened, on the main rank.

    Raises:
        ConfigError: nothing is trainable, an example is longer than the model's context, or an MTP loss is asked for of
            a network without the block.
    """

    def __init__(
        self,
        recipe: TuneRecipe,
        model: CausalLM,
        data: Dataset,
        *,
        world: World,
        evaluation: Dataset | None = None,
        objective: Objective | None = None,
        store: CheckpointStore | None = None,
        order: Callable[[int], Any] | None = None,
        on_step: Callable[[StepRecord], None] = lambda record: None,
        on_evaluation: Callable[[EvaluationRecord], None] = lambda record: None,
    ) -> None:
        self.recipe, self.model, self.world = recipe, model, world
        self._data, self._evaluation, self._store = data, evaluation, store
        self._on_step, self._on_evaluation = on_step, on_evaluation
        mtp_weight = recipe.experts.mtp_weight
        if mtp_weight and not len(model.mtp):
            raise ConfigError("experts.mtp_weight is set, and the model has no MTP block.", hint="Leave it at 0.")
        longest, context = int(data.lengths.max(initial=0)), model.config.max_position
        if longest > context:
            raise ConfigError(
                f"An example has {longest} tokens, and the model's context {context}.",
                hint=f"Set data.max_length={context}, and data.overlong to what shall become of longer ones.",
            )
        self._objective = objective or (_WithMtp(mtp_weight) if mtp_weight else Objective())
        if not mtp_weight:
            for parameter in model.mtp.parameters():
                parameter.requires_grad_(False)
        self._routers = Routers(model, balance_weight=recipe.experts.balance_weight)
        if recipe.activation_checkpointing:
            checkpoint_activations(model)
        self._loss = _LossModule(model, self._objective)
        if recipe.strategy == "fsdp":
            world.share_out(self._loss, model)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not trained:
            raise ConfigError("No weight of the model is trained.", hint="Check adapter.targets of the recipe.")
        self.optimizer = Optimizer(trained, recipe.optimizer, scales_loss=recipe.precision == "fp16")
        ordered = Order(len(data), recipe.batch.examples, recipe.seed)
        self._order, self._steps_per_epoch = order or ordered.step, ordered.steps_per_epoch
        self.schedule = Schedule(
            recipe.schedule, recipe.learning_rate, num_steps(recipe.schedule, self._steps_per_epoch)
        )
        self.position = Position()
        self.stop_requested = False

    @property
    def num_steps(self) -> int:
        """Steps of the whole run."""
        return self.schedule.num_steps

    def run(self) -> None:
        """Train to the end, or until `stop_requested` on any rank; a checkpoint is made then."""
        every = self.recipe.saving.checkpoint_every_steps or max(self.num_steps // _TIMES_A_RUN, 1)
        evaluate_every = self.recipe.saving.evaluate_every_steps or max(self.num_steps // _TIMES_A_RUN, 1)
        saved = self.position.step
        self.model.train()
        if self.world.device.type == "cpu":
            keep_freed()
        while self.position.step < self.num_steps and not self._stops():
            record = self.step()
            if self.world.is_main:
                self._on_step(record)
            step, ended = self.position.step, self.position.step == self.num_steps
            if self._evaluation is not None and (ended or step % evaluate_every == 0):
                self.evaluate()
            if ended or step % every == 0:
                self.save()
                saved = step
        if saved != self.position.step:
            self.save()

    def _stops(self) -> bool:
        """Whether some rank was asked to stop: all of them end after the same step."""
        return self.world.sums(float(self.stop_requested))[0] > 0

    def step(self) -> StepRecord:
        """Do one step; return what it did.

        Raises:
            DivergedError: there are no numbers any more. Checkpoints are of steps before it.
        """
        began = time.monotonic()
        number, recipe = self.position.step, self.recipe
        chosen = [int(index) for index in self._order(number)]
        examples = [(index, self._data.example(index)) for index in chosen]
        num_trained = int(sum(self._data.num_trained[chosen]))
        micros = pack(
            examples, micro_tokens=recipe.batch.micro_tokens, rank=self.world.rank, world_size=self.world.size
        )
        torch.manual_seed(_seed(recipe.seed, number, self.world.rank))  # dropout
        scale = self.optimizer.loss_scale / num_trained
        # FSDP takes means over the ranks, and sums are wanted.
        factor = scale * (self.world.size if recipe.strategy == "fsdp" else 1)
        total = 0.0
        for micro in micros:
            ready = _ready(micro, self.world.device)
            self._routers.begin(ready.starts, 0 if micro.is_filler else micro.starts[-1], factor)
            loss = self._loss(ready)
            total += float(loss.detach())
            (loss * factor).backward()
            self.optimizer.gather()
        self.world.add_up(list(self.optimizer.gradients().values()))
        self.world.add_up(list(self._routers.loads().values()))
        (total,) = self.world.sums(total)
        self._objective.add_gradients(self.optimizer)
        rate = self.schedule.rate(number) * self._objective.rate_factor(number)
        norm = self.optimizer.step(rate)
        self._stop_where_diverged(total, norm)
        imbalance = self._routers.balance(recipe.experts.bias_rate)
        position, num_tokens = self.position, int(sum(self._data.lengths[chosen]))
        position.step += 1
        position.num_tokens += num_tokens
        position.num_trained_tokens += num_trained
        seconds = time.monotonic() - began
        return StepRecord(
            step=position.step,
            num_steps=self.num_steps,
            epoch=position.step / self._steps_per_epoch,
            loss=total / num_trained,
            learning_rate=rate,
            gradient_norm=norm,
            imbalance=imbalance,
            num_tokens=num_tokens,
            num_trained_tokens=num_trained,
            tokens_per_s=num_tokens / seconds,
            seconds=seconds,
            memory_bytes=_peak_bytes(self.world.device),
        )

    @torch.no_grad()
    def evaluate(self) -> float:
        """Return the mean loss over the evaluation examples, and tell it; of the average where one is kept.

        Raises:
            DivergedError: it is no number.
        """
        if self._evaluation is None:
            raise ConfigError("There is no evaluation data.", hint="Give data.evaluation in the recipe.")
        total, data = 0.0, self._evaluation
        self.optimizer.publish_average()
        self.model.eval()
        try:
            for start in range(0, len(data), _EVALUATED_AT_ONCE):
                chosen = range(start, min(start + _EVALUATED_AT_ONCE, len(data)))
                examples = [(index, data.example(index)) for index in chosen]
                micros = pack(
                    examples,
                    micro_tokens=self.recipe.batch.micro_tokens,
                    rank=self.world.rank,
                    world_size=self.world.size,
                )
                for micro in micros:
                    total += float(self._loss(_ready(micro, self.world.device)))
        finally:  # a checkpoint may yet be made when another rank has failed
            self.model.train()
            if isinstance(self._loss, FSDPModule):
                self._loss.reshard()  # else the root keeps the weights of the forward pass
            self.optimizer.take_average_back()
        (total,) = self.world.sums(total)
        loss = total / int(data.num_trained.sum())
        self._stop_where_diverged(loss, 0.0)
        self.position.evaluation_loss = loss
        self.schedule.evaluated(loss)
        if self.world.is_main:
            self._on_evaluation(EvaluationRecord(self.position.step, loss))
        return loss

    def save(self) -> None:
        """Write a checkpoint of this moment."""
        if self._store is None:
            return
        tensors = self.optimizer.state() | {f"router.{name}": bias for name, bias in self._routers.biases.items()}
        tensors |= {f"objective.{name}": tensor for name, tensor in self._objective.state().items()}
        gathered = {name: whole(tensor) for name, tensor in tensors.items()}
        facts = {
            "position": asdict(self.position),
            "optimizer": self.optimizer.facts(),
            "plateau": asdict(self.schedule.plateau),
            "data": self._data.digest,
            "num_steps": self.num_steps,
            "rules": self._rules(),
        }
        if self.world.is_main:
            self._store.save(self.position.step, gathered, facts)

    def restore(self, step: int | None = None) -> None:
        """Go on from a checkpoint of the store: the one of `step`, or the newest.

        Raises:
            CheckpointError: it is damaged, or of another network, recipe or data.
        """
        if self._store is None:
            raise CheckpointError("This run keeps no checkpoints.")
        tensors, facts = self._store.load(step)
        if facts["data"] != self._data.digest:
            raise CheckpointError(
                "The training data is not that of the checkpoint: going on would train on other examples.",
                hint="Put the data back, or begin anew in another output folder.",
            )
        for name, value in self._rules().items():
            if facts["rules"].get(name) != value:
                raise CheckpointError(
                    f"The checkpoint was made with {name} {facts['rules'].get(name)}; it is {value} now.",
                    hint="Use the recipe that the run began with, or another output folder.",
                )
        if facts["num_steps"] != self.num_steps:
            raise CheckpointError(
                f"The checkpoint is of a run of {facts['num_steps']} steps; the recipe makes {self.num_steps}.",
                hint="Use the recipe that the run began with, or another output folder.",
            )
        self.optimizer.load_state(tensors, facts["optimizer"])  # compares the networks
        for name, bias in self._routers.biases.items():
            bias.copy_(tensors[f"router.{name}"])
        prefix = "objective."
        self._objective.load_state({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
        self.schedule.plateau = Plateau(**facts["plateau"])
        self.position = Position(**facts["position"])

    def _rules(self) -> dict[str, Any]:
        """What decides the weights that come out, by the recipe's names; not how work is cut, shared out and kept."""
        found: dict[str, Any] = {"objective": self._objective.rules}
        for name, value in self.recipe.model_dump(mode="json", exclude=_FREE).items():
            inner = (
                {f"{name}.{field}": one for field, one in value.items()} if isinstance(value, dict) else {name: value}
            )
            found |= inner
        return found | {"model": Path(self.recipe.model).name}  # which may have moved with the run

    def _stop_where_diverged(self, loss: float, norm: float) -> None:
        """See that there still are numbers. A step of fp16 may overflow: it is left out, and the loss scaled less."""
        can_scale = self.optimizer.loss_scale > 1.0
        if (math.isfinite(loss) and math.isfinite(norm)) or can_scale:
            return
        raise DivergedError(
            f"Step {self.position.step + 1} has a loss of {loss} and gradients of norm {norm}: training has diverged.",
            hint="Lower optimizer.learning_rate, and begin anew in another output folder.",
        )

    def final_weights(self) -> dict[str, Tensor]:
        """The trained weights in fp32, by parameter name: the average where one is kept. Every rank must ask."""
        chosen = self.optimizer.average or self.optimizer.masters
        return {name: whole(tensor.detach()) for name, tensor in chosen.items()}


def _ready(micro: MicroBatch, device: torch.device) -> MicroBatch:
    """The micro-batch on its device.

    On a CPU one more example is added, of which nothing is trained, so that few numbers of tokens occur: the matrix
    library prepares itself for each new shape, which takes longer than the products of a small model.
    """
    end = micro.starts[-1]
    missing = -end % _TOKEN_MULTIPLE
    if device.type != "cpu" or not missing:
        return micro.to(device)
    filling = torch.arange(missing)
    return replace(
        micro,
        token_ids=torch.cat((micro.token_ids, torch.zeros_like(filling))),
        positions=torch.cat((micro.positions, filling)),
        starts=(*micro.starts, end + missing),
        trained=torch.cat((micro.trained, torch.zeros(missing, dtype=torch.bool))),
    )


def _seed(seed: int, step: int, rank: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed} {step} {rank}".encode(), digest_size=8).digest()) >> 1


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
