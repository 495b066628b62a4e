"""Saves and restores a training run. Called by `loop`.

A checkpoint is a folder `step-N`: state.safetensors (master weights, optimizer, router biases) and state.json (step,
schedule, counters). It is written beside its place and renamed into it, so that a kill leaves whole ones only. The
order of data, and all else that is random, depends on recipe and step alone: no generator's state is needed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from seamount.core.errors import CheckpointError

_TENSORS, _FACTS = "state.safetensors", "state.json"


def save(folder: Path, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], *, keep: int) -> Path:
    """Write `folder/step-N` and remove all but the newest `keep` checkpoints; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step}"
    partial = folder / f"step-{step}.tmp"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, partial / _TENSORS)
    (partial / _FACTS).write_text(json.dumps(dict(facts)), encoding="utf-8")
    for name in (_TENSORS, _FACTS):
        with open(partial / name, "rb") as file:
            os.fsync(file.fileno())
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    for old in _all(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run, or None."""
    found = _all(folder)
    return found[-1] if found else None


def load(checkpoint: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of a checkpoint. Raises CheckpointError naming the file that cannot be read."""
    try:
        facts = json.loads((checkpoint / _FACTS).read_text(encoding="utf-8"))
        return load_file(checkpoint / _TENSORS), facts
    except (OSError, ValueError, SafetensorError) as cause:
        raise CheckpointError(
            f"The training checkpoint {checkpoint} cannot be read: {cause}.",
            hint="Remove it to go on from the one before.",
        ) from cause


def _all(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    found = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))
