"""A tuning run from its recipe to its report: the composition root behind `FineTuningPipeline` and `seamount tune`.

It reads as a run goes: data, network, steps, result, accuracy before and after, report. Whatever is shown meanwhile is
told to a `Watcher`. A run that was stopped goes on from its newest checkpoint; what was scored before is not scored
again.
"""

from __future__ import annotations

import gc
import json
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal, Protocol

import torch

from seamount.core.errors import ConfigError
from seamount.models.locate import model_name
from seamount.models.prompt import PromptEncoder
from seamount.training.compression.files import write_whole
from seamount.version import __version__

from .distributed import World, make_whole
from .failures import together
from .log import RunLog
from .network import Tuned, open_network, tunable, write_result
from .prepare import Prepared, prepare
from .recipe import TuneRecipe
from .report import write_report
from .scoring import Score, questions, score_model
from .state import CheckpointStore
from .surroundings import surroundings
from .trainer import EvaluationRecord, Objective, Position, StepRecord, Trainer
from .writing import writing

Resume = int | Literal["auto", "never"]
MakeObjective = Callable[[Prepared, World], Objective]
_SCORES, _FACTS, _RECIPE = "scores.json", "facts.json", "recipe.yaml"


class Watcher(Protocol):
    """What a run tells while it goes on."""

    def stage(self, text: str) -> None:
        """Something begins that takes a while."""

    def loading(self, done: int, total: int) -> None:
        """Bytes of the model that have been read."""

    def began(self, tuned: Tuned, data: Prepared, trainer: Trainer) -> None:
        """The steps begin; `trainer.stop_requested` ends them early. Every rank is told this, the first all else."""

    def step(self, record: StepRecord) -> None:
        """A step is done."""

    def evaluation(self, record: EvaluationRecord) -> None:
        """The evaluation examples were looked at."""

    def scoring(self, done: int, total: int) -> None:
        """So many evaluation examples were answered."""


class Silent(Watcher):
    """Watches and says nothing."""

    def stage(self, text: str) -> None: ...
    def loading(self, done: int, total: int) -> None: ...
    def began(self, tuned: Tuned, data: Prepared, trainer: Trainer) -> None: ...
    def step(self, record: StepRecord) -> None: ...
    def evaluation(self, record: EvaluationRecord) -> None: ...
    def scoring(self, done: int, total: int) -> None: ...


class Quiet(Silent):
    """For ranks but the first: says nothing, and can end the steps, as one that all are asked to end must."""

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher

    def began(self, tuned: Tuned, data: Prepared, trainer: Trainer) -> None:
        self._watcher.began(tuned, data, trainer)


@dataclass(frozen=True, slots=True)
class TuneResult:
    """What came out of a run.

    Attributes:
        folder: of the run.
        result: the adapter's or the model's folder; None if the run was stopped before its end, and on ranks but the
            first.
        step, num_steps: done, and of the whole run.
        loss, evaluation_loss: the last ones; None where there was none.
        before, after: accuracy on evaluation examples, 0 to 1; None where none were scored.
        report: the HTML report.
    """

    folder: Path
    result: Path | None
    step: int
    num_steps: int
    loss: float | None
    evaluation_loss: float | None
    before: float | None
    after: float | None
    report: Path | None

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return self.step == self.num_steps


class FineTuningPipeline:
    """Tune a model on records: `FineTuningPipeline(model=..., data_loader=..., learning_rate=1e-5, epochs=10).run()`.

    Args:
        model: name of an embedded model, or a folder.
        data_loader: files, an iterable of dicts, or a torch DataLoader; docs/tuning-data.md lists the formats.
        evaluation: held-out records, likewise; None: see `data.evaluation_share`.
        output: the run's folder; None is `runs/` and the model's name.
        method: `full`, `lora` or `qlora`.
        sections: of the recipe, as dicts: `batch={"examples": 32}`, `optimizer={...}`, `adapter={...}`, `seed=1`.

    Raises:
        ConfigError: a field is wrong or unknown.
    """

    def __init__(
        self,
        model: str | Path = "seamount-tiny",
        data_loader: Any = None,
        *,
        learning_rate: float = 1e-5,
        epochs: float = 10,
        evaluation: Any = None,
        output: str | Path | None = None,
        method: Literal["full", "lora", "qlora"] = "full",
        **sections: Any,
    ) -> None:
        if method not in ("full", "lora", "qlora"):
            raise ConfigError(f"There is no method {method!r}.", hint="Methods are full, lora and qlora.")
        given = {name: dict(value) if isinstance(value, Mapping) else value for name, value in sections.items()}
        given["optimizer"] = {"learning_rate": learning_rate, **given.get("optimizer", {})}
        given["schedule"] = {"epochs": epochs, **given.get("schedule", {})}
        if method == "full":
            given["adapter"] = None
        else:
            given["adapter"] = {"method": method, **(given.get("adapter") or {})}
        name = model_name(tunable(str(model)))
        fields = {"model": str(model), "output": str(output or Path("runs") / name), **given}
        self.recipe = TuneRecipe.checked(fields, where="FineTuningPipeline")
        self._data, self._evaluation = _paths(data_loader), _paths(evaluation)

    def run(self, *, resume: Resume = "auto", watcher: Watcher | None = None) -> TuneResult:
        """Run to the end; goes on where an earlier run of the same output folder was stopped.

        Raises:
            SeamountError: see `tune`.
        """
        return tune(self.recipe, train=self._data, evaluation=self._evaluation, resume=resume, watcher=watcher)


