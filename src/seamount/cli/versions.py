"""`seamount versions`: what a run of tasks has become after each; go back to one, or write one out."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from seamount.core.errors import ConfigError

if TYPE_CHECKING:
    from seamount.training.continual.versions import Version

DESCRIPTION = """List the versions of a run of tasks (`seamount tune` with a recipe that has `tasks`): the model as it
was, and one for each task that was learned, with the version that it was made of and the accuracy on all tasks so far.

--rollback makes a version current: the next task is learned on top of it. Nothing is deleted. --export writes a version
as `seamount serve` loads it."""
ARGUMENTS = "RUN [FLAGS]"
EXAMPLES = """  seamount versions runs/desk
  seamount versions runs/desk --rollback 2
  seamount versions runs/desk --export desk --version 1"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder, `output` of its recipe")
    parser.add_argument("--rollback", type=int, metavar="N", help="make this version current")
    parser.add_argument("--export", type=Path, metavar="FOLDER", help="write a version to FOLDER/adapter or /model")
    parser.add_argument("--version", type=int, metavar="N", help="which one --export writes (the current one)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Roll back and export where that is asked for, and list."""
    if args.version is not None and args.export is None:
        raise ConfigError("--version says which version --export writes.", hint="Add --export FOLDER.")
    from seamount.training.continual.pipeline import ContinualLearning

    learning = ContinualLearning.of_run(args.run)
    if args.rollback is not None:
        learning.rollback(args.rollback)
    result = None if args.export is None else learning.export(args.export, args.version)
    versions = learning.versions()
    if args.json:
        told = {
            "versions": [asdict(version) for version in versions],
            "result": None if result is None else str(result),
        }
        print(json.dumps(told, indent=2))
        return 0
    _show(versions)
    if result is not None:
        print(f"Written: {result}")
    elif args.rollback is not None:
        print(f"Version {args.rollback} is current. To serve it: seamount versions {args.run} --export FOLDER")
    return 0


def _show(versions: list[Version]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for name in ("version", "made of", "task", "accuracy on the tasks so far", ""):
        table.add_column(name)
    for version in versions:
        number, made_of = str(version.number), str(version.parent) if version.number else ""
        accuracy = "  ".join(f"{share:.1%}" for share in version.accuracy)
        name = version.task_id or "(the model as it was)"
        table.add_row(number, made_of, name, accuracy, "current" if version.is_current else "")
    Console().print(table)
