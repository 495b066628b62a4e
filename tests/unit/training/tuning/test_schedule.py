"""Learning rates: the shape that each kind promises, over runs of any length."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seamount.training.tuning.recipe import ScheduleSection
from seamount.training.tuning.schedule import Schedule, num_steps

PEAK = 2e-4


def rates(steps: int, **fields: object) -> list[float]:
    schedule = Schedule(ScheduleSection.model_validate(fields), PEAK, steps)
    return [schedule.rate(step) for step in range(steps)]


@given(steps=st.integers(1, 300), kind=st.sampled_from(["cosine", "linear", "constant", "plateau"]))
def test_it_rises_never_passes_the_peak_and_is_never_zero(steps: int, kind: str) -> None:
    found = rates(steps, kind=kind, warmup_share=0.1)
    top = found.index(max(found))
    assert 0 < min(found) <= max(found) <= PEAK
    assert found[: top + 1] == sorted(found[: top + 1])
    assert found[top:] == sorted(found[top:], reverse=True)


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_it_ends_near_the_final_share(kind: str) -> None:
    assert rates(1000, kind=kind, final_share=0.1)[-1] == pytest.approx(0.1 * PEAK, rel=0.05)


def test_a_plateau_waits_for_as_many_bad_evaluations_as_it_was_told() -> None:
    section = ScheduleSection(kind="plateau", plateau_patience=2, plateau_factor=0.5, warmup_share=0.0)
    schedule = Schedule(section, PEAK, 100)
    for loss, wanted in ((1.0, 1.0), (1.1, 1.0), (1.1, 0.5), (0.9, 0.5), (0.95, 0.5), (2.0, 0.25)):
        schedule.evaluated(loss)
        assert schedule.rate(50) == pytest.approx(wanted * PEAK)


@pytest.mark.parametrize(
    ("fields", "per_epoch", "wanted"),
    [({"epochs": 3}, 10.0, 30), ({"epochs": 1}, 2.5, 3), ({"epochs": 0.01}, 10.0, 1), ({"steps": 7}, 10.0, 7)],
)
def test_how_long_a_run_is(fields: dict[str, float], per_epoch: float, wanted: int) -> None:
    assert num_steps(ScheduleSection.model_validate(fields), per_epoch) == wanted
