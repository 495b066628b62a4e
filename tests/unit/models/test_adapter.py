"""Adapter folders: what is added to which tensor, and refusals that name file and tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from seamount.core.errors import CheckpointError, UnsupportedModelError
from seamount.models.adapter import WEIGHTS_NAME, Adapter, adaptable_modules
from seamount.models.adapter_config import CONFIG_NAME
from seamount.models.config import ModelConfig
from seamount.models.keymap import placements

RANK, ALPHA = 2, 6
PREFIX = "base_model.model."
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def config(raw_configs: Any) -> ModelConfig:
    return ModelConfig.from_dict(raw_configs["v3"])


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """`write(tensors, **settings)`: an adapter's folder."""

    def make(tensors: Tensors, **settings: Any) -> Path:
        folder = tmp_path / "adapter"
        folder.mkdir(exist_ok=True)
        save_file(
            {f"{PREFIX}{name}.weight": value.contiguous() for name, value in tensors.items()}, folder / WEIGHTS_NAME
        )
        given = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": ["o_proj", "kv_b_proj"]}
        (folder / CONFIG_NAME).write_text(json.dumps(given | settings))
        return folder

    return make


def adapter_tensors(config: ModelConfig, ends: tuple[str, ...] = ("o_proj", "kv_b_proj")) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in adaptable_modules(config).items():
        if name.endswith(ends):
            tensors[f"{name}.lora_A"] = torch.randn(RANK, shape[1], generator=generator)
            tensors[f"{name}.lora_B"] = torch.randn(shape[0], RANK, generator=generator)
    return tensors


def test_a_product_is_added_to_the_tensors_it_is_for_and_to_no_other(config: ModelConfig, write: Any) -> None:
    tensors = adapter_tensors(config)
    adapter = Adapter.from_folder(write(tensors))
    adapter.check(config, "any")
    touched = 0
    for place in placements(config):
        name = place.key.removesuffix(".weight")
        added = adapter.delta(place)
        assert adapter.touches(place) == (added is not None)
        if f"{name}.lora_A" not in tensors:
            assert added is None
            continue
        touched += 1
        expected = ALPHA / RANK * tensors[f"{name}.lora_B"] @ tensors[f"{name}.lora_A"]
        assert torch.allclose(added, expected, atol=1e-5)
        assert torch.equal(adapter.delta_rows(place, 1, 3), added[1:4])
    assert touched == 2 * config.num_layers
    assert "rank 2 on 6 matrices" in str(adapter)


@pytest.mark.parametrize("spelling", ["stacked", "single"])
def test_experts_in_both_spellings_and_checkpoints_in_both(spelling: str, config: ModelConfig, write: Any) -> None:
    experts = config.experts
    assert experts is not None
    generator = torch.Generator().manual_seed(0)
    inner, width, count = experts.intermediate_size, config.hidden_size, experts.num_experts
    tensors: Tensors = {}
    expected: Tensors = {}
    for layer in (1, 2):
        key = f"model.layers.{layer}.mlp.experts"
        a, b = (torch.randn(s, generator=generator) for s in ((count, RANK, width), (count, 2 * inner, RANK)))
        for expert in range(count):
            whole = 3.0 * b[expert] @ a[expert]
            expected[f"{key}.{expert}.gate_proj.weight"], expected[f"{key}.{expert}.up_proj.weight"] = whole.chunk(2)
            if spelling == "single":
                for leaf, rows in zip(("gate_proj", "up_proj"), b[expert].chunk(2), strict=True):
                    tensors[f"{key}.{expert}.{leaf}.lora_A"] = a[expert].clone()
                    tensors[f"{key}.{expert}.{leaf}.lora_B"] = rows.clone()
        if spelling == "stacked":  # as PEFT files the only parameter that it wraps
            tensors[f"{key}.lora_A"] = a.flatten(0, 1)
            tensors[f"{key}.lora_B"] = b.permute(1, 2, 0).flatten(1)
    settings = {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"]}
    adapter = Adapter.from_folder(write(tensors, **settings))
    adapter.check(config, "any")
    for place in placements(config):
        added = adapter.delta(place)
        assert (added is not None) == (place.key in expected)
        if added is not None:
            assert torch.allclose(added, expected[place.key], atol=1e-5)
    for place in placements(config, lambda key: True):
        if place.key.endswith("mlp.experts.gate_up_proj"):
            key = place.key.removesuffix(".gate_up_proj")
            halves = [
                torch.cat([expected[f"{key}.{e}.{leaf}_proj.weight"] for leaf in ("gate", "up")]) for e in range(count)
            ]
            found = adapter.delta(place)
            assert torch.allclose(found, torch.stack(halves), atol=1e-5)
            assert torch.equal(adapter.delta_rows(place, 5, 40), found.flatten(0, 1)[5:45])
        else:
            assert adapter.delta(place) is None


def test_factors_and_patterns(config: ModelConfig, write: Any) -> None:
    tensors = adapter_tensors(config)
    places = {place.key: place for place in placements(config)}
    key = "model.layers.1.self_attn.o_proj"

    def factor(**settings: Any) -> float:
        added = Adapter.from_folder(write(tensors, **settings)).delta(places[f"{key}.weight"])
        return float((added / (tensors[f"{key}.lora_B"] @ tensors[f"{key}.lora_A"])).mean())

    assert factor() == pytest.approx(3)
    assert factor(use_rslora=True) == pytest.approx(6 / 2**0.5)
    assert factor(alpha_pattern={"o_proj": 1}) == pytest.approx(0.5)
    assert factor(alpha_pattern={"kv_b_proj": 1}) == pytest.approx(3)
    assert factor(alpha_pattern={"proj": 1}) == pytest.approx(3)  # no part of a name
    assert factor(alpha_pattern={r"layers\.\d+\.self_attn\.(o_proj|q_proj)": 2, "o_proj": 4}) == pytest.approx(1)
    with pytest.raises(CheckpointError, match=r"says that the rank is 5"):
        factor(rank_pattern={"layers.1.self_attn.o_proj": 5})


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
        ({"a_method_of_the_future": {"x": 1}}, "a_method_of_the_future"),
        ({"task_type": "SEQ_CLS"}, "SEQ_CLS"),
        ({"alpha_pattern": {"(a+)+b": 1}}, "alpha_pattern"),
        ({"rank_pattern": {".*.*.*.*.*x": 1}}, "rank_pattern"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    settings: dict[str, Any], named: str, config: ModelConfig, write: Any
) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        Adapter.from_folder(write(adapter_tensors(config), **settings))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"r": 0}, "r is '0'"),
        ({"r": True}, "r is 'True'"),
        ({"lora_alpha": "much"}, "lora_alpha"),
        ({"r": 3}, "rank is 3"),
        ({"target_modules": [1]}, "target_modules"),
        ({"alpha_pattern": {"(": 1}}, "no pattern"),
        ({"alpha_pattern": ["o_proj"]}, "alpha_pattern"),
        (
            {"target_modules": ["o_proj", "kv_b_proj", "q_a_proj"]},
            r"lacks the tensors of model\.layers\.0\.self_attn\.q_a",
        ),
        ({"base_model_name_or_path": "org/another-model"}, "another-model"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], named: str, config: ModelConfig, write: Any) -> None:
    with pytest.raises(CheckpointError, match=named):
        Adapter.from_folder(write(adapter_tensors(config), **settings)).check(config, "the-model")


