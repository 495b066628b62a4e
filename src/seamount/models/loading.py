"""A checkpoint folder becomes a network with its weights, ready to run.

Called by the engine when it starts. Headers, shapes and memory are checked first; then each tensor is read straight
into the parameter that it belongs to, or, for the compiled kernels, through `models.packing` into packed form. Peak
memory is the weights plus a few small buffers, and nothing is mapped. Knows no family: `models.keymap` says where
tensors go.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from io import FileIO
from pathlib import Path
from typing import Self, cast

import torch
from torch import Tensor, nn

from seamount import kernels
from seamount.core.errors import CheckpointError, ConfigError, OutOfMemoryError, UnsupportedModelError
from seamount.kernels import hardware

from .checkpoint import Checkpoint, StoredTensor, open_file, read_at, shown
from .config import ModelConfig
from .footprint import weight_bytes
from .keymap import Placement, is_ignored, placements, shared_copies
from .memory import available_bytes
from .network import CausalLM, build_network
from .packing import Part, pack_model, packed_names

Progress = Callable[[int, int], None]

_LOG = logging.getLogger(__name__)
_BUFFER_BYTES = 32 * 2**20
# Reading from the page cache is bound by the processor, which a second reader relieves and an eighth does not.
_MOST_READERS = 4
_FP8 = "F8_E4M3"
_SCALE_SUFFIX = "_scale_inv"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    _FP8: torch.float8_e4m3fn,
}
_MOST_MISSING = 1000


@dataclasses.dataclass(frozen=True)
class LoadPlan:
    """Where every tensor of a checkpoint goes; made from headers, so that problems show before memory is
    spent.

    Attributes:
        config: the config given, without the MTP blocks that the folder does not hold.
        places: by checkpoint key.
        scales: factors of FP8 weights, by the weight's key.
    """

    config: ModelConfig
    checkpoint: Checkpoint
    places: dict[str, Placement]
    scales: dict[str, StoredTensor]

    def dtype_of(self, place: Placement) -> torch.dtype:
        """In which type a tensor is best held before it is rounded: its own, if that is a usual one."""
        stored = _DTYPES[self.checkpoint.tensors[place.key].dtype]
        return stored if stored in (torch.bfloat16, torch.float16) else torch.float32


def load_model(
    folder: Path,
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantization: str = "none",
    packed: bool = True,
    progress: Progress | None = None,
) -> CausalLM:
    """Return the network of `config` with the weights of `folder`, in eval mode and without gradients.

    Args:
        dtype: of the weights in memory; what is stored otherwise is converted, FP8 blocks are dequantized.
            Routers that are stored in fp32, and router biases, stay fp32.
        quantization: "int8" or "int4" rounds weight matrices further, where the compiled kernels run them.
        packed: let the compiled kernels take the matrices, where they can. False leaves ordinary parameters, for
            training and for a look at the weights.
        progress: told the bytes read so far and the bytes in all, many times a second.

    Raises:
        CheckpointError: the files are broken or do not fit the config; names file and tensor.
        OutOfMemoryError: the weights do not fit into the memory that is available on `device`.
    """
    plan = plan_load(folder, config)
    _check_memory(plan.config, dtype, quantization, device)
    kind = packed_kind(dtype, quantization, device) if packed else None
    model = build_network(plan.config).to(dtype).requires_grad_(False).eval()
    apart = packed_names(model) if kind else set()
    _allocate(model, plan, apart, device)
    parameters = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    reader = _Reader(plan, progress)
    by_file: dict[Path, list[Placement]] = {path: [] for path in plan.checkpoint.files}
    to_pack: dict[str, list[Placement]] = {}
    for key, place in plan.places.items():
        if place.parameter in apart:
            to_pack.setdefault(place.parameter, []).append(place)
        else:
            by_file[plan.checkpoint.tensors[key].path].append(place)
    with reader:
        for places in by_file.values():
            for place in sorted(places, key=lambda p: plan.checkpoint.tensors[p.key].offset):
                reader.read(place, place.part_of(parameters[place.parameter]))
        if kind:
            pack_model(model, kind, to_pack, plan.dtype_of, reader.read_part, reader.advance)
    return model


def packed_kind(dtype: torch.dtype, quantization: str, device: torch.device) -> kernels.Kind | None:
    """How matrices are stored for the compiled kernels; None where plain torch computes.

    Raises:
        ConfigError: quantization was asked for, and only the compiled kernels can do it.
    """
    quantized = quantization in ("int8", "int4")
    if device.type != "cpu" or kernels.library() is None:
        if quantized:
            reason = "the device is not a CPU" if device.type != "cpu" else kernels.why_missing()
            raise ConfigError(
                f"quantization {quantization} needs the compiled CPU kernels, and {reason}.",
                hint="Install g++, or use quantization none.",
            )
        return None
    return cast("kernels.Kind", quantization if quantized else str(dtype).removeprefix("torch."))


def plan_load(folder: Path, config: ModelConfig) -> LoadPlan:
    """Compare the headers in `folder` with what a network of `config` needs.

    Raises:
        CheckpointError: tensors are missing, unknown, of another shape, or of a type that cannot be read.
    """
    checkpoint = Checkpoint.from_folder(folder)
    tensors = checkpoint.tensors
    config = _without_absent_mtp(config, checkpoint)
    places, missing, num_missing = {}, "", 0
    for place in placements(config, tensors.__contains__):
        if place.key in tensors:
            _check_tensor(tensors[place.key], place)
            places[place.key] = place
        else:
            missing, num_missing = missing or place.key, num_missing + 1
            if num_missing == _MOST_MISSING:
                break
    if num_missing:
        at_least = "at least " if num_missing == _MOST_MISSING else ""
        raise CheckpointError(
            f"{folder} lacks the tensor {shown(missing)} that its config.json asks for "
            f"({at_least}{num_missing} missing in all).",
            hint="A shard was not fetched, or config.json belongs to another model.",
        )
    scales = {key: _scale_of(tensors[key], checkpoint) for key in places if tensors[key].dtype == _FP8}
    _refuse_unknown(checkpoint, config, {*places, *(scale.name for scale in scales.values())})
    return LoadPlan(config, checkpoint, places, scales)


def _without_absent_mtp(config: ModelConfig, checkpoint: Checkpoint) -> ModelConfig:
    """Converters often drop the MTP blocks and leave their number in the config."""
    prefixes = tuple(f"model.layers.{config.num_layers + i}." for i in range(config.num_mtp_layers))
    if not prefixes or any(key.startswith(prefixes) for key in checkpoint.tensors):
        return config
    _LOG.warning(
        "%s: config.json declares %d multi-token-prediction block(s), and the weights hold none; loading without.",
        checkpoint.folder,
        config.num_mtp_layers,
    )
    return dataclasses.replace(config, num_mtp_layers=0)


def _check_tensor(stored: StoredTensor, place: Placement) -> None:
    if stored.shape != place.shape:
        raise CheckpointError(
            f"The {stored} has the shape {list(stored.shape)}; by config.json it must be {list(place.shape)}."
        )
    if stored.dtype not in _DTYPES or (stored.dtype == _FP8 and len(stored.shape) != 2):
        raise UnsupportedModelError(
            f"The {stored} is stored as {stored.dtype} with {len(stored.shape)} axes, which cannot be read.",
            hint="Supported: F32, F16, BF16, F64, and matrices of F8_E4M3 with a factor per 128x128 block.",
        )


def _scale_of(stored: StoredTensor, checkpoint: Checkpoint) -> StoredTensor:
    name = stored.name + _SCALE_SUFFIX
    scale = checkpoint.tensors.get(name)
    if scale is None:
        raise CheckpointError(
            f"The {stored} is FP8 and {shown(name)} is in no file: without its scales it means nothing.",
            hint="Fetch all shards; scales may lie in another shard than their weight.",
        )
    expected = tuple(-(-size // kernels.FP8_BLOCK) for size in stored.shape)
    if scale.shape != expected or scale.dtype not in ("F32", "BF16"):
        raise CheckpointError(
            f"The {scale} is {scale.dtype} {list(scale.shape)}; for blocks of {kernels.FP8_BLOCK} it must be "
            f"F32 {list(expected)}."
        )
    return scale


def _refuse_unknown(checkpoint: Checkpoint, config: ModelConfig, used: set[str]) -> None:
    for key, shape in shared_copies(config).items():
        copy = checkpoint.tensors.get(key)
        if copy is not None and copy.shape != shape:
            raise CheckpointError(
                f"The {copy} has the shape {list(copy.shape)}; by config.json it must be {list(shape)}."
            )
    unknown = sorted(
        key
        for key, stored in checkpoint.tensors.items()
        if key not in used and stored.num_bytes and not is_ignored(config, key)
    )
    if unknown:
        raise CheckpointError(
            f"{checkpoint.folder} holds {len(unknown)} tensor(s) that a {config.family} network of this config has no "
            f"place for: {', '.join(shown(key) for key in unknown[:3])}.",
            hint="A network that leaves weights out answers wrongly; config.json may belong to another model.",
        )


def _check_memory(config: ModelConfig, dtype: torch.dtype, quantization: str, device: torch.device) -> None:
    needed, available = weight_bytes(config, dtype, quantization), available_bytes(device)
    if needed > available:
        raise OutOfMemoryError(
            f"The weights take {needed / 2**30:.1f} GiB in {str(dtype).removeprefix('torch.')}; "
            f"{available / 2**30:.1f} GiB are available on {device}.",
            hint="Free memory, use a 16-bit dtype, or take a smaller model.",
        )


def _allocate(model: CausalLM, plan: LoadPlan, apart: set[str], device: torch.device) -> None:
    """Give every parameter but those in `apart` its memory."""
    for place in plan.places.values():
        stored_fp32 = plan.checkpoint.tensors[place.key].dtype == "F32"
        if place.kept_fp32 or (place.kept_fp32 is None and stored_fp32):
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


class _Reader:
    """Reads placed tensors, or parts of them, into memory; a context manager, because its threads end with it."""

    def __init__(self, plan: LoadPlan, progress: Progress | None) -> None:
        self._plan = plan
        self._progress = progress
        self._done = 0
        self._total = sum(plan.checkpoint.tensors[key].num_bytes for key in plan.places)
        self._threads = ThreadPoolExecutor(min(_MOST_READERS, hardware.default_threads()))
        self._files: dict[Path, FileIO] = {}
        self._closing = ExitStack()
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._closing.close()

    def read(self, place: Placement, target: Tensor) -> None:
        """Read the whole tensor into `target` of its shape."""
        for piece in self._pieces(place, 0, target):
            self.advance(piece.read())

    def read_part(self, part: Part, target: Tensor) -> int:
        """Read rows of a tensor into `target [num_rows, columns]`; returns the bytes read."""
        return sum(self._threads.map(_Piece.read, self._pieces(part.place, part.first_row, target)))

    def advance(self, num_bytes: int) -> None:
        """Count bytes as done and tell."""
        self._done += num_bytes
        if self._progress is not None:
            self._progress(self._done, self._total)

    def _pieces(self, place: Placement, first_row: int, target: Tensor) -> list[_Piece]:
        stored = self._plan.checkpoint.tensors[place.key]
        with self._lock:
            file = self._files.get(stored.path)
            if file is None:
                file = self._files[stored.path] = self._closing.enter_context(open_file(stored.path))
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        return list(_pieces(file, stored, self._plan.scales.get(stored.name), first_row, target))


@dataclasses.dataclass(frozen=True, slots=True)
class _Piece:
    """A part of a stored tensor, as large as fits the buffer, and the part of a parameter that it fills.

    `factors` are the FP8 scales of its rows.
    """

    file: FileIO
    stored: StoredTensor
    offset: int
    target: Tensor
    factors: Tensor | None

    def read(self) -> int:
        """Read and convert; in place, where type and device agree. Returns the bytes read."""
        source = _DTYPES[self.stored.dtype]
        if source == self.target.dtype and self.target.device.type == "cpu":
            read_at(self.file, self.offset, _bytes_of(self.target), self.stored)
            return self.target.nbytes
        values = torch.empty(self.target.shape, dtype=source)
        read_at(self.file, self.offset, _bytes_of(values), self.stored)
        wide = values.to(self.target.device)
        if self.factors is not None:
            wide = kernels.dequantize_fp8_blocks(wide, self.factors, torch.float32)
        self.target.copy_(wide)
        _check_range(self.target, wide, self.stored)
        return values.nbytes


def _pieces(
    file: FileIO, stored: StoredTensor, scale: StoredTensor | None, first_row: int, target: Tensor
) -> Iterator[_Piece]:
    """Cut the rows from `first_row` on, as many as `target` holds; of FP8 a multiple of its blocks' height."""
    if scale is None:
        flat, size = target.view(-1), _DTYPES[stored.dtype].itemsize
        origin = stored.offset + first_row * (target.shape[-1] if target.dim() > 1 else 1) * size
        length = _BUFFER_BYTES // size
        for start in range(0, flat.numel(), length):
            yield _Piece(file, stored, origin + start * size, flat[start : start + length], None)
        return
    factors = torch.empty(scale.shape, dtype=_DTYPES[scale.dtype])
    with open_file(scale.path) as scale_file:
        read_at(scale_file, scale.offset, _bytes_of(factors), scale)
    factors = factors.float().to(target.device)
    (rows, columns), block = target.shape, kernels.FP8_BLOCK
    # A quarter of the buffer, because the dequantized values, in fp32, are four times as large.
    strip = max(_BUFFER_BYTES // 4 // max(columns, 1) // block, 1) * block
    for start in range(0, rows, strip):
        at = first_row + start
        of_strip = factors[at // block : -(-(at + strip) // block)]
        yield _Piece(file, stored, stored.offset + at * columns, target[start : start + strip], of_strip)


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data


def _check_range(converted: Tensor, original: Tensor, stored: StoredTensor) -> None:
    """fp16 ends at 65504: a weight beyond it would become infinite without a word."""
    if converted.dtype != torch.float16 or original.dtype == torch.float16:
        return
    low, high = converted.aminmax()
    if not (low.isfinite() and high.isfinite()):
        raise CheckpointError(
            f"The {stored} holds values that float16 cannot hold.", hint="Use dtype bfloat16 or float32."
        )
