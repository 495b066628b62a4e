"""The header of a GGUF file is read as its own package writes it, and refused where it lies."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from seamount.core.errors import CheckpointError, UnsupportedModelError
from seamount.models.gguf import Gguf

VALUES = np.arange(12, dtype=np.float32).reshape(3, 4)


def write(path: Path, fill: Callable[[gguf.GGUFWriter], None] = lambda writer: None, **options: Any) -> Path:
    writer = gguf.GGUFWriter(path, "llama", **options)
    writer.add_float32("eps", 1e-6)
    writer.add_array("numbers", [1, 2, 3])
    writer.add_array("words", ["a", "ü", ""])
    writer.add_bool("yes", True)
    fill(writer)
    writer.add_tensor("a.weight", VALUES)
    writer.add_tensor("b.weight", np.ones(5, np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def header(*fields: bytes, tensors: tuple[bytes, ...] = (), version: int = 3, **counts: int) -> bytes:
    num_tensors, num_fields = counts.get("num_tensors", len(tensors)), counts.get("num_fields", len(fields))
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_fields) + b"".join(fields) + b"".join(tensors)


def tensor(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def test_metadata_and_tensors(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf")
    file = Gguf.from_file(path)
    assert file.metadata["general.architecture"] == "llama"
    assert (file.metadata["eps"], file.metadata["words"], file.metadata["yes"]) == (1e-6, ["a", "ü", ""], True)
    assert file.metadata["numbers"].tolist() == [1, 2, 3]
    stored = file.tensors["a.weight"]
    assert (stored.dtype, stored.shape, stored.num_bytes) == ("F32", (3, 4), 48)
    assert path.read_bytes()[stored.offset :][:48] == VALUES.tobytes()
    assert file.tensors["b.weight"].dtype == "F16"
    assert file.tensors["b.weight"].offset % 32 == 0


def test_another_alignment(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", lambda writer: writer.add_custom_alignment(256))
    stored = Gguf.from_file(path).tensors["a.weight"]
    assert stored.offset % 256 == 0
    assert path.read_bytes()[stored.offset :][:48] == VALUES.tobytes()


def test_shards_are_one_model(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", split_max_tensors=1)
    shards = sorted(tmp_path.glob("m-*.gguf"))
    assert len(shards) == 2
    for given in shards:
        file = Gguf.from_file(given)
        assert file.metadata["general.architecture"] == "llama"
        assert {name: stored.path for name, stored in file.tensors.items()} == dict(
            zip(("a.weight", "b.weight"), shards, strict=True)
        )
    renamed = shards[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(CheckpointError, match="one of 2 shards"):
        Gguf.from_file(renamed)
    with pytest.raises(CheckpointError, match="00001-of-00002"):
        Gguf.from_file(shards[1])


BIG = 2**62
BAD = {
    "no GGUF file": b"GGML" + bytes(40),
    "ends within": b"GGUF\x03",
    "claims 4611686018427387904 tensors": header(num_tensors=BIG),
    "ends within a metadata key": header(num_fields=BIG),
    "unknown type 77": header(text("k") + struct.pack("<I", 77)),
    "elements; the limit": header(text("k") + struct.pack("<IIQ", 9, 8, BIG)),
    "which claims 4194304 bytes": header(text("k") + struct.pack("<IIQ", 9, 0, 2**22)),
    "array of elements of type 9": header(text("k") + struct.pack("<IIQ", 9, 9, 1)),
    "twice": header(*[text("k") + struct.pack("<IB", 0, 1)] * 2),
    "neither 0 nor 1": header(text("k") + struct.pack("<IB", 7, 2)),
    "not UTF-8": header(struct.pack("<Q", 1) + b"\xff" + struct.pack("<IB", 0, 1)),
    "power of two": header(text("general.alignment") + struct.pack("<II", 4, 48)),
    "number of shards": header(text("split.count") + struct.pack("<II", 4, 10**6)),
    "5 axes": header(tensors=(tensor("t", (1, 1, 1, 1, 1), 0, 0),)),
    "0 axes": header(tensors=(tensor("t", (), 0, 0),)),
    "axis of size 0": header(tensors=(tensor("t", (4, 0), 0, 0),)),
    "the file has": header(tensors=(tensor("t", (BIG, BIG), 0, 0),)),
    "ends at byte": header(tensors=(tensor("t", (8,), 0, 2**63),)),
    "do not divide": header(tensors=(tensor("t", (33,), 2, 0),)),
    "no multiple of 32": header(tensors=(tensor("t", (1,), 0, 4),)) + bytes(99),
    "the tensor 't' twice": header(tensors=(tensor("t", (1,), 0, 0),) * 2) + bytes(99),
    "overlaps": header(tensors=(tensor("t", (1,), 0, 0), tensor("u", (1,), 0, 0))) + bytes(99),
}


@pytest.mark.parametrize("problem", BAD)
def test_a_header_that_lies_is_refused(problem: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(BAD[problem])
    with pytest.raises(CheckpointError, match=problem) as caught:
        Gguf.from_file(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian GGUF 3"),
        (header(version=1), "version 1"),
        (header(tensors=(tensor("t", (256,), 20, 0),)), "IQ4_NL"),
        (header(tensors=(tensor("t", (256,), 99, 0),)), "type 99"),
    ],
)
def test_what_is_not_read_is_said(data: bytes, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    path.write_bytes(data)
    with pytest.raises(UnsupportedModelError, match=problem):
        Gguf.from_file(path)


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        Gguf.from_file(tmp_path / "none.gguf")


def test_headers_configs_and_tokenizers_load_no_torch() -> None:
    for name in ("gguf", "gguf_config", "gguf_keymap", "gguf_tokenizer", "quantized_config"):
        program = f"import sys, seamount.models.{name}; sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0, name
