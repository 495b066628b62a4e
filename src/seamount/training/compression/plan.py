"""What quantization of a checkpoint reads, what it will write, and what that costs; all from headers.

`Source` reads tensors of the checkpoint as fp32; `Format` says which matrices are rounded and as which stored tensors.
Called by `compress` and `layer`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from seamount import kernels
from seamount.core.errors import CheckpointError, ConfigError, UnsupportedModelError
from seamount.models.checkpoint import Checkpoint, StoredTensor, open_file, read_at
from seamount.models.config import ModelConfig
from seamount.models.keymap import (
    Placement,
    expert_placements,
    layer_experts,
    layer_placements,
    outer_placements,
    shared_copies,
)
from seamount.models.loading import plan_load
from seamount.models.quantized import ChannelQuantized, GroupQuantized
from seamount.models.quantized_config import QuantizationConfig, awq_config, int8_config
from seamount.models.quantized_formats import encode_awq, encode_int8
from seamount.models.tokenizer import read_json_object

from .files import TORCH_DTYPES, Entry
from .search import Rounding

Method = Literal["awq", "rtn"]
GROUP_SIZES = (128, 64, 32, 16, 8)
# Tokens that go through a layer at once.
CHUNK_TOKENS = 4096

_FP8 = "F8_E4M3"
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
_READ_DTYPES = {**TORCH_DTYPES, "F64": torch.float64, _FP8: torch.float8_e4m3fn}
_ROUNDED = ("_proj.weight", ".kv_a_proj_with_mqa.weight")
_AWQ_ROWS = 8  # that one stored word holds
_PROCESS_BYTES = 500 * 2**20  # Python, torch, tokenizer


class Source:
    """The checkpoint that is quantized.

    Attributes:
        folder, raw_config, config, checkpoint: what was read of it; `config` without MTP blocks that it lacks.

    Raises:
        CheckpointError: it is broken.
        UnsupportedModelError: it is of an unsupported family, or quantized already.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UnsupportedModelError(
                f"{folder} is no folder with config.json and *.safetensors.",
                hint="Quantize the 16-bit or FP8 checkpoint that it was made from.",
            )
        self.folder = folder
        self.raw_config: dict[str, Any] = read_json_object(folder / "config.json") or {}
        quantization = QuantizationConfig.from_config(self.raw_config, where=str(folder / "config.json"))
        if quantization is not None and quantization.format != "fp8":
            raise UnsupportedModelError(
                f"{folder} is quantized already ({quantization.format}).",
                hint="Quantize the 16-bit or FP8 checkpoint that it was made from.",
            )
        plan = plan_load(folder, ModelConfig.from_folder(folder))
        self.config: ModelConfig = plan.config
        self.checkpoint: Checkpoint = plan.checkpoint

    @property
    def num_layers(self) -> int:
        """Decoder layers, those of MTP blocks included."""
        return self.config.num_layers + self.config.num_mtp_layers

    def placements(self, index: int) -> Iterator[Placement]:
        """Every tensor of one layer, experts one by one however they are stored."""
        yield from layer_placements(self.config, index)
        experts = layer_experts(self.config, index)
        if experts is not None:
            for expert in range(experts.num_experts):
                yield from expert_placements(self.config, experts, index, expert)

    def outer(self) -> list[StoredTensor]:
        """Embedding, final norm, head, and the copies of them that MTP blocks hold."""
        keys = [*(place.key for place in outer_placements(self.config)), *shared_copies(self.config)]
        return [self.checkpoint.tensors[key] for key in keys if key in self.checkpoint.tensors]

    def kept_dtype(self, place: Placement) -> str:
        """As which type a tensor that is not rounded is stored: its own, or the config's if that is FP8."""
        stored, _ = self._find(place)
        if stored.dtype == _FP8:
            return _NAMES[getattr(torch, self.config.dtype)]
        return "F32" if stored.dtype == "F64" else stored.dtype

    def read(self, place: Placement) -> Tensor:
        """The tensor in fp32.

        Raises:
            CheckpointError: it cannot be read, or holds values that are no finite numbers.
        """
        stored, first_row = self._find(place)
        return self._read(stored, first_row, place.shape)

    def read_rows(self, key: str, first_row: int, num_rows: int) -> Tensor:
        """Some rows of a matrix that is not FP8, in fp32."""
        stored = self.checkpoint.tensors[key]
        return self._read(stored, first_row, (num_rows, stored.shape[1]))

    def _find(self, place: Placement) -> tuple[StoredTensor, int]:
        """The stored tensor and the row of it, all axes but the last flattened, at which the tensor begins."""
        found = self.checkpoint.tensors.get(place.key)
        if found is not None or place.expert is None:
            return self.checkpoint.tensors[place.key], 0
        head, _, leaf = place.key.partition(f".experts.{place.expert}.")
        stacked = self.checkpoint.tensors[
            f"{head}.experts.{'down_proj' if leaf.startswith('down') else 'gate_up_proj'}"
        ]
        return stacked, place.expert * stacked.shape[1] + place.start_row

    def _read(self, stored: StoredTensor, first_row: int, shape: tuple[int, ...]) -> Tensor:
        values = torch.empty(shape, dtype=_READ_DTYPES[stored.dtype])
        row_bytes = values.nbytes // shape[0] if shape[0] else 0
        with open_file(stored.path) as file:
            data = values.view(-1).view(torch.uint8).numpy().data
            read_at(file, stored.offset + first_row * row_bytes, data, stored)
        wide = values.float()
        if stored.dtype == _FP8:
            scale = self.checkpoint.tensors[stored.name + "_scale_inv"]
            wide = kernels.dequantize_fp8_blocks(wide, self._read(scale, 0, scale.shape), torch.float32)
        if not wide.isfinite().all():
            raise CheckpointError(f"The {stored} holds values that are no finite numbers.")
        return wide


