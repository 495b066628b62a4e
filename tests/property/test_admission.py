"""Laws of admission over random traffic, in virtual time: bounds hold, nobody starves, everybody leaves once."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seamount.core.errors import DeadlineError, QueueFullError
from seamount.server.admission.core import AdmissionCore, Capacity, Ticket
from seamount.server.admission.limits import Bucket
from seamount.server.admission.queue import Admission
from seamount.server.admission.shares import PRIORITIES, FairQueue

SEQUENCES, TOKENS, WAITING = 4, 1000, 12


def ticket(
    tenant: str = "a", tokens: int = 10, priority: int = 0, n: int = 1, deadline_s: float | None = None
) -> Ticket:
    return Ticket(tenant=tenant, priority=priority, num_sequences=n, num_tokens=tokens, deadline_s=deadline_s)


@dataclass
class Traffic:
    """An engine that ends requests when told to, and a clock that also jumps."""

    core: AdmissionCore
    now_s: float = 1000.0
    admitted: list[Ticket] = field(default_factory=list)
    waiting: list[Ticket] = field(default_factory=list)
    num_refused: int = 0

    def ask(self, new: Ticket) -> None:
        try:
            yielding = self.core.ask(new, self.now_s)
        except (QueueFullError, DeadlineError) as error:
            assert error.retry_after is None or 0 < error.retry_after <= 3600
            assert new.state == "new"
            self.num_refused += 1
            return
        if yielding is not None:
            self.waiting.remove(yielding)
            assert yielding.state == "over"
            self.num_refused += 1
        if new.state == "waiting":
            self.waiting.append(new)
            self._move(self.core.admit(self.now_s))
        else:
            self.admitted.append(new)
        self.check()

    def finish(self, which: int, used: int) -> None:
        done = self.admitted.pop(which % len(self.admitted))
        self.core.speed.count(used, self.now_s)
        self._move(self.core.leave(done, self.now_s, num_tokens=used))
        with pytest.raises(RuntimeError):
            self.core.leave(done, self.now_s)
        self.check()

    def cancel(self, which: int) -> None:
        gone = self.waiting.pop(which % len(self.waiting))
        self._move(self.core.leave(gone, self.now_s))
        self.check()

    def _move(self, tickets: list[Ticket]) -> None:
        for moved in tickets:
            self.waiting.remove(moved)
            self.admitted.append(moved)

    def check(self) -> None:
        assert all(one.state == "admitted" for one in self.admitted)
        assert all(one.state == "waiting" for one in self.waiting)
        assert len(self.core.queue) == len(self.waiting) <= WAITING
        assert self.core.num_admitted == len(self.admitted)
        sequences = sum(one.num_sequences for one in self.admitted)
        tokens = sum(one.num_tokens for one in self.admitted)
        assert (self.core.num_sequences, self.core.num_tokens) == (sequences, tokens)
        assert len(self.admitted) == 1 or (sequences <= SEQUENCES and tokens <= TOKENS)
        assert self.admitted or not self.waiting, "requests wait and nothing is worked on"


@given(seed=st.integers(0, 2**32), max_wait_s=st.sampled_from([0.5, 30.0, 1e9]))
def test_random_traffic_stays_within_bounds_and_everybody_leaves_once(seed: int, max_wait_s: float) -> None:
    chance = random.Random(seed)
    traffic = Traffic(AdmissionCore(max_waiting=WAITING, max_wait_s=max_wait_s))
    traffic.core.open(Capacity(max_sequences=SEQUENCES, max_tokens=TOKENS), traffic.now_s)
    for _ in range(150):
        # A clock of another machine's making: it stands, runs, leaps, and goes back.
        traffic.now_s += chance.choice([0, 0.01, 0.3, 3, 500, -40])
        action = chance.random()
        if action < 0.5:
            deadline_s = chance.choice([None, None, traffic.now_s + 5, traffic.now_s - 1])
            tokens = chance.choice([1, 10, 200, 3 * TOKENS])
            traffic.ask(
                ticket(chance.choice("abc"), tokens, chance.choice(PRIORITIES), chance.choice([1, 1, 2, 9]), deadline_s)
            )
        elif action < 0.85 and traffic.admitted:
            traffic.finish(chance.randrange(99), chance.randrange(1, 500))
        elif traffic.waiting:
            traffic.cancel(chance.randrange(99))
    while traffic.admitted:
        traffic.finish(0, 10)
    assert not traffic.waiting
    assert (traffic.core.num_sequences, traffic.core.num_tokens, len(traffic.core.queue)) == (0, 0, 0)


def serve(queue: FairQueue[Ticket]) -> Ticket:
    head = queue.head()
    assert head is not None
    queue.charge(head)
    queue.remove(head)
    return head


@given(costs=st.lists(st.lists(st.integers(1, 500), min_size=30, max_size=60), min_size=2, max_size=5))
def test_tenants_who_wait_are_never_ahead_of_each_other_by_more_than_their_largest_requests(
    costs: list[list[int]],
) -> None:
    queue: FairQueue[Ticket] = FairQueue()
    for tenant, own in enumerate(costs):
        for cost in own:
            queue.push(ticket(str(tenant), cost))
    served = dict.fromkeys(map(str, range(len(costs))), 0)
    left = {str(tenant): len(own) for tenant, own in enumerate(costs)}
    largest = {str(tenant): max(own) for tenant, own in enumerate(costs)}
    while all(left.values()):
        done = serve(queue)
        served[done.tenant] += done.num_tokens
        left[done.tenant] -= 1
        for one in served:
            for other in served:
                assert served[one] - served[other] <= largest[one] + largest[other]


@given(seed=st.integers(0, 2**32))
def test_shares_are_of_what_was_used_and_not_of_what_was_guessed(seed: int) -> None:
    """One tenant's answers are ten times as long as guessed, the other's a tenth: their shares come out even."""
    chance = random.Random(seed)
    queue: FairQueue[Ticket] = FairQueue()
    used = {"long": 0, "short": 0}
    for tenant in used:
        for _ in range(3000):
            queue.push(ticket(tenant, 100))
    while used["long"] + used["short"] < 40_000:
        done = serve(queue)
        really = chance.randint(900, 1100) if done.tenant == "long" else chance.randint(5, 15)
        used[done.tenant] += really
        queue.correct(done, really - done.num_tokens)
    assert abs(used["long"] - used["short"]) < 3000


@given(
    flood=st.sampled_from([0, 1]),
    cost=st.integers(1, 400),
    victim_priority=st.sampled_from(PRIORITIES),
    victim_cost=st.integers(1, 400),
)
def test_nobody_starves_behind_an_endless_flood(flood: int, cost: int, victim_priority: int, victim_cost: int) -> None:
    queue: FairQueue[Ticket] = FairQueue()
    for _ in range(5):
        queue.push(ticket("flood", cost, flood))
    for _ in range(40):
        serve(queue)
        queue.push(ticket("flood", cost, flood))
    victim = ticket("quiet", victim_cost, victim_priority)
    queue.push(victim)
    num_before = 0
    while serve(queue) is not victim:
        queue.push(ticket("flood", cost, flood))
        num_before += 1
        # It never waited before, so it begins now, behind at most what began before it came.
        assert num_before <= 3


def test_the_lowest_priority_gets_a_fraction_and_not_nothing() -> None:
    queue: FairQueue[Ticket] = FairQueue()
    counts = dict.fromkeys(PRIORITIES, 0)
    for priority in PRIORITIES:
        for _ in range(3000):
            queue.push(ticket("a", 10, priority))
    for _ in range(2730):
        counts[serve(queue).priority] += 1
    assert [round(counts[priority] / 10) for priority in PRIORITIES] == [1, 16, 256]


def test_one_tenants_flood_takes_no_place_in_the_queue_from_others() -> None:
    traffic = Traffic(AdmissionCore(max_waiting=WAITING, max_wait_s=1e9))
    traffic.core.open(Capacity(max_sequences=1, max_tokens=TOKENS), traffic.now_s)
    for _ in range(50):
        traffic.ask(ticket("flood"))
    assert traffic.num_refused == 50 - 1 - WAITING
    for tenant in "bcdef":
        traffic.ask(ticket(tenant))
    assert sorted(one.tenant for one in traffic.waiting) == [*"bcdef", *["flood"] * (WAITING - 5)]
    traffic.ask(ticket("low", priority=-1))
    assert "low" not in [one.tenant for one in traffic.waiting]
    traffic.ask(ticket("flood", priority=1))
    assert [one.tenant for one in traffic.waiting if one.priority == 1] == ["flood"]


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32))
def test_tasks_that_are_cancelled_anywhere_leave_nothing_behind(seed: int) -> None:
    """The shell, with real tasks: each is cancelled at a random moment, or works and leaves."""

    async def traffic() -> None:
        chance = random.Random(seed)
        admission = Admission(max_waiting=WAITING, max_wait_s=1e9)
        admission.open(Capacity(max_sequences=2, max_tokens=TOKENS))
        most = 0

        async def request() -> None:
            nonlocal most
            mine = ticket(chance.choice("abc"), chance.choice([1, 50, 2000]), chance.choice(PRIORITIES))
            await admission.enter(mine)
            try:
                most = max(most, admission.load().num_admitted)
                for _ in range(chance.randrange(4)):
                    await asyncio.sleep(0)
            finally:
                admission.leave(mine, num_tokens=chance.randrange(300))

        tasks = []
        for _ in range(60):
            tasks.append(asyncio.create_task(request()))
            if chance.random() < 0.5:
                chance.choice(tasks).cancel()
            for _ in range(chance.randrange(3)):
                await asyncio.sleep(0)
        for end in await asyncio.gather(*tasks, return_exceptions=True):
            assert end is None or isinstance(end, QueueFullError | asyncio.CancelledError), end
        assert most <= 2
        load = admission.load()
        assert (load.num_admitted, load.num_admitted_tokens, sum(load.num_waiting.values())) == (0, 0, 0)
        assert not admission._futures

    asyncio.run(traffic())


@given(
    per_minute=st.integers(1, 1000),
    steps=st.lists(st.tuples(st.floats(-100, 100), st.integers(1, 50)), min_size=1, max_size=80),
)
def test_a_bucket_gives_no_more_than_a_minutes_worth_and_what_time_brings(
    per_minute: int, steps: list[tuple[float, int]]
) -> None:
    now_s = latest_s = 500.0
    bucket = Bucket(per_minute, now_s)
    taken = 0
    for passed_s, amount in steps:
        now_s += passed_s
        latest_s = max(latest_s, now_s)
        if amount <= per_minute and not bucket.wait_s(amount, now_s):
            bucket.take(amount, now_s)
            taken += amount
        # A clock that went back and forth brought no more than one that went straight to the latest time.
        assert taken <= per_minute + (latest_s - 500.0) * per_minute / 60 + 1e-3


@given(per_minute=st.integers(1, 10_000), amount=st.integers(1, 20_000))
def test_waiting_as_long_as_told_is_enough(per_minute: int, amount: int) -> None:
    bucket = Bucket(per_minute, 0.0)
    bucket.take(amount, 0.0)
    wait_s = bucket.wait_s(amount, 0.0)
    assert bucket.wait_s(amount, wait_s) == 0.0