def tune(
    recipe: TuneRecipe,
    *,
    train: Any = None,
    evaluation: Any = None,
    objective: MakeObjective | None = None,
    resume: Resume = "auto",
    watcher: Watcher | None = None,
    world: World | None = None,
) -> TuneResult:
    """Run a recipe.

    Args:
        train, evaluation: records that are handed over in place of the recipe's files.
        objective: makes what is minimised, once the data is there; None is the loss that the recipe says.
        resume: `auto` goes on from the newest checkpoint where there is one; a number from that step's; `never` refuses
            a folder that holds checkpoints.
        world: the ranks, where they have met already; they part in the end.

    Raises:
        ConfigError: the recipe, the data or the output folder does not fit, or ranks were given different ones.
        CheckpointError: a checkpoint is damaged, of another run, or cannot be written.
        CapacityError: another file cannot be written.
        RankFailedError: another rank failed.
    """
    watcher = watcher or Silent()
    world = world or World.join(recipe.device)
    run = _Run(recipe, world, watcher if world.is_main else Quiet(watcher), objective)
    with _stoppable(run, world), together(recipe.output, world, run.rescue):
        return run.go(train, evaluation, resume)


@contextmanager
def _stoppable(run: _Run, world: World) -> Iterator[None]:
    """torchrun ends the ranks by SIGTERM, for Ctrl-C and when one has failed: they come to an orderly end."""
    is_free = (
        threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    )
    if world.size == 1 or not is_free:
        yield
        return

    def asked(number: int, frame: FrameType | None) -> None:
        run.stop()

    signal.signal(signal.SIGTERM, asked)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is asked:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


