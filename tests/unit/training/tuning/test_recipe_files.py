"""What people write into recipe files by mistake: each ends with words that say what, where, and what to do."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from seamount.core.errors import ConfigError
from seamount.training.continual.recipe import ContinualRecipe
from seamount.training.distillation.recipe import DistillRecipe
from seamount.training.tuning.recipe import TuneRecipe
from seamount.training.tuning.recipe_files import with_changes

BASE = "model: a\noutput: b\n"
JARGON = ("Input should", "Extra inputs", "instance of", "<class", "tuple", "Value error", "pydantic", "dictionary")


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def said(folder: Path, text: str, *changes: str) -> str:
    with pytest.raises(ConfigError) as caught:
        TuneRecipe.from_file(write(folder, text), changes)
    assert caught.value.hint
    assert not any(word in str(caught.value) for word in JARGON)
    return caught.value.message


def fields_of(kind: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, field in kind.model_fields.items():
        kinds = {field.annotation, *get_args(field.annotation)}
        sections = [k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)]
        for section in sections:
            yield from fields_of(section, f"{prefix}{name}.")
        if not sections:
            yield f"{prefix}{name}", kinds


NUMBERS = [
    (kind, name)
    for kind in (TuneRecipe, ContinualRecipe, DistillRecipe)
    for name, kinds in fields_of(kind)
    if kinds & {int, float} and (kind is TuneRecipe or name not in dict(fields_of(TuneRecipe)))
]


@pytest.mark.parametrize(("kind", "name"), NUMBERS, ids=[name for _, name in NUMBERS])
@pytest.mark.parametrize("text", ["1e999", "-1e999", ".inf", "-.inf", ".nan", "true", "1e300", "0x" + "f" * 5000])
def test_every_number_is_finite_and_bounded(kind: type[TuneRecipe], name: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        kind.checked(with_changes({"output": "b"}, (f"{name}={text}",)), where="test")
    assert f"{name}: " in str(caught.value)
    assert not any(word in str(caught.value) for word in JARGON)


@pytest.mark.parametrize("text", ["1e-3", "0.001", "'1e-3'", "1.0e-3", "1"])
def test_numbers_are_written_as_people_do(tmp_path: Path, text: str) -> None:
    recipe = TuneRecipe.from_file(write(tmp_path, f"{BASE}optimizer: {{learning_rate: {text}}}"))
    assert recipe.learning_rate == float(text.strip("'"))
    assert TuneRecipe.from_file(write(tmp_path, recipe.to_yaml())) == recipe


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("[" * 5000, "more than 64 deep"),
        ("9" * 5000, "too large"),
        ("9" * 200, "too large"),
        ("&a [x]", "anchors"),
        ("!!int x", "tags"),
        ("!!python/object:x.y {}", "tags"),
        ("{1: 2}", "name of a field must be text"),
        ("{a: 1, a: 2}", "the field a is given twice"),
        ('"\\0"', "character"),
        ('"\\ud800"', "character"),
        ("[", "not valid YAML"),
    ],
)
def test_values_that_no_recipe_has(tmp_path: Path, value: str, words: str) -> None:
    assert words in said(tmp_path, f"{BASE}seed: {value}\n")
    assert words in said(tmp_path, BASE, f"seed={value}")
    assert len(said(tmp_path, BASE, f"seed={value}")) < 300


def test_deep_maps_and_deep_ways(tmp_path: Path) -> None:
    deep = "".join(f"{' ' * depth}a:\n" for depth in range(1000))
    assert "line 64: values lie more than 64 deep" in said(tmp_path, deep)
    assert "section.field=value" in said(tmp_path, BASE, ".".join(["a"] * 3000) + "=1")


def test_a_field_given_twice_is_named_with_its_lines(tmp_path: Path) -> None:
    words = said(tmp_path, f"{BASE}batch:\n  examples: 4\n  micro_tokens: 4096\n  'examples': 8\n")
    assert "line 6: the field examples is given twice, first in line 4" in words


def test_what_yaml_1_1_takes_for_something_else_stays_text(tmp_path: Path) -> None:
    text = "model: yes\noutput: 2024-13-45\ndata: {thinking: on, language: no}\nactivation_checkpointing: on\n"
    recipe = TuneRecipe.from_file(write(tmp_path, text))
    assert (recipe.model, recipe.output, recipe.data.language) == ("yes", Path("2024-13-45"), "no")
    assert recipe.data.thinking == "on" and recipe.activation_checkpointing
    assert TuneRecipe.from_file(write(tmp_path, recipe.to_yaml())) == recipe


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(ConfigError, match="it is no file"):
            TuneRecipe.from_file(path)


def test_large_files_and_other_encodings_are_refused(tmp_path: Path) -> None:
    assert "larger than 1 MiB" in said(tmp_path, BASE + "#" * 2**20)
    (tmp_path / "latin.yaml").write_bytes(BASE.encode() + b"# \xe4\n")
    with pytest.raises(ConfigError, match="not UTF-8"):
        TuneRecipe.from_file(tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("data=5", "data: must be a section with fields of its own, not 5"),
        ("adapter=lora", "adapter: must be a section with fields of its own, not 'lora'"),
        ("output=5", "output: must be a path, in quotes where it looks like something else, not 5"),
        ("model=5", "model: must be text, in quotes where it looks like something else, not 5"),
        ("adapter.targets=5", "adapter.targets: must be a list, such as [a, b], not 5"),
        ("adapter.targets=[]", "adapter.targets: must not be empty"),
        ("adapter.use_rslora=5", "adapter.use_rslora: must be true or false, not 5"),
        ("device=gpu", "device: must be 'auto', 'cpu' or 'cuda', not 'gpu'"),
        ("batch.examples=0", "batch.examples: must be above 0, not 0"),
        ("batch.examples=1.5", "batch.examples: must be a whole number, not 1.5"),
        ("batch.examples=many", "batch.examples: must be a whole number, not 'many'"),
        ("data.max_length=1e7", "data.max_length: must be a whole number, not '1e7'"),
        ("data.max_length=10000000", "data.max_length: must be at most 4,194,304, not 10000000"),
        ("batch.exmples=4", "batch.exmples: there is no such field; batch.examples is one"),
        ("learning_rat=1", "learning_rat: there is no such field; optimizer.learning_rate is one"),
        ("zzz=1", "zzz: there is no such field."),
        ("schedule.kind=plateau", "recipe.yaml: schedule.kind plateau needs"),
        ("tracking.mlflow=foo", "tracking.mlflow: must be an address such as http"),
        ("tracking.mlflow=http://", "tracking.mlflow: must be an address such as http"),
        ("tracking=http://me:secret@host", "tracking: must be a section with fields of its own."),
    ],
)
def test_errors_are_in_plain_words(tmp_path: Path, change: str, words: str) -> None:
    assert words in said(tmp_path, BASE, change)


def test_many_wrong_fields_are_told_in_part(tmp_path: Path) -> None:
    assert "and 90 more" in said(tmp_path, BASE + "".join(f"zz{number}: 1\n" for number in range(100)))


def test_one_target_needs_no_list(tmp_path: Path) -> None:
    recipe = TuneRecipe.from_file(write(tmp_path, BASE), ("adapter.targets=q_proj",))
    assert recipe.adapter is not None and recipe.adapter.targets == ("q_proj",)


@pytest.mark.parametrize(
    "store",
    [
        "http://h:5000",
        "https://me:word@h/x",
        "file:///srv/runs",
        "file:runs",
        "sqlite:///runs.db",
        "mysql+pymysql://h/d",
    ],
)
def test_addresses_of_stores(tmp_path: Path, store: str) -> None:
    assert TuneRecipe.from_file(write(tmp_path, BASE), (f"tracking.mlflow={store}",)).tracking.mlflow == store


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([name for name, _ in fields_of(TuneRecipe)] + ["data", "adapter"]), VALUES)
def test_a_recipe_comes_out_finite_or_with_plain_words(name: str, value: Any) -> None:
    fields: dict[str, Any] = {"model": "a", "output": "b"}
    *home, last = name.split(".")
    (fields.setdefault(home[0], {}) if home else fields)[last] = value
    try:
        recipe = TuneRecipe.checked(fields, where="test")
    except ConfigError as error:
        assert not any(word in error.message.replace(repr(value), "") for word in JARGON)
    else:
        section = recipe.model_dump()
        numbers = [
            v for part in (section, *filter(lambda v: isinstance(v, dict), section.values())) for v in part.values()
        ]
        assert all(math.isfinite(number) for number in numbers if isinstance(number, float))


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.sampled_from("ab:-[]{},'\"&*!<|>?#%@ \n\t019.=~_\\x"), max_size=40))
def test_any_text_is_a_value_or_an_error_of_ours(text: str) -> None:
    try:
        with_changes({}, (f"data.train={text}",))
    except ConfigError as error:
        assert error.message
