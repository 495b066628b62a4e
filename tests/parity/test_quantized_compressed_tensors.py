"""What the compressed-tensors package packs is decoded as it decodes it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from seamount.models.quantized import ChannelQuantized, GroupQuantized
from seamount.models.quantized_config import QuantizationConfig, int8_config
from seamount.models.quantized_formats import decode_weight, encode_int8

KEY = "model.layers.0.mlp.up_proj.weight"
DTYPES = {torch.int8: "I8", torch.int32: "I32", torch.int64: "I64", torch.bfloat16: "BF16", torch.float32: "F32"}


def quantized(storage: str, shape: tuple[int, int], seed: int = 0, **weights: Any) -> tuple[Any, dict[str, Any]]:
    """A random weight compressed by the package: (its own decompressed values, the stored tensors, the config)."""
    args = QuantizationArgs(**weights)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=storage)
    generator = torch.Generator().manual_seed(seed)
    size = weights.get("group_size") or shape[1]
    groups = 1 if weights["strategy"] == "tensor" else -(-shape[1] // size)
    weight = torch.randn(shape, generator=generator)
    limit = 2 ** (weights["num_bits"] - 1)
    scale = torch.rand((1 if weights["strategy"] == "tensor" else shape[0], groups), generator=generator) * 2 / limit
    state = {"weight": weight, "weight_scale": scale.squeeze() if weights["strategy"] == "tensor" else scale}
    if not weights["symmetric"]:
        zeros = torch.randint(-limit // 2, limit // 2, scale.shape, generator=generator, dtype=torch.int8)
        state["weight_zero_point"] = zeros
    compressor: Any = BaseCompressor.get_value_from_registry(storage)
    stored = compressor.compress(state, scheme)
    expected = compressor.decompress(dict(stored), scheme)["weight"]
    group = {"targets": ["Linear"], "weights": args.model_dump(), "input_activations": None}
    raw = {"quant_method": "compressed-tensors", "format": storage, "config_groups": {"group_0": group}}
    return (expected, stored), {"quantization_config": raw}


def decode(raw: dict[str, Any], stored: dict[str, torch.Tensor], shape: tuple[int, int]) -> Any:
    config = QuantizationConfig.from_config(raw)
    assert config is not None
    stem = KEY.removesuffix("weight")
    parts = config.expected_parts(KEY, shape, lambda name: name.removeprefix(stem) in stored)
    assert parts is not None
    assert set(parts) == set(stored)
    for role, part in parts.items():
        assert tuple(stored[role].shape) in part.shapes
        assert DTYPES[stored[role].dtype] in part.dtypes
    return decode_weight(config, KEY, shape, stored)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("strategy", "shape"),
    [("group", (16, 64)), ("group", (13, 96)), ("channel", (16, 64)), ("channel", (13, 96)), ("channel", (8, 36))],
)
@pytest.mark.parametrize("bits", [4, 8])
def test_pack_quantized(symmetric: bool, strategy: str, shape: tuple[int, int], bits: int) -> None:
    size = 32 if strategy == "group" else None
    (expected, stored), raw = quantized(
        "pack-quantized", shape, num_bits=bits, symmetric=symmetric, strategy=strategy, group_size=size
    )
    found = decode(raw, stored, shape)
    in_rows = bits == 8 and symmetric and strategy == "channel"
    assert isinstance(found, GroupQuantized if bits == 4 else ChannelQuantized if in_rows else torch.Tensor)
    values = found if isinstance(found, torch.Tensor) else found.dequantize()
    torch.testing.assert_close(values, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_int_quantized(strategy: str) -> None:
    (expected, stored), raw = quantized("int-quantized", (13, 40), num_bits=8, symmetric=True, strategy=strategy)
    found = decode(raw, stored, (13, 40))
    assert isinstance(found, ChannelQuantized)
    torch.testing.assert_close(found.dequantize(), expected, rtol=0, atol=0)


def test_what_is_written_is_read_by_the_package() -> None:
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(-128, 128, (6, 40), generator=generator, dtype=torch.int8)
    weight = ChannelQuantized(codes, torch.rand(6, generator=generator))
    scheme = QuantizationScheme.model_validate(int8_config()["config_groups"]["group_0"])
    compressor: Any = BaseCompressor.get_value_from_registry("int-quantized")
    assert torch.equal(compressor.decompress(encode_int8(weight), scheme)["weight"], weight.dequantize())
