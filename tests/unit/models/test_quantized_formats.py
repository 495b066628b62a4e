"""AWQ and GPTQ by their documented formulas, one element at a time; what is encoded comes back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from seamount.core.errors import CheckpointError
from seamount.models.quantized import ChannelQuantized, GroupQuantized
from seamount.models.quantized_config import QuantizationConfig, awq_config, int8_config
from seamount.models.quantized_formats import decode_weight, encode_awq, encode_int8

KEY = "model.layers.0.mlp.up_proj.weight"
ROWS, COLUMNS = 24, 96
# The nibble of a word, counted from the lowest, in which AWQ's gemm format keeps each of 8 columns.
AWQ_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)


def config(**fields: Any) -> QuantizationConfig:
    made = QuantizationConfig.from_config({"quantization_config": fields})
    assert made is not None
    return made


def words(rng: np.random.Generator, *shape: int) -> torch.Tensor:
    return torch.from_numpy(rng.integers(0, 2**32, shape, dtype=np.uint32).view(np.int32))


def bits_of(word: int, place: int, bits: int) -> int:
    return (word % 2**32 >> (place * bits)) % 2**bits


def checked(config: QuantizationConfig, parts: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> Any:
    """Decode, after comparing with what the config expects, as a loader does."""
    dtypes = {torch.int32: "I32", torch.int64: "I64", torch.int8: "I8", torch.float16: "F16", torch.float32: "F32"}
    stem = KEY.removesuffix("weight")
    expected = config.expected_parts(KEY, shape, lambda name: name.removeprefix(stem) in parts)
    assert expected is not None
    assert set(expected) == set(parts)
    for role, part in expected.items():
        assert part.name == stem + role
        assert tuple(parts[role].shape) in part.shapes
        assert dtypes[parts[role].dtype] in part.dtypes
    return decode_weight(config, KEY, shape, parts)


def awq_parts(group: int, seed: int = 0) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(seed)
    scales = torch.from_numpy(rng.normal(0, 0.1, (COLUMNS // group, ROWS)).astype(np.float16))
    return {
        "qweight": words(rng, COLUMNS, ROWS // 8),
        "qzeros": words(rng, COLUMNS // group, ROWS // 8),
        "scales": scales,
    }


@pytest.mark.parametrize("group", [32, COLUMNS])
def test_awq_by_its_formula(group: int) -> None:
    parts = awq_parts(group)
    made = config(quant_method="awq", version="GEMM", bits=4, group_size=group if group < COLUMNS else -1)
    found = checked(made, parts, (ROWS, COLUMNS))
    assert isinstance(found, GroupQuantized)
    values = found.dequantize()
    for n in range(ROWS):
        for k in range(COLUMNS):
            place = AWQ_NIBBLES[n % 8]
            code = bits_of(int(parts["qweight"][k, n // 8]), place, 4)
            zero = bits_of(int(parts["qzeros"][k // group, n // 8]), place, 4)
            assert values[n, k] == parts["scales"][k // group, n].float() * (code - zero)


def test_awq_comes_back() -> None:
    parts = awq_parts(32)
    made = config(**awq_config(32))
    again = encode_awq(checked(made, parts, (ROWS, COLUMNS)))
    assert all(torch.equal(again[role], parts[role]) for role in parts)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"zeros": torch.full((ROWS, 3), 7.5)}, "zeros"),
        ({"zeros": torch.full((ROWS, 3), 16.0)}, "zeros"),
        ({"zeros": torch.full((ROWS, 3), -1.0)}, "zeros"),
        ({"scales": torch.full((ROWS, 3), 1e6)}, "fp16"),
        ({"group_size": 64}, "does not fit"),
    ],
)
def test_awq_refuses_what_it_cannot_hold(change: dict[str, Any], problem: str) -> None:
    fields = {"scales": torch.ones(ROWS, 3), "zeros": torch.zeros(ROWS, 3), "group_size": 32} | change
    with pytest.raises(ValueError, match=problem):
        encode_awq(GroupQuantized(torch.zeros(ROWS, COLUMNS, dtype=torch.uint8), **fields))


def gptq_parts(bits: int, group: int, order: list[int] | None, seed: int = 1) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(seed)
    pack, groups = 32 // bits, -(-COLUMNS // group)
    scales = torch.from_numpy(rng.normal(0, 0.1, (groups, ROWS)).astype(np.float16))
    parts = {"qweight": words(rng, COLUMNS // pack, ROWS), "qzeros": words(rng, groups, ROWS // pack), "scales": scales}
    return parts if order is None else parts | {"g_idx": torch.tensor(order, dtype=torch.int32)}


PLAIN = [k // 32 for k in range(COLUMNS)]
SHUFFLED = [(k * 7) % 3 for k in range(COLUMNS)]


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize(
    ("bits", "order", "form"),
    [(4, None, GroupQuantized), (4, PLAIN, GroupQuantized), (4, SHUFFLED, torch.Tensor), (8, PLAIN, torch.Tensor)],
)
def test_gptq_by_its_formula(version: str, bits: int, order: list[int] | None, form: type) -> None:
    parts = gptq_parts(bits, 32, order)
    made = config(quant_method="gptq", checkpoint_format=version, bits=bits, group_size=32, desc_act=order is SHUFFLED)
    found = checked(made, parts, (ROWS, COLUMNS))
    assert isinstance(found, form)
    values = found.dequantize() if isinstance(found, GroupQuantized) else found
    assert values.dtype == torch.float32
    pack = 32 // bits
    for n in range(ROWS):
        for k in range(COLUMNS):
            group = (order or PLAIN)[k]
            code = bits_of(int(parts["qweight"][k // pack, n]), k % pack, bits)
            zero = bits_of(int(parts["qzeros"][group, n // pack]), n % pack, bits)
            if version == "gptq":
                zero = (zero + 1) % 2**bits
            expected = parts["scales"][group, n].float() * (code - zero)
            assert values[n, k] == expected


def test_a_short_last_group() -> None:
    found = checked(config(quant_method="gptq", bits=4, group_size=64), gptq_parts(4, 64, None), (ROWS, COLUMNS))
    assert found.dequantize().shape == found.codes.shape == (ROWS, COLUMNS)
    assert found.scales.shape == (ROWS, 2)
    assert torch.equal(found.dequantize()[:, 64:], found.scales[:, 1:] * (found.codes[:, 64:] - found.zeros[:, 1:]))


@pytest.mark.parametrize("wrong", [3, -1, 2**31 - 1])
def test_a_group_that_is_not_there_is_refused(wrong: int) -> None:
    with pytest.raises(CheckpointError, match="g_idx"):
        checked(
            config(quant_method="gptq", bits=4, group_size=32),
            gptq_parts(4, 32, [*PLAIN[:-1], wrong]),
            (ROWS, COLUMNS),
        )


def test_a_scale_that_is_no_number_is_refused() -> None:
    parts = awq_parts(32)
    parts["scales"][0, 0] = torch.nan
    with pytest.raises(CheckpointError, match="scales"):
        checked(config(quant_method="awq", bits=4, group_size=32), parts, (ROWS, COLUMNS))


def test_int8_comes_back() -> None:
    rng = np.random.default_rng(3)
    codes = torch.from_numpy(rng.integers(-128, 128, (5, 7), dtype=np.int8))
    weight = ChannelQuantized(codes, torch.from_numpy(rng.random(5).astype(np.float32)))
    found = checked(config(**int8_config()), encode_int8(weight), (5, 7))
    assert torch.equal(found.codes, weight.codes)
    assert torch.equal(found.scales, weight.scales)
    assert torch.equal(found.dequantize(), torch.diag(weight.scales) @ codes.float())


def test_rows_of_groups_keep_their_scales() -> None:
    whole = checked(config(quant_method="awq", bits=4, group_size=32), awq_parts(32), (ROWS, COLUMNS))
    order = torch.tensor([3, 1, 20])
    assert torch.equal(whole.rows(order).dequantize(), whole.dequantize()[order])
    assert torch.equal(whole.rows(slice(2, 9)).dequantize(), whole.dequantize()[2:9])
