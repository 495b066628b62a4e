"""Laws of scheduler and blocks over random traffic: no block is leaked or shared by mistake, and everyone finishes."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seamount.core.requests import IDLE_PRIORITY
from seamount.core.sampling import SamplingParams
from seamount.engine.blocks import BlockPool, chain_hash
from seamount.engine.scheduler import Scheduler, Work
from seamount.engine.sequence import Sequence

BLOCK_SIZE = 4
NUM_BLOCKS = 12
MAX_LEN = BLOCK_SIZE * NUM_BLOCKS


RIGHT, WRONG = 7, 8


class Machine:
    """A scheduler with a pretended cache: each slot remembers which prefix was computed into it.

    Every sequence goes on with the token RIGHT; where `guesses` is given, it guesses up to three of them and errs.
    """

    def __init__(
        self,
        *,
        max_num_seqs: int,
        max_step_tokens: int,
        enable_prefix_cache: bool,
        guesses: random.Random | None = None,
    ) -> None:
        self.pool = BlockPool(NUM_BLOCKS, BLOCK_SIZE)
        self.scheduler = Scheduler(
            self.pool,
            max_num_seqs=max_num_seqs,
            max_step_tokens=max_step_tokens,
            enable_prefix_cache=enable_prefix_cache,
        )
        self.max_num_seqs, self.max_step_tokens = max_num_seqs, max_step_tokens
        self.guesses = guesses
        self.num_accepted = 0
        self.slots: dict[int, tuple[int, ...]] = {}
        self.live: list[Sequence] = []
        self.finished: list[Sequence] = []

    def add(self, prompt: list[int], max_tokens: int, n: int = 1, priority: int = 0) -> None:
        group: list[Sequence] = []
        for index in range(n):
            leader = group[0] if group else None
            group.append(
                Sequence("r", index, tuple(prompt), SamplingParams(), seed=1, max_tokens=max_tokens, leader=leader)
            )
        self.scheduler.add(group, priority=priority)
        self.live += group

    def step(self) -> list[Work]:
        work = self.scheduler.schedule()
        assert sum(item.num_new + item.num_drafts for item in work) <= self.max_step_tokens
        assert len(self.scheduler.running) <= self.max_num_seqs
        completes = [item.completes for item in work]
        for item in work:
            self._compute(item)
        self.scheduler.advance(work)
        for item, complete in zip(work, completes, strict=True):
            if complete:
                self._sample(item)
        self.scheduler.measured(work, 0.01 * len(work))
        self.check()
        return work

    def _compute(self, item: Work) -> None:
        """What the network does: read the whole context through the block table, write the new entries."""
        sequence = item.sequence
        first, last = sequence.num_computed, sequence.num_computed + item.num_new + item.num_drafts
        assert 0 < item.num_new <= sequence.num_pending
        assert item.num_drafts == 0 or (item.completes and item.num_drafts <= len(sequence.draft_token_ids))
        tokens = sequence.token_ids + sequence.draft_token_ids
        for position in range(first, last):
            block = sequence.blocks[position // BLOCK_SIZE]
            assert self.pool.references(block) == 1, "wrote into a block that another sequence reads"
            self.slots[block * BLOCK_SIZE + position % BLOCK_SIZE] = tuple(tokens[: position + 1])
        for position in range(last):
            slot = sequence.blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
            assert self.slots[slot] == tuple(tokens[: position + 1]), "read another prefix's entry"

    def _sample(self, item: Work) -> None:
        sequence = item.sequence
        for guess in [*sequence.draft_token_ids[: item.num_drafts], None]:
            sequence.token_ids.append(RIGHT)
            if sequence.num_output_tokens == sequence.max_tokens:
                self.scheduler.remove(sequence)
                self.live.remove(sequence)
                self.finished.append(sequence)
            if guess != RIGHT or sequence.finished:
                break
            self.scheduler.accept(sequence)
            self.num_accepted += 1
        if self.guesses is not None:
            most = max(sequence.max_tokens - sequence.num_output_tokens - 1, 0)
            count = min(self.guesses.randint(0, 3), most)
            sequence.draft_token_ids = self.guesses.choices([RIGHT, WRONG], [3, 1], k=count)

    def abort(self, which: int) -> None:
        sequence = self.live.pop(which % len(self.live))
        self.scheduler.remove(sequence)
        self.check()

    def check(self) -> None:
        """Every reference is held by exactly one live sequence, and every other block is free."""
        held: dict[int, int] = {}
        for sequence in self.live:
            assert len(set(sequence.blocks)) == len(sequence.blocks)
            for block in sequence.blocks:
                held[block] = held.get(block, 0) + 1
        for block in range(NUM_BLOCKS):
            assert self.pool.references(block) == held.get(block, 0)
        assert self.pool.num_free == NUM_BLOCKS - len(held)
        assert len(self.live) == len(self.scheduler.running) + len(self.scheduler.waiting)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    max_num_seqs=st.integers(1, 6),
    max_step_tokens=st.integers(1, 40),
    enable_prefix_cache=st.booleans(),
    guessing=st.booleans(),
)
def test_random_traffic_leaks_and_mixes_nothing(
    seed: int, max_num_seqs: int, max_step_tokens: int, enable_prefix_cache: bool, guessing: bool
) -> None:
    chance = random.Random(seed)
    machine = Machine(
        max_num_seqs=max_num_seqs,
        max_step_tokens=max_step_tokens,
        enable_prefix_cache=enable_prefix_cache,
        guesses=random.Random(seed) if guessing else None,
    )
    for _ in range(60):
        action = chance.random()
        if action < 0.3:
            length = chance.randint(1, MAX_LEN - 1)
            # Few different tokens and a common opening make equal prefixes frequent.
            prompt = [1] * chance.randint(0, length) + [chance.randint(1, 2) for _ in range(length)]
            prompt = prompt[:length]
            priority = chance.choice([IDLE_PRIORITY, -1, 0, 0, 1])
            machine.add(prompt, chance.randint(1, MAX_LEN - length), n=chance.choice([1, 1, 1, 3]), priority=priority)
        elif action < 0.4 and machine.live:
            machine.abort(chance.randrange(100))
        else:
            machine.step()
    for _ in range(3000):
        if not machine.live:
            break
        assert machine.step(), "sequences are queued and the step is empty"
    assert not machine.live
    assert machine.pool.num_free == NUM_BLOCKS


def test_an_equal_prompt_is_found_in_the_cache_but_for_its_last_token() -> None:
    machine = Machine(max_num_seqs=4, max_step_tokens=64, enable_prefix_cache=True)
    prompt = list(range(100, 117))
    machine.add(prompt, 1)
    machine.step()
    machine.add(prompt, 2)
    (work,) = machine.step()
    assert work.sequence.num_cached == 16
    assert work.num_new == 1


def test_the_cache_can_be_switched_off() -> None:
    machine = Machine(max_num_seqs=4, max_step_tokens=64, enable_prefix_cache=False)
    for _ in range(2):
        machine.add(list(range(17)), 1)
        (work,) = machine.step()
        assert work.num_new == 17


def test_a_hash_collision_does_not_hand_out_foreign_tokens() -> None:
    pool = BlockPool(2, BLOCK_SIZE)
    block = pool.allocate()
    assert block is not None
    key = chain_hash(None, [1, 2, 3, 4])
    pool.publish(block, key, [1, 2, 3, 4])
    assert pool.find(key, [1, 2, 3, 4]) == block
    assert pool.find(key, [1, 2, 3, 5]) is None


def test_the_same_block_after_another_beginning_is_another_block() -> None:
    assert chain_hash(chain_hash(None, [1, 2]), [3, 4]) != chain_hash(chain_hash(None, [2, 1]), [3, 4])


def test_the_least_recently_released_prefix_goes_first() -> None:
    pool = BlockPool(2, BLOCK_SIZE)
    first, second = pool.allocate(), pool.allocate()
    assert first is not None and second is not None
    pool.publish(first, b"first", [1])
    pool.publish(second, b"second", [2])
    pool.release([first])
    pool.release([second])
    assert pool.allocate() == first
    assert pool.find(b"first", [1]) is None
    assert pool.find(b"second", [2]) == second


def test_releasing_twice_is_a_bug_that_shows() -> None:
    pool = BlockPool(1, BLOCK_SIZE)
    block = pool.allocate()
    assert block is not None
    pool.release([block])
    with pytest.raises(RuntimeError, match="more often"):
        pool.release([block])


def test_decodes_go_on_beside_a_long_prompt() -> None:
    machine = Machine(max_num_seqs=4, max_step_tokens=8, enable_prefix_cache=False)
    machine.add([1, 2], 10)
    machine.step()
    machine.add(list(range(30)), 1)
    for _ in range(3):
        decode, chunk = machine.step()
        assert decode.num_new == 1
        assert chunk.num_new == 7


def test_guesses_take_only_what_others_leave() -> None:
    machine = Machine(max_num_seqs=4, max_step_tokens=8, enable_prefix_cache=False)
    machine.add([1, 2], 20)
    (sequence,) = machine.live
    machine.step()
    sequence.draft_token_ids = [RIGHT, RIGHT, WRONG]
    machine.add(list(range(20)), 1)
    decode, chunk = machine.step()
    assert (decode.num_new, decode.num_drafts, chunk.num_new) == (1, 0, 7)
    machine.abort(1)
    (decode,) = machine.step()
    assert (decode.num_new, decode.num_drafts, machine.num_accepted) == (1, 3, 2)
    assert sequence.num_output_tokens == 5
    assert sequence.num_pending == 1


def test_guesses_preempt_nobody() -> None:
    """Both sequences fill their block with the pending token; one block is left, which the first's guesses may take."""
    scheduler = Scheduler(BlockPool(3, 4), max_num_seqs=2, max_step_tokens=64, enable_prefix_cache=False)
    pair = [Sequence("r", i, (1, 2, 3), SamplingParams(), seed=0, max_tokens=9) for i in range(2)]
    scheduler.add(pair)
    scheduler.advance(scheduler.schedule())
    for sequence in pair:
        sequence.token_ids.append(RIGHT)
        sequence.draft_token_ids = [RIGHT, RIGHT]
    assert [item.num_drafts for item in scheduler.schedule()] == [2, 0]
    assert scheduler.num_preemptions == 0
