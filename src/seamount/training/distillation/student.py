"""The student as a checkpoint folder, before it has learned anything: `make_student`.

Called by `pipeline`. A student that the recipe names is left alone. One of a config begins at random, with the
teacher's tokenizer and template beside it; one that is shrunk from the teacher begins with what it can take over
(`takeover`).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from seamount.core.errors import CapacityError, ConfigError
from seamount.models.config import ModelConfig
from seamount.models.keymap import placements
from seamount.models.locate import is_gguf, locate_model
from seamount.models.network import build_network
from seamount.models.saving import companions, save_folder
from seamount.training.compression.files import write_whole

from .recipe import StudentSection
from .shrinking import shrunk_config
from .takeover import take_over

_STD = 0.02  # of random matrices
_MARK = ".made.json"  # hidden, so that it is not copied with the tokenizer


def make_student(section: StudentSection, teacher: Path, folder: Path, *, seed: int) -> Path:
    """Return the student's folder; what is not there yet is made in `folder`, the same for the same seed.

    Raises:
        ConfigError: the config is of no supported model, or does not fit the teacher's tokens; the share cannot be
            reached; or `folder` holds another student.
        CheckpointError: there is no such model, or the teacher is broken.
        CapacityError: the disk is full; the same call makes it once there is room.
    """
    if section.model is not None:
        return locate_model(section.model)
    if is_gguf(teacher):
        raise ConfigError(
            f"{teacher} is a GGUF file: it has no tokenizer files that a new student could be given.",
            hint="Take the safetensors checkpoint as teacher, or name a student in student.model.",
        )
    raw = _raw_config(section, teacher)
    told = {"config": raw, "shrink": section.shrink, "seed": seed}
    mark = folder / _MARK
    if mark.exists():
        if json.loads(mark.read_text(encoding="utf-8")) != told:
            raise ConfigError(f"{folder} holds another student.", hint="Choose another output, or remove it.")
        return folder
    config = ModelConfig.from_dict(raw, where="student.config")
    tensors = random_weights(config, seed)
    if section.shrink is not None:
        take_over(teacher, config, tensors)
    try:
        shutil.rmtree(folder, ignore_errors=True)  # one that was not finished
        folder.mkdir(parents=True)
        for path in companions(teacher):
            shutil.copyfile(path, folder / path.name)
        save_folder(folder, raw, tensors, torch.float32)
        write_whole(mark, json.dumps(told).encode())
    except (OSError, SafetensorError) as cause:
        raise CapacityError(
            f"The student cannot be written to {folder}: {cause}.",
            hint="Make room, or choose another output, and give the same command again.",
            code="disk_full",
        ) from cause
    return folder


def num_weights(config: ModelConfig) -> int:
    """Weights of a network of this config, without MTP blocks."""
    return sum(place.num_values for place in placements(config) if not place.is_of_mtp)


def random_weights(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """Weights to begin with, in fp32, by parameter name; those of a seed are the same on every machine.

    Normal; matrices that write into the residual stream start smaller, so that its variance does not grow with depth
    (GPT-2, Radford et al., 2019).
    """
    model = build_network(config)
    generator = torch.Generator().manual_seed(seed)
    residual_std = _STD / (2 * config.num_layers) ** 0.5
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            tensors[name] = torch.zeros(parameter.shape)
        elif parameter.ndim == 1:
            tensors[name] = torch.ones(parameter.shape)
        else:
            std = residual_std if "o_proj" in name or "down_proj" in name else _STD
            tensors[name] = torch.empty(parameter.shape).normal_(0.0, std, generator=generator)
    return tensors | {name: torch.zeros(buffer.shape) for name, buffer in model.named_buffers()}


def _raw_config(section: StudentSection, teacher: Path) -> dict[str, Any]:
    taught = ModelConfig.from_folder(teacher)
    held = json.loads((teacher / "config.json").read_text(encoding="utf-8"))
    if section.shrink is not None:
        return shrunk_config(held, taught, section.shrink)
    inherited = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")
    raw = {name: held[name] for name in inherited if name in held} | dict(section.config or {})
    config = ModelConfig.from_dict(raw, where="student.config")
    if config.vocab_size < taught.vocab_size:
        raise ConfigError(
            f"student.config: vocab_size is {config.vocab_size}; the teacher's is {taught.vocab_size}.",
            hint="Leave vocab_size out: it is taken over.",
        )
    return raw
