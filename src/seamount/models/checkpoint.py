"""What a folder of safetensors files holds, by its headers alone: names, types, shapes and byte ranges, all
checked.

`models.loading` reads tensors through this and `ops.inspection` describes folders with it. The folder is
untrusted: every number is compared with the file before anything is allocated from it, pickle files are never
opened, and each problem is a CheckpointError that names the file and the tensor. Knows nothing of networks;
`models.keymap` gives tensors their meaning.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from seamount.core.errors import CheckpointError

MAX_HEADER_BYTES = 100 * 10**6
MAX_INDEX_BYTES = 256 * 2**20
INDEX_NAME = "model.safetensors.index.json"
_SINGLE_NAME = "model.safetensors"
_MAX_RANK = 8
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_SHARD_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")

DTYPE_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor on disk: `num_bytes` bytes at `offset` of `path`, row-major, little-endian."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    num_bytes: int

    def __str__(self) -> str:
        return f"tensor {shown(self.name)} in {self.path}"


@dataclass(frozen=True)
class Checkpoint:
    """All tensors of a folder, by name, and the files they lie in."""

    folder: Path
    files: tuple[Path, ...]
    tensors: dict[str, StoredTensor]

    @classmethod
    def from_folder(cls, folder: Path) -> Checkpoint:
        """Read the headers of all weight files.

        Raises:
            CheckpointError: there are no safetensors, or a file or the index is broken.
        """
        placed = _read_index(folder) if not (folder / _SINGLE_NAME).exists() else None
        names = sorted(set(placed.values())) if placed else _names_without_index(folder)
        tensors: dict[str, StoredTensor] = {}
        for name in names:
            for stored in read_header(folder / name).values():
                if stored.name in tensors:
                    raise CheckpointError(f"The {stored} is also in {tensors[stored.name].path}.")
                tensors[stored.name] = stored
        for tensor_name, file_name in (placed or {}).items():
            found = tensors.get(tensor_name)
            if found is None or found.path.name != file_name:
                raise CheckpointError(
                    f"{folder / INDEX_NAME} says that tensor {shown(tensor_name)} is in {file_name}; it is not.",
                    hint="Fetch the checkpoint again: index and shards do not belong together.",
                )
        return cls(folder, tuple(folder / name for name in names), tensors)


def shown(name: str) -> str:
    """An untrusted name, quoted and cut, so that it is safe in a message."""
    return ascii(name if len(name) <= 200 else name[:200] + "...")


@contextmanager
def open_file(path: Path) -> Iterator[FileIO]:
    """Open a regular file for unbuffered reading; symbolic links are followed, as hub caches are made of
    them.

    Raises:
        CheckpointError: it is missing, unreadable, or no regular file; also for an OSError inside the block.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(f"{path} is not a regular file.")
        with FileIO(path, "r") as file:
            yield file
    except OSError as cause:
        raise CheckpointError(f"{path} cannot be read: {cause.strerror}.") from cause


def read_at(file: FileIO, offset: int, buffer: memoryview, what: object) -> None:
    """Fill `buffer` from byte `offset` on; threads may share the file.

    Raises:
        CheckpointError: the file ends before; the message names `what` was wanted.
    """
    done = 0
    while done < len(buffer):
        count = os.preadv(file.fileno(), [buffer[done:]], offset + done)
        if not count:
            raise CheckpointError(f"The file ended within {what}.", hint="Fetch the file again; it is truncated.")
        done += count


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Read and check the header of one safetensors file.

    The format: 8 bytes of little-endian header length, the header as JSON, then the tensors without gaps or
    overlaps.

    Raises:
        CheckpointError: anything about the file is not so; the tensor is named where there is one to blame.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size < 8:
            raise CheckpointError(f"{path} has {size} bytes; a safetensors file has 8 at least.", hint=_AGAIN)
        prefix = bytearray(8)
        read_at(file, 0, memoryview(prefix), f"the header of {path}")
        length = int.from_bytes(prefix, "little")
        if length > MAX_HEADER_BYTES or length > size - 8:
            raise CheckpointError(
                f"{path} claims a header of {length} bytes; the file has {size} and the limit is {MAX_HEADER_BYTES}.",
                hint=_AGAIN,
            )
        header = bytearray(length)
        read_at(file, 8, memoryview(header), f"the header of {path}")
    entries = _parse_json(bytes(header), f"The header of {path}")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise CheckpointError(f"The header of {path} holds a __metadata__ that is not an object.")
    tensors = {name: _tensor(name, entry, path, 8 + length) for name, entry in entries.items()}
    _check_ranges(path, list(tensors.values()), 8 + length, size)
    return tensors


