"""What a GGUF file holds, by its header alone: metadata, and names, types, shapes and byte ranges of tensors.

The counterpart of `models.checkpoint` for GGUF (versions 2 and 3, little-endian). `models.gguf_config`,
`gguf_keymap` and `gguf_tokenizer` give metadata and tensors their meaning. The file is untrusted: every number is
compared with the file before anything is allocated from it, and each problem is a CheckpointError that names the file
and the field or tensor. Knows no architecture, and loads no torch: the server's process reads tokenizers from here.
"""

from __future__ import annotations

import math
import os
import re
import struct
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from seamount.core.errors import CheckpointError, UnsupportedModelError

from .checkpoint import StoredTensor, open_file, read_at, shown

MAX_HEADER_BYTES = 64 * 2**20
MAX_ARRAY_LENGTH = 2**22
MAX_TENSORS = 2**17
_MAX_SHARDS = 1000
_MAX_RANK = 4
_MAX_ALIGNMENT = 2**16
_CHUNK_BYTES = 2**20
_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SHARD_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")

# Types of metadata values, by number (the format's specification).
_SCALARS: dict[int, np.dtype[Any]] = {
    0: np.dtype("u1"),
    1: np.dtype("i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_TEXT = 8
_ARRAY = 9


@dataclass(frozen=True, slots=True)
class BlockType:
    """How a tensor's values are stored: rows are cut into blocks of `num_values`, each of `num_bytes`."""

    name: str
    num_values: int
    num_bytes: int


BLOCK_TYPES = {
    0: BlockType("F32", 1, 4),
    1: BlockType("F16", 1, 2),
    2: BlockType("Q4_0", 32, 18),
    3: BlockType("Q4_1", 32, 20),
    6: BlockType("Q5_0", 32, 22),
    7: BlockType("Q5_1", 32, 24),
    8: BlockType("Q8_0", 32, 34),
    12: BlockType("Q4_K", 256, 144),
    13: BlockType("Q5_K", 256, 176),
    14: BlockType("Q6_K", 256, 210),
    30: BlockType("BF16", 1, 2),
}
BLOCK_TYPE_OF = {kind.name: kind for kind in BLOCK_TYPES.values()}
_UNREAD_TYPES = {10: "Q2_K", 11: "Q3_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL"} | {
    21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4"
}  # fmt: skip


@dataclass(frozen=True)
class Gguf:
    """One GGUF model, from one file or from all its shards.

    Attributes:
        path: the file given; for a model in shards, the first one.
        metadata: by key: bool, int, float, str, list[str] or a one-dimensional numpy array.
        tensors: by GGUF name. `shape` is row-major (the file's order reversed) and `dtype` names a BlockType.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]

    @classmethod
    def from_file(cls, path: Path) -> Gguf:
        """Read and check the header of a GGUF file, and those of its other shards where it is one of several.

        Raises:
            CheckpointError: a file is missing, broken or lies; the message names file and field or tensor.
            UnsupportedModelError: it is big-endian, of another version, or holds a type that is not read.
        """
        first = _read_file(path)
        count = _split_count(first)
        if count == 1:
            return first
        match = _SHARD_NAME.fullmatch(path.name)
        if match is None or int(match[3]) != count:
            raise CheckpointError(
                f"{path} is one of {count} shards, and its name is not of the form NAME-00001-of-{count:05d}.gguf.",
                hint="Give the shards the names that they were published under.",
            )
        shards = [_read_file(path.with_name(f"{match[1]}-{i:05d}-of-{match[3]}.gguf")) for i in range(1, count + 1)]
        tensors: dict[str, StoredTensor] = {}
        for shard in shards:
            for stored in shard.tensors.values():
                if stored.name in tensors:
                    raise CheckpointError(f"The {stored} is also in {tensors[stored.name].path}.")
                tensors[stored.name] = stored
        expected = shards[0].metadata.get("split.tensors.count", len(tensors))
        if expected != len(tensors):
            raise CheckpointError(f"The shards of {path} hold {len(tensors)} tensors; the first says {expected!s:.20}.")
        return cls(shards[0].path, shards[0].metadata, tensors)


def _split_count(file: Gguf) -> int:
    count = file.metadata.get("split.count", 1)
    if type(count) is not int or not 0 <= count <= _MAX_SHARDS:
        raise CheckpointError(f"{file.path}: split.count is no number of shards.")
    return max(count, 1)


def _read_file(path: Path) -> Gguf:
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        cursor = _Cursor(file, size, path)
        num_tensors, num_fields = _read_preamble(cursor)
        metadata: dict[str, Any] = {}
        for _ in range(num_fields):
            key = cursor.text("a metadata key")
            if key in metadata:
                raise CheckpointError(f"{path} has the metadata key {shown(key)} twice.")
            metadata[key] = _read_value(cursor, f"{path}: {shown(key)}")
        found = [_read_tensor(cursor) for _ in range(num_tensors)]
    alignment = _alignment(metadata, path)
    start = -(-cursor.position // alignment) * alignment
    tensors: dict[str, StoredTensor] = {}
    for name, kind, shape, offset in found:
        num_bytes = math.prod(shape) // kind.num_values * kind.num_bytes
        stored = StoredTensor(name, kind.name, shape, path, start + offset, num_bytes)
        if name in tensors:
            raise CheckpointError(f"{path} has the tensor {shown(name)} twice.")
        if offset % alignment:
            raise CheckpointError(f"The {stored} begins at {offset}, which is no multiple of {alignment}.")
        tensors[name] = stored
    _check_ranges(path, list(tensors.values()), size)
    return Gguf(path, metadata, tensors)


class _Cursor:
    """Reads the header front to back, in chunks; nothing is allocated that the file does not hold."""

    def __init__(self, file: FileIO, size: int, path: Path) -> None:
        self._file = file
        self._size = size
        self.path = path
        self._chunk = b""
        self._chunk_start = 0
        self.position = 0

    def take(self, count: int, what: str) -> bytes:
        """The next `count` bytes.

        Raises:
            CheckpointError: the file, or the room that a header is given, ends before.
        """
        end = self.position + count
        if end > self._size:
            raise CheckpointError(
                f"{self.path} ends within {what}, which claims {count} bytes at byte {self.position} of {self._size}.",
                hint="Fetch the file again; it is truncated or no GGUF file.",
            )
        if end > MAX_HEADER_BYTES:
            raise CheckpointError(f"{self.path} has a header of over {MAX_HEADER_BYTES} bytes, in {what}.")
        if end > self._chunk_start + len(self._chunk):
            chunk = bytearray(min(max(count, _CHUNK_BYTES), self._size - self.position))
            read_at(self._file, self.position, memoryview(chunk), f"the header of {self.path}")
            self._chunk, self._chunk_start = bytes(chunk), self.position
        begin = self.position - self._chunk_start
        self.position = end
        return self._chunk[begin : begin + count]

    def integer(self, layout: str, what: str) -> int:
        """The next unsigned integer; `layout` is "<I" or "<Q"."""
        (value,) = struct.unpack(layout, self.take(struct.calcsize(layout), what))
        return int(value)

    def text(self, what: str) -> str:
        """The next string: 8 bytes of length, then UTF-8."""
        data = self.take(self.integer("<Q", what), what)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as cause:
            raise CheckpointError(f"{self.path}: {what} is not UTF-8: {cause.reason}.") from cause


def _read_preamble(cursor: _Cursor) -> tuple[int, int]:
    path = cursor.path
    if cursor.take(4, "its first bytes") != _MAGIC:
        raise CheckpointError(f"{path} is no GGUF file: it does not begin with GGUF.")
    version = cursor.integer("<I", "its version")
    if version not in _VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        kind = f"big-endian GGUF {swapped}" if swapped in _VERSIONS else f"GGUF version {version}"
        raise UnsupportedModelError(f"{path} is {kind}, which is not read.", hint="Little-endian versions 2 and 3 are.")
    num_tensors = cursor.integer("<Q", "the number of tensors")
    num_fields = cursor.integer("<Q", "the number of metadata fields")
    if num_tensors > MAX_TENSORS:
        raise CheckpointError(f"{path} claims {num_tensors} tensors; the limit is {MAX_TENSORS}.")
    return num_tensors, num_fields


def _read_value(cursor: _Cursor, where: str) -> Any:
    kind = cursor.integer("<I", where)
    if kind == _TEXT:
        return cursor.text(where)
    if kind in _SCALARS:
        value = _read_numbers(cursor, kind, 1, where)[0]
        # The shortest decimal that gives this fp32 is the number that the writer meant: 1e-06, not 9.99999997e-07.
        return float(str(value)) if value.dtype == np.float32 else value.item()
    if kind != _ARRAY:
        raise CheckpointError(f"{where} has a value of the unknown type {kind}.")
    kind = cursor.integer("<I", where)
    length = cursor.integer("<Q", where)
    if length > MAX_ARRAY_LENGTH:
        raise CheckpointError(f"{where} claims {length} elements; the limit is {MAX_ARRAY_LENGTH}.")
    if kind == _TEXT:
        return [cursor.text(where) for _ in range(length)]
    if kind in _SCALARS:
        return _read_numbers(cursor, kind, length, where)
    raise CheckpointError(f"{where} is an array of elements of type {kind}, which is not read.")


def _read_numbers(cursor: _Cursor, kind: int, length: int, where: str) -> np.ndarray:
    dtype = _SCALARS[kind]
    data = cursor.take(length * dtype.itemsize, where)
    if dtype.kind == "b" and data.strip(b"\0\1"):
        raise CheckpointError(f"{where} holds a truth value that is neither 0 nor 1.")
    return np.frombuffer(data, dtype)


def _read_tensor(cursor: _Cursor) -> tuple[str, BlockType, tuple[int, ...], int]:
    name = cursor.text("a tensor's name")
    where = f"{cursor.path}: tensor {shown(name)}"
    rank = cursor.integer("<I", where)
    if not 1 <= rank <= _MAX_RANK:
        raise CheckpointError(f"{where} has {rank} axes; at least 1 and at most {_MAX_RANK} are allowed.")
    shape = struct.unpack(f"<{rank}Q", cursor.take(8 * rank, where))[::-1]
    if not all(shape):
        raise CheckpointError(f"{where} has an axis of size 0.")
    number = cursor.integer("<I", where)
    offset = cursor.integer("<Q", where)
    kind = BLOCK_TYPES.get(number)
    if kind is None:
        raise UnsupportedModelError(
            f"{where} is stored as {_UNREAD_TYPES.get(number, f'type {number}')}, which is not read.",
            hint=f"Read are: {', '.join(BLOCK_TYPE_OF)}. Take a file of another quantization.",
        )
    if shape[-1] % kind.num_values:
        raise CheckpointError(f"{where}: rows of {shape[-1]} values do not divide into {kind.name}'s blocks.")
    return name, kind, shape, offset


def _alignment(metadata: dict[str, Any], path: Path) -> int:
    value = metadata.get("general.alignment", 32)
    if type(value) is not int or not 1 <= value <= _MAX_ALIGNMENT or value & (value - 1):
        raise CheckpointError(f"{path}: general.alignment is {value!s:.20}; it must be a power of two.")
    return value


def _check_ranges(path: Path, tensors: list[StoredTensor], size: int) -> None:
    end = 0
    for stored in sorted(tensors, key=lambda t: (t.offset, t.num_bytes)):
        if stored.offset < end:
            raise CheckpointError(f"The {stored} overlaps another tensor.")
        end = stored.offset + stored.num_bytes
        if end > size:
            raise CheckpointError(
                f"The {stored} ends at byte {end}; the file has {size}.",
                hint="Fetch the file again; it is truncated.",
            )