def test_a_base_of_the_same_name_is_the_same(config: ModelConfig, write: Any) -> None:
    for base in ("org/The-Model", "/models/the-model/", None, ""):
        Adapter.from_folder(write(adapter_tensors(config), base_model_name_or_path=base)).check(config, "the-model")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop("model.layers.1.self_attn.o_proj.lora_B"), r"lacks.*layers\.1\.self_attn\.o_proj\.lora_B"),
        (
            lambda t: t["model.layers.1.self_attn.o_proj.lora_A"].fill_(float("nan")),
            r"layers\.1\.self_attn\.o_proj\.lora_A",
        ),
        (
            lambda t: t.update({"model.layers.0.self_attn.o_proj.lora_magnitude_vector": torch.ones(3)}),
            "lora_magnitude",
        ),
        (lambda t: t.update({"model.layers.0.self_attn.o_proj.lora_A": torch.ones(RANK, 3)}), r"\[16, 3\]"),
        (lambda t: t.update({"model.layers.0.self_attn.o_proj.lora_A": torch.ones(2, 2, 2)}), "must be a matrix"),
        (
            lambda t: t.update({f"model.layers.9.self_attn.o_proj.lora_{s}": torch.ones(RANK, RANK) for s in "AB"}),
            "layers.9.*it has 3",
        ),
        (
            lambda t: t.update({f"model.layers.1.mlp.gate.lora_{s}": torch.ones(RANK, RANK) for s in "AB"}),
            r"mlp\.gate.*no linear projection",
        ),
        (
            lambda t: t.update({f"model.layers.1.mlp.experts.7.up_proj.lora_{s}": torch.ones(2, 2) for s in "AB"}),
            r"experts\.7\.up_proj",
        ),
        (lambda t: t.clear(), "holds no tensors"),
    ],
)
def test_tensors_that_are_wrong(change: Any, named: str, config: ModelConfig, write: Any) -> None:
    tensors = adapter_tensors(config)
    change(tensors)
    with pytest.raises(CheckpointError, match=named) as error:
        Adapter.from_folder(write(tensors)).check(config, "any")
    assert WEIGHTS_NAME in error.value.message


def test_an_adapter_of_a_model_with_other_layers(config: ModelConfig, write: Any, raw_configs: Any) -> None:
    adapter = Adapter.from_folder(write(adapter_tensors(config)))
    fewer = ModelConfig.from_dict(raw_configs["v3"] | {"num_hidden_layers": 2})
    with pytest.raises(CheckpointError, match="does not have; it has 2"):
        adapter.check(fewer, "any")
    more = ModelConfig.from_dict(raw_configs["v3"] | {"num_hidden_layers": 4})
    with pytest.raises(CheckpointError, match=r"lacks the tensors of model\.layers\.3"):
        adapter.check(more, "any")


@pytest.mark.parametrize("damage", ["no folder", "no config", "config", "cut", "pickle", "empty"])
def test_files_that_are_broken(damage: str, config: ModelConfig, write: Any, tmp_path: Path) -> None:
    folder = write(adapter_tensors(config))
    path = folder / WEIGHTS_NAME
    if damage == "no folder":
        folder = tmp_path / "nowhere"
    elif damage == "no config":
        (folder / CONFIG_NAME).unlink()
    elif damage == "config":
        (folder / CONFIG_NAME).write_text('{"peft_type": ')
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-7])
    elif damage == "pickle":
        path.rename(folder / "adapter_model.bin")
    else:
        path.write_bytes(b"")
    with pytest.raises(CheckpointError) as error:
        Adapter.from_folder(folder)
    assert str(folder) in error.value.message
