"""`seamount distill`: train a small model to guess as a large one does, by a recipe; or say what would be done."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from seamount.core.sizes import size_text

from . import tune

if TYPE_CHECKING:
    from seamount.training.distillation.pipeline import DistillPlan, DistillResult
    from seamount.training.distillation.recipe import DistillRecipe

DESCRIPTION = """Train a student, a smaller model, to guess as its teacher does: by the teacher's logits, made beside
the student or written to disk first, as a recipe says. The run's folder gets checkpoints, metrics.jsonl, a report, and
model/, which `seamount serve` loads; docs/tuning-distillation.md describes the recipe.

Ctrl-C makes a checkpoint and ends; the same command goes on from there. Under torchrun several processes train
together."""
ARGUMENTS = "RECIPE [FLAGS]"
EXAMPLES = """  seamount distill recipes/distill.yaml --set data.train=examples.jsonl --set output=runs/small
  seamount distill recipes/distill.yaml --set data.train=examples.jsonl --dry-run
  seamount distill recipes/distill.yaml --set distillation.top_k=32 --set data.train=examples.jsonl"""

_INTERRUPTED = 130

add_arguments = tune.add_arguments


def run(args: argparse.Namespace) -> int:
    """Distill, or plan."""
    from seamount.core.settings import ranks
    from seamount.training.distillation.pipeline import distill, plan_distillation
    from seamount.training.distillation.recipe import DistillRecipe

    recipe = DistillRecipe.from_file(args.recipe, tuple(args.changes))
    watcher = tune.watch(f"student of {recipe.teacher}", quiet=args.quiet or args.json)
    if args.dry_run:
        with watcher.shown():
            found = plan_distillation(recipe, watcher)
        if not ranks().rank:
            _show_plan(found, recipe, as_json=args.json)
        return 0
    with watcher.shown():
        result = distill(recipe, resume=args.resume, watcher=watcher)
    if ranks().rank:
        return 0  # the first one speaks
    if args.json:
        fields = asdict(result) | {"run": tune.told(result.run)}
        print(json.dumps(fields, indent=2))
    elif result.run.finished:
        _say_end(result)
    else:
        print(f"Stopped after step {result.run.step:,} of {result.run.num_steps:,}; the checkpoint is written.")
        print("The same command goes on from there.")
    return 0 if result.run.finished else _INTERRUPTED


def _say_end(result: DistillResult) -> None:
    print(result.sizes.text)
    if result.teacher_accuracy is not None and result.student_accuracy is not None:
        print(
            f"Accuracy on held-out examples: teacher {result.teacher_accuracy:.1%}, "
            f"student {result.student_accuracy:.1%}."
        )
    print(f"Report: {result.run.report}")
    print(f"Serve it: seamount serve {result.run.result}")


def _show_plan(found: DistillPlan, recipe: DistillRecipe, *, as_json: bool) -> None:
    if as_json:
        fields = asdict(found)
        del fields["plan"]["example"]
        fields["plan"]["seconds"] = found.plan.seconds
        print(json.dumps(fields, indent=2))
        return
    print(found.sizes.text)
    if found.cache_bytes is not None:
        print(
            f"The teacher's guesses take {size_text(found.cache_bytes)} in {recipe.cache_folder}; the steps below were "
            "tried with the teacher beside the student."
        )
    tune.show_plan(found.plan, recipe.teacher)
