"""What a person sees of a run while it goes on: a panel that stays in its place, or plain lines where no terminal is.

Called by `seamount tune`, which shows nothing with `--quiet` and `--json`. Always on stderr. It takes the records that
the log takes, and must not know how they come to be.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from seamount.core.sizes import size_text

_LINE_EVERY_S = 10.0
_BARS = "▁▂▃▄▅▆▇█"
_MOST_KEPT = 1024
_TREND_WIDTH = 40
_IN_ROWS = ("task", "step", "epoch", "loss")


class RunView:
    """The view of one run, a context manager.

    Args:
        title: of the panel, such as the model's name.
        console: where it is shown; None is stderr.
        clock: seconds, for the pace and for when a line is due.
    """

    def __init__(
        self, title: str, *, console: Console | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._title, self._clock = title, clock
        self._console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self._live: Live | None = None
        self._stage = ""
        self._record: Mapping[str, Any] = {}
        self._evaluation: Mapping[str, Any] = {}
        self._trend = Trend()
        self._pace = _Pace()
        self._said_at = -math.inf

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live = Live(console=self._console, get_renderable=self._panel, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def stage(self, text: str) -> None:
        """Something begins that takes a while, or is worth a remark."""
        self._stage = text
        if self._live is None:
            self._say(text)

    def progress(self, text: str, done: int, total: int) -> None:
        """So much of a stage is done; a terminal alone shows it."""
        self._stage = f"{text}: {done / max(total, 1):.0%}"

    def step(self, record: Mapping[str, Any]) -> None:
        """A step was done; see `RunLog.step`. `num_steps` is that of the whole run."""
        now = self._clock()
        self._record, self._stage = record, ""
        self._pace.add(record["step"], now)
        self._trend.add(float(record["loss"]))
        is_last = record["step"] == record.get("num_steps")
        if self._live is None and (now - self._said_at >= _LINE_EVERY_S or is_last):
            self._said_at = now
            self._say("  ".join(f"{name} {value}" if name else value for name, value in self._told()))

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """Held-out examples were tried; see `RunLog.evaluation`."""
        self._evaluation = record
        if self._live is None:
            self._say(f"evaluation at step {record['step']:,}: {_tried(record)}")

    def _say(self, text: str) -> None:
        self._console.print(Text(text))

    def _told(self) -> list[tuple[str, str]]:
        """The last step, as names and texts; a text that says what it is has no name."""
        record = self._record
        left = self._pace.left(record.get("num_steps"))
        return [
            *([("task", _task(record))] if "task" in record else []),
            ("step", f"{record['step']:,}" + (f"/{record['num_steps']:,}" if "num_steps" in record else "")),
            *([("epoch", f"{record['epoch']:.2f}")] if "epoch" in record else []),
            ("loss", f"{record['loss']:.4f}"),
            *([("rate", f"{record['learning_rate']:.2e}")] if "learning_rate" in record else []),
            *([("norm", f"{record['gradient_norm']:.3g}")] if "gradient_norm" in record else []),
            *([("", f"{record['tokens_per_s']:,.0f} tokens/s")] if "tokens_per_s" in record else []),
            *([("", size_text(record["memory_bytes"]))] if "memory_bytes" in record else []),
            *([("", f"{duration(left)} left")] if left is not None else []),
        ]

    def _panel(self) -> Panel:
        parts: list[Any] = []
        record = self._record
        if record:
            loss = Text(f"{record['loss']:.4f}", style="bold")
            loss.append(f"  {self._trend.bars(_TREND_WIDTH)}", style="cyan")
            grid = Table.grid(padding=(0, 2))
            if "task" in record:
                grid.add_row(Text("task", style="dim"), Text(_task(record)))
            grid.add_row(Text("loss", style="dim"), loss)
            if self._evaluation:
                told = f"{_tried(self._evaluation)} (step {self._evaluation['step']:,})"
                grid.add_row(Text("evaluation", style="dim"), Text(told))
            told_briefly = [(name, value) for name, value in self._told() if name not in _IN_ROWS]
            line = "   ".join(f"{name} {value}" if name else value for name, value in told_briefly)
            grid.add_row(Text("now", style="dim"), Text(line))
            total = record.get("num_steps")
            epoch = f"   epoch {record['epoch']:.2f}" if "epoch" in record else ""
            of = f" of {total:,}" if total is not None else ""
            grid.add_row(Text("step", style="dim"), Text(f"{record['step']:,}{of}{epoch}"))
            if total is not None:
                grid.add_row("", ProgressBar(total=total, completed=record["step"], width=_TREND_WIDTH + 20))
            parts.append(grid)
        if self._stage:
            parts.append(Text(self._stage, style="italic"))
        return Panel(Group(*parts), title=Text(self._title), title_align="left", expand=False, padding=(0, 1))


class Trend:
    """The losses of a run of any length as a row of bars, each the mean over equally many steps."""

    def __init__(self) -> None:
        self._means: list[float] = []
        self._per_mean, self._sum, self._count = 1, 0.0, 0

    def add(self, value: float) -> None:
        """Note one; what is not finite is left out."""
        if not math.isfinite(value):
            return
        self._sum, self._count = self._sum + value, self._count + 1
        if self._count < self._per_mean:
            return
        self._means.append(self._sum / self._count)
        self._sum, self._count = 0.0, 0
        if len(self._means) == _MOST_KEPT:
            self._means = [(a + b) / 2 for a, b in zip(self._means[::2], self._means[1::2], strict=True)]
            self._per_mean *= 2

    def bars(self, width: int) -> str:
        """At most `width` characters, the lowest value the lowest bar."""
        count = min(width, len(self._means))
        if not count:
            return ""
        edges = [i * len(self._means) // count for i in range(count + 1)]
        values = [sum(self._means[a:b]) / (b - a) for a, b in pairwise(edges)]
        low, span = min(values), max(values) - min(values)
        return "".join(_BARS[round((value - low) / span * (len(_BARS) - 1)) if span else 0] for value in values)


class _Pace:
    """How long steps take, evaluations and checkpoints included, since this process does them."""

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None
        self._last: tuple[int, float] = (0, 0.0)

    def add(self, step: int, now: float) -> None:
        if self._first is None or step <= self._last[0]:  # another task's steps begin anew
            self._first = (step, now)
        self._last = (step, now)

    def left(self, num_steps: int | None) -> float | None:
        """Seconds; None while it cannot be told."""
        if self._first is None or num_steps is None or self._last[0] == self._first[0]:
            return None
        per_step = (self._last[1] - self._first[1]) / (self._last[0] - self._first[0])
        return per_step * (num_steps - self._last[0])


def duration(seconds: float) -> str:
    """A time in words: "2 h 05 min", "3 min 20 s", "12 s"."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {whole % 60:02} s" if minutes else f"{whole} s"


def _task(record: Mapping[str, Any]) -> str:
    return f"{record['task']} ({record['task_number']} of {record['num_tasks']})"


def _tried(record: Mapping[str, Any]) -> str:
    told = [f"loss {record['loss']:.4f}"] if record.get("loss") is not None else []
    if record.get("accuracy") is not None:
        told.append(f"accuracy {record['accuracy']:.1%}")
    return ", ".join(told)
