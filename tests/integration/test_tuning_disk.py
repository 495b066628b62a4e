"""A disk that is full while a model is tuned: it is told, nothing is half written, and the same call goes on."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from continual_site import records, write_model

from seamount import FineTuningPipeline
from seamount.core.errors import CapacityError, CheckpointError
from seamount.training.tuning import network
from seamount.training.tuning.state import CheckpointStore


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """No larger file can be written: the system says so as it says that a disk is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def pipeline(model: Path, output: Path) -> FineTuningPipeline:
    return FineTuningPipeline(
        model,
        records("first"),
        output=output,
        device="cpu",
        data={"max_length": 64},
        batch={"examples": 4, "micro_tokens": 128},
        schedule={"steps": 4},
        saving={"checkpoint_every_steps": 2},
    )


def result(output: Path) -> bytes:
    return (output / "model" / "model.safetensors").read_bytes()


def test_a_full_disk_costs_nothing_that_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, output = write_model(tmp_path / "model"), tmp_path / "run"
    pipeline(model, tmp_path / "whole").run()

    with files_of_at_most(2**20), pytest.raises(CheckpointError, match=r"checkpoint-2 cannot be written"):
        pipeline(model, output).run()
    assert CheckpointStore(output / "checkpoints").steps() == []

    def full(*given: object) -> int:
        (output / "model" / "model.safetensors.tmp").touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(network, "save_folder", full)
        with pytest.raises(CapacityError, match=r"model cannot be written: No space left on device\.") as told:
            pipeline(model, output).run()
    assert "the same command" in str(told.value)
    assert CheckpointStore(output / "checkpoints").steps()[-1] == 4
    assert not list(output.rglob("*.tmp"))

    pipeline(model, output).run()
    assert result(output) == result(tmp_path / "whole")
