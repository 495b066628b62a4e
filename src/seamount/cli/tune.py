"""`seamount tune`: tune a model by a recipe, with a view of how it goes; or say what would be done."""

from __future__ import annotations

import argparse
import json
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from seamount.core.sizes import size_text

if TYPE_CHECKING:
    from seamount.training.tuning.estimate import Plan
    from seamount.training.tuning.network import Tuned
    from seamount.training.tuning.pipeline import TuneResult
    from seamount.training.tuning.prepare import Prepared
    from seamount.training.tuning.recipe import TuneRecipe
    from seamount.training.tuning.trainer import EvaluationRecord, StepRecord, Trainer
    from seamount.training.tuning.view import RunView

_INTERRUPTED = 130

DESCRIPTION = """Tune a model on your own examples: all weights, or an adapter beside them (LoRA, QLoRA), as a recipe
says. The run's folder gets checkpoints, metrics.jsonl, a report with curves and the accuracy before and after, and what
comes out: adapter/ or model/, which `seamount serve` loads. A recipe with `tasks` learns them one after the other and
keeps the earlier ones; `seamount versions` lists what came of each.

Ctrl-C makes a checkpoint and ends; the same command goes on from there. Several processes train together under
torchrun: torchrun --nproc-per-node 2 -m seamount tune recipes/full.yaml --set strategy=fsdp"""
ARGUMENTS = "RECIPE [FLAGS]"
EXAMPLES = """  seamount tune recipes/lora.yaml --set data.train=examples.jsonl --set output=runs/mine
  seamount tune recipes/lora.yaml --set data.train=examples.jsonl --dry-run
  seamount tune recipes/full.yaml --set data.train=[first.jsonl,second.parquet] --set schedule.epochs=1"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="YAML file; docs/tuning.md describes its fields")
    parser.add_argument(
        "--set", dest="changes", action="append", default=[], metavar="FIELD=VALUE", help="change a field of the recipe"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be trained, try a few steps, and write nothing"
    )
    parser.add_argument(
        "--resume",
        type=_resume,
        default="auto",
        metavar="WHERE",
        help="auto: the newest checkpoint, if there is one (auto); a step's number; never: refuse a folder with a run",
    )
    parser.add_argument("--quiet", action="store_true", help="show nothing while it runs")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Tune, or plan."""
    from seamount.training.tuning.recipe import TuneRecipe, read_fields

    fields = read_fields(args.recipe, tuple(args.changes))
    if "tasks" in fields:
        from . import tune_tasks

        return tune_tasks.run(fields, args)
    recipe = TuneRecipe.checked(fields, where=str(args.recipe))
    if args.dry_run:
        return _dry_run(recipe, args)
    from seamount.core.settings import ranks
    from seamount.training.tuning.pipeline import tune

    watcher = watch(recipe.model, quiet=args.quiet or args.json)
    with watcher.shown():
        result = tune(recipe, resume=args.resume, watcher=watcher)
    if ranks().rank:
        return 0  # the first one speaks
    if args.json:
        print(json.dumps(told(result), indent=2))
    elif result.finished:
        _say_end(result, recipe)
    else:
        print(f"Stopped after step {result.step:,} of {result.num_steps:,}; the checkpoint is written.")
        print("The same command goes on from there.")
    return 0 if result.finished else _INTERRUPTED


