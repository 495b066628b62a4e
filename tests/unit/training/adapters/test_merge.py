"""Merging: the sums, what is copied as it is, and that whatever stops it, nothing is half written or lost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from seamount.core.errors import CapacityError, CheckpointError, ConfigError, UnsupportedModelError
from seamount.models.adapter import Adapter
from seamount.models.checkpoint import INDEX_NAME
from seamount.models.config import ModelConfig
from seamount.models.keymap import placements
from seamount.models.loading import load_model
from seamount.training.adapters import merge as merging
from seamount.training.adapters.files import save_adapter
from seamount.training.adapters.lora import add_adapters
from seamount.training.adapters.merge import merge
from seamount.training.compression.files import ShardWriter

EVERY = ("attention", "dense", "shared", "experts")


@pytest.fixture
def adapter(network: Any, section: Any, disturb: Any, tmp_path: Path) -> Any:
    def make(name: str = "latent") -> Path:
        given = section(targets=EVERY if name == "latent" else EVERY[:2])
        model = network(name)
        add_adapters(model, given, seed=0)
        save_adapter(disturb(model), tmp_path / "adapter", given, "base-model")
        return tmp_path / "adapter"

    return make


def shard(folder: Path) -> None:
    """Cut the weights into three files and an index, as large checkpoints are."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, placed = sorted(tensors), {}
    for number in range(3):
        own = {name: tensors[name] for name in names[number::3]}
        file = f"model-{number + 1:05d}-of-00003.safetensors"
        save_file(own, folder / file, metadata={"format": "pt"})
        placed |= dict.fromkeys(own, file)
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": placed}))


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("in_shards", [False, True])
def test_sums_are_rounded_once_and_all_else_is_copied(
    dtype: torch.dtype, in_shards: bool, checkpoint: Any, adapter: Any, tmp_path: Path
) -> None:
    folder, added = checkpoint("latent", dtype), adapter()
    if in_shards:
        shard(folder)
    (folder / "chat_templates").mkdir()
    (folder / "chat_templates" / "tool_use.jinja").write_text("x")
    before = content(folder), content(added)
    told: list[tuple[int, int]] = []
    merge(folder, added, tmp_path / "out", progress=lambda *numbers: told.append(numbers))
    assert (content(folder), content(added)) == before
    kept = {"config.json", "tokenizer.json", "chat_templates/tool_use.jinja"}
    weights = {path.name for path in folder.glob("*.safetensors")} | ({INDEX_NAME} if in_shards else set())
    assert content(tmp_path / "out").keys() == kept | weights
    assert all(content(tmp_path / "out")[name] == before[0][name] for name in kept)
    source, result, found = tensors_in(folder), tensors_in(tmp_path / "out"), Adapter.from_folder(added)
    config = ModelConfig.from_folder(folder)
    num_adapted = 0
    for place in placements(config):
        delta = found.delta(place)
        num_adapted += delta is not None
        expected = source[place.key]
        expected = expected if delta is None else (expected.float() + delta).to(expected.dtype)
        assert torch.equal(result[place.key], expected) and result[place.key].dtype == expected.dtype, place.key
    assert num_adapted > 20
    assert told[-1] == (sum(value.nbytes for value in result.values()),) * 2
    load_model(tmp_path / "out", config, dtype=dtype, device=torch.device("cpu"), packed=False)
    assert not (tmp_path / "out.partial").exists()


