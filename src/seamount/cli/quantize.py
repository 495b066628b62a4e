"""`seamount quantize`: make a 4- or 8-bit checkpoint out of one in 16 bits or FP8, layer by layer."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from seamount.models.locate import locate_model

from .screen import harmless

if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.table import Table

    from seamount.training.compression.compress import Costs, Report

DESCRIPTION = """Make a checkpoint of 4 or 8 bits per weight out of one in 16 or 32 bits, or FP8 blocks. 4 bits are
written as AWQ (gemm, with zero points), 8 bits as compressed-tensors (int-quantized: a scale per row, activations
quantized per token while running). Embedding, head, norms, routers and kv_b_proj stay as they are.

method awq   scales and clips weights so that the outputs for the calibration's text change least (arXiv 2306.00978)
method rtn   rounds to nearest; with a calibration file it also measures the error

One layer is in memory at a time, of a layer with experts one expert: at most about its attention and feed-forward part
in 32 bits, for awq a square matrix per input width, and 1 GiB. The number is printed first. A stopped job goes on when
the same command is given again; until then its work is in OUTPUT.partial."""
ARGUMENTS = "MODEL --output FOLDER [FLAGS]"
EXAMPLES = """  seamount quantize /models/folder --calibration texts.jsonl --output /models/folder-awq
  seamount quantize /models/folder --method rtn --bits 8 --output /models/folder-int8
  seamount quantize seamount-tiny --method awq --bits 4 --group-size 32 --calibration texts.txt --output tiny-awq"""

_STEPS = 10_000  # of the bar
_HEAD_ROWS = 12  # of the layers' table on a terminal; the worst are shown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("model", metavar="MODEL", help="folder of a checkpoint, or the name of an embedded model")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="folder to be made")
    parser.add_argument("--method", choices=("awq", "rtn"), default="awq", help="how weights are rounded (awq)")
    parser.add_argument("--bits", type=int, choices=(4, 8), default=4, help="per weight (4)")
    parser.add_argument(
        "--group-size",
        type=int,
        choices=(8, 16, 32, 64, 128),
        metavar="N",
        help="weights that share a scale, with 4 bits (128, or what below divides the rows of all matrices)",
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="texts like those that the model will meet: a sample per line, or JSON lines with text or messages",
    )
    parser.add_argument(
        "--samples", type=_positive, default=128, metavar="N", help="most samples, spread over the file (128)"
    )
    parser.add_argument(
        "--sample-tokens", type=_positive, default=512, metavar="N", help="most tokens of a sample (512)"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    """Quantize and print the report."""
    folder = locate_model(args.model)
    from seamount.training.compression.compress import Job, quantize

    job = Job(
        folder=folder,
        output=args.output,
        method=args.method,
        bits=args.bits,
        group_size=args.group_size,
        calibration=args.calibration,
        num_samples=args.samples,
        sample_tokens=args.sample_tokens,
    )
    # A job that is told to end says how it goes on, as one that is interrupted does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with _Progress() as progress:
            report = quantize(job, on_start=_tell_costs, progress=progress)
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on with the layer that was under way.", file=sys.stderr)
        raise
    if args.json:
        import json
        from dataclasses import asdict

        print(json.dumps({"output": str(args.output), **asdict(report)}, indent=2))
        return 0
    from rich.console import Console

    Console(highlight=False, markup=False, emoji=False).print(_table(report, args.output))
    return 0


def _tell_costs(costs: Costs) -> None:
    from rich.filesize import decimal

    group = "" if costs.group_size is None else f", groups of {costs.group_size}"
    done = f"; {costs.num_done} done before" if costs.num_done else ""
    print(
        f"{costs.num_layers} layers{done}{group}; {costs.num_tokens} calibration tokens; at most about "
        f"{decimal(costs.memory_bytes)} of memory and {decimal(costs.disk_bytes)} more on the disk.",
        file=sys.stderr,
        flush=True,
    )


def _table(report: Report, output: Path) -> Table:
    from rich.filesize import decimal
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    group = "" if report.group_size is None else f", groups of {report.group_size}"
    table.add_row("folder", harmless(str(output)))
    table.add_row("method", f"{report.method}, {report.bits} bits{group}")
    table.add_row("bits per weight", f"{report.bits_per_weight:.2f}, with what stays in 16 bits")
    table.add_row("size", f"{decimal(report.bytes_before)} before, {decimal(report.bytes_after)} after")
    table.add_row("time", f"{report.seconds:.0f} s")
    if report.num_plain_experts:
        told = f"{report.num_plain_experts} rounded to nearest, for lack of calibration tokens"
        table.add_row("experts", told)
    errors = {index: error for index, error in enumerate(report.relative_errors) if error is not None}
    worst = sorted(errors, key=lambda index: -errors[index])[:_HEAD_ROWS]
    if errors:
        table.add_row("error of a layer", f"{sum(errors.values()) / len(errors):.2%} of what it adds, on average")
    for index in sorted(worst):
        table.add_row(f"  layer {index}", f"{errors[index]:.2%}")
    if len(errors) > len(worst):
        table.add_row("", "the largest; all are in quantization_report.json")
    return table


class _Progress:
    """Layers done and time left: a bar on a terminal, a line per layer in a log. On stderr."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._told = -1

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, num_done: int, num_layers: int, share: float) -> None:
        """Note what is done; `share` is of the work, in which layers differ."""
        if not sys.stderr.isatty():
            if num_done != self._told:
                self._told = num_done
                print(f"  {num_done} of {num_layers} layers ({share:.0%})", file=sys.stderr, flush=True)
            return
        if self._bar is None:
            self._bar = _new_bar(share)
        self._bar.update(
            self._bar.task_ids[0], completed=round(share * _STEPS), description=f"layer {num_done} of {num_layers}"
        )


def _new_bar(share: float) -> Progress:
    """A bar that begins at `share`, so that the time left is told by the speed of this run."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    text, bar, done = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn()
    left = TimeRemainingColumn()
    columns = (text, bar, done, TimeElapsedColumn(), TextColumn("left"), left)
    progress = Progress(*columns, console=Console(stderr=True), transient=True, speed_estimate_period=3600)
    progress.add_task("", total=_STEPS, completed=round(share * _STEPS))
    progress.start()
    return progress


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number