_AGAIN = "Fetch the file again; it is truncated or no safetensors file."


def _tensor(name: str, entry: Any, path: Path, data_start: int) -> StoredTensor:
    where = f"The header of {path}: tensor {shown(name)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} must have dtype, shape and data_offsets, and nothing else.")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise CheckpointError(f"{where} has the unknown dtype {shown(str(dtype))}.")
    if not _are_sizes(shape) or len(shape) > _MAX_RANK:
        raise CheckpointError(f"{where} has a shape that is no list of at most {_MAX_RANK} sizes.")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where} has data_offsets that are not a begin and an end.")
    num_bytes = offsets[1] - offsets[0]
    if math.prod(shape) * DTYPE_BYTES[dtype] != num_bytes:
        raise CheckpointError(f"{where} is {dtype} {shape}, which does not take the {num_bytes} bytes it claims.")
    return StoredTensor(name, dtype, tuple(shape), path, data_start + offsets[0], num_bytes)


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _check_ranges(path: Path, tensors: list[StoredTensor], start: int, size: int) -> None:
    end = start
    for stored in sorted(tensors, key=lambda t: (t.offset, t.num_bytes)):
        if stored.offset != end:
            problem = (
                "overlaps another tensor" if stored.offset < end else f"leaves a gap of {stored.offset - end} bytes"
            )
            raise CheckpointError(f"The {stored} {problem}.")
        end = stored.offset + stored.num_bytes
        if end > size:
            raise CheckpointError(
                f"The {stored} ends at byte {end}; the file has {size}.",
                hint="Fetch the file again; it is truncated.",
            )
    if end != size:
        raise CheckpointError(f"{path} has {size - end} bytes behind its last tensor.", hint=_AGAIN)


def _parse_json(data: bytes, where: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table: dict[str, Any] = {}
        for name, value in pairs:
            if name in table:
                raise CheckpointError(f"{where} has the key {shown(name)} twice.")
            table[name] = value
        return table

    try:
        parsed = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as cause:
        raise CheckpointError(f"{where} is not valid JSON: {cause}.") from cause
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{where} is not a JSON object.")
    return parsed


def _read_index(folder: Path) -> dict[str, str] | None:
    """Tensor name to file name, each a plain name inside the folder; None when there is no index."""
    path = folder / INDEX_NAME
    if not path.exists():
        return None
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_INDEX_BYTES:
            raise CheckpointError(f"{path} has {size} bytes; the limit is {MAX_INDEX_BYTES}.")
        data = file.readall()
    placed = _parse_json(data, str(path)).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise CheckpointError(f"{path} has no weight_map.")
    for tensor_name, file_name in placed.items():
        if not isinstance(file_name, str) or not _is_plain_name(file_name):
            raise CheckpointError(
                f"{path} puts tensor {shown(tensor_name)} into {shown(str(file_name))}, "
                "which is not the name of a safetensors file in the folder."
            )
    for file_name in sorted(set(placed.values())):
        if not (folder / file_name).exists():
            raise CheckpointError(
                f"{folder / file_name} is missing; {INDEX_NAME} names it.", hint="Fetch the missing shard."
            )
    return placed


def _is_plain_name(name: str) -> bool:
    return name.endswith(".safetensors") and not any(c in name for c in "/\\:\0") and name.isprintable()


def _names_without_index(folder: Path) -> list[str]:
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as cause:
        raise CheckpointError(f"{folder} cannot be listed: {cause.strerror}.") from cause
    if _SINGLE_NAME in names:
        return [_SINGLE_NAME]
    found = [name for name in names if name.endswith(".safetensors") and not name.startswith(".")]
    if not found:
        pickled = [name for name in names if name.endswith(_PICKLE_SUFFIXES)]
        if pickled:
            raise CheckpointError(
                f"{folder} holds its weights as pickle only ({shown(pickled[0])}), which can run code when read.",
                hint="Convert them to safetensors on a machine where that does no harm, and give the new folder.",
            )
        raise CheckpointError(f"{folder} holds no *.safetensors file.", hint="Give the folder that holds the weights.")
    for name in found:
        match = _SHARD_NAME.fullmatch(name)
        missing = match and [
            shard
            for number in range(1, int(match[3]) + 1)
            if (shard := f"{match[1]}-{number:05d}-of-{match[3]}.safetensors") not in found
        ]
        if missing:
            raise CheckpointError(f"{folder / missing[0]} is missing; {name} says it exists.", hint="Fetch the shard.")
    return found
