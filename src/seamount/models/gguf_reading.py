"""Reads rows of a checkpoint tensor out of a GGUF file.

Called by the loader, along the entries of `models.gguf_keymap`. Undoes what converters do to weights: llama's rotated
rows, and latent attention's keys and values stored apart. Peak memory is the bytes of the rows asked for and what they
become.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from seamount.core.errors import CheckpointError

from .checkpoint import StoredTensor, open_file, read_at
from .gguf import BLOCK_TYPE_OF
from .gguf_blocks import decode_blocks
from .gguf_keymap import GgufEntry, Layout
from .quantized import GroupQuantized


def read_rows(entry: GgufEntry, start: int = 0, stop: int | None = None) -> Tensor | GroupQuantized:
    """Return rows `start` to `stop` of a checkpoint tensor, all of them by default.

    Args:
        start, stop: multiples of `entry.row_step`; `stop` may also be the number of rows.

    Returns:
        4-bit codes in groups of 32 for matrices stored as Q4_0, Q4_1 and Q4_K; else fp32. Shape `[stop - start, ...]`.

    Raises:
        CheckpointError: the file ends before, or cannot be read.
        ValueError: the rows asked for are not such.
    """
    rows, step = entry.shape[0], entry.row_step
    stop = rows if stop is None else stop
    if not 0 <= start <= stop <= rows or start % step or (stop % step and stop != rows):
        raise ValueError(f"{entry.key} has {rows} rows in steps of {step}; {start} to {stop} are none of them.")
    if entry.layout is Layout.KEY_VALUE:
        return _key_value(entry, start // step, stop // step)
    found = _read(entry.parts[0], start, stop)
    if entry.layout is Layout.PLAIN:
        return found
    order = _unrotate(stop - start, step)
    return found.rows(order) if isinstance(found, GroupQuantized) else found[order]


def _read(stored: StoredTensor, start: int, stop: int) -> Tensor | GroupQuantized:
    """Rows of a stored tensor, all its axes but the last taken as one; of a vector, its elements."""
    if len(stored.shape) == 1:
        return _values(_read(_as_one_row(stored), 0, 1)).view(-1)[start:stop]
    kind = BLOCK_TYPE_OF[stored.dtype]
    row_bytes = stored.shape[-1] // kind.num_values * kind.num_bytes
    raw = torch.empty((stop - start, row_bytes), dtype=torch.uint8)
    with open_file(stored.path) as file:
        read_at(file, stored.offset + start * row_bytes, raw.view(-1).numpy().data, stored)
    decoded = decode_blocks(raw, stored.dtype)
    factors = decoded.scales + decoded.zeros if isinstance(decoded, GroupQuantized) else decoded
    # One pass: a sum is finite unless a value is not, or is so large that no weight is.
    if not factors.sum().isfinite():
        raise CheckpointError(
            f"The {stored} holds values that are no numbers, infinite or absurd.",
            hint="Fetch the file again; it is damaged.",
        )
    return decoded


def _as_one_row(vector: StoredTensor) -> StoredTensor:
    return dataclasses.replace(vector, shape=(1, *vector.shape))


def _values(decoded: Tensor | GroupQuantized) -> Tensor:
    return decoded.dequantize() if isinstance(decoded, GroupQuantized) else decoded


def _key_value(entry: GgufEntry, first: int, last: int) -> Tensor:
    """Heads `first` to `last` of the expanding matrix: per head its keys' rows, then its values'."""
    keys, values = entry.parts
    _, rank, nope = keys.shape
    v_dim = values.shape[1]
    up_key = _values(_read(keys, first * rank, last * rank)).view(-1, rank, nope).transpose(1, 2)
    up_value = _values(_read(values, first * v_dim, last * v_dim)).view(-1, v_dim, rank)
    return torch.cat((up_key, up_value), dim=1).flatten(0, 1)


def _unrotate(num_rows: int, head_rows: int) -> Tensor:
    """Where each row lies in the file: of a head's pairs, all first halves, then all second ones."""
    return torch.arange(num_rows).view(-1, head_rows // 2, 2).transpose(1, 2).reshape(-1)
