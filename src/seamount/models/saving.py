"""Writes a network as a Hugging Face folder: config.json and model.safetensors under the official names.

Called by training. The inverse of `models.loading`, along the same key map. Embedding and head are stored once: MTP
blocks share them. `companions` are the files that a copy of a checkpoint needs beside those. It must not know how the
weights came to be.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from seamount.core.errors import CheckpointError
from seamount.models.config import ModelConfig
from seamount.models.keymap import placements

# Files of a checkpoint that speak of other weights, or are weights.
_NOT_COPIED = (
    ".safetensors",
    ".index.json",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".md",
    ".h5",
    ".msgpack",
    ".onnx",
)
_LARGEST_COPY = 256 * 2**20


def save_folder(folder: Path, raw_config: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: torch.dtype) -> int:
    """Write weights and config into `folder`, each beside its place and then renamed into it.

    Args:
        raw_config: what config.json is to hold; its `dtype` is set to `dtype`.
        tensors: by the network's parameter and buffer names.
        dtype: of the stored weights; router biases stay fp32, as in DeepSeek's own checkpoints.

    Returns:
        Bytes of model.safetensors.

    Raises:
        CheckpointError: a tensor of the network is missing, or has another shape than the config says.
    """
    described = {**raw_config, "dtype": str(dtype).removeprefix("torch.")}
    config = ModelConfig.from_dict(described, where="the given config")
    stored = {}
    for place in placements(config):
        if place.parameter not in tensors:
            raise CheckpointError(f"The network has no {place.parameter}, which {place.key} is made from.")
        part = place.part_of(tensors[place.parameter].detach())
        if tuple(part.shape) != place.shape:
            raise CheckpointError(
                f"{place.parameter} gives {list(part.shape)} for {place.key}; the config says {list(place.shape)}."
            )
        stored[place.key] = part.to("cpu", torch.float32 if place.kept_fp32 else dtype).contiguous().clone()
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / "model.safetensors"
    partial = folder / "model.safetensors.tmp"
    save_file(stored, partial, metadata={"format": "pt"})
    partial.chmod(0o644)
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, weights)
    partial = folder / "config.json.tmp"
    partial.write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, folder / "config.json")
    return weights.stat().st_size


def companions(folder: Path, *, without: Collection[str] = ()) -> list[Path]:
    """The small files beside a checkpoint's weights and config: tokenizer, templates, sampling defaults, licence."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file()
        and not path.name.startswith(".")
        and path.name not in ("config.json", *without)
        and not path.name.lower().endswith(_NOT_COPIED)
        and path.stat().st_size <= _LARGEST_COPY
    )
