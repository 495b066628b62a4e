"""Training checkpoints: whole or not there."""

import pytest
import torch

from seamount.core.errors import CheckpointError
from seamount.training.pretraining import checkpoint


def test_what_was_saved_comes_back_and_old_ones_go(tmp_path):
    for step in (1, 2, 10):
        checkpoint.save(tmp_path, step, {"w": torch.full((2,), float(step))}, {"step": step}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10", "step-2"]
    tensors, facts = checkpoint.load(checkpoint.latest(tmp_path))
    assert facts == {"step": 10}
    assert torch.equal(tensors["w"], torch.full((2,), 10.0))


def test_a_half_written_checkpoint_is_passed_over(tmp_path):
    assert checkpoint.latest(tmp_path) is None
    checkpoint.save(tmp_path, 3, {"w": torch.zeros(1)}, {}, keep=2)
    killed = tmp_path / "step-6.tmp"
    killed.mkdir()
    (killed / "state.safetensors").write_bytes(b"half")
    assert checkpoint.latest(tmp_path).name == "step-3"
    checkpoint.save(tmp_path, 6, {"w": torch.zeros(1)}, {}, keep=2)
    assert checkpoint.latest(tmp_path).name == "step-6"
    assert not killed.exists()


def test_damage_is_a_typed_error_that_names_the_folder(tmp_path):
    path = checkpoint.save(tmp_path, 3, {"w": torch.zeros(8)}, {}, keep=2)
    (path / "state.safetensors").write_bytes(b"\0" * 4)
    with pytest.raises(CheckpointError, match="step-3"):
        checkpoint.load(path)
