"""Every method of tuning goes in two processes as in one: losses, checkpoints, and what comes out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torchrun import ranks
from tuning_ways import WAYS

from seamount.training.tuning.state import CheckpointStore


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    alone, shared = tmp_path_factory.mktemp("alone"), tmp_path_factory.mktemp("shared")
    for done in (
        ranks("tuning_ways.py", 1, str(alone), "ddp"),
        ranks("tuning_ways.py", 2, str(shared), "ddp", "fsdp"),
    ):
        assert done.returncode == 0, done.stderr[-3000:]
    return alone, shared


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_do_as_one(both: tuple[Path, Path], way: str, strategy: str) -> None:
    alone, shared = (both[0] / f"ddp-{way}", both[1] / f"{strategy}-{way}")
    one, two = (json.loads(folder.with_suffix(".json").read_text(encoding="utf-8")) for folder in (alone, shared))
    assert (one["size"], two["size"]) == (1, 2)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-2 if way in ("half", "routers") else 1e-4)
    kept, same = (CheckpointStore(folder / "checkpoints").load()[0] for folder in (alone, shared))
    assert {name: tensor.shape for name, tensor in kept.items()} == {name: t.shape for name, t in same.items()}
    if "adapter" in WAYS[way]:
        first, second = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (alone, shared))
        assert first.keys() == second.keys()
        for name, tensor in first.items():
            torch.testing.assert_close(second[name], tensor, rtol=1e-3, atol=1e-4)
