"""Two processes under torchrun train as one does; and when one of them fails, the other says which and of what."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torchrun import ranks

from seamount.training.tuning.state import CheckpointStore


def seen(folder: Path, count: int, strategy: str) -> dict[str, Any]:
    folder.mkdir()
    done = ranks("tuning_ranks.py", count, strategy, str(folder))
    assert done.returncode == 0, done.stderr[-2000:]
    told: dict[str, Any] = json.loads((folder / "seen.json").read_text(encoding="utf-8"))
    assert told["size"] == count
    return told


def test_two_processes_lose_as_one_does(tmp_path: Path) -> None:
    alone = seen(tmp_path / "alone", 1, "ddp")
    for strategy in ("ddp", "fsdp"):
        both = seen(tmp_path / strategy, 2, strategy)
        for name in ("losses", "norms", "evaluations"):
            assert both[name] == pytest.approx(alone[name], rel=1e-4), (strategy, name)
        assert both["sums"] == pytest.approx(alone["sums"], rel=1e-3, abs=1e-2)


def test_the_checkpoints_of_shared_out_weights_are_those_of_one_process(tmp_path: Path) -> None:
    for name, count, strategy in (("alone", 1, "ddp"), ("shared", 2, "fsdp")):
        seen(tmp_path / name, count, strategy)
    alone, _ = CheckpointStore(tmp_path / "alone" / "checkpoints").load()
    shared, _ = CheckpointStore(tmp_path / "shared" / "checkpoints").load()
    assert alone.keys() == shared.keys()
    assert all(alone[name].shape == shared[name].shape for name in alone)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_rank_that_fails_is_named_and_a_checkpoint_is_whole(tmp_path: Path, strategy: str) -> None:
    done = ranks("tuning_ranks.py", 2, strategy, str(tmp_path), "1")
    assert done.returncode != 0
    assert "rank 1: The disk with the examples is gone." in done.stderr
    assert "rank 0: Rank 1 failed: The disk with the examples is gone." in done.stderr
    tensors, facts = CheckpointStore(tmp_path / "checkpoints").load()
    assert facts["position"]["step"] == 3
    assert tensors
