"""The network that a run tunes: loaded, its adapters added, what is trained marked; and written out at the end.

Called by `pipeline`. One network serves and learns: what is written here is what `seamount serve` loads.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seamount.core.errors import ConfigError
from seamount.models.config import ModelConfig
from seamount.models.load_plan import plan_load
from seamount.models.loading import load_model
from seamount.models.locate import is_gguf, locate_model
from seamount.models.network import CausalLM
from seamount.models.reading import Progress
from seamount.models.saving import companions, save_folder
from seamount.training.adapters.files import save_adapter
from seamount.training.adapters.lora import add_adapters
from seamount.training.adapters.qlora import quantize_base

from .recipe import TuneRecipe
from .writing import writing

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True)
class Tuned:
    """A network, ready to be trained.

    Attributes:
        model: trainable parameters are those that require gradients.
        folder: of the checkpoint that it came from.
        raw_config: its config.json.
        groups: trained weights by group.
        dtype: of the weights while training.
    """

    model: CausalLM
    folder: Path
    raw_config: dict[str, Any]
    groups: dict[str, int]
    dtype: torch.dtype

    @property
    def num_weights(self) -> int:
        """All weights, trained or not, adapters included."""
        return sum(p.numel() for p in self.model.parameters())


def open_network(recipe: TuneRecipe, device: torch.device, progress: Progress | None = None) -> Tuned:
    """Load the recipe's model and mark what is trained.

    Raises:
        ConfigError: the model cannot be tuned, or the adapter's targets match nothing.
        CheckpointError, OutOfMemoryError: see `models.loading.load_model`.
    """
    folder = tunable(recipe.model)
    config = ModelConfig.from_folder(folder)
    dtype = training_dtype(recipe, folder, config)
    model = load_model(folder, config, dtype=dtype, device=device, packed=False, progress=progress)
    raw_config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if recipe.adapter is None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith("mtp.") or recipe.experts.mtp_weight > 0)
        return Tuned(model, folder, raw_config, _groups(model), dtype)
    if recipe.adapter.method == "qlora":
        quantize_base(model)
    groups = add_adapters(model, recipe.adapter, seed=recipe.seed)
    return Tuned(model, folder, raw_config, groups, dtype)


def tunable(name: str) -> Path:
    """The folder of a model that can be tuned. Raises ConfigError for what cannot."""
    folder = locate_model(name)
    if is_gguf(folder):
        raise ConfigError(f"{folder} is a GGUF file, which cannot be tuned.", hint="Tune the safetensors checkpoint.")
    return folder


def training_dtype(recipe: TuneRecipe, folder: Path, config: ModelConfig) -> torch.dtype:
    """In which type a run holds the model's weights."""
    if recipe.precision != "auto":
        return DTYPES[recipe.precision]
    plan = plan_load(folder, config)
    stored = [plan.dtype_of(place) for place in plan.places.values() if len(place.shape) == 2]
    return torch.float32 if all(dtype == torch.float32 for dtype in stored) else torch.bfloat16


def write_result(recipe: TuneRecipe, tuned: Tuned, weights: Mapping[str, Tensor], output: Path) -> Path:
    """Write what came out of a run below `output`: `adapter/`, or `model/` with all that serving needs.

    Args:
        weights: the trained ones, in fp32, by parameter name.

    Returns:
        The folder that was written.

    Raises:
        CapacityError: it cannot be written; what was there before stays.
    """
    with torch.no_grad():
        parameters = dict(tuned.model.named_parameters())
        for name, tensor in weights.items():
            parameters[name].copy_(tensor)
    if recipe.adapter is not None:
        folder = output / "adapter"
        with writing(folder):
            save_adapter(tuned.model, folder, recipe.adapter, recipe.model)
        return folder
    folder = output / "model"
    stored = torch.float32 if tuned.dtype == torch.float32 else torch.bfloat16
    tensors = dict(tuned.model.named_parameters()) | dict(tuned.model.named_buffers()) | dict(weights)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for path in companions(tuned.folder):
            shutil.copyfile(path, folder / path.name)
        save_folder(folder, tuned.raw_config, tensors, stored)
    return folder


def _groups(model: CausalLM) -> dict[str, int]:
    """Trained weights of a network that is trained whole, by the part that they belong to."""
    found: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = _group(name)
            found[group] = found.get(group, 0) + parameter.numel()
    return found


def _group(name: str) -> str:
    if name.startswith("mtp."):
        return "mtp"
    for part, group in (
        ("embed_tokens", "embedding"),
        ("lm_head", "head"),
        (".self_attn.", "attention"),
        (".mlp.experts.", "experts"),
        (".mlp.shared_experts.", "shared"),
        (".mlp.gate.", "routers"),
        (".mlp.", "dense"),
    ):
        if part in name:
            return group
    return "norms"
