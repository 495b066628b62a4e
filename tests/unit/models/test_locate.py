"""A model's name or path leads to its folder, or to an error that says what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from seamount.core.errors import CheckpointError, NotFoundError
from seamount.models import locate
from seamount.models.locate import embedded_models, locate_model


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def test_a_checkpoint_folder_is_found(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert locate_model(str(checkpoint)) == checkpoint
    monkeypatch.chdir(checkpoint.parent)
    assert locate_model("model").resolve() == checkpoint.resolve()
    monkeypatch.setenv("HOME", str(checkpoint.parent))
    assert locate_model("~/model") == checkpoint


def test_an_embedded_model_is_found_by_name(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locate, "_EMBEDDED", checkpoint.parent)
    assert embedded_models() == ("model",)
    assert locate_model("model") == checkpoint
    with pytest.raises(NotFoundError, match="nosuch") as caught:
        locate_model("nosuch")
    assert caught.value.hint and "model" in caught.value.hint


def test_no_embedded_models_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locate, "_EMBEDDED", tmp_path / "none")
    assert embedded_models() == ()


def test_a_hub_id_is_not_downloaded() -> None:
    with pytest.raises(NotFoundError) as caught:
        locate_model("deepseek-ai/DeepSeek-V2-Lite")
    assert caught.value.hint and "does not download" in caught.value.hint


@pytest.mark.parametrize("name", ["", "  ", "/no/such/folder", "../nowhere", "x" * 5000, "a\0b"])
def test_nothing_of_this_name(name: str) -> None:
    with pytest.raises(NotFoundError):
        locate_model(name)


def test_a_file_is_not_a_folder(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="is a file") as caught:
        locate_model(str(checkpoint / "config.json"))
    assert caught.value.hint and str(checkpoint) in caught.value.hint


def test_folders_without_a_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json") as caught:
        locate_model(str(tmp_path))
    assert caught.value.hint and str(checkpoint) in caught.value.hint
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(CheckpointError, match="is empty"):
        locate_model(str(empty))


def test_a_gguf_file_is_found_by_its_path_and_by_its_folder(tmp_path: Path) -> None:
    shards = [tmp_path / f"m-0000{i}-of-00002.gguf" for i in (1, 2)]
    for shard in shards:
        shard.write_bytes(b"GGUF")
    assert locate_model(str(shards[0])) == shards[0]
    assert locate_model(str(tmp_path)) == shards[0]
    (tmp_path / "config.json").write_text("{}")  # as some publishers leave it beside the files
    assert locate_model(str(tmp_path)) == shards[0]
    (tmp_path / "other-Q4_0.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="2 models in GGUF.*other-Q4_0") as caught:
        locate_model(str(tmp_path))
    assert caught.value.hint == "Give one of the files."
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert locate_model(str(tmp_path)) == tmp_path
