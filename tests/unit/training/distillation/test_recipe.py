"""What a distillation's recipe may say, and what it becomes for the student's run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from seamount.core.errors import ConfigError
from seamount.training.distillation.recipe import DistillRecipe

FIELDS: dict[str, Any] = {"teacher": "seamount-tiny", "student": {"shrink": 0.25}, "output": "run"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"student": {}}, "one of model, config and shrink"),
        ({"student": {"shrink": 0.25, "model": "x"}}, "one of model, config and shrink"),
        ({"student": {"shrink": 1.5}}, r"student\.shrink"),
        ({"student": {"config": {"rope_theta": float("nan")}}}, r"student: config holds what config.json cannot"),
        ({"model": "x"}, r"student\.model"),
        ({"adapter": {}}, "adapter: must be left out or null here"),
        ({"experts": {"mtp_weight": 0.1}}, r"mtp_weight"),
        ({"distillation": {"weight": 0}}, r"distillation\.weight"),
        ({"distillation": {"temperature": 0}}, r"distillation\.temperature"),
        ({"distillation": {"cache": "x"}}, "top_k"),
        ({"distillation": {"k": 3}}, r"distillation\.k"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        DistillRecipe.checked(FIELDS | changes, where="test")


def test_the_run_is_the_students_with_all_weights() -> None:
    recipe = DistillRecipe.checked(FIELDS | {"seed": 7, "schedule": {"steps": 9}}, where="test")
    run = recipe.tuning(Path("student"))
    assert (run.model, run.adapter, run.seed, run.schedule.steps) == ("student", None, 7, 9)
    assert type(run).__name__ == "TuneRecipe" and run.data.scored == 0
    named = DistillRecipe.checked(FIELDS | {"student": {"model": "x"}}, where="test")
    assert named.tuning(Path("x")).data.scored > 0


def test_the_cache_lies_in_the_run_unless_it_is_put_elsewhere() -> None:
    told = FIELDS | {"distillation": {"top_k": 4}}
    assert DistillRecipe.checked(told, where="test").cache_folder == Path("run/teacher-cache")
    told = FIELDS | {"distillation": {"top_k": 4, "cache": "other"}}
    assert DistillRecipe.checked(told, where="test").cache_folder == Path("other")