@dataclasses.dataclass(frozen=True)
class Format:
    """As what weights are stored: 4 bits as AWQ (gemm) with `group_size`, or 8 bits per row (`group_size` None)."""

    group_size: int | None

    @property
    def rounding(self) -> Rounding:
        """How matrices are rounded for it."""
        return Rounding(self.group_size)

    def rounds(self, place: Placement) -> bool:
        """Whether a tensor of a layer is rounded; norms, routers and what expands latents are not."""
        if place.key.endswith(".kv_b_proj.weight") or not place.key.endswith(_ROUNDED):
            return False
        return self.group_size is None or place.shape[0] % _AWQ_ROWS == 0

    def entries(self, key: str, shape: tuple[int, ...]) -> list[Entry]:
        """The stored tensors of a rounded matrix."""
        rows, columns = shape
        stem = key.removesuffix(".weight")
        if self.group_size is None:
            return [Entry(key, "I8", (rows, columns)), Entry(f"{stem}.weight_scale", "F32", (rows, 1))]
        words, groups = rows // _AWQ_ROWS, columns // self.group_size
        return [
            Entry(f"{stem}.qweight", "I32", (columns, words)),
            Entry(f"{stem}.qzeros", "I32", (groups, words)),
            Entry(f"{stem}.scales", "F16", (groups, rows)),
        ]

    @staticmethod
    def encode(key: str, weight: GroupQuantized | ChannelQuantized) -> dict[str, Tensor]:
        """The tensors of `entries`, by name."""
        parts = encode_awq(weight) if isinstance(weight, GroupQuantized) else encode_int8(weight)
        stem = key.removesuffix(".weight")
        return {f"{stem}.{role}": values for role, values in parts.items()}

    def described(self, kept: tuple[str, ...]) -> dict[str, Any]:
        """`quantization_config` of the result; `kept` names the modules that are not rounded."""
        return int8_config(kept) if self.group_size is None else awq_config(self.group_size, kept)


