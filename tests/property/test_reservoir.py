"""The reservoir is a uniform sample of all that went by, however it came."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from seamount.training.continual.reservoir import Reservoir


@given(st.integers(0, 20), st.integers(0, 1000), st.lists(st.integers(0, 40), max_size=6))
def test_what_is_kept_does_not_depend_on_how_the_stream_was_cut(size: int, seed: int, parts: list[int]) -> None:
    cut = Reservoir[int](size, seed)
    for part in parts:
        cut = cut.extended(part, range(cut.num_seen, cut.num_seen + part).__getitem__)
    total = sum(parts)
    assert cut == Reservoir[int](size, seed).extended(total, lambda index: index)
    assert len(cut.kept) == min(size, total) and len(set(cut.kept)) == len(cut.kept)


def test_each_thing_is_kept_equally_often() -> None:
    size, total, trials = 10, 60, 3000
    counts = [0] * total
    for seed in range(trials):
        for number in Reservoir[int](size, seed).extended(total, lambda index: index).kept:
            counts[number] += 1
    expected = trials * size / total
    chi_square = sum((count - expected) ** 2 / expected for count in counts) / (1 - size / total)
    # A sample without replacement; 59 degrees of freedom: five standard deviations.
    assert chi_square < 59 + 5 * math.sqrt(2 * 59)


def test_only_what_is_kept_is_asked_for() -> None:
    asked: list[int] = []

    def thing(index: int) -> int:
        asked.append(index)
        return index

    kept = Reservoir[int](3, 1).extended(1000, thing).kept
    assert sorted(asked) == sorted(kept)
