"""Which requests the engine works on now, which wait, and which are refused: the decisions of admission.

Pure: the caller gives the time and is told what changed; nothing here waits. `queue.Admission` is the shell round
it. The engine is given as many sequences as it runs side by side, and no more tokens than its cache holds, so that who
waits waits here, where shares are fair, and not in the engine's queue, where the first to come is served first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from seamount.core.errors import DeadlineError, QueueFullError

from .shares import BATCH, PRIORITIES, FairQueue

# Work of the lowest priority, and below it that of batches, fills idle time. Each keeps to the first part of the
# engine, both together to the second, so that whoever comes while they run finds room at once and does not wait until
# some of it has ended.
LOWEST = PRIORITIES[0]
LOWEST_PART = 0.5
_IDLE_PART = 0.75
# Without any measure yet, this is what a refused request is told.
_UNMEASURED_RETRY_S = 1.0
_MIN_RETRY_S, _MAX_RETRY_S = 0.5, 3600.0
# A measure of speed forgets at this pace, counted in seconds during which it measured.
_MEMORY_S = 30.0
_FOLD_S = 0.25
_MIN_MEASURED_S = 1.0
_FIRST_GUESS_TOKENS = 128.0
_GUESS_WEIGHT = 0.05


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """What the engine can work on at once: sequences, and tokens of prompts and answers."""

    max_sequences: int
    max_tokens: int


@dataclass(eq=False, kw_only=True)
class Ticket:
    """One request on its way through.

    Attributes:
        tenant, priority: whose share it counts for; see `core.identity.Principal`.
        num_sequences: answers to its prompt.
        num_tokens: of the prompt and, probably, of the answers.
        deadline_s: the clock's time at which it must have begun; None is never.
    """

    tenant: str
    priority: int
    num_sequences: int
    num_tokens: int
    deadline_s: float | None = None
    state: Literal["new", "waiting", "admitted", "over"] = "new"


@dataclass
class _Part:
    """What some of those who are let in hold together."""

    num_sequences: int = 0
    num_tokens: int = 0

    def keeps_with(self, ticket: Ticket, capacity: Capacity, part: float) -> bool:
        """Say whether they hold no more than a part of the engine, this one among them."""
        return (
            self.num_sequences + ticket.num_sequences <= capacity.max_sequences * part
            and self.num_tokens + ticket.num_tokens <= capacity.max_tokens * part
        )


class Speed:
    """Tokens per second, prompts and answers together, while requests wait; lately counts more than long ago.

    Only while they wait: an engine with little to do is slow for want of work, which says nothing of what it can do.
    """

    def __init__(self) -> None:
        self._tokens = self._seconds = 0.0
        self._pending = 0
        self._since_s: float | None = None

    def watch(self, *, waiting: bool, now_s: float) -> None:
        """Requests wait from now on, or none do."""
        if not waiting:
            self._fold(now_s)
            self._since_s = None
        elif self._since_s is None:
            self._since_s, self._pending = now_s, 0

    def count(self, num_tokens: int, now_s: float) -> None:
        """These tokens were done."""
        self._pending += num_tokens
        if self._since_s is not None and now_s - self._since_s >= _FOLD_S:
            self._fold(now_s)

    def tokens_per_s(self) -> float | None:
        """Return the measure; None when there is none to be trusted yet."""
        return self._tokens / self._seconds if self._seconds >= _MIN_MEASURED_S and self._tokens > 0 else None

    def _fold(self, now_s: float) -> None:
        if self._since_s is None:
            return
        passed_s = max(now_s - self._since_s, 0.0)
        fading = math.exp(-passed_s / _MEMORY_S)
        self._tokens = self._tokens * fading + self._pending
        self._seconds = self._seconds * fading + passed_s
        self._pending, self._since_s = 0, max(now_s, self._since_s)


class AdmissionCore:
    """The state of admission.

    Args:
        max_waiting: most requests that wait.
        max_wait_s: a request that would wait longer, by the measured speed, is refused at once; one of the lowest
            priority has time.
    """

    def __init__(self, *, max_waiting: int, max_wait_s: float) -> None:
        self.queue: FairQueue[Ticket] = FairQueue()
        self.speed = Speed()
        self.num_sequences = 0
        self.num_tokens = 0
        self.num_admitted = 0
        self._lowest, self._batches = _Part(), _Part()
        self._holds_batches = False
        self._max_waiting = max_waiting
        self._max_wait_s = max_wait_s
        self._capacity: Capacity | None = None
        self._output_tokens = _FIRST_GUESS_TOKENS

    def open(self, capacity: Capacity, now_s: float) -> list[Ticket]:
        """Follow what the engine can do; return what may begin. Before the first call everything waits."""
        self._capacity = capacity
        return self.admit(now_s)

    def guess(self, num_prompt_tokens: int, num_sequences: int, most: int) -> int:
        """Return the tokens that a request will probably need, given the most that each answer may have."""
        return num_prompt_tokens + num_sequences * min(most, math.ceil(self._output_tokens))

    def most_at_once(self, num_sequences: int, priority: int) -> int:
        """Return how many requests of so many sequences can be worked on or wait while there are no others.

        More are never taken together. However large one is, it is worked on, by itself.
        """
        most = 0 if self._capacity is None else self._capacity.max_sequences
        part = LOWEST_PART if priority <= LOWEST else 1.0
        return self._max_waiting + max(int(most * part) // num_sequences, 1)

    def check(self, tenant: str, priority: int) -> None:
        """Refuse early what `ask` would refuse for want of a place in the queue.

        Raises:
            QueueFullError: as `ask`.
        """
        self._yielding(Ticket(tenant=tenant, priority=priority, num_sequences=1, num_tokens=1))

    def ask(self, ticket: Ticket, now_s: float) -> Ticket | None:
        """Admit a new request or let it wait; return the one that had to yield its place in the queue, if any.

        Who comes to wait may be next all the same: call `admit` afterwards.

        Raises:
            QueueFullError: as many wait as may, or the wait would be too long; `retry_after` says when to come again.
            DeadlineError: the wait would probably outlast the request's deadline.
        """
        if ticket.deadline_s is not None and ticket.deadline_s <= now_s:
            raise DeadlineError("The time that the request allows was over before it could begin.")
        above = BATCH if ticket.priority > BATCH else None
        before = self._turn(above) if ticket.priority > LOWEST else self.queue.head(above)
        if before is None and self._fits(ticket):
            self._begin(ticket)
            return None
        self._check_wait(ticket, now_s)
        yielding = self._yielding(ticket)
        if yielding is not None:
            self.queue.remove(yielding)
            yielding.state = "over"
        ticket.state = "waiting"
        self.queue.push(ticket)
        return yielding

    def hold_batches(self) -> None:
        """Let no more lines of batches in; those that wait go on waiting."""
        self._holds_batches = True

    def admit(self, now_s: float) -> list[Ticket]:
        """Let in whom there is room for, in turn; return them."""
        admitted = []
        while (head := self._turn()) is not None and self._fits(head):
            self._begin(head)
            admitted.append(head)
        self.speed.watch(waiting=head is not None, now_s=now_s)
        return admitted

    def leave(self, ticket: Ticket, now_s: float, *, num_tokens: int | None = None) -> list[Ticket]:
        """Take out a request that ended, however it ended; return those that may begin now.

        Args:
            num_tokens: what it really took, of prompt and answers; None when it never began.

        Raises:
            RuntimeError: it is out already, which is a bug.
        """
        if ticket.state == "waiting":
            self.queue.remove(ticket)
        elif ticket.state == "admitted":
            self.num_sequences -= ticket.num_sequences
            self.num_tokens -= ticket.num_tokens
            self.num_admitted -= 1
            self._count_idle(ticket, -1)
            if num_tokens is not None:
                self.queue.correct(ticket, num_tokens - ticket.num_tokens)
        else:
            raise RuntimeError(f"a request left admission that is {ticket.state}")
        ticket.state = "over"
        return self.admit(now_s)

    def learn(self, num_output_tokens: int, num_sequences: int) -> None:
        """Remember how long the answers of a request were that came to its end."""
        self._output_tokens += _GUESS_WEIGHT * (num_output_tokens / num_sequences - self._output_tokens)

    def wait_s(self, ticket: Ticket) -> float | None:
        """Return how long a request that comes now will about wait; None when no speed was measured yet."""
        speed = self.speed.tokens_per_s()
        # Room comes free at the pace at which tokens are done; it must be enough for those before and for itself.
        return None if speed is None else (self.queue.tokens_before(ticket) + ticket.num_tokens) / speed

    def _check_wait(self, ticket: Ticket, now_s: float) -> None:
        wait_s = self.wait_s(ticket)
        if wait_s is None:
            return
        if ticket.deadline_s is not None and now_s + wait_s > ticket.deadline_s:
            raise DeadlineError(
                f"The request would wait about {wait_s:.0f} s, longer than the time that it allows.",
                hint="Try again later, or allow more time.",
                retry_after=_bounded(wait_s),
            )
        if wait_s > self._max_wait_s and ticket.priority > LOWEST:
            raise QueueFullError(
                f"The request would wait about {wait_s:.0f} s; the limit is {self._max_wait_s:.0f} s.",
                hint="Try again when it is over.",
                retry_after=_bounded(wait_s - self._max_wait_s),
            )

    def _yielding(self, ticket: Ticket) -> Ticket | None:
        if len(self.queue) < self._max_waiting:
            return None
        yielding = self.queue.who_yields_to(ticket.tenant, ticket.priority)
        if yielding is None:
            raise self.full(ticket)
        return yielding

    def full(self, ticket: Ticket) -> QueueFullError:
        """Return what a request is told that finds no place in the queue, or had to yield its own."""
        return QueueFullError(
            f"{len(self.queue)} requests are waiting; the limit is {self._max_waiting}.",
            hint="Try again shortly.",
            retry_after=_bounded(self.wait_s(ticket)),
        )

    def _turn(self, above: int | None = None) -> Ticket | None:
        """Return who is next; those of the lowest priority wait for each other only, and not others for them.

        A batch's line begins only where nobody else waits, whatever for.
        """
        head = self.queue.head(above)
        if head is not None and head.priority <= LOWEST and not self._leaves_room(head):
            head = self.queue.head(above=head.priority)
        return None if head is not None and head.priority == BATCH and self._holds_batches else head

    def _fits(self, ticket: Ticket) -> bool:
        if self._capacity is None:
            return False
        if not self.num_admitted:  # larger than everything, it can only ever run alone
            return True
        return (
            self.num_sequences + ticket.num_sequences <= self._capacity.max_sequences
            and self.num_tokens + ticket.num_tokens <= self._capacity.max_tokens
            and (ticket.priority > LOWEST or self._leaves_room(ticket))
        )

    def _leaves_room(self, ticket: Ticket) -> bool:
        """Say whether, with this one, those who fill idle time keep to their parts: the rest is for who comes.

        One that is larger than its part runs all the same: a batch's line alone, another one as the only one of its
        priority.
        """
        idle = _Part(
            self._lowest.num_sequences + self._batches.num_sequences, self._lowest.num_tokens + self._batches.num_tokens
        )
        if self._capacity is None:
            return True
        if ticket.priority == BATCH:
            return not self.num_admitted or idle.keeps_with(ticket, self._capacity, LOWEST_PART)
        return not self._lowest.num_sequences or (
            self._lowest.keeps_with(ticket, self._capacity, LOWEST_PART)
            and idle.keeps_with(ticket, self._capacity, _IDLE_PART)
        )

    def _begin(self, ticket: Ticket) -> None:
        self.queue.charge(ticket)
        if ticket.state == "waiting":
            self.queue.remove(ticket)
        ticket.state = "admitted"
        self.num_sequences += ticket.num_sequences
        self.num_tokens += ticket.num_tokens
        self.num_admitted += 1
        self._count_idle(ticket, 1)

    def _count_idle(self, ticket: Ticket, sign: int) -> None:
        if ticket.priority <= LOWEST:
            part = self._batches if ticket.priority == BATCH else self._lowest
            part.num_sequences += sign * ticket.num_sequences
            part.num_tokens += sign * ticket.num_tokens


def _bounded(wait_s: float | None) -> float:
    return _UNMEASURED_RETRY_S if wait_s is None else min(max(wait_s, _MIN_RETRY_S), _MAX_RETRY_S)
