"""Where every tensor of a checkpoint goes, decided from headers: problems show before any memory is spent.

Called by `models.loading`, by the engine (which plans memory with it) and by `ops.inspection`. Safetensors folders and
GGUF files become the same plan: placements by key, and beside them what is not stored as plain numbers. Reads no
weights, but for small tensors that other tools store although they mean nothing.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from seamount import kernels
from seamount.core.errors import CheckpointError, UnsupportedModelError

from .adapter import Adapter
from .checkpoint import Checkpoint, StoredTensor, shown
from .config import ModelConfig
from .encoded import PLAIN, Encoded, Form, QuantizedLayer, form_of, is_all_zero
from .gguf import Gguf
from .gguf_config import hf_config
from .gguf_keymap import GgufEntry, gguf_entries
from .keymap import Placement, is_ignored, placements, shared_copies
from .locate import is_gguf, model_name
from .pooling_config import is_embedding_folder
from .quantized_config import ExpectedPart

_LOG = logging.getLogger(__name__)
_FP8 = "F8_E4M3"
_SCALE_SUFFIX = "_scale_inv"
_BASE, _TABLE, _HEAD = "model.", "embed_tokens.weight", "lm_head."
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    _FP8: torch.float8_e4m3fn,
}
_MOST_MISSING = 1000
# Tensors that some tools store beside a quantized layer although the layer has no such part: zeros, or it would.
_EMPTY_ROLES = ("bias", "weight_zero_point")


@dataclass(frozen=True)
class LoadPlan:
    """Where every tensor of a checkpoint goes.

    Attributes:
        config: the config given, without the MTP blocks that the folder does not hold.
        checkpoint: files and stored tensors, under the names that the files give them.
        places: by checkpoint key.
        scales: factors of FP8 weights, by the weight's key.
        encoded: what is not stored as plain numbers, or lies in a GGUF file, by checkpoint key.
        adapter: what is added to the tensors while they are read, if anything.
    """

    config: ModelConfig
    checkpoint: Checkpoint
    places: dict[str, Placement]
    scales: dict[str, StoredTensor]
    encoded: dict[str, Encoded]
    adapter: Adapter | None = None

    def with_adapter(self, adapter: Adapter, *, dequantize: bool = False) -> LoadPlan:
        """The plan of the same network with an adapter's part added to its weights, in fp32 and before any rounding.

        Args:
            dequantize: whoever reads takes numbers, also where few bits are stored, and does not keep these bits.

        Raises:
            CheckpointError: the adapter belongs to another model.
            UnsupportedModelError: it adds to weights that are stored in few bits.
        """
        adapter.check(self.config, _base_name(self.checkpoint.folder))
        few = next((place.key for place in self.places.values() if self._is_in_few_bits(place, adapter)), None)
        if few is not None and not dequantize:
            raise UnsupportedModelError(
                f"The adapter {adapter.folder} adds to {shown(few)}, which {self.checkpoint.folder} stores in few "
                "bits: rounded to these again, most of the sum would be lost.",
                hint="Use the adapter with the 16-bit checkpoint; or `seamount merge` both, and quantize the result.",
            )
        return dataclasses.replace(self, adapter=adapter)

    def _is_in_few_bits(self, place: Placement, adapter: Adapter) -> bool:
        return self.form_of(place.key) != PLAIN and adapter.touches(place)

    def is_adapted(self, place: Placement) -> bool:
        """Whether the adapter adds something to this tensor."""
        return self.adapter is not None and self.adapter.touches(place)

    def without_mtp(self) -> LoadPlan:
        """The plan of the same network without its MTP blocks, which are then not read."""
        if not self.config.num_mtp_layers:
            return self
        config = dataclasses.replace(self.config, num_mtp_layers=0)
        places = {key: place for key, place in self.places.items() if not place.is_of_mtp}
        scales = {key: scale for key, scale in self.scales.items() if key in places}
        encoded = {key: layer for key, layer in self.encoded.items() if key in places}
        return dataclasses.replace(self, config=config, places=places, scales=scales, encoded=encoded)

    def form_of(self, key: str) -> Form:
        """What the tensor of this key holds."""
        encoded = self.encoded.get(key)
        return PLAIN if encoded is None else form_of(encoded)

    def dtype_of(self, place: Placement) -> torch.dtype:
        """In which type a tensor is best held before it is rounded: its own, if that is a usual one, and all of it."""
        if place.key in self.encoded or self.is_adapted(place):
            return torch.float32
        stored = DTYPES[self.checkpoint.tensors[place.key].dtype]
        return stored if stored in (torch.bfloat16, torch.float16) else torch.float32

    def is_fp32(self, place: Placement) -> bool:
        """Whether it is fp32 in memory whatever the model's type is."""
        if place.kept_fp32 is not None:
            return place.kept_fp32
        encoded = self.encoded.get(place.key)
        if encoded is None:
            return self.checkpoint.tensors[place.key].dtype == "F32"
        return isinstance(encoded, GgufEntry) and encoded.parts[0].dtype == "F32"

    def file_of(self, key: str) -> Path:
        """The file that its tensor, or the first part of it, lies in."""
        return self._first_part(key).path

    def offset_of(self, key: str) -> int:
        """Where in the file."""
        return self._first_part(key).offset

    def num_bytes(self, key: str) -> int:
        """Bytes on disk of what the tensor is made of, without FP8 factors."""
        encoded = self.encoded.get(key)
        return self.checkpoint.tensors[key].num_bytes if encoded is None else encoded.num_bytes

    def _first_part(self, key: str) -> StoredTensor:
        encoded = self.encoded.get(key)
        if encoded is None:
            return self.checkpoint.tensors[key]
        return encoded.parts[0] if isinstance(encoded, GgufEntry) else next(iter(encoded.parts.values()))


