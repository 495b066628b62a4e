"""`seamount bench engine`: measure the engine on this machine and print a table, or JSON."""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING

from seamount.core.sizes import size_text

from . import flags
from .progress import LoadingProgress
from .screen import harmless

if TYPE_CHECKING:
    from rich.table import Table

    from seamount.ops.bench_run import Shape, Timing
    from seamount.ops.benchmark import EngineBenchmark, Report, Row
    from seamount.ops.ceiling import Ceiling

DESCRIPTION = """Measure the engine in this process: prefill and decode rates, time to the first token, time between
tokens, peak memory, and the share of the machine's own ceiling (memory bandwidth and matrix rate), which is measured in
the same run. Every combination of lengths and concurrencies is run in every round; medians over the rounds are printed.
Prompts are random token ids, all requests of a combination arrive at once, decoding is greedy and ignores the end
token. Progress goes to stderr. Ctrl-C prints what was measured so far."""
ARGUMENTS = "engine [MODEL] [FLAGS]"
EXAMPLES = """  seamount bench engine seamount-tiny
  seamount bench engine /models/folder --prompt-lengths 128 --output-lengths 128 --concurrency 1,8
  seamount bench engine /models/folder --shared-prefix 1024 --prompt-lengths 2048
  seamount bench engine /models/folder --rounds 5 --json"""

_INTERRUPTED = 130
_NOTHING_MEASURED = 1
_PIPE_WIDTH = 120
_LEGEND = """
Medians of the rounds; prefill counts cached tokens too. Of the ceiling: prefill against the matrix rate; decode against
the nearer of the two, memory (mem) or matrix (mat). A model that fits into the processor's cache can exceed the memory
rate."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("what", choices=("engine",), metavar="engine", help="what is measured")
    flags.add_model(parser)
    parser.add_argument(
        "--prompt-lengths", type=_numbers, default=(128, 2048), metavar="N[,N]", help="tokens per prompt (128,2048)"
    )
    parser.add_argument(
        "--output-lengths", type=_numbers, default=(64,), metavar="N[,N]", help="tokens put out per request (64)"
    )
    parser.add_argument(
        "--concurrency", type=_numbers, default=(1, 8, 32), metavar="N[,N]", help="requests side by side (1,8,32)"
    )
    parser.add_argument(
        "--shared-prefix", type=_number, default=0, metavar="N", help="tokens that all prompts begin with (none)"
    )
    parser.add_argument("--rounds", type=_number, default=3, metavar="N", help="times that everything is measured (3)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    flags.add_engine_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    config = flags.settings_from(args).engine
    from seamount.models.locate import locate_model

    locate_model(config.model)  # a wrong name is told at once, not after seconds of importing torch
    with LoadingProgress(config.model) as progress:
        from seamount.ops.benchmark import EngineBenchmark, shapes_of

        shapes = shapes_of(args.prompt_lengths, args.output_lengths, args.concurrency, args.shared_prefix)
        benchmark = EngineBenchmark(config, shapes, progress)
    head = _head(benchmark)
    print(head, file=sys.stderr if args.json else sys.stdout, flush=True)
    try:
        with _Progress() as watcher:
            benchmark.run(args.rounds, watcher)
        report = benchmark.report()
    except KeyboardInterrupt:
        print("Interrupted: what follows was measured until then.", file=sys.stderr)
        report = benchmark.report(interrupted=True)
    if args.json:
        print(report.to_json())
    else:
        _print_table(report)
    if report.interrupted:
        return _INTERRUPTED
    return 0 if any(row.num_rounds for row in report.rows) else _NOTHING_MEASURED


class _Progress:
    """A line on stderr for each run, with its result; on a terminal it counts tokens meanwhile."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._open = ""
        self._began_s = 0.0

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self._open:
            self._write("\n")

    def stage(self, what: str) -> None:
        self._write(f"{what} ...\n")

    def started(self, shape: Shape, number: int, total: int) -> None:
        self._open = f"[{number}/{total}] {shape}: "
        self._began_s = time.monotonic()
        self._write(self._open)

    def ticked(self, num_tokens: int) -> None:
        if self._live:
            self._write(f"\r{self._open}{num_tokens} tokens in {time.monotonic() - self._began_s:.0f} s ")

    def finished(self, shape: Shape, result: Timing | str) -> None:
        if isinstance(result, str):
            said = f"not measured: {result}"
        else:
            decode = f"{_rate(result.decode_tokens / result.decode_s)} tokens/s" if result.decode_steps else "none"
            prefill = _rate(shape.concurrency * shape.prompt_tokens / result.prefill_s)
            said = f"prefill {prefill} tokens/s, decode {decode}"
        clear = "\r\x1b[K" if self._live and self._open else ""
        self._write(f"{clear}{self._open or f'{shape}: '}{said}\n" if clear or not self._open else f"{said}\n")
        self._open = ""

    @staticmethod
    def _write(text: str) -> None:
        print(text, end="", file=sys.stderr, flush=True)


