"""Checkpoint tensors that are not stored as plain numbers: what they are, by header, and how rows of them are read.

Two sources, one face: quantized linear layers of safetensors folders (`QuantizedLayer`, several stored tensors each)
and the tensors of GGUF files (`GgufEntry`). `models.load_plan` finds them, `models.precision` decides from their `Form`
how they are held in memory, `models.reading` reads them. Knows no networks.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from seamount.core.errors import CheckpointError, UnsupportedModelError

from .checkpoint import StoredTensor, open_file, read_at, shown
from .gguf_keymap import GgufEntry, Layout
from .gguf_reading import read_rows
from .quantized import ChannelQuantized, GroupQuantized
from .quantized_config import QuantizationConfig
from .quantized_formats import Weight, decode_weight

_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
}
_FOUR_BIT_BLOCKS = ("Q4_0", "Q4_1", "Q4_K")
_PLAIN_BLOCKS = ("F32", "F16", "BF16")
_BLOCK_GROUP = 32
_TILE = 64


@dataclass(frozen=True, slots=True)
class Form:
    """What a stored tensor holds.

    Attributes:
        bits: 4, 8 or 16 per value, rounded up; 16 stands for all plain numbers.
        group: 4 bits: values of a row that share scale and zero, as the packed kernels count them.
        has_codes: what `read_encoded` returns are codes that the packed kernels take as they are.
    """

    bits: int = 16
    group: int | None = None
    has_codes: bool = False


PLAIN = Form()


@dataclass(frozen=True)
class QuantizedLayer:
    """The weight `key [N, K]` of a quantized linear layer, and the stored tensors by role that it is made of."""

    config: QuantizationConfig
    key: str
    shape: tuple[int, int]
    parts: dict[str, StoredTensor]

    @property
    def num_bytes(self) -> int:
        """Bytes in the files."""
        return sum(part.num_bytes for part in self.parts.values())

    @property
    def row_step(self) -> int:
        """Rows that are read together: all of them, as most formats store columns."""
        return self.shape[0]


Encoded = QuantizedLayer | GgufEntry


def form_of(encoded: Encoded) -> Form:
    """What the tensor holds, by its header."""
    if isinstance(encoded, GgufEntry):
        return _gguf_form(encoded)
    config = encoded.config
    if config.bits == 4 and not config.reordered:
        return _grouped_form(config.group_size, encoded.shape[1])
    in_rows = config.format == "int-quantized" or (
        config.format == "pack-quantized" and config.symmetric and config.group_size is None and not config.reordered
    )
    return Form(8, has_codes=config.bits == 8 and in_rows)


def _gguf_form(entry: GgufEntry) -> Form:
    kinds = {part.dtype for part in entry.parts}
    if kinds <= set(_PLAIN_BLOCKS):
        return PLAIN
    if kinds <= set(_FOUR_BIT_BLOCKS) and entry.layout is not Layout.KEY_VALUE:
        return Form(4, _BLOCK_GROUP, has_codes=True)
    return Form(8)


@functools.cache
def _grouped_form(group_size: int | None, columns: int) -> Form:
    """Groups of 32 or multiples of 64 are taken as they are; a row that is one group is rounded up to such."""
    if group_size is None or group_size >= columns:
        return Form(4, -(-columns // _TILE) * _TILE, has_codes=True)
    fits = group_size == _BLOCK_GROUP or group_size % _TILE == 0
    return Form(4, group_size, has_codes=True) if fits else Form(8)


def read_encoded(encoded: Encoded, start: int, stop: int) -> Weight:
    """Return rows `start` to `stop`, multiples of `encoded.row_step` (`stop` may also be the number of rows).

    Raises:
        CheckpointError: a file ends before or cannot be read, or what it holds makes no sense.
    """
    if isinstance(encoded, GgufEntry):
        return read_rows(encoded, start, stop)
    if (start, stop) != (0, encoded.shape[0]):
        raise ValueError(f"{encoded.key} is read as a whole, not from row {start} to {stop}")
    tensors = {role: read_stored(part) for role, part in encoded.parts.items()}
    decoded = decode_weight(encoded.config, encoded.key, encoded.shape, tensors)
    wanted = form_of(encoded)
    if wanted.has_codes and isinstance(decoded, Tensor):
        raise UnsupportedModelError(
            f"{shown(encoded.key)}: its g_idx puts columns out of order, and config.json says that they are in order.",
            hint='Set "desc_act" of quantization_config in config.json to true.',
        )
    return decoded


def read_stored(stored: StoredTensor) -> Tensor:
    """A stored tensor as it is."""
    values = torch.empty(stored.shape, dtype=_DTYPES[stored.dtype])
    with open_file(stored.path) as file:
        read_at(file, stored.offset, values.view(-1).view(torch.uint8).numpy().data, stored)
    return values


def is_all_zero(stored: StoredTensor) -> bool:
    """Whether it holds nothing but zeros."""
    if stored.dtype not in _DTYPES:
        return False
    return not read_stored(stored).any()


def values_of(weight: Weight) -> Tensor:
    """The numbers that a weight stands for, fp32."""
    return weight if isinstance(weight, Tensor) else weight.dequantize()


def empty_weight(form: Form, shape: tuple[int, int], dtype: torch.dtype) -> Weight:
    """Memory for rows of a weight, as codes where `form` says so, else as numbers of `dtype`."""
    if not form.has_codes:
        return torch.empty(shape, dtype=dtype)
    if form.group is None:
        return ChannelQuantized(torch.empty(shape, dtype=torch.int8), torch.empty(shape[0]))
    groups = (shape[0], -(-shape[1] // form.group))
    return GroupQuantized(torch.empty(shape, dtype=torch.uint8), torch.empty(groups), torch.empty(groups), form.group)


def rows_of(weight: Weight, start: int, count: int) -> Weight:
    """A view of some rows."""
    index = slice(start, start + count)
    if isinstance(weight, GroupQuantized):
        return weight.rows(index)
    if isinstance(weight, ChannelQuantized):
        return ChannelQuantized(weight.codes[index], weight.scales[index])
    return weight[index]


def fill(target: Weight, source: Weight) -> None:
    """Copy rows into rows of the same shape; into numbers, whatever the source is.

    Raises:
        CheckpointError: the source has other scales than the target has room for.
    """
    if isinstance(target, Tensor):
        target.copy_(values_of(source).view(target.shape))
        return
    for field in dataclasses.fields(target):
        to, values = getattr(target, field.name), getattr(source, field.name)
        if isinstance(to, Tensor):
            if to.shape != values.shape:
                raise CheckpointError(f"{field.name} of shape {list(values.shape)} do not fit {list(to.shape)}.")
            to.copy_(values)
