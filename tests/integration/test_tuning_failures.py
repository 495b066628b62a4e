"""A pipeline under torchrun: its result, a rank that is killed, ranks that were given different things."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from continual_site import write_model
from safetensors.torch import load_file
from torchrun import ranks

from seamount.training.tuning.log import read_log
from seamount.training.tuning.state import CheckpointStore

PROGRAM = "pipeline_ranks.py"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_model(tmp_path_factory.mktemp("site") / "model"))


def steps(folder: Path) -> list[int]:
    return [line["step"] for line in read_log(folder / "metrics.jsonl") if line is not None and line["kind"] == "step"]


def test_a_model_that_was_shared_out_is_written_whole(model: str, tmp_path: Path) -> None:
    made = []
    for count, strategy in ((1, "ddp"), (2, "fsdp")):
        folder = tmp_path / strategy
        done = ranks(PROGRAM, count, model, str(folder), strategy)
        assert done.returncode == 0, done.stderr[-3000:]
        assert (folder / "report.html").exists()
        made.append(load_file(folder / "model" / "model.safetensors"))
    alone, shared = made
    assert alone.keys() == shared.keys()
    for name, tensor in alone.items():
        torch.testing.assert_close(shared[name], tensor, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_rank_that_is_killed_is_named_and_another_number_of_ranks_goes_on(
    model: str, tmp_path: Path, strategy: str
) -> None:
    done = ranks(PROGRAM, 2, model, str(tmp_path), strategy, "killed")
    assert done.returncode != 0
    assert "RankFailedError: Rank 1 (process " in done.stderr
    assert "it was killed" in done.stderr
    told = steps(tmp_path)
    newest = CheckpointStore(tmp_path / "checkpoints").steps()[-1]
    assert newest == told[-1] if strategy == "ddp" else newest >= 2
    again = ranks(PROGRAM, 1, model, str(tmp_path), strategy, "unharmed")
    assert again.returncode == 0, again.stderr[-3000:]
    assert steps(tmp_path) == list(range(1, 41))
    assert (tmp_path / "model" / "model.safetensors").exists()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ranks_that_are_asked_to_end_do_so_after_the_same_step(model: str, tmp_path: Path, strategy: str) -> None:
    done = ranks(PROGRAM, 2, model, str(tmp_path), strategy, "asked")
    assert done.returncode == 0, done.stderr[-3000:]
    told = steps(tmp_path)
    assert 1 <= len(told) < 40
    assert CheckpointStore(tmp_path / "checkpoints").steps()[-1] == told[-1]


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        ("recipe", "ConfigError: Rank 1 was started with another recipe than rank 0."),
        ("data", "RankFailedError: Rank 1 failed: There is no file no-such-file.jsonl."),
    ],
)
def test_ranks_that_were_given_different_things_do_not_begin(model: str, tmp_path: Path, harm: str, said: str) -> None:
    done = ranks(PROGRAM, 2, model, str(tmp_path), "ddp", harm)
    assert done.returncode != 0
    assert said in done.stderr
    assert not (tmp_path / "metrics.jsonl").exists()