def _head(benchmark: EngineBenchmark) -> str:
    """What was measured on what: the lines that come first."""
    facts, machine = benchmark.facts, benchmark.machine
    width = benchmark.work.weight_bytes_per_parameter
    cache = f"{facts.num_blocks * facts.block_size:,} tokens of cache"
    lines = {
        "Model": f"{harmless(facts.name)} ({facts.family}), {facts.num_parameters / 1e6:,.0f} M parameters, "
        f"{facts.num_active_parameters / 1e6:,.0f} M active per token",
        "Precision": f"{benchmark.work.precision}, {width:.2f} bytes per parameter, activations {facts.dtype}",
        "Device": f"{machine.device}; {machine.processor}",
        "Threads": f"{machine.num_threads} of {machine.num_cores} core(s)",
        "CPU features": " ".join(machine.instruction_sets) or "unknown",
        "Kernels": machine.kernels,
        "Memory": f"{size_text(facts.weight_bytes)} of weights, {cache}; the machine has "
        f"{size_text(machine.memory_bytes)}",
        "Versions": f"seamount {machine.seamount_version}, torch {machine.torch_version}, "
        f"Python {machine.python_version}",
    }
    return "\n".join(f"{name:<14}{value}" for name, value in lines.items())


def _print_table(report: Report) -> None:
    from rich.console import Console

    if report.ceiling is not None:
        print(f"{'Ceiling':<14}{_ceiling(report.ceiling)}")
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = _PIPE_WIDTH
    if any(row.num_rounds for row in report.rows):
        console.print("", _table(report), sep="\n")
        console.print(_LEGEND, soft_wrap=True)
        if cached := [row.num_cached_tokens for row in report.rows if row.num_cached_tokens]:
            console.print(f"Of each prompt, {min(cached)} tokens were in the cache.")
    for row in report.rows:
        if row.not_measured:
            console.print(f"{_shape(row)}: {row.not_measured}.", soft_wrap=True)


def _table(report: Report) -> Table:
    """Narrow enough for 80 columns; what is left out is in the JSON."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 1, 0, 0))
    for name in (
        "prompt+output\nx requests",
        "prefill\ntokens/s",
        "of\nceiling",
        "decode\ntokens/s",
        "of\nceiling",
        "first\ntoken",
        "between tokens\np50/p95",
        "peak\nmemory",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    speculates = any(row.acceptance is not None for row in report.rows)
    if speculates:
        table.add_column("guesses\nright", justify="right", no_wrap=True)
    for row in report.rows:
        if row.num_rounds:
            table.add_row(
                f"{row.prompt_tokens}+{row.output_tokens} x{row.concurrency}",
                _rate(row.prefill_tokens_per_s),
                _share(row.prefill_share),
                _rate(row.decode_tokens_per_s),
                f"{_share(row.decode_share)} {(row.decode_bound or '')[:3]}".rstrip(),
                "-" if row.first_token_p50_s is None else _seconds(row.first_token_p50_s),
                _pair(row.inter_token_p50_s, row.inter_token_p95_s),
                "-" if row.peak_memory_bytes is None else size_text(row.peak_memory_bytes),
                *([_share(row.acceptance)] if speculates else []),
            )
    return table


def _shape(row: Row) -> str:
    shared = f" ({row.shared_prefix_tokens} shared)" if row.shared_prefix_tokens else ""
    return f"prompt {row.prompt_tokens}{shared}, output {row.output_tokens}, concurrency {row.concurrency}"


def _ceiling(ceiling: Ceiling) -> str:
    rates = ", ".join(f"{rate / 1e12:.2f} T {name} operations/s" for name, rate in ceiling.matrix_ops_per_s.items())
    return f"{ceiling.read_bytes_per_s / 1e9:.1f} GB/s read, {rates}"


def _rate(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _share(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0%}" if value >= 0.1 else f"{value:.1%}"


def _pair(low: float | None, high: float | None) -> str:
    return "-" if low is None or high is None else f"{_three(low * 1e3)}/{_three(high * 1e3)} ms"


def _seconds(value: float) -> str:
    return f"{_three(value)} s" if value >= 1 else f"{_three(value * 1e3)} ms"


def _three(value: float) -> str:
    """The three digits that a measurement is good for, and never an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _number(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(_number(part) for part in text.split(",")))
