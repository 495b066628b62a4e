"""Lets requests into the engine: at once while there is room, else in turn. The thin shell round `core`.

Called by `service`, once per request to the engine. It knows tasks and a clock; the decisions are the core's. Whoever
was let in leaves through `leave`, once, whatever ended the request; whoever stops waiting, because the client left or
time was over, leaves by itself.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from seamount.core.errors import DeadlineError, SeamountError

from .core import AdmissionCore, Capacity, Ticket

Clock = Callable[[], float]
"""Seconds from any beginning; never goes back (`time.monotonic`)."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is in flight and what waits, for the metrics.

    Attributes:
        num_waiting, num_waiting_tokens: by priority.
        tokens_per_s: the measured speed; 0 when there is no measure.
    """

    num_admitted: int = 0
    num_admitted_tokens: int = 0
    num_waiting: dict[int, int] = field(default_factory=dict)
    num_waiting_tokens: dict[int, int] = field(default_factory=dict)
    tokens_per_s: float = 0.0


class Admission:
    """Who is worked on, who waits.

    Args:
        max_waiting: most requests that wait.
        max_wait_s: a request that would wait longer, by the measured speed, is refused at once.
        clock: for tests, which have their own time.
    """

    def __init__(self, *, max_waiting: int, max_wait_s: float, clock: Clock = time.monotonic) -> None:
        self._core = AdmissionCore(max_waiting=max_waiting, max_wait_s=max_wait_s)
        self._clock = clock
        self._futures: dict[Ticket, asyncio.Future[None]] = {}
        self._closed: SeamountError | None = None

    def open(self, capacity: Capacity) -> None:
        """Begin to let requests in."""
        self._wake(self._core.open(capacity, self._clock()))

    def hold_batches(self) -> None:
        """Let no more lines of batches in; safe to call from a signal's handler."""
        self._core.hold_batches()

    def close(self, error: SeamountError) -> None:
        """Refuse whoever waits, and whoever comes, with this error."""
        self._closed = error
        for future in self._futures.values():
            if not future.done():
                future.set_exception(error)

    def check(self, tenant: str, priority: int) -> None:
        """Refuse early what would be refused for want of a place in the queue, before work is spent on it.

        Raises:
            QueueFullError: it would.
        """
        self._core.check(tenant, priority)

    def most_at_once(self, num_sequences: int, priority: int) -> int:
        """Return how many requests of so many sequences can be worked on or wait while there are no others."""
        return self._core.most_at_once(num_sequences, priority)

    def guess(self, num_prompt_tokens: int, num_sequences: int, most: int) -> int:
        """Return the tokens that a request will probably need, given the most that each answer may have."""
        return self._core.guess(num_prompt_tokens, num_sequences, most)

    async def enter(self, ticket: Ticket) -> None:
        """Return when the request may begin. Cancelled, or failed, it is out of the queue.

        Raises:
            QueueFullError: it may not wait, or had to yield its place to a tenant who had less in the queue.
            DeadlineError: its deadline passed, or surely would.
        """
        if self._closed is not None:
            raise self._closed
        now_s = self._clock()
        yielding = self._core.ask(ticket, now_s)
        if yielding is not None and not (waiter := self._futures[yielding]).done():
            waiter.set_exception(self._core.full(yielding))
        self._wake(self._core.admit(now_s))
        if ticket.state == "admitted":
            return
        future = self._futures[ticket] = asyncio.get_running_loop().create_future()
        try:
            await self._until(future, ticket.deadline_s)
        except BaseException:
            # It may have been let in a moment ago, before this task noticed.
            if ticket.state != "over":
                self.leave(ticket)
            raise
        finally:
            del self._futures[ticket]

    def progress(self, num_tokens: int) -> None:
        """Count tokens that the engine has done, of prompts and answers."""
        self._core.speed.count(num_tokens, self._clock())

    def leave(self, ticket: Ticket, *, num_tokens: int | None = None) -> None:
        """The request is over; it took this many tokens, None if it never began."""
        self._wake(self._core.leave(ticket, self._clock(), num_tokens=num_tokens))

    def learn(self, num_output_tokens: int, num_sequences: int) -> None:
        """Remember how long a request's answers were, for later guesses."""
        self._core.learn(num_output_tokens, num_sequences)

    def load(self) -> Load:
        """Return what is in flight and what waits."""
        core = self._core
        return Load(
            num_admitted=core.num_admitted,
            num_admitted_tokens=core.num_tokens,
            num_waiting=core.queue.num_waiting(),
            num_waiting_tokens=core.queue.num_waiting_tokens(),
            tokens_per_s=core.speed.tokens_per_s() or 0.0,
        )

    async def _until(self, future: asyncio.Future[None], deadline_s: float | None) -> None:
        if deadline_s is None:
            await future
            return
        try:
            async with asyncio.timeout(max(deadline_s - self._clock(), 0.0)):
                await future
        except TimeoutError as cause:
            raise DeadlineError("The time that the request allows was over before it could begin.") from cause

    def _wake(self, admitted: Iterable[Ticket]) -> None:
        for ticket in admitted:
            future = self._futures.get(ticket)  # none yet where it is the one that asks
            if future is not None and not future.done():
                future.set_result(None)