class _Run:
    def __init__(
        self, recipe: TuneRecipe, world: World, watcher: Watcher, objective: MakeObjective | None = None
    ) -> None:
        self._recipe, self._world, self._watcher, self._objective = recipe, world, watcher, objective
        self._folder = recipe.output
        self._loss: float | None = None
        self._before: Score | None = None
        self._after: Score | None = None
        self._asked_of = ""
        self._trainer: Trainer | None = None
        self._log: RunLog | None = None
        self._position, self._num_steps = Position(), 0

    def go(self, train: Any, evaluation: Any, resume: Resume) -> TuneResult:
        recipe, watcher, saving = self._recipe, self._watcher, self._recipe.saving
        store = CheckpointStore(self._folder / "checkpoints", full_every=saving.full_every, keep=saving.keep)
        start = _start(store, resume, self._folder)
        watcher.stage("Reading the data")
        encoder = PromptEncoder.from_folder(tunable(recipe.model))
        try:
            data = prepare(recipe.data, encoder, recipe.seed, train=train, evaluation=evaluation)
        finally:
            encoder.close()
        self._world.agree(self._given(data, start))
        self._score_before(data)
        self._world.wait()
        result = self._train(data, store, start)
        gc.collect()  # the network, before the engine loads what came out
        if result is not None:
            self._score_after(result, data)
            write_report(self._folder, self._folder / "report.html")
        self._world.wait()
        return self._result(result)

    def _given(self, data: Prepared, start: int | None) -> dict[str, str]:
        """What must be the same on all ranks."""
        return {
            "version of Seamount": __version__,
            "recipe": self._recipe.to_yaml(),
            "training data": data.train.digest,
            "evaluation data": "" if data.evaluation is None else data.evaluation.digest,
            "checkpoint to go on from": str(start),
        }

    def _train(self, data: Prepared, store: CheckpointStore, start: int | None) -> Path | None:
        """Do the steps; return what was written, on the main rank and at the run's end."""
        recipe, world, watcher = self._recipe, self._world, self._watcher
        watcher.stage("Loading the model")
        tuned = open_network(recipe, world.device, watcher.loading)
        trainer = Trainer(
            recipe,
            tuned.model,
            data.train,
            world=world,
            evaluation=data.evaluation,
            objective=None if self._objective is None else self._objective(data, world),
            store=store,
            on_step=self._on_step,
            on_evaluation=self._on_evaluation,
        )
        self._position, self._num_steps = trainer.position, trainer.num_steps
        if start is not None:
            trainer.restore(start)
            self._position = trainer.position
        world.wait()
        if world.is_main:  # nothing of what was there is removed before it is known that the run can go on
            self._write_facts(tuned, data)
            self._write_scores()
            store.rewind(start or 0)
            self._log = self._open_log(start)
        self._trainer = trainer  # from here on there is something to stop, and to rescue
        finished = False
        try:
            watcher.began(tuned, data, trainer)
            trainer.run()
            finished = trainer.position.step == trainer.num_steps
            weights = trainer.final_weights() if finished else {}
            if finished:
                make_whole(tuned.model, world)
        finally:
            if self._log is not None:
                self._log.close(finished=finished)
        self._trainer = None
        if not finished or not world.is_main:
            return None
        watcher.stage("Writing the result")
        return write_result(recipe, tuned, weights, self._folder)

    def _result(self, result: Path | None) -> TuneResult:
        position = self._position
        return TuneResult(
            folder=self._folder,
            result=result,
            step=position.step,
            num_steps=self._num_steps,
            loss=self._loss,
            evaluation_loss=position.evaluation_loss,
            before=None if self._before is None else self._before.accuracy,
            after=None if self._after is None else self._after.accuracy,
            report=None if result is None else self._folder / "report.html",
        )

    def stop(self) -> None:
        """End after this step with a checkpoint, or at once where no steps are done. A signal's handler calls it."""
        if self._trainer is None or self._trainer.stop_requested:
            raise KeyboardInterrupt
        self._trainer.stop_requested = True

    def rescue(self) -> None:
        """Another rank is gone: keep what is whole here. Of weights that are shared out, nothing is."""
        if self._world.is_main and self._trainer is not None and self._recipe.strategy == "ddp":
            self._trainer.save()

    def _on_step(self, record: StepRecord) -> None:
        self._loss = record.loss
        if self._log is not None:
            self._log.step(asdict(record))
        self._watcher.step(record)

    def _on_evaluation(self, record: EvaluationRecord) -> None:
        if self._log is not None:
            self._log.evaluation(asdict(record))
        self._watcher.evaluation(record)

    def _open_log(self, start: int | None) -> RunLog:
        tracking = self._recipe.tracking
        log = RunLog(
            self._folder,
            tensorboard=tracking.tensorboard,
            mlflow=tracking.mlflow,
            recipe=self._recipe.model_dump(mode="json"),
            tell=self._watcher.stage,
        )
        log.rewind(start or 0)
        return log

    def _score_before(self, data: Prepared) -> None:
        most = self._recipe.data.scored
        if data.evaluation is None or not most or not self._world.is_main:
            return
        asked_of = f"{self._recipe.model} {data.evaluation.digest} {most}"
        with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):  # absent, or damaged: asked again
            held = json.loads((self._folder / _SCORES).read_bytes())
            if held["asked_of"] == asked_of:
                self._before = Score(int(held["before"]["num_right"]), int(held["before"]["num_items"]))
                self._asked_of = asked_of
                return
        self._watcher.stage("Answering evaluation examples before the run")
        self._before, self._asked_of = self._score(None, data), asked_of

    def _score_after(self, result: Path, data: Prepared) -> None:
        if self._before is None:
            return
        self._watcher.stage("Answering evaluation examples after the run")
        self._after = self._score(result, data)
        self._write_scores()

    def _write_scores(self) -> None:
        if self._before is None:
            return
        scores = {"before": self._before, "after": self._after}
        told = {name: asdict(score) for name, score in scores.items() if score is not None}
        self._write_json(_SCORES, {"asked_of": self._asked_of, **told})

    def _score(self, result: Path | None, data: Prepared) -> Score:
        recipe, adapter = self._recipe, None
        model = recipe.model
        if result is not None and recipe.adapter is not None:
            adapter = result
        elif result is not None:
            model = str(result)
        if data.evaluation is None:
            raise ConfigError("There is no evaluation data.")
        asked = questions(data.evaluation, recipe.data.scored)
        return score_model(model, adapter, asked, on_progress=self._watcher.scoring)

    def _write_facts(self, tuned: Tuned, data: Prepared) -> None:
        self._write(_RECIPE, self._recipe.to_yaml())
        self._write_json(
            _FACTS,
            {
                "model": self._recipe.model,
                "num_weights": tuned.num_weights,
                "groups": tuned.groups,
                "precision": str(tuned.dtype).removeprefix("torch."),
                "data": dict(data.facts),
                "ranks": self._world.size,
                "device": str(self._world.device),
                "threads": torch.get_num_threads(),
                **surroundings(self._world.device),
            },
        )

    def _write_json(self, name: str, value: object) -> None:
        self._write(name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def _write(self, name: str, text: str) -> None:
        with writing(self._folder):
            write_whole(self._folder / name, text.encode())


def _start(store: CheckpointStore, resume: Resume, folder: Path) -> int | None:
    steps = store.steps()
    if resume == "never":
        if steps:
            raise ConfigError(
                f"{folder} holds a run already.", hint="Choose another output, or go on with --resume auto."
            )
        return None
    if resume == "auto":
        return steps[-1] if steps else None
    if resume not in steps:
        there = f"There are steps {', '.join(map(str, steps))}." if steps else "There is none of any step."
        raise ConfigError(f"{folder} holds no checkpoint of step {resume}.", hint=there)
    return resume


def _paths(source: Any) -> Any:
    if isinstance(source, str | Path):
        return (Path(source),)
    if isinstance(source, list | tuple) and source and all(isinstance(part, str | Path) for part in source):
        return tuple(Path(part) for part in source)
    return source
