"""`quantization_config` of the ecosystem's tools: what is read, what is refused, which tensors are then expected."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seamount.core.errors import CheckpointError, UnsupportedModelError
from seamount.models.quantized_config import QuantizationConfig, awq_config, int8_config

KEY = "model.layers.0.mlp.up_proj.weight"
STEM = KEY.removesuffix("weight")

AWQ = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 128, "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}


def compressed(storage: str, activations: dict[str, Any] | None = None, **weights: Any) -> dict[str, Any]:
    scheme = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128} | weights
    group = {"targets": ["Linear"], "weights": scheme, "input_activations": activations}
    return {"quant_method": "compressed-tensors", "format": storage, "config_groups": {"group_0": group}}


W8A8 = compressed("int-quantized", {"num_bits": 8, "dynamic": True}, num_bits=8, strategy="channel", group_size=None)


def read(raw: dict[str, Any]) -> QuantizationConfig:
    made = QuantizationConfig.from_config({"quantization_config": raw}, where="config.json")
    assert made is not None
    return made


def test_no_quantization() -> None:
    assert QuantizationConfig.from_config({}) is None
    assert QuantizationConfig.from_config({"quantization_config": None}) is None


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (AWQ, {"format": "awq", "bits": 4, "group_size": 128}),
        (awq_config(64), {"format": "awq", "bits": 4, "group_size": 64}),
        (AWQ | {"version": "GEMM", "group_size": -1}, {"format": "awq", "group_size": None}),
        (GPTQ, {"format": "gptq", "bits": 4, "zero_offset": 1}),
        (GPTQ | {"bits": 8, "checkpoint_format": "gptq_v2"}, {"format": "gptq", "bits": 8, "zero_offset": 0}),
        (GPTQ | {"dynamic": {"-:lm_head": {}}}, {"format": "gptq"}),
        (W8A8, {"format": "int-quantized", "bits": 8, "per_tensor": False}),
        (int8_config(), {"format": "int-quantized", "bits": 8}),
        (compressed("pack-quantized"), {"format": "pack-quantized", "bits": 4, "group_size": 128, "symmetric": True}),
        (compressed("pack-quantized", symmetric=False), {"format": "pack-quantized", "symmetric": False}),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, {"format": "fp8"}),
    ],
)
def test_what_is_read(raw: dict[str, Any], expected: dict[str, Any]) -> None:
    made = read(raw)
    assert {name: getattr(made, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (AWQ | {"version": "marlin"}, "'marlin'"),
        (AWQ | {"bits": 3}, "3 bits"),
        (AWQ | {"zero_point": False}, "zero_point False"),
        (GPTQ | {"bits": 3}, "3 bits"),
        (GPTQ | {"checkpoint_format": "marlin"}, "'marlin'"),
        (GPTQ | {"is_marlin_format": True}, "GPTQ"),
        (GPTQ | {"dynamic": {r"+:.*up_proj": {"bits": 8}}}, "other settings"),
        ({"quant_method": "bitsandbytes"}, "'bitsandbytes'"),
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, "'fp8'"),
        (compressed("float-quantized", type="float", num_bits=8), "'float-quantized'"),
        (compressed("marlin-24"), "'marlin-24'"),
        (compressed("pack-quantized", num_bits=2), "2-bit"),
        (compressed("int-quantized", num_bits=8, strategy="channel", symmetric=False), "asymmetric"),
        (compressed("int-quantized", {"num_bits": 8, "dynamic": False}, num_bits=8), "stored scales"),
        (compressed("pack-quantized") | {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        (compressed("pack-quantized") | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse"),
    ],
)
def test_what_is_refused(raw: dict[str, Any], problem: str) -> None:
    with pytest.raises(UnsupportedModelError, match=problem) as caught:
        read(raw)
    assert "config.json" in str(caught.value)


def test_groups_that_differ_are_refused_and_groups_alike_are_one() -> None:
    raw = copy.deepcopy(compressed("pack-quantized"))
    raw["config_groups"]["group_1"] = copy.deepcopy(raw["config_groups"]["group_0"])
    assert read(raw).format == "pack-quantized"
    raw["config_groups"]["group_1"]["weights"]["group_size"] = 32
    with pytest.raises(UnsupportedModelError, match="2 different"):
        read(raw)


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        ({}, None),
        ({"bits": 4}, "quant_method"),
        (AWQ | {"group_size": 0}, "group_size"),
        (AWQ | {"bits": "4"}, "bits"),
        (GPTQ | {"bits": None}, "bits"),
        (compressed("pack-quantized", group_size=None), "group_size"),
        ({"quant_method": "compressed-tensors", "config_groups": {"g": {}}}, "no weights"),
    ],
)
def test_broken_fields(raw: dict[str, Any], problem: str | None) -> None:
    if problem is None:
        assert QuantizationConfig.from_config({"quantization_config": raw}) is None
        return
    with pytest.raises(CheckpointError, match=problem):
        read(raw)


def names(raw: dict[str, Any], *present: str, shape: tuple[int, int] = (64, 256)) -> set[str] | None:
    parts = read(raw).expected_parts(KEY, shape, {STEM + name for name in present}.__contains__)
    return None if parts is None else {part.name.removeprefix(STEM) for part in parts.values()}


def test_expected_tensors() -> None:
    assert names(AWQ, "qweight") == {"qweight", "qzeros", "scales"}
    assert names(GPTQ, "qweight") == {"qweight", "qzeros", "scales"}
    assert names(GPTQ, "qweight", "g_idx") == {"qweight", "qzeros", "scales", "g_idx"}
    assert names(W8A8, "weight", "weight_scale") == {"weight", "weight_scale"}
    packed = {"weight_packed", "weight_scale", "weight_shape"}
    assert names(compressed("pack-quantized"), "weight_packed") == packed
    asymmetric = compressed("pack-quantized", symmetric=False)
    assert names(asymmetric, "weight_packed") == packed | {"weight_zero_point"}


def test_a_layer_left_unquantized_is_expected_as_it_is() -> None:
    for raw in (AWQ, GPTQ, W8A8, compressed("pack-quantized"), {"quant_method": "fp8"}):
        assert names(raw, "weight") is None
    assert read(AWQ).expected_parts(f"{STEM}bias", (64, 256), lambda name: True) is None


@pytest.mark.parametrize(("raw", "shape"), [(AWQ, (60, 256)), (AWQ, (64, 200)), (GPTQ, (64, 252)), (GPTQ, (60, 256))])
def test_a_shape_that_cannot_be_stored_is_refused(raw: dict[str, Any], shape: tuple[int, int]) -> None:
    with pytest.raises(CheckpointError, match="does not fit"):
        names(raw, "qweight", shape=shape)


odd_values = (
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=3) | st.just([]) | st.just({})
)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([AWQ, GPTQ, W8A8, compressed("pack-quantized")]), st.data())
def test_odd_values_are_read_or_refused(base: dict[str, Any], data: st.DataObject) -> None:
    raw = copy.deepcopy(base)
    tables = [raw]
    for table in tables:
        tables += [value for value in table.values() if isinstance(value, dict)]
    table = data.draw(st.sampled_from(tables))
    name = data.draw(
        st.sampled_from([*table, "dynamic", "format", "symmetric", "sparsity_config", "input_activations"])
    )
    table[name] = data.draw(odd_values)
    try:
        made = read(raw)
    except CheckpointError:
        return
    assert made.bits in (4, 8)
