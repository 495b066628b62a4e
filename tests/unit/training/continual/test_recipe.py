"""What a recipe of continual learning refuses, and the fields that Python callers may give without their section."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from continual_site import records

from seamount.core.errors import ConfigError
from seamount.training.continual.pipeline import ContinualLearning
from seamount.training.continual.recipe import ContinualRecipe, ContinualSection, from_fields

RECIPES = Path(__file__).parents[4] / "recipes"
FIELDS: dict[str, Any] = {"model": "seamount-tiny", "output": "runs/x", "adapter": None}
TASKS = [{"task_id": "a", "data": "a.jsonl"}, {"task_id": "b", "data": ["b.jsonl", "c.jsonl"]}]


def test_fields_of_a_section_may_stand_by_themselves() -> None:
    recipe = from_fields({**FIELDS, "learning_rate": 1e-3, "epochs": 2, "memory_buffer_size": 7, "tasks": TASKS})
    assert recipe.learning_rate == 1e-3 and recipe.schedule.epochs == 2 and recipe.continual.memory_buffer_size == 7
    assert recipe.tasks[1].data == (Path("b.jsonl"), Path("c.jsonl"))


def test_a_section_and_one_of_its_fields_go_together() -> None:
    recipe = from_fields({**FIELDS, "schedule": {"kind": "constant"}, "epochs": 2})
    assert recipe.schedule.kind == "constant" and recipe.schedule.epochs == 2


@pytest.mark.parametrize("section", [None, 5, "constant"])
def test_what_is_no_section_takes_no_field(section: Any) -> None:
    with pytest.raises(ConfigError, match="schedule: must be a section"):
        from_fields({**FIELDS, "schedule": section, "epochs": 2})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tasks": [TASKS[0], TASKS[0]]}, "Two tasks have the id 'a'"),
        ({"tasks": [{"task_id": "a"}]}, "tasks.0.data"),
        ({"tasks": [{"task_id": "", "data": "a"}]}, "tasks.0.task_id"),
        ({"data": {"train": "a.jsonl"}}, "each of `tasks` has its own"),
        ({"data": {"scored": 0}}, "scored"),
        ({"strategy": "fsdp"}, "ddp"),
        ({"batch": {"examples": 1}}, "2 at least"),
        ({"continual": {"memory_buffer_size": -1}}, "memory_buffer_size"),
        ({"continual": {"replay_share": 1.0}}, "replay_share"),
        ({"wrong": 1}, "wrong"),
        (
            {"continual": {"replay_shar": 0.5}},
            "continual.replay_shar: there is no such field; continual.replay_share is",
        ),
        ({"tasks": [{"task_id": "a", "dat": "x"}]}, "tasks.0.dat: there is no such field; tasks.data is one"),
        ({"continual": {"ewc_weight": True}}, "must be a number, not true"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ContinualRecipe.checked({**FIELDS, **changes}, where="test")


def test_the_document_has_each_field_with_its_value() -> None:
    text = (RECIPES.parent / "docs" / "tuning-continual.md").read_text(encoding="utf-8")
    for name, field in ContinualSection.model_fields.items():
        value = str(field.default).lower() if isinstance(field.default, bool) else field.default
        assert f"| `continual.{name}` | `{value}` | " in text


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ConfigError, match="no method 'dora'"):
        ContinualLearning.load("seamount-tiny", method="dora")  # type: ignore[arg-type]


def test_what_is_no_run_cannot_be_rolled_back(tmp_path: Path) -> None:
    run = ContinualLearning.load("seamount-tiny", output=tmp_path / "run")
    assert run.versions() == []
    with pytest.raises(ConfigError, match="holds no run"):
        run.rollback(1)


def test_the_recipe_runs(tmp_path: Path, model_folder: Path) -> None:
    data = {name: tmp_path / f"{name}.jsonl" for name in ("first", "second")}
    for name, path in data.items():
        path.write_text("".join(f"{json.dumps(row)}\n" for row in records(name)), encoding="utf-8")
    given = [{"task_id": name, "data": str(path)} for name, path in data.items()]
    recipe = RECIPES / "continual.yaml"
    run = ContinualLearning.from_recipe(recipe, model=str(model_folder), output=str(tmp_path / "run"), tasks=given)
    assert run.recipe.learning_rate == 5e-4
    assert run.train().tasks == ("first", "second")
    assert ContinualLearning.from_recipe(tmp_path / "run" / "recipe.yaml").versions()[2].task_id == "second"
