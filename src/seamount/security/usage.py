"""What each key used: tokens in and out, per day in UTC.

The server adds to a `UsageLedger` as answers end; the commands read totals. Counts wait in memory for up to a second
and are written together, so that no answer waits for a disk; the loss of the process loses that second. Knows no
protocol.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

from seamount.core.database import Database, Run
from seamount.core.errors import SeamountError

_log = logging.getLogger(__name__)
_FLUSH_S = 1.0


@dataclass(frozen=True)
class Tokens:
    """Tokens in and out."""

    num_prompt: int = 0
    num_generated: int = 0

    def __add__(self, other: Tokens) -> Tokens:
        return Tokens(self.num_prompt + other.num_prompt, self.num_generated + other.num_generated)


Counts = dict[tuple[str, str], Tokens]


class UsageLedger:
    """Adds up what keys use, and writes it down. Used from one event loop.

    Args:
        clock: Unix seconds; decides the day.
        flush_s: seconds between writes.
    """

    def __init__(
        self, database: Database, clock: Callable[[], float] = time.time, *, flush_s: float = _FLUSH_S
    ) -> None:
        self._database = database
        self._clock = clock
        self._flush_s = flush_s
        self._waiting: Counts = {}
        self._failing = ""

    def add(self, key_id: str, tokens: Tokens) -> None:
        """Count tokens of a key, today. Takes no time and cannot fail."""
        day = datetime.fromtimestamp(self._clock(), UTC).date().isoformat()
        self._add({(key_id, day): tokens})

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Write now and then while inside, and at the end once more."""
        stopping = asyncio.Event()
        writing = asyncio.create_task(self._write_until(stopping))
        try:
            yield
        finally:
            # Not cancelled: a write under way is waited for, so that what it holds is neither lost nor counted twice.
            stopping.set()
            await writing

    async def flush(self) -> None:
        """Write what waits; when that fails it goes on waiting, and the log says so once."""
        if not self._waiting:
            return
        counts, self._waiting = self._waiting, {}
        try:
            await self._database.call(partial(self._database.write, partial(_write, counts)))
        except SeamountError as error:
            self._add(counts)
            if self._failing != error.code:
                _log.warning("Usage cannot be written and is kept in memory: %s", error)
            self._failing = error.code
        else:
            self._failing = ""

    async def _write_until(self, stopping: asyncio.Event) -> None:
        stopped = asyncio.create_task(stopping.wait())
        while not stopped.done():
            await asyncio.wait((stopped,), timeout=self._flush_s)
            await self.flush()
        if self._waiting:
            _log.error("Usage of %d keys and days could not be written and is lost.", len(self._waiting))

    def _add(self, counts: Counts) -> None:
        for row, tokens in counts.items():
            self._waiting[row] = self._waiting.get(row, Tokens()) + tokens


def usage_by_day(database: Database) -> dict[str, dict[str, Tokens]]:
    """Return what each key that used anything used: key id, then day (as 2027-01-31, in order), then tokens."""
    rows = database.read(
        lambda run: run("SELECT key_id, day, num_prompt_tokens, num_generated_tokens FROM usage ORDER BY key_id, day")
    )
    found: dict[str, dict[str, Tokens]] = {}
    for key_id, day, num_prompt, num_generated in rows:
        found.setdefault(key_id, {})[day] = Tokens(num_prompt, num_generated)
    return found


def _write(counts: Counts, run: Run) -> None:
    for (key_id, day), tokens in counts.items():
        run(
            """INSERT INTO usage (key_id, day, num_prompt_tokens, num_generated_tokens) VALUES (?, ?, ?, ?)
            ON CONFLICT (key_id, day) DO UPDATE SET
                num_prompt_tokens = usage.num_prompt_tokens + excluded.num_prompt_tokens,
                num_generated_tokens = usage.num_generated_tokens + excluded.num_generated_tokens""",
            key_id,
            day,
            tokens.num_prompt,
            tokens.num_generated,
        )
