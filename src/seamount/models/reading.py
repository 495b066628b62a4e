"""Reads placed tensors, or rows of them, from checkpoint files into memory.

Called by `models.loading` (into parameters) and, through it, by `models.packing` (into buffers that are then packed).
What an adapter adds is added here, in fp32. Plain numbers are read in pieces straight to where they belong where types
agree; FP8 blocks and what `models.encoded` describes are converted on the way. Nothing is mapped, and buffers stay
small.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from seamount import kernels
from seamount.core.errors import CheckpointError
from seamount.kernels import hardware

from .checkpoint import StoredTensor, open_file, read_at, shown
from .encoded import Encoded, fill, read_encoded, rows_of
from .keymap import Placement
from .load_plan import DTYPES, LoadPlan
from .memory import release_freed
from .quantized_formats import Weight

Progress = Callable[[int, int], None]

_BUFFER_BYTES = 32 * 2**20
# Reading from the page cache is bound by the processor, which a second reader relieves and an eighth does not.
_MOST_READERS = 4
_STRIP_ROWS = 512
# Buffers that were freed lie between matrices that stay; so often they are handed back.
_RELEASE_BYTES = 128 * 2**20


@dataclass(frozen=True)
class Part:
    """Rows of one matrix that come from one checkpoint tensor.

    Attributes:
        place: the tensor's placement.
        first_row: of the stored tensor (all axes but the last flattened) at which the part begins.
        num_rows: how many.
        at_row: of the matrix, where they go.
    """

    place: Placement
    first_row: int
    num_rows: int
    at_row: int


class Reader:
    """A context manager, because its threads end with it.

    Args:
        total_bytes: that will be read.
        progress: told the bytes read so far and the bytes in all.
    """

    def __init__(self, plan: LoadPlan, total_bytes: int, progress: Progress | None) -> None:
        self._plan = plan
        self._progress = progress
        self._done, self._total = 0, total_bytes
        self._since_release = 0
        self._threads = ThreadPoolExecutor(min(_MOST_READERS, hardware.default_threads()))
        self._files: dict[Path, FileIO] = {}
        self._closing = ExitStack()
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._closing.close()

    def read(self, place: Placement, target: Tensor) -> None:
        """Read the whole tensor into `target` of its shape."""
        if self._plan.is_adapted(place):
            self._read_adapted(place, target.view(-1, place.shape[-1]))
            return
        for piece in self._pieces(Part(place, 0, place.shape[0], 0), target):
            self.advance(piece.read())

    def read_part(self, part: Part, target: Weight) -> int:
        """Read rows of a tensor into `target` of so many rows, fp32 where they are adapted; returns the bytes read."""
        num_bytes = sum(self._threads.map(lambda piece: piece.read(), self._pieces(part, target)))
        adapter = self._plan.adapter
        added = None if adapter is None else adapter.delta_rows(part.place, part.first_row, part.num_rows)
        if added is not None:
            if not isinstance(target, Tensor):
                raise TypeError(f"{part.place.key} is adapted, and codes were asked for")
            target += added
        return num_bytes

    def _read_adapted(self, place: Placement, target: Tensor) -> None:
        """Read `[N, C]` rows through an fp32 buffer, so that weight and addition are rounded as one."""
        step = max(_BUFFER_BYTES // (4 * target.shape[1]) // kernels.FP8_BLOCK, 1) * kernels.FP8_BLOCK
        if place.key in self._plan.encoded:
            step = target.shape[0]
        for start in range(0, target.shape[0], step):
            rows = target[start : start + step]
            wide = torch.empty(rows.shape)
            num_bytes = self.read_part(Part(place, start, rows.shape[0], 0), wide)
            rows.copy_(wide)
            if rows.dtype == torch.float16:
                _check_range(rows, shown(place.key))
            self.advance(num_bytes)

    def advance(self, num_bytes: int) -> None:
        """Count bytes as done and tell."""
        self._done += num_bytes
        self._since_release += num_bytes
        if self._since_release >= _RELEASE_BYTES:
            release_freed()
            self._since_release = 0
        if self._progress is not None:
            self._progress(self._done, self._total)

    def _pieces(self, part: Part, target: Weight) -> list[_Piece] | list[_EncodedPiece]:
        encoded = self._plan.encoded.get(part.place.key)
        if encoded is not None:
            return list(_encoded_pieces(encoded, part, target))
        if not isinstance(target, Tensor):
            raise TypeError(f"{part.place.key} holds numbers, and codes were asked for")
        stored = self._plan.checkpoint.tensors[part.place.key]
        with self._lock:
            file = self._files.get(stored.path)
            if file is None:
                file = self._files[stored.path] = self._closing.enter_context(open_file(stored.path))
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        return list(_pieces(file, stored, self._plan.scales.get(stored.name), part.first_row, target))


@dataclass(frozen=True, slots=True)
class _EncodedPiece:
    """Rows of an encoded tensor, and where they go."""

    encoded: Encoded
    start: int
    stop: int
    target: Weight
    num_bytes: int

    def read(self) -> int:
        """Read and decode; returns the bytes counted for it."""
        decoded = read_encoded(self.encoded, self.start, self.stop)
        fill(self.target, decoded)
        if isinstance(self.target, Tensor) and self.target.dtype == torch.float16:
            _check_range(self.target, shown(self.encoded.key))
        return self.num_bytes


def _encoded_pieces(encoded: Encoded, part: Part, target: Weight) -> Iterator[_EncodedPiece]:
    step = max(_STRIP_ROWS // encoded.row_step, 1) * encoded.row_step
    if len(encoded.shape) == 1:
        step = encoded.shape[0]
    end, rows = part.first_row + part.num_rows, encoded.shape[0]
    for start in range(part.first_row, end, step):
        stop = min(start + step, end)
        num_bytes = encoded.num_bytes * stop // rows - encoded.num_bytes * start // rows
        yield _EncodedPiece(encoded, start, stop, rows_of(target, start - part.first_row, stop - start), num_bytes)


@dataclass(frozen=True, slots=True)
class _Piece:
    """A part of a stored tensor, as large as fits the buffer, and the part of a parameter that it fills.

    `factors` are the FP8 scales of its rows.
    """

    file: FileIO
    stored: StoredTensor
    offset: int
    target: Tensor
    factors: Tensor | None

    def read(self) -> int:
        """Read and convert; in place, where type and device agree. Returns the bytes read."""
        source = DTYPES[self.stored.dtype]
        if source == self.target.dtype and self.target.device.type == "cpu":
            read_at(self.file, self.offset, _bytes_of(self.target), self.stored)
            return self.target.nbytes
        values = torch.empty(self.target.shape, dtype=source)
        read_at(self.file, self.offset, _bytes_of(values), self.stored)
        wide = values.to(self.target.device)
        if self.factors is not None:
            wide = kernels.dequantize_fp8_blocks(wide, self.factors, torch.float32)
        self.target.copy_(wide)
        if self.target.dtype == torch.float16 and source != torch.float16:
            _check_range(self.target, self.stored)
        return values.nbytes


def _pieces(
    file: FileIO, stored: StoredTensor, scale: StoredTensor | None, first_row: int, target: Tensor
) -> Iterator[_Piece]:
    """Cut the rows from `first_row` on, as many as `target` holds; of FP8 a multiple of its blocks' height."""
    if scale is None:
        flat, size = target.view(-1), DTYPES[stored.dtype].itemsize
        origin = stored.offset + first_row * (target.shape[-1] if target.dim() > 1 else 1) * size
        length = _BUFFER_BYTES // size
        for start in range(0, flat.numel(), length):
            yield _Piece(file, stored, origin + start * size, flat[start : start + length], None)
        return
    factors = torch.empty(scale.shape, dtype=DTYPES[scale.dtype])
    with open_file(scale.path) as scale_file:
        read_at(scale_file, scale.offset, _bytes_of(factors), scale)
    factors = factors.float().to(target.device)
    (rows, columns), block = target.shape, kernels.FP8_BLOCK
    # A quarter of the buffer, because the dequantized values, in fp32, are four times as large.
    strip = max(_BUFFER_BYTES // 4 // max(columns, 1) // block, 1) * block
    for start in range(0, rows, strip):
        at = first_row + start
        of_strip = factors[at // block : -(-(at + strip) // block)]
        yield _Piece(file, stored, stored.offset + at * columns, target[start : start + strip], of_strip)


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data


def _check_range(converted: Tensor, what: object) -> None:
    """fp16 ends at 65504: a weight beyond it would become infinite without a word."""
    low, high = converted.aminmax()
    if not (low.isfinite() and high.isfinite()):
        raise CheckpointError(
            f"The {what} holds values that float16 cannot hold.", hint="Use dtype bfloat16 or float32."
        )
