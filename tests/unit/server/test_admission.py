"""Admission: how long a wait it foresees, deadlines, and what becomes of those who wait when something happens."""

from __future__ import annotations

import asyncio

import pytest

from seamount.core.errors import DeadlineError, DrainingError, QueueFullError
from seamount.server.admission.core import AdmissionCore, Capacity, Ticket
from seamount.server.admission.queue import Admission


class Clock:
    """Time that moves when told to."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def ticket(tokens: int = 100, tenant: str = "a", deadline_s: float | None = None) -> Ticket:
    return Ticket(tenant=tenant, priority=0, num_sequences=1, num_tokens=tokens, deadline_s=deadline_s)


def one_at_a_time(**settings: float) -> tuple[Admission, Clock]:
    clock = Clock()
    admission = Admission(**{"max_waiting": 10, "max_wait_s": 1e6, **settings}, clock=clock)
    admission.open(Capacity(max_sequences=1, max_tokens=1000))
    return admission, clock


async def entering(admission: Admission, wanted: Ticket) -> asyncio.Task[None]:
    """Begin to enter, as far as it goes without anybody leaving."""
    task = asyncio.create_task(admission.enter(wanted))
    await asyncio.sleep(0)
    return task


async def test_one_request_alone_does_not_even_yield():
    admission, _ = one_at_a_time()
    entry = admission.enter(ticket())
    with pytest.raises(StopIteration):
        entry.send(None)
    assert admission.load().num_admitted == 1


async def test_before_the_engine_is_ready_requests_wait():
    admission = Admission(max_waiting=10, max_wait_s=60)
    first = await entering(admission, ticket())
    assert not first.done()
    admission.open(Capacity(max_sequences=1, max_tokens=1000))
    await first


async def test_a_full_queue_says_how_long_its_tokens_take_at_the_measured_speed():
    admission, clock = one_at_a_time(max_waiting=3)
    await admission.enter(first := ticket())
    waiting = [await entering(admission, ticket(tokens=300)) for _ in range(3)]
    for _ in range(8):  # two seconds
        clock.now_s += 0.25
        admission.progress(12)
    speed = admission.load().tokens_per_s
    assert speed == pytest.approx(48, rel=0.05)
    with pytest.raises(QueueFullError) as caught:
        await admission.enter(ticket(tokens=100))
    assert caught.value.retry_after == pytest.approx((3 * 300 + 100) / speed)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    admission.leave(first)


async def test_speed_is_measured_only_while_somebody_waits():
    """An engine with one stream is slow for want of work; a burst is not to be refused for that."""
    admission, clock = one_at_a_time()
    await admission.enter(first := ticket())
    clock.now_s += 100
    admission.progress(1)
    waiting = await entering(admission, ticket())
    assert admission.load().tokens_per_s == 0
    clock.now_s += 2
    admission.progress(2000)
    assert admission.load().tokens_per_s == pytest.approx(1000)
    admission.leave(first)
    await waiting
    clock.now_s += 1000
    admission.progress(1)
    assert admission.load().tokens_per_s == pytest.approx(1000)


async def test_a_wait_beyond_the_limit_is_refused_at_once():
    admission, clock = one_at_a_time(max_wait_s=60)
    await admission.enter(ticket())
    waiting = await entering(admission, ticket(tokens=500))
    clock.now_s += 10
    admission.progress(100)  # 10 a second: 50 s for what waits
    with pytest.raises(QueueFullError, match="would wait") as caught:
        await admission.enter(ticket(tokens=200))
    assert caught.value.retry_after == pytest.approx(10)
    # Another tenant's fair share comes sooner: 200 of the 500 tokens before it, and its own.
    other = await entering(admission, ticket(tokens=200, tenant="b"))
    assert not other.done()
    waiting.cancel()
    other.cancel()


async def test_a_deadline_that_cannot_be_met_is_refused_at_once_and_one_that_passes_ends_the_wait():
    admission, clock = one_at_a_time()
    await admission.enter(first := ticket())
    with pytest.raises(DeadlineError):
        await admission.enter(ticket(deadline_s=clock.now_s - 1))
    late = await entering(admission, ticket(deadline_s=clock.now_s + 0.001))
    with pytest.raises(DeadlineError):
        await late
    patient = await entering(admission, ticket(tokens=500))
    clock.now_s += 10
    admission.progress(100)
    with pytest.raises(DeadlineError, match="would wait") as caught:
        await admission.enter(ticket(deadline_s=clock.now_s + 30))
    assert caught.value.retry_after == pytest.approx(60)
    admission.leave(first, num_tokens=100)
    await patient
    assert admission.load().num_admitted == 1


async def test_who_leaves_in_the_moment_of_being_let_in_gives_the_place_on():
    admission, _ = one_at_a_time()
    await admission.enter(first := ticket())
    second = await entering(admission, ticket())
    third = await entering(admission, ticket())
    admission.leave(first)  # lets the second in, whose task has not run yet
    second.cancel()
    await third
    assert second.cancelled()
    assert admission.load().num_admitted == 1


async def test_closing_ends_every_wait_and_refuses_who_comes():
    admission, _ = one_at_a_time()
    await admission.enter(first := ticket())
    waiting = await entering(admission, ticket())
    admission.close(DrainingError("closing"))
    with pytest.raises(DrainingError):
        await waiting
    with pytest.raises(DrainingError):
        await admission.enter(ticket())
    admission.leave(first)
    assert admission.load().num_admitted == 0


async def test_who_yields_a_place_in_the_queue_is_told_when_to_come_again():
    admission, _ = one_at_a_time(max_waiting=3)
    await admission.enter(ticket())
    flood = [await entering(admission, ticket()) for _ in range(3)]
    other = await entering(admission, ticket(tenant="b"))
    with pytest.raises(QueueFullError) as caught:
        await flood[-1]
    assert caught.value.retry_after is not None
    assert [task.done() for task in (*flood, other)] == [False, False, True, False]
    for task in (*flood, other):
        task.cancel()


def test_answers_to_come_are_guessed_from_those_that_came():
    core = AdmissionCore(max_waiting=1, max_wait_s=1)
    assert core.guess(10, 2, 50) == 10 + 2 * 50
    for _ in range(200):
        core.learn(600, 2)
    assert core.guess(10, 1, 10_000) == pytest.approx(310, abs=2)
    assert core.guess(10, 1, 7) == 17


async def test_a_request_larger_than_everything_runs_alone():
    admission, _ = one_at_a_time()
    await admission.enter(giant := ticket(tokens=10_000))
    small = await entering(admission, ticket(tokens=1))
    assert not small.done()
    admission.leave(giant, num_tokens=10_000)
    await small


async def test_idle_time_is_filled_but_for_the_room_of_who_comes():
    admission = Admission(max_waiting=10, max_wait_s=1e6)
    admission.open(Capacity(max_sequences=4, max_tokens=10_000))
    batch = [Ticket(tenant="batch", priority=-1, num_sequences=1, num_tokens=100) for _ in range(4)]
    waiting = [await entering(admission, one) for one in batch]
    assert [one.state for one in batch] == ["admitted", "admitted", "waiting", "waiting"]
    people = [ticket(), ticket(tenant="b")]
    for one in people:
        await asyncio.wait_for(admission.enter(one), timeout=1)
    later = ticket()
    entry = await entering(admission, later)
    admission.leave(people[0], num_tokens=100)
    await entry
    admission.leave(batch[0], num_tokens=100)
    assert batch[2].state == "admitted", "and it starves of nobody"
    for task in waiting:
        task.cancel()