def plan_load(folder: Path, config: ModelConfig) -> LoadPlan:
    """Compare the headers in `folder` (or of a .gguf file) with what a network of `config` needs.

    Raises:
        CheckpointError: tensors are missing, unknown, of another shape, or of a type that cannot be read.
    """
    if is_gguf(folder):
        return _plan_gguf(folder, config)
    checkpoint = Checkpoint.from_folder(folder)
    is_base = _BASE + _TABLE not in checkpoint.tensors and _TABLE in checkpoint.tensors
    if is_base:
        checkpoint = _with_whole_names(checkpoint)
    tensors = checkpoint.tensors
    config = _without_absent_mtp(config, checkpoint)
    config = _without_absent_head(config, checkpoint, is_base=is_base)
    places: dict[str, Placement] = {}
    encoded: dict[str, Encoded] = {}
    missing = _Missing(folder, "config.json")
    for place in placements(config, tensors.__contains__):
        layer = _quantized_layer(config, checkpoint, place)
        if layer is not None:
            encoded[place.key] = layer
        elif place.key in tensors:
            _check_tensor(tensors[place.key], place)
        else:
            missing.add(place.key)
            continue
        places[place.key] = place
    missing.check()
    scales = {
        key: _scale_of(tensors[key], checkpoint) for key in places if key not in encoded and tensors[key].dtype == _FP8
    }
    used = {part.name for layer in encoded.values() for part in _parts_of(layer)}
    used |= {*(places.keys() - encoded.keys()), *(scale.name for scale in scales.values())}
    _refuse_unknown(checkpoint, config, used | _empty_parts(checkpoint, encoded, used))
    return LoadPlan(config, checkpoint, places, scales, encoded)


def _plan_gguf(path: Path, config: ModelConfig) -> LoadPlan:
    file = Gguf.from_file(path)
    entries = gguf_entries(file, hf_config(file))
    places: dict[str, Placement] = {}
    missing = _Missing(path, "its metadata")
    for place in placements(config):
        entry = entries.get(place.key)
        if entry is None:
            missing.add(place.key)
            continue
        if entry.shape != place.shape:
            raise CheckpointError(
                f"The {entry.parts[0]} makes {shown(place.key)} of shape {list(entry.shape)}; by the metadata it must "
                f"be {list(place.shape)}."
            )
        places[place.key] = place
    missing.check()
    files = tuple(sorted({stored.path for stored in file.tensors.values()} | {file.path}))
    checkpoint = Checkpoint(path, files, file.tensors)
    unknown = sorted(set(entries) - set(places))
    if unknown:
        raise _unknown(path, config, unknown)
    return LoadPlan(config, checkpoint, places, {}, {key: entries[key] for key in places})


def _base_name(folder: Path) -> str:
    """By which name adapters know the model of a folder; in a hub's cache the folder itself is named by a digest."""
    whole = folder.resolve()
    return whole.parent.parent.name.rpartition("--")[2] if whole.parent.name == "snapshots" else model_name(folder)


