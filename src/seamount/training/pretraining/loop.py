"""The training loop of a language model from nothing: batches in, weights out. Called by `tiny`.

`Trainer.run` reads as the loop does: batch, loss, gradients, update, router balance, record, checkpoint. A run that
was killed goes on from its last checkpoint to the same weights, to the bit, on the same machine with the same number of
threads. It must not know what the samples say.

While it runs, a file `ANNEAL` in the run folder that holds a number N starts the decay of the learning rate now, over
the next N steps: the way to end a run early without losing what the decay brings.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seamount.models.batch import Batch
from seamount.models.config import ModelConfig
from seamount.models.layers import Router
from seamount.models.network import CausalLM, build_network
from seamount.training.pretraining import checkpoint
from seamount.training.pretraining.data import TrainingBatch, TrainingData
from seamount.training.pretraining.optimizer import Optimizer
from seamount.training.pretraining.recipe import Recipe

_INIT_STD = 0.02
_MOST_COMPILED_SHAPES = 64
# The number of guesses varies by step; padded, it takes few values, and matrix products of a known shape are quicker.
_GUESS_MULTIPLE = 256
_NO_GUESS = -100


@dataclass(slots=True)
class Progress:
    """Where a run is; saved with each checkpoint.

    Attributes:
        step: steps done.
        end_step, decay_steps: the learning rate falls to zero over the `decay_steps` before `end_step`.
        num_tokens: real tokens seen; num_trained_tokens: those that the loss counted.
    """

    step: int
    end_step: int
    decay_steps: int
    num_tokens: int = 0
    num_trained_tokens: int = 0


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What one step did; in phase "main" to all but the MTP block, in phase "mtp" to that alone.

    `imbalance` is the busiest expert's load over the mean, the worst layer's.
    """

    step: int
    phase: Literal["main", "mtp"]
    loss: float
    learning_rate: float
    gradient_norm: float
    imbalance: float
    num_tokens: int
    seconds: float


class Trainer:
    """One run of a recipe.

    Args:
        data: gives the batch of each step.
        on_step: told what each step did, with the run's progress.
        on_probe: called every `probe_every_steps` and at the end, with the network in eval mode.
    """

    def __init__(
        self,
        recipe: Recipe,
        data: TrainingData,
        *,
        on_step: Callable[[StepRecord, Progress], None],
        on_probe: Callable[[CausalLM, Progress], None] | None = None,
    ) -> None:
        self.recipe, self._data, self._on_step, self._on_probe = recipe, data, on_step, on_probe
        self.device = choose_device(recipe.device)
        self.model = initial_network(recipe, self.device)
        self._routers = _watch_routers(self.model)
        self._optimizer = Optimizer(self.model.named_parameters(), recipe.optimizer)
        schedule = recipe.schedule
        self.progress = Progress(0, schedule.total_steps, schedule.decay_steps)
        self._guess_loss = _guess_loss
        self.stop_requested = False
        if recipe.compile:
            self._compile()

    def run(self) -> None:
        """Train to the end, or until `stop_requested`; goes on from the run's last checkpoint where there is one."""
        self._restore()
        while self.progress.step < self._last_step() and not self.stop_requested:
            began = time.monotonic()
            batch = self._data.batch(self.progress.step)
            is_mtp = self._is_mtp_phase()
            loss = self._mtp_loss(batch) if is_mtp else self._loss(batch)
            loss.backward()
            rate = self._learning_rate()
            norm = self._optimizer.step(rate)
            imbalance = self._balance(batch.real)
            self._advance(batch)
            self._on_step(
                StepRecord(
                    self.progress.step,
                    "mtp" if is_mtp else "main",
                    float(loss.detach()),
                    rate,
                    norm,
                    imbalance,
                    int(batch.real.sum()),
                    time.monotonic() - began,
                ),
                self.progress,
            )
            self._after_step()
        if self.stop_requested:
            self.save()

    def save(self) -> None:
        """Write a checkpoint of this moment."""
        tensors = self._optimizer.state() | {
            f"router.{name}": router.e_score_correction_bias for name, router in self._routers.items()
        }
        folder = self.recipe.run_folder / "checkpoints"
        checkpoint.save(folder, self.progress.step, tensors, asdict(self.progress), keep=self.recipe.keep_checkpoints)

    def _restore(self) -> None:
        found = checkpoint.latest(self.recipe.run_folder / "checkpoints")
        if found is None:
            return
        tensors, facts = checkpoint.load(found)
        for name, router in self._routers.items():
            router.e_score_correction_bias.copy_(tensors.pop(f"router.{name}"))
        self._optimizer.load_state(tensors)
        self.progress = Progress(**facts)

    def _loss(self, batch: TrainingBatch) -> Tensor:
        """Mean cross-entropy over trained tokens, each guessed from the tokens before it."""
        token_ids, trained = batch.token_ids.to(self.device), batch.trained.to(self.device)
        hidden = self.model.hidden_states(Batch.without_cache(token_ids), None)
        rows, targets = _guesses(token_ids, trained, 1)
        return self._guess_loss(self.model, hidden, rows, targets, True)

    def _mtp_loss(self, batch: TrainingBatch) -> Tensor:
        """As `_loss` for the MTP block, which guesses one token further; gradients reach that block alone."""
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name.startswith("mtp."))
        token_ids, trained = batch.token_ids.to(self.device), batch.trained.to(self.device)
        flat = Batch.without_cache(token_ids)
        with torch.compiler.set_stance("force_eager"):
            with torch.no_grad():
                hidden = self.model(flat, None)
            following = F.pad(token_ids[:, 1:], (0, 1)).flatten()
            further = self.model.mtp_hidden(hidden, following, flat)
            rows, targets = _guesses(token_ids, trained, 2)
            return _guess_loss(self.model, further, rows, targets, False)

    def _is_mtp_phase(self) -> bool:
        return self.progress.step >= self.progress.end_step

    def _last_step(self) -> int:
        return self.progress.end_step + (self.recipe.mtp.steps if self.recipe.mtp else 0)

    def _learning_rate(self) -> float:
        """Of the next step: linear warm-up, plateau, linear decay that ends just above zero; then the MTP block's."""
        p = self.progress
        if self.recipe.mtp and self._is_mtp_phase():
            return self.recipe.mtp.learning_rate * (self._last_step() - p.step) / self.recipe.mtp.steps
        rising = (p.step + 1) / max(self.recipe.schedule.warmup_steps, 1)
        falling = (p.end_step - p.step) / p.decay_steps
        return self.recipe.optimizer.learning_rate * min(1.0, rising, falling)

    @torch.no_grad()
    def _balance(self, real: Tensor) -> float:
        """Raise the bias of idle experts and lower that of busy ones (arXiv 2412.19437, section 2.1.2)."""
        worst = 1.0
        rows = real.flatten().to(self.device)
        for router in self._routers.values():
            chosen = router.__dict__.pop("chosen", None)
            if chosen is None or not router.weight.requires_grad:
                continue  # not run in this step, or frozen
            bias = router.e_score_correction_bias
            load = torch.bincount(chosen[rows].flatten(), minlength=bias.shape[0]).float()
            bias.add_(torch.sign(load.mean() - load), alpha=self.recipe.router_bias_rate)
            worst = max(worst, float(load.max() / load.mean()))
        return worst

    def _advance(self, batch: TrainingBatch) -> None:
        self.progress.step += 1
        self.progress.num_tokens += int(batch.real.sum())
        self.progress.num_trained_tokens += int(batch.trained.sum())

    def _after_step(self) -> None:
        step, recipe = self.progress.step, self.recipe
        annealed = self._read_anneal()
        if annealed or step in (self.progress.end_step, self._last_step()) or step % recipe.checkpoint_every_steps == 0:
            self.save()
            if annealed:
                (recipe.run_folder / "ANNEAL").unlink()
        ended = step == self.progress.end_step
        probing = ended or (step % recipe.probe_every_steps == 0 and not self._is_mtp_phase())
        if self._on_probe is not None and probing:
            with torch.compiler.set_stance("force_eager"):
                self._on_probe(self.model.eval(), self.progress)
            self.model.train()
            for router in self._routers.values():
                router.__dict__.pop("chosen", None)

    def _read_anneal(self) -> bool:
        path = self.recipe.run_folder / "ANNEAL"
        if self._is_mtp_phase() or not path.exists():
            return False
        num_steps = int(path.read_text(encoding="utf-8"))
        self.progress.decay_steps = num_steps
        self.progress.end_step = self.progress.step + num_steps
        return True

    def _compile(self) -> None:
        # One shape per bucket, with and without gradients of inputs; the default limit is 8.
        torch._dynamo.config.recompile_limit = _MOST_COMPILED_SHAPES
        # The MTP block stays as it is: it runs for part of the steps, and would double what there is to compile.
        for layer in self.model.layers:
            layer.compile(dynamic=False, fullgraph=True)
        self._guess_loss = torch.compile(_guess_loss, dynamic=True)


