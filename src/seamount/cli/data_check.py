"""`seamount data check`: says what is in training data, and which records are bad and why."""

from __future__ import annotations

import argparse
import sys
from contextlib import closing
from typing import TYPE_CHECKING

from .data_flags import add_data_flags, add_language_flag, open_renderer
from .screen import harmless

if TYPE_CHECKING:
    from rich.console import Console

    from seamount.training.examples.check import Report

_SHOWN = 20
# A table in a pipe is for a file or for grep: nothing folds it.
_PIPE_WIDTH = 400


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the action's flags."""
    add_data_flags(parser)
    parser.add_argument(
        "--overlong",
        choices=("error", "skip", "cut"),
        default="error",
        help="what becomes of records longer than --max-length (error)",
    )
    add_language_flag(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Check and print; 1 if anything is bad."""
    from seamount.training.examples.check import check

    encoder, renderer = open_renderer(args)
    tell = None if args.json or not sys.stderr.isatty() else _tell
    with closing(encoder):
        report = check(args.files, renderer, overlong=args.overlong, language=args.language, progress=tell)
    if tell is not None:
        print("\r\033[K", end="", file=sys.stderr)
    if args.json:
        print(report.to_json())
    else:
        _print(report)
    return 0 if report.is_good else 1


def _print(report: Report) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = _PIPE_WIDTH
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in report.rows():
        table.add_row(name, harmless(value))
    console.print(table)
    if report.bad:
        _print_bad(console, report)


def _print_bad(console: Console, report: Report) -> None:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("bad record", "field", "reason"):
        table.add_column(heading, overflow="fold")
    for error in report.bad[:_SHOWN]:
        table.add_row(*(harmless(text) for text in (error.where, error.field or "-", error.reason or error.message)))
    console.print()
    console.print(table)
    more = report.counts.num_bad - len(report.bad[:_SHOWN])
    if more:
        console.print(f"and {more:,} more; --json lists the first {len(report.bad):,}")
    for hint in dict.fromkeys(error.hint for error in report.bad if error.hint):
        console.print(f"hint: {harmless(hint)}", soft_wrap=True)


def _tell(num_records: int) -> None:
    print(f"\r{num_records:,} records", end="", file=sys.stderr, flush=True)
