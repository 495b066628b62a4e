"""What is remembered: a uniform sample of all that was seen, whatever the tasks, the same again for the same seed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seamount.training.continual.reservoir import Reservoir


def remembered(size: int, seed: int, counts: list[int]) -> Reservoir[int]:
    """The reservoir of a stream of numbers from 0, which comes in tasks of these counts."""
    found: Reservoir[int] = Reservoir(size, seed)
    for count in counts:
        found = found.extended(count, range(found.num_seen, found.num_seen + count).__getitem__)
    return found


def test_each_thing_is_kept_as_likely_as_any_other() -> None:
    size, total, num_seeds = 8, 40, 2000
    kept = np.array([remembered(size, seed, [25, 15]).kept for seed in range(num_seeds)])
    times = np.bincount(kept.ravel(), minlength=total)
    wanted = num_seeds * size / total
    # Chi-squared with 39 degrees of freedom is above 73 once in a thousand times; draws are fixed by their seeds.
    assert ((times - wanted) ** 2 / wanted).sum() < 73
    pairs = np.zeros((total, total))
    for row in kept:
        pairs[np.ix_(row, row)] += 1
    together = pairs[np.triu_indices(total, 1)]
    assert together.mean() == pytest.approx(num_seeds * size * (size - 1) / (total * (total - 1)))
    assert together.max() < 2 * together.mean()


@given(st.integers(1, 12), st.integers(0, 9), st.lists(st.integers(0, 15), max_size=5))
def test_how_the_stream_is_cut_into_tasks_does_not_matter(size: int, seed: int, counts: list[int]) -> None:
    found = remembered(size, seed, counts)
    assert found == remembered(size, seed, [sum(counts)])
    assert len(set(found.kept)) == len(found.kept) == min(size, sum(counts))
    assert found.num_seen == sum(counts) and all(0 <= thing < found.num_seen for thing in found.kept)


def test_other_seeds_remember_others_and_no_room_remembers_none() -> None:
    assert remembered(5, 1, [50]).kept != remembered(5, 2, [50]).kept
    none = remembered(0, 1, [50])
    assert none.kept == () and none.num_seen == 50


def test_only_what_is_kept_is_asked_for() -> None:
    asked: list[int] = []

    def thing(index: int) -> int:
        asked.append(index)
        return index

    kept = Reservoir[int](4, 3).extended(1000, thing).kept
    assert sorted(asked) == sorted(kept)
