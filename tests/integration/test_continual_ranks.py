"""Two processes under torchrun learn tasks one after the other as one process does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from continual_site import write_model

from seamount.training.continual.versions import Versions
from seamount.training.tuning.log import read_log

PROGRAM = Path(__file__).parents[1] / "support" / "continual_ranks.py"


def run(count: int, model: Path, output: Path) -> list[float]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    command = [*(launcher if count > 1 else [sys.executable]), str(PROGRAM), str(model), str(output)]
    environment = os.environ | {"PYTHONPATH": str(PROGRAM.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in read_log(output / "metrics.jsonl") if line is not None and line["kind"] == "step"]
    return [line["loss"] for line in lines]


def test_two_processes_learn_tasks_as_one_does(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    losses = {count: run(count, model, tmp_path / str(count)) for count in (1, 2)}
    assert losses[2] == pytest.approx(losses[1], rel=1e-4)
    (alone, _), (both, _) = (Versions(tmp_path / str(count)).load(2) for count in (1, 2))
    assert alone.keys() == both.keys()
    for name, tensor in alone.items():
        if name.startswith(("memory.", "evaluation.")):
            assert torch.equal(tensor, both[name]), name
    # Sums in another order, through Adam: weights that hardly matter differ, information does not.
    fishers = [name for name in alone if name.startswith("fisher.")]
    off = sum(float((alone[name] - both[name]).abs().sum()) for name in fishers)
    assert off < 0.05 * sum(float(alone[name].sum()) for name in fishers)
