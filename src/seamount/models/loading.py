"""A checkpoint becomes a network with its weights, ready to run.

Called by the engine when it starts. Headers, shapes and memory are checked first (`models.load_plan`); then each tensor
is read straight into the parameter that it belongs to, or, for the compiled kernels, through `models.packing` into
packed form. Peak memory is the weights plus a few small buffers, and nothing is mapped. Knows no family:
`models.keymap` says where tensors go.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from seamount import kernels
from seamount.core.errors import ConfigError, OutOfMemoryError
from seamount.core.settings import QuantizationName
from seamount.core.sizes import size_text

from .config import ModelConfig
from .footprint import weight_bytes
from .keymap import Placement
from .load_plan import LoadPlan, plan_load
from .memory import available_bytes, release_freed
from .network import CausalLM, build_network
from .packing import pack_model, packed_names, resident_bytes
from .precision import EMBEDDING, Precision
from .reading import Progress, Reader

__all__ = [
    "LoadPlan",
    "Progress",
    "choose_precision",
    "load_model",
    "load_planned",
    "plan_load",
    "planned_bytes",
    "resident_bytes",
]


def load_model(
    folder: Path,
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantization: QuantizationName = "none",
    packed: bool = True,
    progress: Progress | None = None,
) -> CausalLM:
    """Return the network of `config` with the weights of `folder`, in eval mode and without gradients.

    Args:
        folder: of safetensors, or a .gguf file.
        dtype: of the weights in memory; what is stored otherwise is converted, FP8 blocks are dequantized.
            Routers that are stored in fp32, and router biases, stay fp32.
        quantization: "auto" keeps few bits where they are stored; "none" makes them `dtype`; "int8" and "int4" round
            weight matrices. For the compiled kernels: without them everything is `dtype`.
        packed: let the compiled kernels take the matrices, where they can. False leaves ordinary parameters, for
            training and for a look at the weights.
        progress: told the bytes read so far and the bytes in all, many times a second.

    Raises:
        CheckpointError: the files are broken or do not fit the config; names file and tensor.
        OutOfMemoryError: the weights do not fit into the memory that is available on `device`.
    """
    plan = plan_load(folder, config)
    precision = choose_precision(plan, dtype, quantization, device)
    if not packed:
        precision = Precision(dtype)
    return load_planned(plan, precision, device=device, progress=progress)


def load_planned(
    plan: LoadPlan, precision: Precision, *, device: torch.device, progress: Progress | None = None
) -> CausalLM:
    """As `load_model`, where headers have been compared and precision has been chosen already."""
    _check_memory(plan, precision, device)
    model = build_network(plan.config).to(precision.dtype).requires_grad_(False).eval()
    apart = packed_names(model) if precision.is_packed else set()
    _allocate(model, plan, apart, device)
    parameters = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    by_file: dict[Path, list[Placement]] = {}
    for key, place in plan.places.items():
        if place.parameter not in apart:
            by_file.setdefault(plan.file_of(key), []).append(place)
    total = sum(plan.num_bytes(key) for key in plan.places)
    # The table is read once more, as the head.
    if precision.is_packed and plan.config.tie_embeddings and plan.config.has_head:
        total += sum(plan.num_bytes(key) for key, place in plan.places.items() if place.parameter == EMBEDDING)
    with Reader(plan, total, progress) as reader:
        for places in by_file.values():
            for place in sorted(places, key=lambda p: plan.offset_of(p.key)):
                reader.read(place, place.part_of(parameters[place.parameter]))
        if precision.is_packed:
            pack_model(model, plan, precision, reader.read_part, reader.advance)
    release_freed()
    return model


def choose_precision(
    plan: LoadPlan, dtype: torch.dtype, quantization: QuantizationName, device: torch.device
) -> Precision:
    """How the matrices of a checkpoint are held on `device`.

    Raises:
        ConfigError: quantization was asked for, and only the compiled kernels can do it.
    """
    if device.type == "cpu" and kernels.library() is not None:
        return Precision(dtype, quantization, is_packed=True, form_of=plan.form_of)
    if quantization in ("int8", "int4"):
        reason = "the device is not a CPU" if device.type != "cpu" else kernels.why_missing()
        raise ConfigError(
            f"quantization {quantization} needs the compiled CPU kernels, and {reason}.",
            hint="Mend that, or use quantization none.",
        )
    return Precision(dtype)


def planned_bytes(plan: LoadPlan, precision: Precision) -> int:
    """Memory that the weights will take, once loaded."""
    return weight_bytes(plan.config, plan.places.values(), precision, plan.is_fp32)


def _check_memory(plan: LoadPlan, precision: Precision, device: torch.device) -> None:
    needed, available = planned_bytes(plan, precision), available_bytes(device)
    if needed > available:
        raise OutOfMemoryError(
            f"The weights take {size_text(needed)} in {str(precision.dtype).removeprefix('torch.')}; "
            f"{size_text(available)} is available on {device}.",
            hint="Free memory, use a 16-bit dtype, quantize, or take a smaller model.",
        )


def _allocate(model: CausalLM, plan: LoadPlan, apart: set[str], device: torch.device) -> None:
    """Give every parameter but those in `apart` its memory."""
    for place in plan.places.values():
        if plan.is_fp32(place):
            _retype(model, place.parameter, torch.float32)
    for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
        if name in apart:
            continue
        owner_name, _, leaf = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        # Beside packed weights, biases are added in fp32.
        dtype = torch.float32 if apart and leaf == "bias" else parameter.dtype
        empty = torch.empty(parameter.shape, dtype=dtype, device=device)
        setattr(owner, leaf, nn.Parameter(empty, requires_grad=False) if isinstance(parameter, nn.Parameter) else empty)


def _retype(model: nn.Module, name: str, dtype: torch.dtype) -> None:
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    old = getattr(owner, leaf)
    new = old.to(dtype)
    setattr(owner, leaf, nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new)
