"""Blocks of every supported GGUF type give the values of the format's own implementation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from seamount.models.gguf import BLOCK_TYPE_OF, BLOCK_TYPES
from seamount.models.gguf_blocks import decode_blocks
from seamount.models.quantized import GroupQuantized

ROWS, COLUMNS = 5, 768
GROUPED = {"Q4_0", "Q4_1", "Q4_K"}
# Byte positions of the fp16 factors in a block, which random bytes must not turn into infinities.
FACTORS = {"Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0]} | {
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
}


def random_blocks(name: str, seed: int) -> np.ndarray:
    """Every code and scale occurs; factors are plausible ones."""
    rng = np.random.default_rng(seed)
    kind = BLOCK_TYPE_OF[name]
    blocks = rng.integers(0, 256, (ROWS * COLUMNS // kind.num_values, kind.num_bytes), dtype=np.uint8)
    for position in FACTORS[name]:
        factors = rng.normal(0, 0.1, len(blocks)).astype(np.float16)
        factors[:3] = 0
        blocks[:, position : position + 2] = factors.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(ROWS, -1)


def dequantized(decoded: torch.Tensor | GroupQuantized, name: str) -> np.ndarray:
    assert isinstance(decoded, GroupQuantized) == (name in GROUPED)
    if isinstance(decoded, GroupQuantized):
        assert decoded.group_size == 32
        assert decoded.codes.dtype == torch.uint8
        assert int(decoded.codes.max()) <= 15
        decoded = decoded.dequantize()
    assert decoded.dtype == torch.float32
    return decoded.numpy()


@pytest.mark.parametrize("number", sorted(BLOCK_TYPES))
def test_sizes_are_those_of_the_format(number: int) -> None:
    kind = BLOCK_TYPES[number]
    known = GGMLQuantizationType(number)
    assert (kind.name, (kind.num_values, kind.num_bytes)) == (known.name, GGML_QUANT_SIZES[known])


@pytest.mark.parametrize("name", sorted(FACTORS))
@pytest.mark.parametrize("seed", [0, 1])
def test_random_blocks(name: str, seed: int) -> None:
    raw = random_blocks(name, seed)
    expected = quants.dequantize(raw, GGMLQuantizationType[name])
    found = dequantized(decode_blocks(torch.from_numpy(raw), name), name)
    assert found.shape == (ROWS, COLUMNS)
    # Groups hold their minimum as a fractional zero, which rounds once more.
    np.testing.assert_allclose(found, expected, rtol=1e-5 if name in GROUPED else 0, atol=1e-5 * abs(expected).max())
    if name not in GROUPED:
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_what_the_format_quantizes_comes_back(name: str) -> None:
    values = np.random.default_rng(2).normal(0, 1, (ROWS, COLUMNS)).astype(np.float32)
    kind = GGMLQuantizationType[name]
    stored = np.ascontiguousarray(quants.quantize(values, kind)).view(np.uint8)
    found = dequantized(decode_blocks(torch.from_numpy(stored), name), name)
    np.testing.assert_allclose(found, quants.dequantize(stored, kind), rtol=0, atol=2e-6)
    if name in ("F32", "F16"):
        np.testing.assert_array_equal(found, values if name == "F32" else values.astype(np.float16))


@pytest.mark.parametrize("name", ["Q4_1", "Q4_K"])
def test_a_group_without_scale_keeps_its_minimum(name: str) -> None:
    raw = random_blocks(name, 3)
    kind = BLOCK_TYPE_OF[name]
    raw.reshape(-1, kind.num_bytes)[:, :2] = 0
    found = dequantized(decode_blocks(torch.from_numpy(raw), name), name)
    assert len(np.unique(found)) > 10
    np.testing.assert_array_equal(found, quants.dequantize(raw, GGMLQuantizationType[name]))