class _Missing:
    """Counts tensors that are not there, up to a number at which it gives up."""

    def __init__(self, folder: Path, source: str) -> None:
        self._folder, self._source = folder, source
        self._first, self._count = "", 0

    def add(self, key: str) -> None:
        self._first, self._count = self._first or key, self._count + 1
        if self._count == _MOST_MISSING:
            self.check()

    def check(self) -> None:
        if self._count:
            at_least = "at least " if self._count == _MOST_MISSING else ""
            raise CheckpointError(
                f"{self._folder} lacks the tensor {shown(self._first)} that {self._source} asks for "
                f"({at_least}{self._count} missing in all).",
                hint="A shard was not fetched, or config.json belongs to another model.",
            )


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


def _with_whole_names(checkpoint: Checkpoint) -> Checkpoint:
    """A base model that was saved by itself names its tensors without the beginning that they have within a whole."""
    names = {name: name if name.startswith(_HEAD) else _BASE + name for name in checkpoint.tensors}
    tensors = {
        names[name]: dataclasses.replace(stored, name=names[name]) for name, stored in checkpoint.tensors.items()
    }
    return dataclasses.replace(checkpoint, tensors=tensors)


def _without_absent_head(config: ModelConfig, checkpoint: Checkpoint, *, is_base: bool) -> ModelConfig:
    """Weights decide: embedding models are often saved without their head, under the name of the class that had one."""
    if any(key.startswith(_HEAD) for key in checkpoint.tensors):
        return dataclasses.replace(config, has_head=True)
    # Any other folder without a head was not fetched to its end; where the head is the embedding nothing shows.
    is_without = is_base or (is_embedding_folder(checkpoint.folder) and not config.tie_embeddings)
    return dataclasses.replace(config, has_head=False) if is_without else config


def _quantized_layer(config: ModelConfig, checkpoint: Checkpoint, place: Placement) -> QuantizedLayer | None:
    if config.quantization is None or len(place.shape) != 2:
        return None
    tensors = checkpoint.tensors
    shape = (place.shape[0], place.shape[1])
    expected = config.quantization.expected_parts(place.key, shape, tensors.__contains__)
    if expected is None:
        return None
    parts = {role: _checked_part(part, place, checkpoint) for role, part in expected.items()}
    return QuantizedLayer(config.quantization, place.key, shape, parts)


def _checked_part(part: ExpectedPart, place: Placement, checkpoint: Checkpoint) -> StoredTensor:
    stored = checkpoint.tensors.get(part.name)
    if stored is None:
        raise CheckpointError(
            f"{checkpoint.folder} lacks the tensor {shown(part.name)}, without which {shown(place.key)} means nothing.",
            hint="A shard was not fetched, or quantization_config in config.json belongs to another model.",
        )
    if stored.shape not in part.shapes or stored.dtype not in part.dtypes:
        shapes = " or ".join(str(list(shape)) for shape in part.shapes)
        raise CheckpointError(
            f"The {stored} is {stored.dtype} {list(stored.shape)}; by config.json it must be "
            f"{' or '.join(part.dtypes)} {shapes}."
        )
    return stored


def _parts_of(layer: Encoded) -> tuple[StoredTensor, ...]:
    return layer.parts if isinstance(layer, GgufEntry) else tuple(layer.parts.values())


def _empty_parts(checkpoint: Checkpoint, encoded: dict[str, Encoded], used: set[str]) -> set[str]:
    """Tensors beside quantized layers that the layers do not have and that hold zeros only."""
    names = {f"{key.removesuffix('.weight')}.{role}" for key in encoded for role in _EMPTY_ROLES}
    unused = (name for name in names - used if name in checkpoint.tensors)
    return {name for name in unused if is_all_zero(checkpoint.tensors[name])}


def _check_tensor(stored: StoredTensor, place: Placement) -> None:
    if stored.shape != place.shape:
        raise CheckpointError(
            f"The {stored} has the shape {list(stored.shape)}; by config.json it must be {list(place.shape)}."
        )
    if stored.dtype not in DTYPES or (stored.dtype == _FP8 and len(stored.shape) != 2):
        raise UnsupportedModelError(
            f"The {stored} is stored as {stored.dtype} with {len(stored.shape)} axes, which cannot be read.",
            hint="Supported: F32, F16, BF16, F64, matrices of F8_E4M3 with a factor per 128x128 block, and the "
            "formats that quantization_config in config.json may name.",
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
        raise _unknown(checkpoint.folder, config, unknown)


def _unknown(folder: Path, config: ModelConfig, keys: list[str]) -> CheckpointError:
    return CheckpointError(
        f"{folder} holds {len(keys)} tensor(s) that a {config.family} network of this config has no "
        f"place for: {', '.join(shown(key) for key in keys[:3])}.",
        hint="A network that leaves weights out answers wrongly; config.json may belong to another model.",
    )
