"""Shows how far a model has loaded: a bar on a terminal, a few plain lines in a log. Always on stderr.

Used by every command that loads a model; handed to the engine as its `on_progress`. `seamount merge` shows with it how
far it has written.
"""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_PLAIN_EVERY = 0.25


class LoadingProgress:
    """A context manager that is called with the stage's name, bytes done and bytes in all.

    On a terminal the bar is taken away at the end, so that what the command prints stands alone.
    """

    def __init__(self, model: str, *, verb: str = "Loading") -> None:
        self._title = f"{verb} {model}"
        self._bar: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._told: dict[str, float] = {}

    def __enter__(self) -> LoadingProgress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
        else:
            print(f"{self._title} ...", file=sys.stderr, flush=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar away. Idempotent."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Note that `done` of `total` bytes of the stage are there; without a total, `stage` is a remark to print."""
        if not total:
            print(f"  {stage}", file=sys.stderr, flush=True)
        elif self._bar is not None:
            if stage not in self._tasks:
                self._tasks[stage] = self._bar.add_task(f"{self._title}: {stage}", total=total)
            self._bar.update(self._tasks[stage], completed=done, total=total)
        elif not sys.stderr.isatty():
            self._tell(stage, done, total)

    def _tell(self, stage: str, done: int, total: int) -> None:
        """Print a line at each quarter of a stage, once."""
        share = done / total
        if share - self._told.get(stage, 0.0) >= _PLAIN_EVERY:
            self._told[stage] = share - share % _PLAIN_EVERY
            from rich.filesize import decimal

            print(f"  {stage}: {share:.0%} of {decimal(total)}", file=sys.stderr, flush=True)