def choose_device(name: str) -> torch.device:
    """`auto` is a GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def initial_network(recipe: Recipe, device: torch.device) -> CausalLM:
    """A network of the recipe's shape with random bf16 weights; the same for the same seed on every device.

    Matrices that write into the residual stream start smaller, so that its variance does not grow with depth (GPT-2).
    """
    config = ModelConfig.from_dict(recipe.model, where="recipe: model")
    model = build_network(config).to_empty(device=device)
    generator = torch.Generator().manual_seed(recipe.seed)
    residual_std = _INIT_STD / (2 * config.num_layers) ** 0.5
    for name, parameter in model.named_parameters():
        values = torch.ones(parameter.shape)
        if parameter.ndim > 1:
            std = residual_std if "o_proj" in name or "down_proj" in name else _INIT_STD
            values.normal_(0.0, std, generator=generator)
        parameter.data = values.to(device, torch.bfloat16)
    for buffer in model.buffers():
        buffer.zero_()
    return model


def _watch_routers(model: CausalLM) -> dict[str, Router]:
    """The sigmoid routers by name; each keeps the ids it chose last in `chosen`, for the balance."""
    routers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Router) and module.config.router == "sigmoid"
    }
    for router in routers.values():
        router.register_forward_hook(_keep_chosen)
    return routers


def _keep_chosen(router: nn.Module, inputs: object, output: tuple[Tensor, Tensor]) -> None:
    router.chosen = output[1].detach()


def _guesses(token_ids: Tensor, trained: Tensor, ahead: int) -> tuple[Tensor, Tensor]:
    """Flat rows from which a trained token lies `ahead` places further, and those tokens; padded with `_NO_GUESS`."""
    row, column = trained[:, ahead:].nonzero(as_tuple=True)
    rows, targets = row * token_ids.shape[1] + column, token_ids[row, column + ahead]
    missing = -len(rows) % _GUESS_MULTIPLE
    return F.pad(rows, (0, missing)), F.pad(targets, (0, missing), value=_NO_GUESS)


def _guess_loss(model: CausalLM, hidden: Tensor, rows: Tensor, targets: Tensor, normalize: bool) -> Tensor:
    """Mean cross-entropy of the guesses made at `rows` of `hidden [T, C]`."""
    chosen = hidden.index_select(0, rows)
    logits = model.logits(model.norm(chosen) if normalize else chosen)
    return F.cross_entropy(logits, targets, ignore_index=_NO_GUESS)
