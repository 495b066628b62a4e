"""What the scheduler does for those who wait: streams do not pause for prompts, priorities, tenants' own prefixes."""

from __future__ import annotations

from seamount.core.sampling import SamplingParams
from seamount.engine.blocks import BlockPool
from seamount.engine.scheduler import MAX_PAUSE_S, Scheduler, Work
from seamount.engine.sequence import Sequence

BLOCK = 4


def sequence(name: str, length: int = 3, first_token: int = 0) -> Sequence:
    return Sequence(name, 0, tuple(range(first_token, first_token + length)), SamplingParams(), seed=1, max_tokens=100)


def scheduler(num_blocks: int = 4096, **options: int) -> Scheduler:
    settings = {"max_num_seqs": 8, "max_step_tokens": 2048, **options}
    return Scheduler(BlockPool(num_blocks, BLOCK), **settings)


def step(of: Scheduler) -> dict[str, int]:
    """Run a step; return how many tokens of each request it computed."""
    work = of.schedule()
    completes = [item.completes for item in work]
    of.advance(work)
    for item, complete in zip(work, completes, strict=True):
        if complete:
            item.sequence.token_ids.append(9)
    return {item.sequence.request_id: item.num_new for item in work}


def test_one_prompt_alone_has_the_whole_step() -> None:
    alone = scheduler()
    alone.measured([Work(sequence("past", 100), 100)], took_s=100.0)
    alone.add([sequence("long", 2000)])
    assert step(alone) == {"long": 2000}


def test_beside_streams_a_prompt_is_cut_to_what_takes_no_longer_than_the_longest_pause() -> None:
    busy = scheduler()
    busy.add([sequence("stream")])
    step(busy)
    busy.measured([Work(sequence("past", 1000), 1000)], took_s=10 * MAX_PAUSE_S)
    busy.add([sequence("long", 250), sequence("next", 80, 1000)])
    assert step(busy) == {"stream": 1, "long": 100}
    assert step(busy) == {"stream": 1, "long": 100}
    assert step(busy) == {"stream": 1, "long": 50, "next": 50}
    assert step(busy) == {"stream": 1, "long": 1, "next": 30}


def test_a_slow_machine_still_gets_on_and_a_fast_one_is_not_held_back() -> None:
    busy = scheduler()
    busy.add([sequence("stream")])
    step(busy)
    busy.measured([Work(sequence("past", 1000), 1000)], took_s=1e6)
    busy.add([sequence("long", 4000)])
    assert step(busy) == {"stream": 1, "long": 64}
    for _ in range(200):
        busy.measured([Work(sequence("past", 1000), 1000)], took_s=1e-6)
    assert step(busy) == {"stream": 1, "long": 2047}


def test_steps_without_prompts_say_nothing_about_prompts() -> None:
    busy = scheduler()
    busy.add([sequence("stream")])
    step(busy)
    busy.measured([Work(sequence("decode"), 1)], took_s=1e6)
    busy.add([sequence("long", 2000)])
    assert step(busy) == {"stream": 1, "long": 512}


def test_the_higher_priority_begins_first_and_equals_in_their_order() -> None:
    waiting = scheduler(max_num_seqs=1)
    for name, priority in (("a", 0), ("low", -1), ("b", 0), ("high", 1), ("c", 0)):
        waiting.add([sequence(name)], priority=priority)
    assert [one.request_id for one in waiting.waiting] == ["high", "a", "b", "c", "low"]


def test_the_lower_priority_loses_its_blocks_first_and_waits_before_its_equals() -> None:
    small = scheduler(num_blocks=4, max_step_tokens=64)
    low, high, last = sequence("low", 4), sequence("high", 4), sequence("last", 4)
    small.add([low], priority=-1)
    small.add([high], priority=1)
    assert step(small) == {"high": 4, "low": 4}
    small.add([last], priority=-1)
    for one in (high, low):
        one.token_ids += [9] * 3
    assert step(small) == {"high": 4, "low": 4}
    # Both need a third block now, and there is none: the low one goes, though it came first.
    assert step(small) == {"high": 1}
    assert [one.request_id for one in small.waiting] == ["low", "last"]
    assert small.num_preemptions == 1


def test_prefixes_are_found_under_the_same_salt_only() -> None:
    shared = scheduler()
    found = {}
    for name, salt in (("first", "a"), ("same", "a"), ("other", "b"), ("open", "")):
        one = sequence(name, 17)
        shared.add([one], cache_salt=salt)
        step(shared)
        found[name] = one.num_cached
        shared.remove(one)
    assert found == {"first": 0, "same": 16, "other": 0, "open": 0}
