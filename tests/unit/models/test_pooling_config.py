"""Which folders are made for embeddings, how, and which are refused because vectors would come out wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from seamount.core.errors import CheckpointError, UnsupportedModelError
from seamount.models.config import ModelConfig
from seamount.models.load_plan import plan_load
from seamount.models.pooling_config import read_pooling

TRANSFORMER, POOLING, NORMALIZE = (
    {"type": f"sentence_transformers.models.{name}", "path": path}
    for name, path in (("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize"))
)
LAST = {"pooling_mode": "lasttoken"}


@pytest.fixture
def folder(make_folder: Callable[..., Any]) -> Path:
    return make_folder("qwen3")[0]


def made_for_embeddings(folder: Path, *, pooling: Any = LAST, modules: Any = None, **config: Any) -> Path:
    (folder / "modules.json").write_text(json.dumps(modules or [TRANSFORMER, POOLING, NORMALIZE]))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return edited(folder, **config)


def edited(folder: Path, **config: Any) -> Path:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **config}))
    return folder


def read(folder: Path, max_tokens: int = 64) -> Any:
    return read_pooling(folder, plan_load(folder, ModelConfig.from_folder(folder)).config, max_tokens=max_tokens)


def test_a_folder_that_says_nothing_is_for_text(folder: Path) -> None:
    assert read(folder) is None


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        (LAST, "last"),
        ({"pooling_mode": "mean", "embedding_dimension": 16}, "mean"),
        ({"pooling_mode": ["cls"]}, "first"),
        ({"word_embedding_dimension": 16, "pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}, "last"),
        ({"pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "first"),
        ({}, "mean"),
    ],
)
def test_pooling_in_the_old_and_the_new_spelling(folder: Path, pooling: dict[str, Any], expected: str) -> None:
    found = read(made_for_embeddings(folder, pooling=pooling))
    assert (found.pooling, found.normalize, found.num_dimensions, found.max_tokens) == (expected, True, 16, 64)
    assert found.shorter_dimensions is None


def test_without_normalize_nothing_is_scaled(folder: Path) -> None:
    assert read(made_for_embeddings(folder, modules=[TRANSFORMER, POOLING])).normalize is False


def test_newer_names_of_the_modules(folder: Path) -> None:
    modules = [{**TRANSFORMER, "type": "sentence_transformers.base.modules.transformer.Transformer"}, POOLING]
    assert read(made_for_embeddings(folder, modules=modules)).pooling == "last"


def test_the_folders_own_limit_holds(folder: Path) -> None:
    made_for_embeddings(folder)
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 32, "do_lower_case": False}))
    assert read(folder).max_tokens == 32
    assert read(folder, max_tokens=20).max_tokens == 20


@pytest.mark.parametrize(
    ("config", "offered", "refused"),
    [
        ({}, [16], [1, 15, 17]),
        ({"is_matryoshka": True}, [1, 15, 16], [17]),
        ({"matryoshka_dimensions": [16, 8, 4]}, [4, 8, 16], [1, 5, 15, 17]),
    ],
)
def test_dimensions_that_config_promises(folder: Path, config: dict, offered: list[int], refused: list[int]) -> None:
    found = read(made_for_embeddings(folder, **config))
    assert all(found.offers(length) for length in offered)
    assert not any(found.offers(length) for length in refused)


def test_a_base_model_gives_the_last_token_scaled(make_folder: Callable[..., Any]) -> None:
    def without_head(tensors: dict[str, Any]) -> None:
        del tensors["lm_head.weight"]
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    folder, *_ = make_folder("qwen3", change=without_head)
    plan = plan_load(folder, ModelConfig.from_folder(folder))
    assert not plan.config.has_head
    found = read(folder)
    assert (found.pooling, found.normalize) == ("last", True)


@pytest.mark.parametrize("listed", [False, True])
def test_an_untied_head_may_be_missing_only_where_nobody_needs_it(make_folder, listed: bool) -> None:
    folder, *_ = make_folder("qwen3", change=lambda tensors: tensors.pop("lm_head.weight"))
    if not listed:
        with pytest.raises(CheckpointError, match=r"lacks the tensor 'lm_head\.weight'"):
            read(folder)
        edited(folder, architectures=["Qwen3Model"])
    else:
        made_for_embeddings(folder, architectures=["Qwen3ForCausalLM"])
    assert read(folder).pooling == "last"


@pytest.mark.parametrize("config", [{"is_causal": False}, {"use_bidirectional_attention": True}])
@pytest.mark.parametrize("listed", [False, True])
def test_attention_both_ways_is_refused(folder: Path, config: dict[str, Any], listed: bool) -> None:
    if listed:
        made_for_embeddings(folder)
    with pytest.raises(UnsupportedModelError, match="bidirectional"):
        read(edited(folder, **config))


def test_code_of_its_own_is_refused_where_it_would_decide_the_vector(folder: Path) -> None:
    edited(folder, auto_map={"AutoModel": "modeling_own.Model"})
    assert read(folder) is None
    with pytest.raises(UnsupportedModelError, match="auto_map"):
        read(made_for_embeddings(folder))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"pooling": {"pooling_mode": "max"}}, "the pooling max is not supported"),
        ({"pooling": {"pooling_mode": ["mean", "cls"]}}, "the pooling mean, cls is not supported"),
        ({"pooling": {"pooling_mode": {"a": 1}}}, "is not supported"),
        ({"pooling": {"pooling_mode": []}}, "is not supported"),
        ({"pooling": [1]}, "must hold a JSON object"),
        ({"modules": [TRANSFORMER, POOLING, {"type": "x.Dense", "path": "2_Dense"}]}, "Dense are not supported"),
        ({"modules": [TRANSFORMER]}, "Transformer are not supported"),
        ({"modules": [{**TRANSFORMER, "path": "0_Transformer"}, POOLING]}, "lie in another folder"),
        ({"modules": [TRANSFORMER, {**POOLING, "path": "../other"}]}, "is no folder in this one"),
        ({"modules": [TRANSFORMER, {**POOLING, "path": ".."}]}, "is no folder in this one"),
        ({"modules": [TRANSFORMER, {**POOLING, "path": "nowhere"}]}, "is missing"),
        ({"modules": {"type": "x"}}, "must hold a list"),
        ({"modules": [1]}, "must hold a list"),
        ({"modules": [{"path": ""}]}, "'type' is missing"),
        ({"modules": [TRANSFORMER] * 17}, "at most 16"),
        ({"matryoshka_dimensions": [17]}, "matryoshka_dimensions is 17"),
    ],
)
def test_what_would_come_out_wrong_is_refused(folder: Path, how: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(made_for_embeddings(folder, **how))


def test_texts_are_not_lowered_behind_the_callers_back(folder: Path) -> None:
    made_for_embeddings(folder)
    (folder / "sentence_bert_config.json").write_text(json.dumps({"do_lower_case": True}))
    with pytest.raises(UnsupportedModelError, match="do_lower_case"):
        read(folder)


def test_a_broken_list_of_modules_is_named(folder: Path) -> None:
    made_for_embeddings(folder)
    (folder / "modules.json").write_text("[{")
    with pytest.raises(CheckpointError, match=r"modules\.json is not valid JSON"):
        read(folder)
