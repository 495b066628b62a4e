"""The stored tensors of quantized linear layers, decoded into `models.quantized` forms, and two formats encoded.

Called by the loader with what `QuantizationConfig.expected_parts` asked for, shapes and types already compared, and by
`seamount quantize` when it writes. Values inside tensors are untrusted too: an index is checked before it is used.
Words of 32 bits are little-endian.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from seamount.core.errors import CheckpointError

from .checkpoint import shown
from .quantized import ChannelQuantized, GroupQuantized
from .quantized_config import QuantizationConfig

Weight = GroupQuantized | ChannelQuantized | Tensor

# AWQ's gemm kernels want the 8 columns of a word in this order, lowest bits first.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_AWQ_PLACE = tuple(_AWQ_ORDER.index(column) for column in range(8))


def decode_weight(config: QuantizationConfig, key: str, shape: tuple[int, int], parts: Mapping[str, Tensor]) -> Weight:
    """Return the weight `[N, K]` of one linear layer.

    Args:
        key: its name, for errors.
        parts: the stored tensors by role, on the CPU.

    Returns:
        4-bit groups; 8-bit rows for compressed-tensors with a scale per row or matrix; fp32 for what neither form
        holds: columns in an order of their own (GPTQ's desc_act), and 8-bit groups.

    Raises:
        CheckpointError: an index or a shape stored among the weights is wrong, or a scale is no number.
    """
    decoders = {
        "awq": _decode_awq,
        "gptq": _decode_gptq,
        "int-quantized": _decode_channel,
        "pack-quantized": _decode_packed,
    }
    for role in ("scales", "weight_scale"):
        if role in parts and not parts[role].isfinite().all():
            raise CheckpointError(f"{shown(key)}: {role} holds values that are no numbers, or infinite.")
    return decoders[config.format](config, key, shape, parts)


def encode_awq(weight: GroupQuantized) -> dict[str, Tensor]:
    """Return qweight, qzeros and scales of a weight in AWQ's gemm format; the inverse of decoding.

    Raises:
        ValueError: N is no multiple of 8, the last group is short, a zero is no code, or a scale is beyond fp16.
    """
    rows, columns = weight.codes.shape
    zeros = weight.zeros.to(torch.uint8)
    if rows % 8 or columns % weight.group_size:
        raise ValueError(f"{rows} x {columns} in groups of {weight.group_size} does not fit AWQ.")
    if not torch.equal(zeros.float(), weight.zeros) or int(zeros.max()) > 15:
        raise ValueError("AWQ stores zeros as codes: whole numbers from 0 to 15.")
    scales = weight.scales.T.to(torch.float16).contiguous()
    if not scales.isfinite().all():
        raise ValueError("AWQ stores scales in fp16; one is beyond it.")
    return {"qweight": _pack_awq(weight.codes.T), "qzeros": _pack_awq(zeros.T), "scales": scales}


def encode_int8(weight: ChannelQuantized) -> dict[str, Tensor]:
    """Return weight and weight_scale `[N, 1]` of a weight as compressed-tensors' int-quantized."""
    return {"weight": weight.codes, "weight_scale": weight.scales.unsqueeze(1)}


def _decode_awq(
    config: QuantizationConfig, key: str, shape: tuple[int, int], parts: Mapping[str, Tensor]
) -> GroupQuantized:
    """value = scale * (code - zero); qweight is `[K, N/8]`, and qzeros `[G, N/8]` in the same order."""
    codes = _nibbles(parts["qweight"])[..., _AWQ_PLACE].flatten(1)
    zeros = _nibbles(parts["qzeros"])[..., _AWQ_PLACE].flatten(1)
    return GroupQuantized(
        codes.T.contiguous(), _transposed(parts["scales"]), _transposed(zeros), config.group_size or shape[1]
    )


def _pack_awq(codes: Tensor) -> Tensor:
    """`[A, N]` codes to int32 `[A, N/8]`."""
    ordered = codes.unflatten(1, (-1, 8))[..., _AWQ_ORDER]
    return (ordered[..., 0::2] | ordered[..., 1::2] << 4).contiguous().view(torch.int32).squeeze(-1)


def _decode_gptq(config: QuantizationConfig, key: str, shape: tuple[int, int], parts: Mapping[str, Tensor]) -> Weight:
    """value = scale * (code - zero), where zero is what is stored plus the version's offset, within the bits.

    qweight `[K * bits / 32, N]` packs along its columns, qzeros `[G, N * bits / 32]` along its rows.
    """
    codes = _unpack(parts["qweight"], config.bits)  # [K / pack, N, pack]
    codes = codes.permute(1, 0, 2).flatten(1)
    zeros = _unpack(parts["qzeros"], config.bits).flatten(1)
    zeros = (zeros + config.zero_offset) & (2**config.bits - 1)
    return _grouped(config, key, codes, _transposed(parts["scales"]), _transposed(zeros), parts.get("g_idx"))


def _decode_channel(
    config: QuantizationConfig, key: str, shape: tuple[int, int], parts: Mapping[str, Tensor]
) -> ChannelQuantized:
    scales = parts["weight_scale"].float().flatten().expand(shape[0]).contiguous()
    return ChannelQuantized(parts["weight"].contiguous(), scales)


def _decode_packed(config: QuantizationConfig, key: str, shape: tuple[int, int], parts: Mapping[str, Tensor]) -> Weight:
    """weight_packed `[N, K * bits / 32]`, weight_zero_point `[N * bits / 32, G]`: signed codes plus half their range.

    As both are shifted alike, the codes stay as they are; without zero points the zero is that half.
    """
    if tuple(parts["weight_shape"].tolist()) != shape:
        raise CheckpointError(
            f"{shown(key)}: weight_shape is {parts['weight_shape'].tolist()}; by config.json it must be {list(shape)}."
        )
    rows, columns = shape
    half = 2 ** (config.bits - 1)
    codes = _unpack(parts["weight_packed"], config.bits).flatten(1)[:, :columns].contiguous()
    scales = parts["weight_scale"].float()
    if config.bits == 8 and config.symmetric and config.group_size is None:
        return ChannelQuantized((codes ^ half).view(torch.int8), scales.flatten())
    if config.symmetric:
        zeros = torch.full_like(scales, half)
    else:
        packed = _unpack(parts["weight_zero_point"], config.bits)  # [N / pack, G, pack]
        zeros = packed.permute(0, 2, 1).flatten(0, 1)[:rows].float()
    return _grouped(config, key, codes, scales, zeros, parts.get("weight_g_idx"))


def _grouped(
    config: QuantizationConfig, key: str, codes: Tensor, scales: Tensor, zeros: Tensor, groups: Tensor | None
) -> GroupQuantized | Tensor:
    """Codes `[N, K]` with scales and zeros `[N, G]`, as groups where they are 4 bits in plain order, else as fp32.

    Args:
        groups: the group of every column, None or all -1 for plain order.
    """
    columns = codes.shape[1]
    size = config.group_size or columns
    plain = torch.arange(columns) // size
    order = plain if groups is None or bool((groups == -1).all()) else groups.long()
    in_order = torch.equal(order, plain)
    if config.bits == 4 and in_order:
        return GroupQuantized(codes.contiguous(), scales, zeros, size)
    if columns and not 0 <= int(order.min()) <= int(order.max()) < scales.shape[1]:
        raise CheckpointError(f"{shown(key)}: its g_idx names groups beyond the {scales.shape[1]} that there are.")
    return scales[:, order] * (codes.float() - zeros[:, order])


def _transposed(values: Tensor) -> Tensor:
    return values.float().T.contiguous()


def _unpack(words: Tensor, bits: int) -> Tensor:
    """`[..., A]` words to uint8 `[..., A, 32 / bits]`, lowest bits first."""
    if bits == 8:
        return words.contiguous().unsqueeze(-1).view(torch.uint8)
    return _nibbles(words)


def _nibbles(words: Tensor) -> Tensor:
    """`[..., A]` words of 32 bits to uint8 `[..., A, 8]`, lowest bits first."""
    packed = words.contiguous().unsqueeze(-1).view(torch.uint8)
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
