"""Recipes: what is wrong is named, and nothing unknown is accepted."""

from pathlib import Path

import pytest
import yaml

import seamount
from seamount.core.errors import ConfigError
from seamount.models.config import ModelConfig
from seamount.training.pretraining.recipe import Recipe

RECIPES = Path(seamount.__file__).parents[2] / "recipes"


def test_the_shipped_recipe_is_valid_and_describes_a_network():
    recipe = Recipe.from_file(RECIPES / "seamount-tiny.yaml")
    config = ModelConfig.from_dict(recipe.model)
    assert max(recipe.data.buckets) <= config.max_position


def written(tmp_path, raw):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return path


def raw_recipe(make_recipe, tmp_path):
    return make_recipe(tmp_path).model_dump(mode="json")


def test_a_recipe_survives_writing_and_reading(make_recipe, tmp_path):
    recipe = make_recipe(tmp_path)
    assert Recipe.from_file(written(tmp_path, recipe.model_dump(mode="json"))) == recipe


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        (None, "learning_rate", 1.0),
        ("optimizer", "lerning_rate", 1.0),
        ("schedule", "decay_steps", 100),
        ("data", "buckets", [32, 16]),
        ("data", "stages", [{"from_step": 5, "samples": 1}]),
        ("optimizer", "learning_rate", -1.0),
    ],
)
def test_a_wrong_field_is_named(make_recipe, tmp_path, section, field, value):
    raw = raw_recipe(make_recipe, tmp_path)
    (raw if section is None else raw[section])[field] = value
    with pytest.raises(ConfigError) as raised:
        Recipe.from_file(written(tmp_path, raw))
    assert (section or field) in str(raised.value)
    assert "recipe.yaml" in str(raised.value)


def test_a_missing_file_and_broken_yaml_are_typed_errors(tmp_path):
    with pytest.raises(ConfigError):
        Recipe.from_file(tmp_path / "absent.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1", encoding="utf-8")
    with pytest.raises(ConfigError):
        Recipe.from_file(tmp_path / "broken.yaml")