def choose_format(source: Source, bits: int, group_size: int | None) -> Format:
    """Return the format of so many bits; by default with the largest group size up to 128 that divides all rows.

    Raises:
        ConfigError: the group size does not suit the bits, or does not divide the rows.
        UnsupportedModelError: no group size divides the rows of all matrices.
    """
    if bits == 8:
        if group_size is not None:
            raise ConfigError("8 bits have one scale per row.", hint="Leave out the group size.")
        return Format(None)
    any_size = Format(GROUP_SIZES[-1])
    common = math.gcd(*(place.shape[1] for place in _each_kind(source) if any_size.rounds(place)))
    fitting = [size for size in GROUP_SIZES if common % size == 0]
    if not fitting:
        raise UnsupportedModelError(
            f"{source.folder} has matrices whose rows do not divide into groups of {GROUP_SIZES[-1]}.",
            hint="Use 8 bits.",
        )
    if group_size is not None and group_size not in fitting:
        raise ConfigError(
            f"Groups of {group_size} do not divide the rows of all matrices of {source.folder}.",
            hint=f"Possible: {', '.join(map(str, fitting))}.",
        )
    return Format(group_size or fitting[0])


def layer_entries(source: Source, index: int, form: Format, method: Method) -> list[Entry]:
    """What the shard of one layer will hold."""
    entries = []
    for place in source.placements(index):
        if form.rounds(place):
            entries += form.entries(place.key, place.shape)
        else:
            # A router takes on the scales of its norm, which 16 bits would round.
            is_router = method == "awq" and place.key.endswith(".mlp.gate.weight")
            entries.append(Entry(place.key, "F32" if is_router else source.kept_dtype(place), place.shape))
    return entries


def outer_entries(source: Source) -> list[Entry]:
    """What the last shard will hold: copies."""
    return [Entry(stored.name, stored.dtype, stored.shape) for stored in source.outer()]


def kept_modules(source: Source, form: Format) -> tuple[str, ...]:
    """Names of the linear layers that stay as they are, embedding and head among them."""
    kept = ["model.embed_tokens", "lm_head"]
    for index in range(source.num_layers):
        matrices = (place for place in source.placements(index) if len(place.shape) == 2)
        kept += [place.key.removesuffix(".weight") for place in matrices if not form.rounds(place)]
        if index >= source.config.num_layers:
            kept += [f"model.layers.{index}.embed_tokens", f"model.layers.{index}.shared_head.head"]
    return tuple(kept)


def output_bytes(source: Source, form: Format, method: Method) -> int:
    """Size of the result's weights."""
    layers = (layer_entries(source, index, form, method) for index in range(source.num_layers))
    return sum(entry.num_bytes for entry in itertools.chain(outer_entries(source), *layers))


def peak_bytes(source: Source, method: Method, num_tokens: int) -> int:
    """About how much memory the process takes at most: a part of a layer in fp32, and its inputs' second moments.

    Parts are attention with the feed-forward network, or, where there are experts, with the shared ones and one expert.
    """
    config, most = source.config, 0
    for index in sorted({0, config.num_layers - 1, source.num_layers - 1}):
        own = [place for place in layer_placements(config, index) if len(place.shape) == 2]
        experts = layer_experts(config, index)
        one = [] if experts is None else list(expert_placements(config, experts, index, 0))
        places = own + one
        weights = 4 * sum(place.num_values for place in places)
        # Inputs that several matrices share are held once; of narrow chunks the rows themselves.
        widths = {(place.key.split(".")[3], place.shape[1]) for place in places}
        moments = 4 * sum(min(width, num_tokens) * width for _, width in widths) if method == "awq" else 0
        largest = max(place.num_values for place in places)
        chunk = 6 * min(num_tokens, CHUNK_TOKENS) * sum(place.shape[0] for place in places)
        most = max(most, weights + moments + 12 * min(largest, 2**25) + chunk + 2 * largest)
    return _PROCESS_BYTES + most


def _each_kind(source: Source) -> Iterator[Placement]:
    """Every kind of matrix once: layers of one kind are equal."""
    for index in {0, source.config.num_layers - 1, source.num_layers - 1}:
        yield from layer_placements(source.config, index)
        experts = layer_experts(source.config, index)
        if experts is not None:
            yield from expert_placements(source.config, experts, index, 0)
