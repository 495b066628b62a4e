"""Broken, hostile and ordinary folders of safetensors: what is read, and what is refused with which words."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from seamount.core.errors import CheckpointError
from seamount.models.checkpoint import INDEX_NAME, MAX_HEADER_BYTES, Checkpoint, read_header

FOUR_FLOATS = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


def write_raw(path: Path, header: Any, data: bytes = bytes(16)) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_reads_what_the_safetensors_library_wrote(tmp_path: Path) -> None:
    tensors = {
        "a": torch.zeros(3, 4, dtype=torch.bfloat16),
        "b": torch.zeros(5),
        "c": torch.zeros(2, 2).to(torch.float8_e4m3fn),
        "d": torch.zeros(0, 7, dtype=torch.float16),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = Checkpoint.from_folder(tmp_path)
    assert {name: (t.dtype, t.shape) for name, t in found.tensors.items()} == {
        "a": ("BF16", (3, 4)),
        "b": ("F32", (5,)),
        "c": ("F8_E4M3", (2, 2)),
        "d": ("F16", (0, 7)),
    }
    assert sum(t.num_bytes for t in found.tensors.values()) == 24 + 20 + 4


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"{not json", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[1]", "not a JSON object"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"w":' + json.dumps(FOUR_FLOATS).encode() + b',"w":' + json.dumps(FOUR_FLOATS).encode() + b"}", "twice"),
        ({"w": [1]}, "dtype, shape and data_offsets"),
        ({"w": FOUR_FLOATS | {"extra": 1}}, "dtype, shape and data_offsets"),
        ({"w": FOUR_FLOATS | {"dtype": "F7"}}, "unknown dtype"),
        ({"w": FOUR_FLOATS | {"dtype": ["F32"]}}, "unknown dtype"),
        ({"w": FOUR_FLOATS | {"shape": [2, -2]}}, "shape"),
        ({"w": FOUR_FLOATS | {"shape": [2, True]}}, "shape"),
        ({"w": FOUR_FLOATS | {"shape": [2.0, 2]}}, "shape"),
        ({"w": FOUR_FLOATS | {"shape": [1] * 9 + [4]}}, "shape"),
        ({"w": FOUR_FLOATS | {"shape": [2, 3]}}, "does not take the 16 bytes"),
        ({"w": FOUR_FLOATS | {"shape": [2**62, 2**62]}}, "does not take the 16 bytes"),
        ({"w": FOUR_FLOATS | {"data_offsets": [16, 0]}}, "data_offsets"),
        ({"w": FOUR_FLOATS | {"data_offsets": [0]}}, "data_offsets"),
        ({"w": FOUR_FLOATS | {"data_offsets": [16, 32]}}, "gap of 16 bytes"),
        ({"w": FOUR_FLOATS, "x": FOUR_FLOATS}, "overlaps"),
        ({"w": FOUR_FLOATS, "x": FOUR_FLOATS | {"data_offsets": [16, 32]}}, "truncated"),
        ({}, "16 bytes behind its last tensor"),
        ({"__metadata__": 3, "w": FOUR_FLOATS}, "__metadata__"),
    ],
)
def test_a_broken_header_is_refused_by_name(tmp_path: Path, header: Any, words: str) -> None:
    path = write_raw(tmp_path / "model.safetensors", header)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    if isinstance(header, dict) and "w" in header and "__metadata__" not in header:
        assert "'w'" in str(caught.value) or "'x'" in str(caught.value)


@pytest.mark.parametrize("length", [17, MAX_HEADER_BYTES + 1, 2**64 - 1])
def test_a_header_longer_than_its_file_or_the_limit_is_refused(tmp_path: Path, length: int) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + bytes(16))
    with pytest.raises(CheckpointError, match=f"header of {length} bytes"):
        read_header(path)


@pytest.mark.parametrize("size", [0, 7])
def test_a_stub_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(size))
    with pytest.raises(CheckpointError, match=f"has {size} bytes"):
        read_header(path)


def test_an_unprintable_name_is_shown_escaped(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "model.safetensors", {"\x1b[2J\ud800" * 100: FOUR_FLOATS | {"dtype": "F7"}})
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert str(caught.value).isascii() and str(caught.value).isprintable()
    assert len(str(caught.value)) < 2500


def test_something_that_is_no_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")  # opening it would wait for ever
    with pytest.raises(CheckpointError, match="not a regular file"):
        Checkpoint.from_folder(tmp_path)


def test_links_into_a_hub_cache_are_followed(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    write_raw(tmp_path / "blobs" / "abc", {"w": FOUR_FLOATS})
    (tmp_path / "snapshot" / "model.safetensors").symlink_to("../blobs/abc")
    assert set(Checkpoint.from_folder(tmp_path / "snapshot").tensors) == {"w"}


def test_a_dangling_link_is_named(tmp_path: Path) -> None:
    write_index(tmp_path, {"w": "a.safetensors"})
    (tmp_path / "a.safetensors").symlink_to("../blobs/gone")
    with pytest.raises(CheckpointError, match=r"a\.safetensors is missing"):
        Checkpoint.from_folder(tmp_path)


def test_shards_are_joined_by_the_index(tmp_path: Path) -> None:
    write_raw(tmp_path / "a.safetensors", {"w": FOUR_FLOATS})
    write_raw(tmp_path / "b.safetensors", {"x": FOUR_FLOATS})
    write_raw(tmp_path / "other.safetensors", {"w": FOUR_FLOATS})  # not in the index: not ours
    write_index(tmp_path, {"w": "a.safetensors", "x": "b.safetensors"})
    found = Checkpoint.from_folder(tmp_path)
    assert [path.name for path in found.files] == ["a.safetensors", "b.safetensors"]
    assert found.tensors["x"].path.name == "b.safetensors"


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "sub/x.safetensors",
        "..\\x.safetensors",
        "x.bin",
        "",
        3,
        "a\n.safetensors",
    ],
)
def test_an_index_that_leaves_the_folder_is_refused(tmp_path: Path, name: Any) -> None:
    write_raw(tmp_path.parent / "x.safetensors", {"w": FOUR_FLOATS})
    write_index(tmp_path, {"w": name})
    with pytest.raises(CheckpointError, match="not the name of a safetensors file"):
        Checkpoint.from_folder(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_raw(tmp_path / "a.safetensors", {"w": FOUR_FLOATS})
    write_index(tmp_path, {"w": "a.safetensors", "x": "b.safetensors"})
    with pytest.raises(CheckpointError, match=r"b\.safetensors is missing"):
        Checkpoint.from_folder(tmp_path)


def test_a_missing_shard_is_named_without_an_index(tmp_path: Path) -> None:
    write_raw(tmp_path / "model-00002-of-00003.safetensors", {"w": FOUR_FLOATS})
    with pytest.raises(CheckpointError, match=r"model-00001-of-00003\.safetensors is missing"):
        Checkpoint.from_folder(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    write_raw(tmp_path / "a.safetensors", {"w": FOUR_FLOATS})
    write_raw(tmp_path / "b.safetensors", {"w": FOUR_FLOATS})
    with pytest.raises(CheckpointError, match=r"'w' in .*b\.safetensors is also in .*a\.safetensors"):
        Checkpoint.from_folder(tmp_path)


def test_an_index_that_names_the_wrong_shard_is_refused(tmp_path: Path) -> None:
    write_raw(tmp_path / "a.safetensors", {"w": FOUR_FLOATS})
    write_raw(tmp_path / "b.safetensors", {"x": FOUR_FLOATS})
    write_index(tmp_path, {"w": "b.safetensors", "x": "a.safetensors"})
    with pytest.raises(CheckpointError, match=r"'w' is in b.safetensors; it is not"):
        Checkpoint.from_folder(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_a_broken_index_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / INDEX_NAME).write_text(content)
    with pytest.raises(CheckpointError, match="index"):
        Checkpoint.from_folder(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "last.ckpt", "consolidated.00.pth"])
def test_pickle_alone_is_refused_and_never_opened(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)  # opening it would wait for ever
    with pytest.raises(CheckpointError, match="pickle") as caught:
        Checkpoint.from_folder(tmp_path)
    assert "Convert" in (caught.value.hint or "")


def test_pickle_beside_safetensors_is_ignored(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pytorch_model.bin")
    write_raw(tmp_path / "model.safetensors", {"w": FOUR_FLOATS})
    assert set(Checkpoint.from_folder(tmp_path).tensors) == {"w"}


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors"):
        Checkpoint.from_folder(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be listed"):
        Checkpoint.from_folder(tmp_path / "nowhere")
