"""What one checkpoint of a run is on disk: `manifest.json` and `state.safetensors`, written once, read with proof.

Called by `state`, which decides what is kept and when. It must not know what the tensors mean.

The manifest is JSON in one spelling only (keys sorted, one space of indent), with the SHA-256 of the rest in it: no
byte of it can change unnoticed. It holds the SHA-256 of the tensor file's header and of each tensor's bytes, so none of
those can either.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seamount.core.errors import CheckpointError
from seamount.models.checkpoint import MAX_HEADER_BYTES, StoredTensor, open_file, read_at, read_header, shown

MANIFEST_NAME, TENSORS_NAME = "manifest.json", "state.safetensors"
_FORMAT = 1
# safetensors' names of types (https://github.com/huggingface/safetensors, "Format").
_DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.int64: "I64",
    torch.float64: "F64",
}
_TORCH_DTYPES = {name: dtype for dtype, name in _DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a checkpoint: `sha256` of its bytes (row-major, little-endian); `step`: whose folder holds them."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str
    step: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a checkpoint is made of.

    Attributes:
        step: its number.
        since_full: saves since one that holds all of its tensors itself; 0 is such a one.
        chain: step to SHA-256 of that checkpoint's manifest.json: of the checkpoint before, and of each other one whose
            folder has tensors of this one.
        header_sha256: of the tensor file's header with its length prefix.
        tensors: by name.
        facts: JSON.
    """

    step: int
    since_full: int
    chain: dict[int, str]
    header_sha256: str
    tensors: dict[str, Entry]
    facts: dict[str, Any]

    @property
    def holders(self) -> set[int]:
        """The steps whose folders this checkpoint cannot do without."""
        return {self.step} | {entry.step for entry in self.tensors.values()}

    def to_bytes(self) -> bytes:
        """The file."""
        fields = {
            "format": _FORMAT,
            "step": self.step,
            "since_full": self.since_full,
            "chain": {str(step): digest for step, digest in self.chain.items()},
            "header_sha256": self.header_sha256,
            "tensors": {
                name: {"dtype": e.dtype, "shape": list(e.shape), "sha256": e.sha256, "step": e.step}
                for name, e in self.tensors.items()
            },
            "facts": self.facts,
        }
        return _sealed(fields)

    @classmethod
    def from_file(cls, path: Path, *, sha256: str | None = None) -> tuple[Manifest, str]:
        """Read a manifest, and its digest.

        Args:
            sha256: what another checkpoint says of it.

        Raises:
            CheckpointError: it cannot be read, is not as it was written, or of another format.
        """
        with open_file(path) as file:
            data = file.readall()
        digest = hashlib.sha256(data).hexdigest()
        try:
            fields = json.loads(data)
            if not isinstance(fields, dict) or _sealed({k: v for k, v in fields.items() if k != "sha256"}) != data:
                raise ValueError("its digest does not fit")
        except (ValueError, RecursionError) as cause:
            raise CheckpointError(f"{path} is not as it was written: bytes of it have changed.") from cause
        if fields.get("format") != _FORMAT:
            raise CheckpointError(
                f"{path} is of format {shown(str(fields.get('format')))}; this version reads {_FORMAT}."
            )
        if sha256 not in (None, digest):
            raise CheckpointError(f"{path} is another one than the checkpoint that is built on it was built on.")
        return cls._from_fields(fields), digest

    @classmethod
    def _from_fields(cls, fields: dict[str, Any]) -> Manifest:
        tensors = {
            name: Entry(entry["dtype"], tuple(entry["shape"]), entry["sha256"], entry["step"])
            for name, entry in fields["tensors"].items()
        }
        chain = {int(step): digest for step, digest in fields["chain"].items()}
        return cls(fields["step"], fields["since_full"], chain, fields["header_sha256"], tensors, fields["facts"])


