"""A small model with a real tokenizer, and runs of five steps a task: continual learning from records, in seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from continual_site import write_model

from seamount.training.continual.pipeline import ContinualLearning


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `continual_site.write_model`."""
    return write_model(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture
def begin(model_folder: Path, tmp_path: Path) -> Callable[..., ContinualLearning]:
    """`begin(name, **fields)`: a run of five steps a task in a folder of that name."""

    def make(name: str = "run", **fields: Any) -> ContinualLearning:
        small: dict[str, Any] = {
            "steps": 5,
            "learning_rate": 1e-2,
            "examples": 4,
            "memory_buffer_size": 6,
            "fisher_examples": 4,
            "drift_every_steps": 2,
            "max_length": 64,
            "saving": {"checkpoint_every_steps": 2},
            "device": "cpu",
        }
        return ContinualLearning.load(model_folder, output=tmp_path / name, **{**small, **fields})

    return make