def test_a_model_in_fp8_is_written_in_its_16_bits(checkpoint: Any, adapter: Any, tmp_path: Path) -> None:
    folder, added = checkpoint("latent", torch.bfloat16), adapter()
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        tensors[f"{name}_scale_inv"] = torch.full([-(-size // 128) for size in tensors[name].shape], 0.5)
        tensors[name] = (tensors[name].float() / 0.5).to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    described = json.loads((folder / "config.json").read_text())
    fp8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(described | {"quantization_config": fp8}))
    merge(folder, added, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == described
    result, found = tensors_in(tmp_path / "out"), Adapter.from_folder(added)
    config = ModelConfig.from_folder(tmp_path / "out")
    for place in placements(config):
        value = tensors[place.key].float() * (0.5 if place.key.endswith("_proj.weight") else 1.0)
        delta = found.delta(place)
        expected = (value if delta is None else value + delta).to(result[place.key].dtype)
        assert torch.equal(result[place.key], expected), place.key
        assert result[place.key].dtype in (torch.bfloat16, torch.float32)
    assert result.keys() == {place.key for place in placements(config)}


def test_a_model_in_4_bits_is_written_in_16(checkpoint: Any, adapter: Any, tmp_path: Path) -> None:
    from seamount.training.compression.compress import Job, quantize

    quantize(Job(folder=checkpoint("dense"), output=tmp_path / "q" / "base-model", method="rtn", bits=4, group_size=32))
    added = adapter("dense")
    merge(tmp_path / "q" / "base-model", added, tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    config, source = ModelConfig.from_folder(tmp_path / "out"), ModelConfig.from_folder(tmp_path / "q" / "base-model")
    cpu, found = torch.device("cpu"), Adapter.from_folder(added)
    merged = load_model(tmp_path / "out", config, dtype=torch.float32, device=cpu, packed=False)
    base = load_model(tmp_path / "q" / "base-model", source, dtype=torch.float32, device=cpu, packed=False)
    now, was = dict(merged.named_parameters()), dict(base.named_parameters())
    for place in placements(config):
        delta = found.delta(place)
        expected = place.part_of(was[place.parameter]) + (0 if delta is None else delta)
        assert torch.allclose(place.part_of(now[place.parameter]), expected, rtol=2**-8, atol=1e-6), place.key


def test_a_base_model_keeps_its_names(checkpoint: Any, adapter: Any, tmp_path: Path) -> None:
    """Embedding models are saved without a head, and their tensors without the beginning `model.`."""
    folder = checkpoint("dense")
    tensors = {name.removeprefix("model."): value for name, value in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    merge(folder, adapter("dense"), tmp_path / "out")
    assert tensors_in(tmp_path / "out").keys() == tensors.keys()
    name = "layers.0.mlp.up_proj.weight"
    assert not torch.equal(tensors_in(tmp_path / "out")[name], tensors[name])


def test_what_cannot_be_merged_is_told_before_anything_is_written(
    checkpoint: Any, adapter: Any, tmp_path: Path
) -> None:
    folder, added = checkpoint("dense"), adapter("dense")
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine").write_text("x")
    with pytest.raises(ConfigError, match="exists already"):
        merge(folder, added, taken)
    with pytest.raises(ConfigError, match="inside what is read"):
        merge(folder, added, folder / "out")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine").write_text("x")
    with pytest.raises(ConfigError, match="no unfinished merge"):
        merge(folder, added, tmp_path / "out")
    assert (tmp_path / "out.partial" / "mine").exists()
    with pytest.raises(CheckpointError, match="adapter_config"):
        merge(folder, tmp_path / "nowhere", tmp_path / "else")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(UnsupportedModelError, match="GGUF"):
        merge(tmp_path / "model.gguf", added, tmp_path / "else")
    assert not (tmp_path / "else.partial").exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_merge_that_fails_leaves_nothing(
    error: BaseException, checkpoint: Any, adapter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, added = checkpoint("dense"), adapter("dense")
    before = content(folder), content(added)

    def fail(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "write", fail)
        expected = CapacityError if isinstance(error, OSError) else KeyboardInterrupt
        with pytest.raises(expected):
            merge(folder, added, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    assert (content(folder), content(added)) == before
    monkeypatch.setattr(merging.shutil, "disk_usage", lambda _: _Full())
    with pytest.raises(CapacityError, match="of disk is needed"):
        merge(folder, added, tmp_path / "out")


class _Full:
    free = 10


PAUSED = """
import signal, sys
from pathlib import Path
from seamount.training.adapters.merge import merge

def pause(done, total):
    print("paused", flush=True)
    signal.pause()

merge(*map(Path, sys.argv[1:]), progress=pause)
"""


def test_a_killed_merge_is_begun_anew_and_two_at_once_are_not_possible(
    checkpoint: Any, adapter: Any, tmp_path: Path
) -> None:
    folder, added, output = checkpoint("dense"), adapter("dense"), tmp_path / "out"
    words = [sys.executable, "-c", PAUSED, str(folder), str(added), str(output)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "paused\n"
        with pytest.raises(ConfigError, match="Another process"):
            merge(folder, added, output)
        process.kill()
    assert (tmp_path / "out.partial").exists() and not output.exists()
    (tmp_path / "out.partial" / "left").mkdir()
    merge(folder, added, output)
    merge(folder, added, tmp_path / "again")
    assert content(output) == content(tmp_path / "again")
