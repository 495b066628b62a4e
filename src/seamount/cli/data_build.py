"""`seamount data build`: makes memory-mapped token shards of data that is too large to be rendered at each run."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from .data_flags import add_data_flags, add_language_flag, open_renderer, positive
from .screen import harmless

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

    from seamount.training.shards.build import Progress
    from seamount.training.shards.store import Manifest

_TOLD_EVERY_S = 10.0
_WHAT = {
    "reading": "reading the files",
    "checking": "checking the records",
    "comparing": "looking for duplicates",
    "encoding": "making examples",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the action's flags."""
    add_data_flags(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="folder to be made")
    parser.add_argument(
        "--overlong",
        choices=("error", "skip", "cut"),
        default="error",
        help="what becomes of conversations longer than --max-length (error); plain text becomes several examples",
    )
    parser.add_argument(
        "--duplicates",
        choices=("keep", "drop"),
        default="keep",
        help="records that say what an earlier one says (keep)",
    )
    parser.add_argument(
        "--invalid", choices=("error", "skip"), default="error", help="records that nothing can be learned from (error)"
    )
    add_language_flag(parser)
    parser.add_argument(
        "--threads", type=positive, metavar="N", help="that render and encode (one per processor, up to 4)"
    )
    parser.add_argument("--json", action="store_true", help="print the manifest as JSON")


def run(args: argparse.Namespace) -> int:
    """Build and say what was made."""
    from seamount.training.shards.build import Job, build

    job = Job(
        sources=tuple(args.files),
        output=args.output,
        overlong=args.overlong,
        duplicates=args.duplicates,
        invalid=args.invalid,
        language=args.language,
    )
    encoder, renderer = open_renderer(args)
    # A build that is told to end says how it goes on, as one that is interrupted does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with closing(encoder), _Progress() as progress:
            manifest = build(job, renderer, encoder, progress=progress, num_threads=args.threads)
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on with the shard that was under way.", file=sys.stderr)
        raise
    if args.json:
        print(manifest.model_dump_json(indent=2))
    else:
        _print(manifest, args.output)
    return 0


def _print(manifest: Manifest, output: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    counts = manifest.counts
    fate = {"keep": "kept", "drop": "left out"}[manifest.origin.duplicates]
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("folder", harmless(str(output)))
    table.add_row("records", f"{counts.num_records:,}")
    table.add_row("examples", f"{manifest.num_examples:,}")
    table.add_row("tokens", f"{manifest.num_tokens:,}, of which {manifest.num_trained:,} are learned")
    table.add_row("shards", f"{len(manifest.shards):,}")
    told = {
        "duplicates": (counts.num_duplicates, fate),
        "invalid": (counts.num_invalid, "left out"),
        "over-long": (counts.num_overlong, "left out"),
        "cut": (counts.num_cut, "at the end"),
    }
    for name, (count, what) in told.items():
        if count:
            table.add_row(name, f"{count:,} {what}; report.jsonl names them")
    table.add_row("digest", manifest.digest)
    Console(highlight=False, markup=False, emoji=False).print(table)


class _Progress:
    """How far each stage is, its rate and the time left: a bar on a terminal, a line every ten seconds in a log."""

    def __init__(self) -> None:
        self._bar: Bar | None = None
        self._stage = ""
        self._began = self._told = 0.0
        self._first = 0

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, progress: Progress) -> None:
        """Note it."""
        now = time.monotonic()
        if progress.stage != self._stage:
            # Rates are of this call: an earlier one's part took none of its time.
            self._stage, self._began, self._told, self._first = progress.stage, now, now, progress.done
            self._next_bar(progress)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[-1], completed=progress.done, examples=_examples(progress))
        elif not sys.stderr.isatty() and now - self._told >= _TOLD_EVERY_S:
            self._told = now
            print(f"  {self._line(progress, now - self._began)}", file=sys.stderr, flush=True)

    def _next_bar(self, progress: Progress) -> None:
        if not sys.stderr.isatty():
            return
        from rich.console import Console
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
        from rich.progress import Progress as Bar

        if self._bar is not None:
            self._bar.stop()
        text, examples = TextColumn("{task.description}"), TextColumn("{task.fields[examples]}")
        speed = () if progress.stage == "comparing" else (TransferSpeedColumn(),)
        columns = (text, BarColumn(), TaskProgressColumn(), *speed, TimeRemainingColumn(), examples)
        self._bar = Bar(*columns, console=Console(stderr=True), transient=True, speed_estimate_period=300)
        self._bar.add_task(_WHAT[progress.stage], total=progress.total, completed=progress.done, examples="")
        self._bar.start()

    def _line(self, progress: Progress, seconds: float) -> str:
        share = progress.done / max(progress.total, 1)
        line = f"{_WHAT[progress.stage]}: {share:.0%}"
        done = progress.done - self._first
        if progress.stage != "comparing" and done > 0:
            left_s = seconds * (progress.total - progress.done) / done
            line += f", {done / seconds / 1e6:.1f} MB/s, {_duration(left_s)} left"
        return line + (f", {told}" if (told := _examples(progress)) else "")


def _examples(progress: Progress) -> str:
    if not progress.num_examples:
        return ""
    return f"{progress.num_examples:,} examples, {progress.num_tokens / 1e6:,.1f} M tokens"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