def told(result: TuneResult) -> dict[str, Any]:
    """A result as JSON has it."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(result).items()}


def _say_end(result: TuneResult, recipe: TuneRecipe) -> None:
    if result.before is not None and result.after is not None:
        print(f"Accuracy on held-out examples: {result.before:.1%} before, {result.after:.1%} after.")
    print(f"Report: {result.report}")
    if recipe.adapter is None:
        print(f"Serve it: seamount serve {result.result}")
    else:
        print(f"Serve it: seamount serve {recipe.model} --adapter {result.result}")


def _dry_run(recipe: TuneRecipe, args: argparse.Namespace) -> int:
    from seamount.core.settings import ranks
    from seamount.training.tuning.estimate import plan

    watcher = watch(recipe.model, quiet=args.quiet or args.json)
    with watcher.shown():
        found = plan(recipe, watcher)
    if ranks().rank:
        return 0  # the first one speaks
    if args.json:
        fields = asdict(found)
        del fields["example"]
        print(json.dumps(fields | {"seconds": found.seconds}, indent=2))
        return 0
    show_plan(found, recipe.model)
    return 0


def show_plan(found: Plan, model: str, lines: Sequence[str] | None = None) -> None:
    """Print what a run would do.

    Args:
        model: has the tokenizer.
        lines: what is said of the data; None counts its examples.
    """
    from rich.console import Console
    from rich.table import Table

    from seamount.models.locate import locate_model
    from seamount.models.prompt import PromptEncoder
    from seamount.training.examples.showing import as_plain, as_text

    console = Console()
    table = Table(title="What is trained", title_justify="left")
    table.add_column("part")
    table.add_column("weights", justify="right")
    for name, count in found.groups.items():
        table.add_row(name, f"{count:,}")
    trained = sum(found.groups.values())
    table.add_row("in all", f"{trained:,} of {found.num_weights:,} ({trained / found.num_weights:.2%})")
    console.print(table)
    for line in data_lines(found.data) if lines is None else lines:
        console.print(line, markup=False)
    minutes = found.seconds / 60
    console.print(
        f"{found.num_steps:,} steps of about {found.seconds_per_step:.2f} s: {minutes:,.1f} minutes; "
        f"memory at least {size_text(found.memory_bytes)}; weights in {found.precision}"
    )
    encoder = PromptEncoder.from_folder(locate_model(model))
    try:
        console.print("\nThe first example; what is trained is marked:")
        show = as_text if console.is_terminal and not console.no_color else as_plain
        console.print(show(found.example, encoder), markup=False, soft_wrap=True)
    finally:
        encoder.close()


def data_lines(data: Mapping[str, Any]) -> list[str]:
    """The counts of a plan's examples, a line for those of each kind."""
    return [
        f"{name}: {data[name]['examples']:,} examples, {data[name]['tokens']:,} tokens, of which "
        f"{data[name]['trained_tokens']:,} are trained; the longest has {data[name]['longest']:,}"
        for name in ("train", "evaluation")
        if name in data
    ]


class Shown:
    """Shows a run, or nothing, and ends it after the step on Ctrl-C; a second Ctrl-C ends it at once.

    Args:
        stop: ends the run, where it is more than one trainer's.
    """

    def __init__(self, view: RunView | None, stop: Callable[[], None] | None = None) -> None:
        self._view, self._stop_run = view, stop
        self._trainer: Trainer | None = None
        self._was_asked = False
        self._stage = ""

    @contextmanager
    def shown(self) -> Iterator[None]:
        """While the run goes on."""
        before = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with self._view or nullcontext():
                yield
        finally:
            for number, handler in before.items():
                if signal.getsignal(number) == self._stop:  # a failed rank's stays: see training.tuning.failures
                    signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self._trainer is None or self._was_asked:
            raise KeyboardInterrupt
        self._was_asked = self._trainer.stop_requested = True
        if self._stop_run is not None:
            self._stop_run()
        self.stage("Stopping after this step")

    def stage(self, text: str) -> None:
        self._stage = text
        if self._view is not None:
            self._view.stage(text)

    def loading(self, done: int, total: int) -> None:
        if self._view is not None:
            self._view.progress("Loading the model", done, total)

    def began(self, tuned: Tuned, data: Prepared, trainer: Trainer) -> None:
        self._trainer = trainer
        trained = sum(tuned.groups.values())
        self.stage(f"Training {trained:,} of {tuned.num_weights:,} weights on {len(data.train):,} examples")

    def step(self, record: StepRecord) -> None:
        if self._view is not None:
            self._view.step(asdict(record))

    def evaluation(self, record: EvaluationRecord) -> None:
        if self._view is not None:
            self._view.evaluation(asdict(record))

    def scoring(self, done: int, total: int) -> None:
        if self._view is not None:
            self._view.progress(self._stage, done, total)


def watch(model: str, *, quiet: bool, stop: Callable[[], None] | None = None) -> Shown:
    """What shows a run of the model, on the first rank and unless it is quiet; `stop` as of `Shown`."""
    from seamount.core.settings import ranks
    from seamount.training.tuning.view import RunView

    return Shown(None if quiet or ranks().rank else RunView(model), stop)


def _resume(text: str) -> int | str:
    if text in ("auto", "never"):
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError("must be auto, never or a step's number") from None
