"""Turns the blocks of GGUF tensors into values, or into 4-bit groups where a type is exactly that.

Called by `models.gguf_reading` with bytes whose number is already checked. The layouts are ggml's; each function takes
blocks as `[B, bytes]` and says what one of its blocks holds. All arithmetic is in fp32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .gguf import BLOCK_TYPE_OF
from .quantized import GroupQuantized

_GROUP = 32
_SUPER = 256  # values in a block of the K types
_PIECE_BLOCKS = 1024


def decode_blocks(raw: Tensor, kind: str) -> Tensor | GroupQuantized:
    """Return the values `[N, K]` of rows of blocks.

    Args:
        raw: uint8 `[N, row bytes]`, contiguous.
        kind: name of a BlockType.

    Returns:
        For Q4_0, Q4_1 and Q4_K their codes in groups of 32; for all others fp32.
    """
    if kind in _PLAIN:
        return raw.view(_PLAIN[kind]).float()
    layout = BLOCK_TYPE_OF[kind]
    rows, columns = raw.shape[0], raw.shape[1] // layout.num_bytes * layout.num_values
    blocks = raw.view(-1, layout.num_bytes)
    if kind in _GROUPED:
        codes, scales, zeros = _GROUPED[kind](blocks)
        shape = (rows, columns // _GROUP)
        return GroupQuantized(codes.view(rows, columns), scales.view(shape), zeros.view(shape), _GROUP)
    # In pieces that stay in the processor's cache, since each step of a decoder makes a tensor of its own.
    values = torch.empty((blocks.shape[0], layout.num_values))
    for piece, target in zip(blocks.split(_PIECE_BLOCKS), values.split(_PIECE_BLOCKS), strict=True):
        target.copy_(_VALUES[kind](piece))
    return values.view(rows, columns)


def _half(blocks: Tensor, start: int) -> Tensor:
    """The fp16 number at byte `start` of every block, as fp32 `[B, 1]`."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor) -> Tensor:
    """`[..., n]` bytes to `[..., 2n]` codes: all low halves, then all high halves."""
    return torch.cat((packed & 15, packed >> 4), dim=-1)


def _fifth_bits(packed: Tensor) -> Tensor:
    """The 32 bits of 4 little-endian bytes `[B, 4]`, each as 0 or 16: `[B, 32]`."""
    shifts = torch.arange(8, dtype=torch.uint8)
    return ((packed.unsqueeze(-1) >> shifts & 1) << 4).flatten(1)


def _with_minimum(codes: Tensor, scales: Tensor, minima: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Groups `[B, G, 32]` of value `scale * code + minimum` as `scale * (code - zero)`.

    A group without scale is one value throughout: it becomes a group of zero codes whose scale is that value.
    """
    constant = scales == 0
    zeros = torch.where(constant, -1.0, -minima / torch.where(constant, 1.0, scales))
    scales = torch.where(constant, minima, scales)
    return codes.masked_fill(constant.unsqueeze(-1), 0), scales, zeros


def _q4_0(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scale fp16, 32 codes of 4 bits; value = scale * (code - 8)."""
    scales = _half(blocks, 0)
    return _nibbles(blocks[:, 2:]), scales, torch.full_like(scales, 8.0)


def _q4_1(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scale fp16, minimum fp16, 32 codes of 4 bits; value = scale * code + minimum."""
    return _with_minimum(_nibbles(blocks[:, 4:]).unsqueeze(1), _half(blocks, 0), _half(blocks, 2))


def _q4_k(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Two fp16 factors, 12 bytes of 6-bit scales and minima, 8 groups of 32 codes of 4 bits."""
    scales, minima = _k_scales(blocks)
    codes = _nibbles(blocks[:, 16:].view(-1, 4, 32)).view(-1, 8, 32)
    return _with_minimum(codes, scales, -minima)


def _k_scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minima `[B, 8]` of Q4_K and Q5_K.

    Of the 12 bytes, the first 4 hold scales 0-3 and the next 4 minima 0-3 in their low 6 bits; scale and minimum 4-7
    have their low 4 bits in the low and high half of the last 4, and their high 2 bits on top of the first 8.
    """
    low_scales, low_minima, shared = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat((low_scales & 63, (shared & 15) | (low_scales >> 6 << 4)), dim=1)
    minima = torch.cat((low_minima & 63, (shared >> 4) | (low_minima >> 6 << 4)), dim=1)
    return _half(blocks, 0) * scales.float(), _half(blocks, 2) * minima.float()


def _q5_0(blocks: Tensor) -> Tensor:
    """Scale fp16, 32 fifth bits, 32 codes of 4 bits; value = scale * (code - 16)."""
    codes = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6])
    return _half(blocks, 0) * (codes.float() - 16)


def _q5_1(blocks: Tensor) -> Tensor:
    """Scale fp16, minimum fp16, 32 fifth bits, 32 codes of 4 bits; value = scale * code + minimum."""
    codes = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8])
    return _half(blocks, 0) * codes.float() + _half(blocks, 2)


def _q8_0(blocks: Tensor) -> Tensor:
    """Scale fp16, 32 codes of 8 bits, signed."""
    return _half(blocks, 0) * blocks[:, 2:].view(torch.int8).float()


def _q5_k(blocks: Tensor) -> Tensor:
    """As Q4_K, with 32 bytes of fifth bits: bit g of byte i belongs to value i of group g."""
    scales, minima = _k_scales(blocks)
    shifts = torch.arange(8, dtype=torch.uint8).view(8, 1)
    fifth = (blocks[:, 16:48].unsqueeze(1) >> shifts & 1) << 4
    codes = _nibbles(blocks[:, 48:].view(-1, 4, 32)).view(-1, 8, 32) | fifth
    return (scales.unsqueeze(-1) * codes.float() - minima.unsqueeze(-1)).view(-1, _SUPER)


def _q6_k(blocks: Tensor) -> Tensor:
    """128 bytes of low 4 bits, 64 of high 2 bits, 16 signed scales (one per 16 values), a factor fp16.

    Each half of the block has 64 bytes of low bits and 32 of high bits; value = factor * scale * (code - 32).
    """
    low = _nibbles(blocks[:, :128].view(-1, 2, 64)).view(-1, 2, 4, 32)
    shifts = torch.tensor((0, 2, 4, 6), dtype=torch.uint8).view(4, 1)
    high = (blocks[:, 128:192].view(-1, 2, 1, 32) >> shifts & 3) << 4
    codes = (low | high).view(-1, 16, 16).float() - 32
    scales = _half(blocks, 208) * blocks[:, 192:208].view(torch.int8).float()
    return (scales.unsqueeze(-1) * codes).view(-1, _SUPER)


_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_GROUPED: dict[str, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]] = {"Q4_0": _q4_0, "Q4_1": _q4_1, "Q4_K": _q4_k}
_VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
