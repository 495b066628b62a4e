"""Who is next: a queue that gives each tenant its fair share of tokens, and each priority its weight.

Pure and without a clock. Used by `core` only. Two levels of start-time fair queueing (Goyal, Vin, Cheng:
"Start-time Fair Queueing", 1996): between priorities, by weight, and between the tenants of one priority, evenly. A
line's next request begins, in virtual time, where its last one ended; the line that begins first is next. So of two
tenants who both wait, one is never ahead of its share by more than its largest request plus the other's; a tenant who
waited for nothing saves nothing up; and the lowest priority moves at its weight's fraction, however busy the others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Hashable
from typing import Generic, Protocol, TypeVar

from seamount.core.requests import IDLE_PRIORITY

K = TypeVar("K", bound=Hashable)

PRIORITIES = (-1, 0, 1)
# Lines of batches, below every key's requests: their turn comes only where nobody else waits.
BATCH = IDLE_PRIORITY
_WEIGHT_STEP = 16
# Lines that are known beyond this many are forgotten when nothing that they did still counts.
_MAX_KNOWN_LINES = 1024


class Waiting(Protocol):
    """What the queue needs to know of a request."""

    @property
    def tenant(self) -> str: ...
    @property
    def priority(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...


W = TypeVar("W", bound=Waiting)


class Shares(Generic[K]):
    """Virtual time over some lines: where each line's next request begins."""

    def __init__(self) -> None:
        self._now = 0.0
        self._starts: dict[K, float] = {}

    def join(self, line: K, waiting: Collection[K]) -> None:
        """A line that had nothing waiting has something now: it begins no earlier than now."""
        if len(self._starts) > _MAX_KNOWN_LINES:
            self._starts = {k: start for k, start in self._starts.items() if start > self._now or k in waiting}
        self._starts[line] = max(self._starts.get(line, 0.0), self._now)

    def turn(self, waiting: Collection[K]) -> K:
        """Return the line whose turn it is; of equals, the one named first."""
        return min(waiting, key=lambda line: self._starts[line])

    def charge(self, line: K, cost: float) -> None:
        """A line that joined was served: virtual time goes to where it began, the line to where it ends."""
        start = self._starts[line]
        self._now = max(self._now, start)
        self._starts[line] = start + cost

    def correct(self, line: K, cost: float) -> None:
        """A line was charged too little, by `cost`, or too much, by a negative one."""
        if line in self._starts:
            self._starts[line] += cost


class FairQueue(Generic[W]):
    """Requests in lines, a line per priority and tenant; within a line, first come first served."""

    def __init__(self) -> None:
        self._lines: dict[int, dict[str, deque[W]]] = {priority: {} for priority in (BATCH, *PRIORITIES)}
        self._priorities: Shares[int] = Shares()
        self._tenants: dict[int, Shares[str]] = {priority: Shares() for priority in (BATCH, *PRIORITIES)}
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def num_waiting(self) -> dict[int, int]:
        """Return how many requests wait, by priority."""
        return {p: sum(len(line) for line in lines.values()) for p, lines in self._lines.items()}

    def num_waiting_tokens(self) -> dict[int, int]:
        """Return how many tokens they wait for, by priority."""
        return {p: sum(_tokens(line) for line in lines.values()) for p, lines in self._lines.items()}

    def push(self, item: W) -> None:
        """Let a request wait."""
        self._join(item)
        self._lines[item.priority].setdefault(item.tenant, deque()).append(item)
        self._length += 1

    def head(self, above: int | None = None) -> W | None:
        """Return the request whose turn it is, of those above a priority where one is given; None when none waits."""
        busy = [priority for priority in self._busy() if above is None or priority > above]
        if not busy:
            return None
        priority = self._priorities.turn([one for one in busy if one != BATCH] or busy)
        lines = self._lines[priority]
        return lines[self._tenants[priority].turn(lines)][0]

    def remove(self, item: W) -> None:
        """Take out a request, which is not charged.

        Raises:
            ValueError: it does not wait.
        """
        lines = self._lines[item.priority]
        line = lines.get(item.tenant, deque())
        line.remove(item)
        self._length -= 1
        if not line:
            del lines[item.tenant]

    def charge(self, item: W) -> None:
        """Charge a request that is served now, either the head of the queue or one that never waited."""
        self._join(item)
        self._tenants[item.priority].charge(item.tenant, item.num_tokens)
        self._priorities.charge(item.priority, item.num_tokens / _weight(item.priority))

    def correct(self, item: W, num_tokens: int) -> None:
        """A request took this many tokens more than it was charged for; fewer, when negative."""
        self._tenants[item.priority].correct(item.tenant, num_tokens)
        self._priorities.correct(item.priority, num_tokens / _weight(item.priority))

    def tokens_before(self, item: W) -> int:
        """Return how many waiting tokens will about be served before a request that came now.

        Those of higher priorities; and of its own, each tenant's as far as the tenant's share goes ahead of it.
        """
        higher = sum(n for priority, n in self.num_waiting_tokens().items() if priority > item.priority)
        sums = {tenant: _tokens(line) for tenant, line in self._lines[item.priority].items()}
        own = sums.get(item.tenant, 0)
        return higher + own + sum(min(n, own + item.num_tokens) for t, n in sums.items() if t != item.tenant)

    def who_yields_to(self, tenant: str, priority: int) -> W | None:
        """Return who should leave a full queue for a newcomer; None when it is the newcomer.

        The last one of the longest line, in the lowest priority: if that is below the newcomer's, or if the line is
        longer than the newcomer's own would become. So one tenant's flood costs other tenants nothing.
        """
        lowest = min(self._busy(), default=priority)
        if lowest > priority:
            return None
        longest = max(self._lines[lowest].values(), key=len, default=None)
        if longest is None:
            return None
        own = len(self._lines[priority].get(tenant, ()))
        return longest[-1] if lowest < priority or len(longest) > own + 1 else None

    def _join(self, item: W) -> None:
        lines = self._lines[item.priority]
        if not lines:
            self._priorities.join(item.priority, self._busy())
        if item.tenant not in lines:
            self._tenants[item.priority].join(item.tenant, lines)

    def _busy(self) -> list[int]:
        return [priority for priority, lines in self._lines.items() if lines]


def _tokens(line: Collection[Waiting]) -> int:
    return sum(item.num_tokens for item in line)


def _weight(priority: int) -> int:
    return int(_WEIGHT_STEP ** max(priority - PRIORITIES[0], 0))
