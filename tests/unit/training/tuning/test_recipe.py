"""Recipes: what a person wrote is checked field by field, and the shipped ones are recipes."""

from __future__ import annotations

from pathlib import Path

import pytest
import recipe_table

from seamount.core.errors import ConfigError
from seamount.training.tuning.recipe import TuneRecipe

RECIPES = Path(__file__).parents[4] / "recipes"


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["full", "lora", "qlora"])
def test_the_shipped_recipes_are_read_and_come_back_as_they_were(name: str, tmp_path: Path) -> None:
    recipe = TuneRecipe.from_file(RECIPES / f"{name}.yaml")
    assert TuneRecipe.from_file(write(tmp_path, recipe.to_yaml())) == recipe
    assert ("none" if recipe.adapter is None else recipe.adapter.method) == name.replace("full", "none")


def test_fields_are_changed_on_the_way(tmp_path: Path) -> None:
    path = write(tmp_path, "model: a\noutput: b\ndata: {max_length: 100}\n")
    changes = ("data.max_length=50", "adapter=null", "optimizer.learning_rate=1e-4", "data.train=[x, y]")
    recipe = TuneRecipe.from_file(path, changes)
    assert recipe.data.max_length == 50
    assert recipe.adapter is None
    assert recipe.learning_rate == 1e-4
    assert recipe.data.train == (Path("x"), Path("y"))


def test_without_a_rate_each_method_has_its_own(tmp_path: Path) -> None:
    path = write(tmp_path, "model: a\noutput: b\n")
    assert TuneRecipe.from_file(path).learning_rate > TuneRecipe.from_file(path, ("adapter=null",)).learning_rate


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: a", "output"),
        ("model: a\noutput: b\nlearning_rat: 1", "learning_rat"),
        ("model: a\noutput: b\nbatch: {examples: 0}", "batch.examples"),
        ("model: a\noutput: b\nschedule: {kind: plateau}", "plateau"),
        ("model: a\noutput: b\nexperts: {mtp_weight: 0.3}", "MTP"),
        ("model: a\noutput: b\ndata: {max_length: 9000}", "micro_tokens"),
        ("- a list", "no recipe"),
        ("a: [", "not valid YAML"),
        ("a: \x00", "not valid YAML"),
        ("", "no recipe"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        TuneRecipe.from_file(write(tmp_path, text))


@pytest.mark.parametrize("change", ["epochs", "=3", "a..b=1", "schedule.epochs=[", "nothing.here=1"])
def test_a_change_that_is_none_is_an_error(tmp_path: Path, change: str) -> None:
    with pytest.raises(ConfigError):
        TuneRecipe.from_file(write(tmp_path, "model: a\noutput: b\n"), (change,))


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        TuneRecipe.from_file(tmp_path / "none.yaml")


def test_the_document_tells_every_field() -> None:
    assert recipe_table.written() == recipe_table.table()
    assert "|  |" not in recipe_table.table()
