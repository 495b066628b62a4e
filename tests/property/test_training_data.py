"""What a step trains on: each epoch a permutation, each example in one micro-batch, whatever the ranks."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from seamount.training.examples.example import Example
from seamount.training.shards.order import Order
from seamount.training.shards.packing import MicroBatch, pack

SIZES = st.integers(1, 300)
SEEDS = st.integers(0, 2**63)


@given(SIZES, SIZES, SEEDS, st.booleans())
def test_every_epoch_is_a_permutation_and_its_steps_partition_it(size: int, batch: int, seed: int, mix: bool) -> None:
    order = Order(size, batch, seed, shuffle=mix)
    num_epochs = 3
    steps = [order.step(step) for step in range(-(-num_epochs * size // batch))]
    assert all(len(step) == batch and step.dtype == np.int64 for step in steps)
    seen = np.concatenate(steps)
    for epoch in range(num_epochs):
        assert np.array_equal(np.sort(seen[epoch * size : (epoch + 1) * size]), np.arange(size))


@given(st.integers(1, 10**13), st.integers(1, 50), SEEDS, st.integers(0, 10**6))
def test_going_on_at_a_step_is_going_there(size: int, batch: int, seed: int, step: int) -> None:
    walked = Order(size, batch, seed)
    for before in range(min(step, 3)):
        walked.step(before)
    found = walked.step(step)
    assert np.array_equal(found, Order(size, batch, seed).step(step))
    assert found.min() >= 0
    assert found.max() < size


@given(st.integers(2, 10**6), SEEDS, st.integers(1, 4))
def test_a_steps_examples_are_distinct_within_an_epoch(size: int, seed: int, share: int) -> None:
    batch = min(size // share, 500)
    assert len(set(Order(size, max(batch, 1), seed).step(0).tolist())) == max(batch, 1)


@st.composite
def examples_of_a_step(draw: st.DrawFn) -> list[tuple[int, Example]]:
    lengths = draw(st.lists(st.integers(2, 60), min_size=1, max_size=40))
    first = draw(st.integers(0, 1000))
    found, token = [], 0
    for number, length in enumerate(lengths):
        flags = np.arange(length) % 3 != 0
        found.append((first + 7 * number, Example(np.arange(token, token + length, dtype=np.int32), flags)))
        token += length
    return found


def of_all_ranks(examples: list[tuple[int, Example]], micro_tokens: int, world_size: int) -> list[list[MicroBatch]]:
    return [pack(examples, micro_tokens=micro_tokens, rank=rank, world_size=world_size) for rank in range(world_size)]


@given(examples_of_a_step(), st.integers(1, 100), st.integers(1, 9))
def test_every_example_is_packed_once_and_whole(
    examples: list[tuple[int, Example]], micro_tokens: int, world_size: int
) -> None:
    given_examples = dict(examples)
    seen = []
    for micro in (micro for mine in of_all_ranks(examples, micro_tokens, world_size) for micro in mine):
        assert micro.starts[0] == 0
        assert micro.starts[-1] == len(micro.token_ids) == len(micro.positions) == len(micro.trained)
        assert len(micro.token_ids) <= micro_tokens or len(micro.indices) == 1
        for index, start, end in zip(micro.indices, micro.starts, micro.starts[1:], strict=False):
            example = given_examples[index]
            assert np.array_equal(micro.token_ids[start:end].numpy(), example.token_ids)
            assert micro.positions[start:end].tolist() == list(range(end - start))
            assert np.array_equal(micro.trained[start:end].numpy(), example.trained & (not micro.is_filler))
        if not micro.is_filler:
            seen += micro.indices
    assert sorted(seen) == sorted(given_examples)


@given(examples_of_a_step(), st.integers(1, 100), st.integers(1, 9))
def test_ranks_compute_equally_often_and_about_as_much(
    examples: list[tuple[int, Example]], micro_tokens: int, world_size: int
) -> None:
    ranks = of_all_ranks(examples, micro_tokens, world_size)
    assert len({len(mine) for mine in ranks}) == 1
    totals = [sum(len(micro.token_ids) for micro in mine if not micro.is_filler) for mine in ranks]
    assert max(totals) - min(totals) <= max(len(example.token_ids) for _, example in examples)
    for mine in ranks:
        sizes = [len(micro.token_ids) for micro in mine if not micro.is_filler]
        assert sizes == sorted(sizes, reverse=True)


@given(examples_of_a_step(), st.integers(60, 200))
def test_packing_wastes_little(examples: list[tuple[int, Example]], micro_tokens: int) -> None:
    num_tokens = sum(len(example.token_ids) for _, example in examples)
    assert len(pack(examples, micro_tokens=micro_tokens)) <= 11 / 9 * (2 * num_tokens / micro_tokens + 1) + 1


@given(examples_of_a_step(), st.integers(1, 100), st.integers(1, 4))
def test_packing_is_the_same_each_time(examples: list[tuple[int, Example]], micro_tokens: int, world_size: int) -> None:
    first, second = (of_all_ranks(examples, micro_tokens, world_size) for _ in range(2))
    assert [[m.indices for m in mine] for mine in first] == [[m.indices for m in mine] for mine in second]
