"""`seamount tune` for a recipe with `tasks`: they are learned one after the other, and the earlier ones are kept."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seamount.core.errors import ConfigError

from . import tune

if TYPE_CHECKING:
    from seamount.training.continual.accuracy import Accuracy
    from seamount.training.continual.estimate import TaskPlan
    from seamount.training.continual.recipe import ContinualRecipe

_INTERRUPTED = 130


def run(fields: dict[str, Any], args: argparse.Namespace) -> int:
    """Learn the tasks of a recipe of these fields, or plan."""
    from seamount.core.settings import ranks
    from seamount.training.continual.pipeline import ContinualLearning
    from seamount.training.continual.recipe import ContinualRecipe

    recipe = ContinualRecipe.checked(fields, where=str(args.recipe))
    if isinstance(args.resume, int):
        hint = f"List them: seamount versions {recipe.output}; go back: --rollback N there."
        raise ConfigError("A recipe with tasks goes back to a version, not to a step.", hint=hint)
    if args.dry_run:
        return _dry_run(recipe, args)
    learning = ContinualLearning(recipe)
    watcher = tune.watch(recipe.model, quiet=args.quiet or args.json, stop=learning.stop)
    with watcher.shown():
        accuracy = learning.train(resume=args.resume, watcher=watcher)
        finished = {task.task_id for task in recipe.tasks} <= set(accuracy.tasks)
        if ranks().rank:
            return 0  # the first one speaks
        if finished:
            watcher.stage("Writing the result")
        result = learning.export(recipe.output) if finished else None
    report = recipe.output / "report.html"
    if args.json:
        told = {"folder": recipe.output, "result": result, "report": report}
        paths = {name: None if path is None else str(path) for name, path in told.items()}
        print(json.dumps({**paths, "finished": finished, **accuracy.to_fields()}, indent=2))
    elif result is not None:
        _say_end(accuracy, recipe, report, result)
    else:
        print(f"Stopped with {len(accuracy.tasks)} of {len(recipe.tasks)} tasks finished; the checkpoint is written.")
        print("The same command goes on from there.")
    return 0 if finished else _INTERRUPTED


def _say_end(accuracy: Accuracy, recipe: ContinualRecipe, report: Path, result: Path) -> None:
    show_matrix(accuracy)
    print(f"Report: {report}")
    served = result if recipe.adapter is None else f"{recipe.model} --adapter {result}"
    print(f"Serve it: seamount serve {served}")


def show_matrix(accuracy: Accuracy) -> None:
    """Print the accuracy matrix, and what follows from it."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Accuracy", title_justify="left")
    table.add_column("when learned")
    for task in accuracy.tasks:
        table.add_column(task, justify="right")
    for task, row in zip(accuracy.tasks, accuracy.matrix, strict=True):
        table.add_row(task, *(f"{share:.1%}" for share in row))
    Console().print(table)
    known = (
        ("average", accuracy.average),
        ("forgetting", accuracy.forgetting),
        ("backward transfer", accuracy.backward_transfer),
    )
    print("; ".join(f"{name} {value:.1%}" for name, value in known if value is not None))


def _dry_run(recipe: ContinualRecipe, args: argparse.Namespace) -> int:
    from seamount.training.continual.estimate import plan_tasks

    watcher = tune.watch(recipe.model, quiet=args.quiet or args.json)
    with watcher.shown():
        found = plan_tasks(recipe, watcher)
    if args.json:
        fields = asdict(found)
        del fields["plan"]["example"], fields["plan"]["data"]
        fields["plan"]["seconds"] = found.plan.seconds
        print(json.dumps(fields, indent=2))
        return 0
    tune.show_plan(found.plan, recipe.model, [line for task in found.tasks for line in _lines(task)])
    return 0


def _lines(task: TaskPlan) -> list[str]:
    """What is planned for a task."""
    if not task.num_steps:
        return [f"{task.task_id}: learned already"]
    replayed = f", {task.num_remembered:,} remembered examples beside" if task.num_remembered else ""
    steps = f"{task.task_id}: {task.num_steps:,} steps{replayed}"
    return [steps, *(f"  {line}" for line in tune.data_lines(task.data))]
