"""What quantization keeps on disk: weight shards written tensor by tensor, and activations between layers.

Called by `compress` and `layer`. Files are written beside their place and renamed into
it when whole. Knows nothing of networks.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch import Tensor

from seamount.models.checkpoint import DTYPE_BYTES, StoredTensor, open_file, read_at

_COPY_BYTES = 16 * 2**20
TORCH_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "I8": torch.int8,
}


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor to be written; `dtype` as in safetensors headers."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size of the tensor's data."""
        return int(np.prod(self.shape, dtype=np.int64)) * DTYPE_BYTES[self.dtype]


class ShardWriter:
    """Writes one safetensors file whose tensors are known beforehand, in any order, holding none of them.

    A context manager: the file takes its name when the block ends well and every tensor was written.
    """

    def __init__(self, path: Path, entries: Sequence[Entry]) -> None:
        self._path, self._partial = path, path.with_name(path.name + ".tmp")
        self._entries = {entry.name: entry for entry in entries}
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._offsets, end = {}, 0
        for entry in entries:
            self._offsets[entry.name] = end
            end += entry.num_bytes
            span = [self._offsets[entry.name], end]
            header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": span}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._header = len(text).to_bytes(8, "little") + text
        self._left = set(self._entries)

    def __enter__(self) -> Self:
        self._file = open(self._partial, "wb", buffering=0)
        _write_at(self._file.fileno(), 0, memoryview(self._header))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if kind is None:
                if self._left:
                    raise RuntimeError(f"{self._path} was to hold {sorted(self._left)[0]}, which was not written.")
                os.fsync(self._file.fileno())
        if kind is None:
            os.replace(self._partial, self._path)

    def write(self, name: str, values: Tensor) -> None:
        """Write the tensor `name`, converted to its type; its shape must be the entry's."""
        entry = self._entries[name]
        if tuple(values.shape) != entry.shape:
            raise RuntimeError(f"{name} is {list(values.shape)}; announced was {list(entry.shape)}.")
        stored = values.to(TORCH_DTYPES[entry.dtype]).contiguous()
        self._put(name, 0, stored.view(-1).view(torch.uint8).numpy().data)
        self._left.remove(name)

    def copy(self, stored: StoredTensor) -> None:
        """Copy a tensor of another file as it is."""
        with open_file(stored.path) as file:
            for start in range(0, stored.num_bytes, _COPY_BYTES):
                piece = memoryview(bytearray(min(_COPY_BYTES, stored.num_bytes - start)))
                read_at(file, stored.offset + start, piece, stored)
                self._put(stored.name, start, piece)
        self._left.remove(stored.name)

    def _put(self, name: str, start: int, data: memoryview) -> None:
        _write_at(self._file.fileno(), len(self._header) + self._offsets[name] + start, data)


class Activations:
    """Hidden states `[T, C]` in fp32, in a file that is mapped only while rows are read or written.

    Mapped pages count as this process's memory, so none stays mapped.
    """

    def __init__(self, path: Path, num_rows: int, width: int) -> None:
        self.path, self._shape = path, (num_rows, width)

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return self._shape[0] * self._shape[1] * 4

    def create(self) -> Self:
        """Make the file, of zeros; its room is taken at once, as a mapped file cannot say that the disk is full."""
        with open(self.path, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(self.num_bytes, 1))
            file.truncate(self.num_bytes)
        return self

    def read(self, rows: slice | Tensor) -> Tensor:
        """A copy of some rows."""
        index = rows if isinstance(rows, slice) else rows.numpy()
        return torch.from_numpy(np.array(self._map("r")[index]))

    def write(self, rows: slice | Tensor, values: Tensor) -> None:
        """Set some rows."""
        self._map("r+")[rows if isinstance(rows, slice) else rows.numpy()] = values.numpy()

    def add(self, rows: Tensor, values: Tensor) -> None:
        """Add to some rows, each named once."""
        self.write(rows, self.read(rows) + values)

    def flush(self) -> None:
        """Bring everything to the disk."""
        with open(self.path, "rb+") as file:
            os.fsync(file.fileno())

    def _map(self, mode: str) -> np.ndarray:
        return np.memmap(self.path, dtype=np.float32, mode=mode, shape=self._shape)  # type: ignore[call-overload]


def write_whole(path: Path, content: bytes) -> None:
    """Write a small file beside its place, and rename it into it once it is on the disk."""
    partial = path.with_name(path.name + ".tmp")
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _write_at(descriptor: int, offset: int, data: memoryview) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)
