"""An adapter's files: written, read into a network and served, the numbers stay the same; nothing is half written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from seamount.core.errors import CheckpointError, UnsupportedModelError
from seamount.models.adapter import WEIGHTS_NAME, Adapter
from seamount.models.adapter_config import CONFIG_NAME
from seamount.models.batch import Batch
from seamount.models.config import ModelConfig
from seamount.models.load_plan import LoadPlan, plan_load
from seamount.models.loading import choose_precision, load_model, load_planned
from seamount.models.network import CausalLM
from seamount.models.precision import Precision
from seamount.training.adapters.files import load_adapter, save_adapter
from seamount.training.adapters.lora import add_adapters

EVERY = ("attention", "dense", "shared", "experts")
CPU = torch.device("cpu")
TOKENS = list(range(3, 20))


@pytest.fixture
def tuned(network: Any, section: Any, disturb: Any, tmp_path: Path) -> Any:
    """`tuned(name, dtype)`: a network with an adapter that matters, and the folder that it was saved in."""

    def make(name: str = "latent", dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[CausalLM, Path]:
        model = network(name, dtype)
        given = section(targets=EVERY if name == "latent" else EVERY[:2], **changes)
        add_adapters(model, given, seed=0)
        save_adapter(disturb(model), tmp_path / "adapter", given, "base-model")
        return model, tmp_path / "adapter"

    return make


@torch.no_grad()
def plain_logits(model: CausalLM) -> torch.Tensor:
    return model.logits(model(Batch.without_cache(torch.tensor([TOKENS])), None))


@torch.inference_mode()
def paged_logits(model: CausalLM, dtype: torch.dtype) -> torch.Tensor:
    cache = model.cache_spec.allocate(64, dtype, CPU)
    return model.logits(model(Batch.over_cache([(TOKENS, 0, list(range(8)))], 8), cache))


def plan(folder: Path, adapter: Path) -> LoadPlan:
    return plan_load(folder, ModelConfig.from_folder(folder)).with_adapter(Adapter.from_folder(adapter))


@pytest.mark.parametrize("name", ["latent", "dense"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_what_is_written_is_read_to_the_bit(
    name: str, use_rslora: bool, tuned: Any, network: Any, section: Any
) -> None:
    model, folder = tuned(name, use_rslora=use_rslora)
    again = network(name)
    counts = load_adapter(again, folder, name="base-model")
    assert torch.equal(plain_logits(again), plain_logits(model))
    assert sum(counts.values()) == sum(v.numel() for v in again.parameters() if v.requires_grad)
    save_adapter(again, folder.with_name("twice"), section(), "base-model")
    for file in (WEIGHTS_NAME, CONFIG_NAME):
        assert (folder / file).read_bytes() == (folder.with_name("twice") / file).read_bytes()


@pytest.mark.parametrize("name", ["latent", "dense"])
@pytest.mark.parametrize("packed", [True, False], ids=["compiled kernels", "plain torch"])
def test_served_in_fp32_it_says_what_the_trained_network_says(
    name: str, packed: bool, tuned: Any, checkpoint: Any
) -> None:
    model, adapter = tuned(name)
    chosen = plan(checkpoint(name), adapter)
    precision = choose_precision(chosen, torch.float32, "none", CPU) if packed else Precision(torch.float32)
    told: list[tuple[int, int]] = []
    served = load_planned(chosen, precision, device=CPU, progress=lambda *numbers: told.append(numbers))
    assert (paged_logits(served, torch.float32) - plain_logits(model)).abs().max() < 1e-4
    assert told[-1][0] == told[-1][1]


@pytest.mark.parametrize("packed", [True, False], ids=["compiled kernels", "plain torch"])
def test_served_in_bf16_the_sum_is_rounded_once(packed: bool, tuned: Any, checkpoint: Any) -> None:
    model, adapter = tuned("latent", torch.bfloat16)
    chosen = plan(checkpoint("latent", torch.bfloat16), adapter)
    found = Adapter.from_folder(adapter)
    plain = load_planned(chosen, Precision(torch.bfloat16), device=CPU)
    base = load_model(chosen.checkpoint.folder, chosen.config, dtype=torch.bfloat16, device=CPU, packed=False)
    served, own = dict(plain.named_parameters()), dict(base.named_parameters())
    num_adapted = 0
    for place in chosen.places.values():
        if place.parameter in served:
            added = found.delta(place)
            was = place.part_of(own[place.parameter])
            now = was if added is None else (was.float() + added).to(was.dtype)
            assert torch.equal(place.part_of(served[place.parameter]), now), place.key
            num_adapted += added is not None
    assert num_adapted == len(found.modules) + (4 * 3 - 2)  # experts are stacked in the adapter alone
    assert any(place.is_of_mtp for place in chosen.places.values())
    if packed:
        precision = choose_precision(chosen, torch.bfloat16, "none", CPU)
        plain = load_planned(chosen, precision, device=CPU)
    dtype = torch.float32 if plain.is_packed else torch.bfloat16
    difference = (paged_logits(plain, dtype) - plain_logits(model)).abs()
    assert difference.mean() < 0.02 * plain_logits(model).abs().mean()


def test_the_sum_is_what_is_rounded_to_few_bits(tuned: Any, checkpoint: Any) -> None:
    model, adapter = tuned("latent")
    chosen = plan(checkpoint("latent"), adapter)
    precision = choose_precision(chosen, torch.float32, "int8", CPU)
    if not precision.is_packed:
        pytest.skip("there are no compiled kernels")
    served = load_planned(chosen, precision, device=CPU)
    expected = plain_logits(model)
    assert (paged_logits(served, torch.float32) - expected).abs().mean() < 0.05 * expected.abs().mean()


def test_weights_of_few_bits_are_not_summed(tuned: Any, checkpoint: Any) -> None:
    from seamount.training.compression.compress import Job, quantize

    _, adapter = tuned("dense")
    settings = json.loads((adapter / CONFIG_NAME).read_text())
    (adapter / CONFIG_NAME).write_text(json.dumps(settings | {"base_model_name_or_path": None}))
    quantized = adapter.with_name("int8")
    quantize(Job(folder=checkpoint("dense"), output=quantized, method="rtn", bits=8))
    with pytest.raises(UnsupportedModelError, match=r"q_proj.*few bits") as error:
        plan(quantized, adapter)
    assert "merge" in str(error.value.hint)


def test_another_base_is_told(tuned: Any, checkpoint: Any, network: Any) -> None:
    _, adapter = tuned("dense")
    folder = checkpoint("dense")
    renamed = folder.with_name("something-else")
    folder.rename(renamed)
    with pytest.raises(CheckpointError, match=r"base-model.*something-else") as error:
        plan(renamed, adapter)
    assert "base_model_name_or_path" in str(error.value.hint)
    cached = folder.with_name("models--org--base-model") / "snapshots" / "0123abcd"
    cached.parent.mkdir(parents=True)
    renamed.rename(cached)
    assert plan(cached, adapter).adapter is not None
    with pytest.raises(CheckpointError, match="no linear projection|adapts a matrix"):
        load_adapter(network("latent"), adapter)


def test_peft_finds_the_settings_it_asks_for(tuned: Any) -> None:
    _, folder = tuned("latent", dropout=0.1, alpha=6.5)
    settings = json.loads((folder / CONFIG_NAME).read_text())
    assert settings["r"] == 4 and settings["lora_alpha"] == 6.5 and settings["bias"] == "none"
    assert settings["target_modules"] == ["kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "q_a_proj", "q_b_proj"]
    assert settings["target_parameters"] == [
        "down_proj",
        "down_proj.weight",
        "gate_proj.weight",
        "gate_up_proj",
        "up_proj.weight",
    ]
    assert settings["lora_dropout"] == 0.0  # which PEFT asks for beside parameters
    assert settings["base_model_name_or_path"] == "base-model"
    keys = load_file(folder / WEIGHTS_NAME).keys()
    assert "base_model.model.model.layers.1.mlp.experts.base_layer.lora_A.weight" in keys


def test_a_save_that_fails_leaves_the_adapter_that_was_there(
    tuned: Any, section: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = tuned("dense")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_adapter(model, folder, section(), "base-model")
    assert {name: (folder / name).read_bytes() for name in before} == before
