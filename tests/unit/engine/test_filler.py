"""Sequences that fill idle time: what they may cost those who wait for their answers, and that they get on."""

from __future__ import annotations

import pytest

from seamount.core.requests import IDLE_PRIORITY
from seamount.core.sampling import SamplingParams
from seamount.engine.blocks import BlockPool
from seamount.engine.filler import SHARE
from seamount.engine.scheduler import Scheduler
from seamount.engine.sequence import Sequence

ALONE_S = 0.01


def sequence(name: str, length: int = 3) -> Sequence:
    first = len(name)  # nobody's beginning is another one's
    return Sequence(name, 0, tuple(range(first, first + length)), SamplingParams(), seed=1, max_tokens=10_000)


def scheduler(num_blocks: int = 4096) -> Scheduler:
    return Scheduler(BlockPool(num_blocks, 4), max_num_seqs=8, max_step_tokens=2048)


def step(of: Scheduler, cost_s: float = 0.0) -> set[str]:
    """Run a step that takes `ALONE_S`, and `cost_s` more with those who fill idle time; return whose it was."""
    work = of.schedule()
    of.advance(work)
    for item in work:
        item.sequence.token_ids.append(9)
    names = {item.sequence.request_id for item in work}
    of.measured(work, ALONE_S + (cost_s if "batch" in names else 0.0))
    return names


def running_batch() -> Scheduler:
    found = scheduler()
    found.add([sequence("batch")], priority=IDLE_PRIORITY)
    assert step(found) == {"batch"}
    return found


def test_alone_they_have_every_step() -> None:
    found = running_batch()
    assert [step(found) for _ in range(50)] == [{"batch"}] * 50


@pytest.mark.parametrize("cost_s", [0.001, 0.03, 0.3])
def test_beside_somebody_they_take_no_more_than_their_share_and_some(cost_s: float) -> None:
    found = running_batch()
    found.add([sequence("person")])
    steps = [step(found, cost_s) for _ in range(2000)]
    assert all("person" in names for names in steps)
    joined = sum("batch" in names for names in steps)
    taken = joined * cost_s / (len(steps) * ALONE_S)
    assert joined > 0
    assert taken <= SHARE * 1.05
    # what costs less than its share is in nearly every step, else the share is used
    assert joined > 0.95 * len(steps) if cost_s < SHARE * ALONE_S else taken > SHARE * 0.8


def test_whoever_comes_has_the_next_step_for_itself() -> None:
    found = running_batch()
    found.add([sequence("more")], priority=IDLE_PRIORITY)
    found.add([sequence("person", 100)])
    assert step(found) == {"person"}


def test_they_go_on_at_once_when_nobody_waits_any_more() -> None:
    found = running_batch()
    person = sequence("person")
    found.add([person])
    for _ in range(3):
        step(found, cost_s=5.0)
    found.remove(person)
    assert step(found) == {"batch"}


def test_one_very_slow_step_does_not_keep_them_out_for_long() -> None:
    found = running_batch()
    found.add([sequence("person")])
    while "batch" not in step(found, cost_s=3600.0):
        pass
    waited = 1
    while "batch" not in step(found):
        waited += 1
    assert waited * ALONE_S < 10


def test_somebody_who_finds_no_memory_does_not_stop_the_machine() -> None:
    found = scheduler(num_blocks=4)
    found.add([sequence("batch", 12)], priority=IDLE_PRIORITY)
    assert step(found) == {"batch"}
    found.add([sequence("person", 12)])
    assert step(found) == {"batch"}
