"""Packed networks compute what their checkpoint says, however its tensors are cut, and keep no second copy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from seamount import kernels
from seamount.core.errors import CheckpointError
from seamount.models import packing
from seamount.models.batch import Batch
from seamount.models.config import ModelConfig
from seamount.models.layers import Experts, LatentAttention, RMSNorm, Router
from seamount.models.linear import Linear
from seamount.models.loading import load_model
from seamount.models.network import CausalLM

pytestmark = pytest.mark.skipif(kernels.library() is None, reason="no compiler: there are no compiled kernels")

CPU = torch.device("cpu")
NETWORKS = ["llama-biases", "qwen2-tied", "qwen3", "v2-lite", "v2-biases", "v3", "v3-no-shared", "v3-all-dense"]
TOKENS = [3, 1, 4, 15, 9, 2, 6, 5, 35, 8, 9, 7, 9, 32, 38, 4]


def like_trained(tensors: dict[str, Tensor]) -> None:
    for name, value in tensors.items():
        if value.dim() == 2:
            value *= value.shape[1] ** -0.5
        elif name.endswith("norm.weight"):
            value.mul_(0.1).add_(1)


def load(folder: Path, config: ModelConfig, quantization: str = "none", **options: Any) -> CausalLM:
    settings: dict[str, Any] = {"dtype": torch.float32, **options}
    return load_model(folder, config, device=CPU, quantization=quantization, **settings)


@torch.inference_mode()
def logits(model: CausalLM, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of TOKENS, through the paged path."""
    cache = model.cache_spec.allocate(len(TOKENS), dtype, CPU)
    return model.logits(model(Batch.over_cache([(TOKENS, 0, [2, 0, 3, 1])], 4), cache))


def parts(model: CausalLM, kind: type) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, kind)]


@pytest.mark.parametrize("name", NETWORKS)
def test_fp32_logits_are_those_of_the_parameters(name: str, make_folder: Any) -> None:
    folder, config, _ = make_folder(name, change=like_trained)
    torch.testing.assert_close(
        logits(load(folder, config)), logits(load(folder, config, packed=False)), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(("quantization", "least"), [("int8", 0.998), ("int4", 0.9)])
@pytest.mark.parametrize("name", ["llama-biases", "qwen2-tied", "v2-lite", "v3-all-dense"])
def test_rounded_logits_stay_near(name: str, quantization: str, least: float, make_folder: Any) -> None:
    folder, config, _ = make_folder(name, change=like_trained)
    rounded, exact = logits(load(folder, config, quantization)), logits(load(folder, config, packed=False))
    assert torch.corrcoef(torch.stack((rounded.flatten(), exact.flatten())))[0, 1] > least


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
@pytest.mark.parametrize("name", ["qwen2-tied", "v3", "v3-mtp"])
def test_no_parameter_remains_beside_its_packed_form(name: str, quantization: str, make_folder: Any) -> None:
    folder, config, _ = make_folder(name)
    model = load(folder, config, quantization, dtype=torch.bfloat16)
    left = {parameter for parameter, _ in model.named_parameters()}
    assert model.is_packed
    assert not left & packing.packed_names(model)
    assert all(name == "embed_tokens.weight" or "norm" in name for name in left)
    assert all(module.weight.dtype == torch.float32 for _, module in parts(model, RMSNorm))


@pytest.mark.parametrize(
    ("quantization", "inner", "head", "up"),
    [
        ("none", "bfloat16", "bfloat16", "bfloat16"),
        ("int8", "int8", "int8", "bfloat16"),
        ("int4", "int4", "int8", "bfloat16"),
    ],
)
@pytest.mark.parametrize("name", ["qwen2-tied", "v3"])
def test_each_part_is_kept_as_precisely_as_it_needs(
    name: str, quantization: str, inner: str, head: str, up: str, make_folder: Any
) -> None:
    folder, config, _ = make_folder(name)
    model = load(folder, config, quantization, dtype=torch.bfloat16)
    for path, linear in parts(model, Linear):
        if linear.packed is not None:
            assert linear.packed.kind == (head if path == "lm_head" else inner), path
    assert all(router.packed.kind == "float32" for _, router in parts(model, Router))
    for _, experts in parts(model, Experts):
        assert {m.kind for stack in experts.packed for m in stack.matrices} == {inner}
    for _, attention in parts(model, LatentAttention):
        assert {m.kind for stack in attention.up_packed for m in stack.matrices} == {up}


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
@pytest.mark.parametrize("name", NETWORKS)
def test_reading_in_slices_changes_no_bit(
    name: str, quantization: str, make_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, config, _ = make_folder(name, change=like_trained, dtype=torch.bfloat16)
    whole = logits(load(folder, config, quantization))
    monkeypatch.setattr(packing, "_SLICE_BYTES", 1)
    monkeypatch.setattr(packing, "_SLICE_ROWS", 16)
    assert torch.equal(logits(load(folder, config, quantization)), whole)


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_progress_ends_with_all_bytes(quantization: str, make_folder: Any) -> None:
    folder, config, tensors = make_folder("v3")
    calls: list[tuple[int, int]] = []
    load(folder, config, quantization, progress=lambda done, total: calls.append((done, total)))
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert calls[-1] == (sum(t.nbytes for t in tensors.values()),) * 2


def spoil(key: str, value: float) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[key][3, 5] = value

    return change


@pytest.mark.parametrize("value", [70000.0, float("inf"), float("nan")], ids=str)
@pytest.mark.parametrize(
    "key", ["model.layers.0.self_attn.o_proj.weight", "model.layers.1.mlp.experts.2.up_proj.weight"]
)
def test_what_float16_cannot_hold_is_refused_by_name(key: str, value: float, make_folder: Any) -> None:
    folder, config, _ = make_folder("v2-lite", change=spoil(key, value))
    parameter = "o_proj" if "o_proj" in key else "gate_up_proj"
    with pytest.raises(CheckpointError, match=parameter) as refused:
        load(folder, config, dtype=torch.float16)
    assert "bfloat16" in (refused.value.hint or "")


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")], ids=str)
def test_a_damaged_weight_shows_in_the_logits(value: float, quantization: str, make_folder: Any) -> None:
    """So that the engine says so, and does not answer as if nothing were wrong."""
    folder, config, _ = make_folder("llama-biases", change=spoil("model.layers.1.mlp.down_proj.weight", value))
    assert not logits(load(folder, config, quantization)).isfinite().all()