def _sealed(fields: dict[str, Any]) -> bytes:
    """The one spelling of these fields, with their digest."""

    def spelled(value: dict[str, Any]) -> bytes:
        return json.dumps(value, indent=1, sort_keys=True).encode()

    return spelled({**fields, "sha256": hashlib.sha256(spelled(fields)).hexdigest()})


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], before: Mapping[str, Entry], step: int
) -> tuple[dict[str, Entry], str]:
    """Write those tensors whose type, shape or bytes are not those of `before` into a new safetensors file, synced.

    Each tensor is read once from its device, and at most one is held beside the given ones. As it is not known before
    they are hashed which ones are written, the header's room is that of all of them.

    Returns:
        An entry for each given tensor, and the header's SHA-256.

    Raises:
        OSError: the disk is full or fails; the file is left as it then is.
        CheckpointError: a tensor is of a type that safetensors does not have.
    """
    # The widest elements first, so that each tensor lies at a multiple of its element's size, as readers like it.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    room = len(_header(_spans({name: tensors[name] for name in names})))
    entries: dict[str, Entry] = {}
    written: dict[str, Tensor] = {}
    with open(path, "xb", buffering=0) as file:
        descriptor = file.fileno()
        os.lseek(descriptor, room, os.SEEK_SET)
        for name in names:
            tensor = tensors[name]
            data = _bytes_of(tensor)
            entry = Entry(_dtype_name(name, tensor), tuple(tensor.shape), hashlib.sha256(data).hexdigest(), step)
            old = before.get(name)
            if old is not None and (old.dtype, old.shape, old.sha256) == (entry.dtype, entry.shape, entry.sha256):
                entry = old
            else:
                _write(descriptor, data)
                written[name] = tensor
            entries[name] = entry
        header = _header(_spans(written), room)
        os.lseek(descriptor, 0, os.SEEK_SET)
        _write(descriptor, memoryview(header))
        os.fsync(descriptor)
    return entries, hashlib.sha256(header).hexdigest()


def write_synced(path: Path, data: bytes) -> None:
    """Write a new file that is on the disk when this returns. Raises OSError."""
    with open(path, "xb", buffering=0) as file:
        _write(file.fileno(), memoryview(data))
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def stored_tensors(folder: Path, header_sha256: str) -> dict[str, StoredTensor]:
    """Where the tensors of a checkpoint's own file lie. Raises CheckpointError: its header is not as it was written."""
    path = folder / TENSORS_NAME
    with open_file(path) as file:
        prefix = bytearray(8)
        read_at(file, 0, memoryview(prefix), f"the header of {path}")
        length = int.from_bytes(prefix, "little")
        whole = bytearray(8 + length if length <= MAX_HEADER_BYTES else 8)
        read_at(file, 0, memoryview(whole), f"the header of {path}")
    if hashlib.sha256(whole).hexdigest() != header_sha256:
        raise CheckpointError(f"{path} is not as it was written: bytes of its header have changed.")
    return read_header(path)


def read_tensor(stored: StoredTensor, entry: Entry) -> Tensor:
    """Read a tensor. Raises CheckpointError: it is not what the entry says."""
    if (stored.dtype, stored.shape) != (entry.dtype, entry.shape):
        raise CheckpointError(
            f"The {stored} is {stored.dtype} {list(stored.shape)}, which the manifest says otherwise."
        )
    tensor = torch.empty(entry.shape, dtype=_TORCH_DTYPES[entry.dtype])
    data = _bytes_of(tensor)
    with open_file(stored.path) as file:
        read_at(file, stored.offset, data, stored)
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise CheckpointError(f"The {stored} is not as it was written: bytes of it have changed.")
    return tensor


def _dtype_name(name: str, tensor: Tensor) -> str:
    if tensor.dtype not in _DTYPES:
        raise CheckpointError(f"Tensor {shown(name)} is {tensor.dtype}, which a checkpoint cannot hold.")
    return _DTYPES[tensor.dtype]


def _bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor; where it lies contiguous on a CPU, its own."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _spans(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The header's fields, for tensors that lie one after the other."""
    fields: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        fields[name] = {
            "dtype": _dtype_name(name, tensor),
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    return fields


def _header(fields: dict[str, Any], room: int = 0) -> bytes:
    """A safetensors header with its length, of `room` bytes at least; the format has spaces fill it."""
    text = json.dumps(fields, separators=(",", ":")).encode()
    length = max(len(text) + -len(text) % 8, room - 8)
    return length.to_bytes(8, "little") + text.ljust(length)


def _write(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
