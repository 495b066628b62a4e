"""What config.json says of quantized weights, and which stored tensors a linear layer is then made of.

`QuantizationConfig.expected_parts` lets a loader compare headers with what it needs before it reads; the tensors it
names go to `models.quantized_formats.decode_weight` by their roles. Formats: AWQ (gemm), GPTQ (v1 and v2),
compressed-tensors (int-quantized, pack-quantized), and FP8 in blocks, which the loader reads itself. Loads no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from seamount.core.errors import CheckpointError, UnsupportedModelError

from .checkpoint import shown
from .fields import Fields

_WORD_BITS = 32
_MOST_GROUP = 2**20
_FLOATS = ("F16", "BF16", "F32")
_INTEGERS = ("I32", "I64")
_WEIGHT = "weight"

Format = Literal["fp8", "awq", "gptq", "int-quantized", "pack-quantized"]


@dataclass(frozen=True, slots=True)
class ExpectedPart:
    """One stored tensor of a quantized linear layer.

    Attributes:
        name: in the checkpoint.
        shapes: those it may have.
        dtypes: those it may have, as in `StoredTensor.dtype`.
    """

    name: str
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    """`quantization_config` of one checkpoint.

    Attributes:
        format: how the weights are stored.
        bits: per weight.
        group_size: weights of a row that share a scale; None: all of a row.
        symmetric: compressed-tensors only: no zero points are stored.
        zero_offset: GPTQ only: what is added to stored zero points (1 in its first version).
        per_tensor: int-quantized only: one scale for the whole matrix.
        reordered: columns belong to groups in an order of their own (desc_act, actorder).
    """

    format: Format
    bits: int = 8
    group_size: int | None = None
    symmetric: bool = False
    zero_offset: int = 0
    per_tensor: bool = False
    reordered: bool = False

    @classmethod
    def from_config(cls, raw: dict[str, Any], *, where: str = "config") -> QuantizationConfig | None:
        """Read it out of a parsed config.json; None where the weights are not quantized.

        Raises:
            CheckpointError: a field is missing or of a wrong type.
            UnsupportedModelError: the method, or a variation of it, is not read.
        """
        fields = Fields(raw, where).table("quantization_config")
        if fields is None:
            return None
        method = fields.text("quant_method")
        if method == "awq":
            return _awq(fields)
        if method == "gptq":
            return _gptq(fields)
        if method == "compressed-tensors":
            return _compressed(fields)
        if method == "fp8" and fields.raw.get("weight_block_size", [128, 128]) == [128, 128]:
            return cls(format="fp8")
        blocks = f" with weight_block_size {fields.raw.get('weight_block_size')!s:.40}" if method == "fp8" else ""
        raise _unsupported(fields, f"quantization {shown(method)}{blocks}")

    def expected_parts(
        self, key: str, shape: tuple[int, int], has: Callable[[str], bool]
    ) -> dict[str, ExpectedPart] | None:
        """Return the stored tensors of a linear layer by role, or None where it is stored unquantized (or as FP8).

        What is quantized is decided by the tensors that are there, not by the config's list of exceptions, which every
        tool matches in its own way.

        Args:
            key: of its weight in an unquantized checkpoint, such as "model.layers.0.mlp.up_proj.weight".
            shape: `[N, K]` of its weight: outputs, inputs.
            has: whether the checkpoint holds a tensor of a name.

        Raises:
            CheckpointError: a matrix of this shape cannot be stored in this format.
        """
        stem, _, ending = key.rpartition(".")
        if ending != _WEIGHT or self.format == "fp8" or not has(f"{stem}.{_MARKERS[self.format]}"):
            return None
        layouts = {
            "awq": self._awq_layout,
            "gptq": self._gptq_layout,
            "int-quantized": self._channel_layout,
            "pack-quantized": self._packed_layout,
        }
        layout = layouts[self.format](key, *shape)
        return {
            role: ExpectedPart(f"{stem}.{role}", shapes, dtypes)
            for role, (shapes, dtypes) in layout.items()
            if role not in _OPTIONAL or has(f"{stem}.{role}")
        }

    def num_groups(self, columns: int) -> int:
        """Groups in a row of so many weights."""
        return 1 if self.group_size is None else -(-columns // self.group_size)

    def _awq_layout(self, key: str, rows: int, columns: int) -> _Layout:
        pack = _WORD_BITS // self.bits
        if rows % pack or columns % (self.group_size or 1):
            raise _unfit(key, rows, columns, f"AWQ: rows in {pack}s, and groups of {self.group_size}")
        groups = self.num_groups(columns)
        return {
            "qweight": (((columns, rows // pack),), ("I32",)),
            "qzeros": (((groups, rows // pack),), ("I32",)),
            "scales": (((groups, rows),), _FLOATS),
        }

    def _gptq_layout(self, key: str, rows: int, columns: int) -> _Layout:
        pack = _WORD_BITS // self.bits
        if rows % pack or columns % pack:
            raise _unfit(key, rows, columns, f"GPTQ in {self.bits} bits: rows and columns in {pack}s")
        groups = self.num_groups(columns)
        return {
            "qweight": (((columns // pack, rows),), ("I32",)),
            "qzeros": (((groups, rows // pack),), ("I32",)),
            "scales": (((groups, rows),), _FLOATS),
            "g_idx": (((columns,),), ("I32",)),
        }

    def _channel_layout(self, key: str, rows: int, columns: int) -> _Layout:
        scales: tuple[tuple[int, ...], ...] = ((1,), ()) if self.per_tensor else ((rows, 1), (rows,))
        return {"weight": (((rows, columns),), ("I8",)), "weight_scale": (scales, _FLOATS)}

    def _packed_layout(self, key: str, rows: int, columns: int) -> _Layout:
        pack = _WORD_BITS // self.bits
        groups = self.num_groups(columns)
        layout: _Layout = {
            "weight_packed": (((rows, -(-columns // pack)),), ("I32",)),
            "weight_scale": (((rows, groups),), _FLOATS),
            "weight_shape": (((2,),), _INTEGERS),
            "weight_g_idx": (((columns,),), _INTEGERS),
        }
        if not self.symmetric:
            layout["weight_zero_point"] = (((-(-rows // pack), groups),), ("I32",))
        return layout


_Layout = dict[str, tuple[tuple[tuple[int, ...], ...], tuple[str, ...]]]
# The tensor by whose presence a layer is known to be quantized.
_MARKERS = {"awq": "qweight", "gptq": "qweight", "int-quantized": "weight_scale", "pack-quantized": "weight_packed"}
_OPTIONAL = ("g_idx", "weight_g_idx")


def awq_config(group_size: int, skipped: tuple[str, ...] = ("lm_head",)) -> dict[str, Any]:
    """`quantization_config` for weights of `quantized_formats.encode_awq`; `skipped` modules stay as they are."""
    return {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": group_size,
        "zero_point": True,
        "modules_to_not_convert": list(skipped),
    }


def int8_config(skipped: tuple[str, ...] = ("lm_head",)) -> dict[str, Any]:
    """`quantization_config` for weights of `quantized_formats.encode_int8`, with activations quantized per token."""
    common: dict[str, Any] = {"num_bits": 8, "type": "int", "symmetric": True}
    weights = {**common, "strategy": "channel", "dynamic": False}
    activations = {**common, "strategy": "token", "dynamic": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": activations}},
        "ignore": list(skipped),
    }


def _awq(fields: Fields) -> QuantizationConfig:
    version = fields.text("version", fields.text("format", "gemm")).lower()
    bits = fields.integer("bits", 1, 64, default=4)
    if version != "gemm" or bits != 4 or not fields.boolean("zero_point", default=True):
        raise _unsupported(
            fields, f"AWQ as {shown(version)} in {bits} bits with zero_point {fields.raw.get('zero_point')!s:.10}"
        )
    return QuantizationConfig(format="awq", bits=bits, group_size=_group_size(fields, 128))


def _gptq(fields: Fields) -> QuantizationConfig:
    version = fields.text("checkpoint_format", fields.text("format", "gptq"))
    bits = fields.integer("bits", 1, 64)
    if version not in ("gptq", "gptq_v2") or bits not in (4, 8) or fields.raw.get("is_marlin_format"):
        raise _unsupported(fields, f"GPTQ as {shown(version)} in {bits} bits")
    # Patterns that begin with "-" leave modules as they are, which their tensors show.
    dynamic = fields.table("dynamic")
    overrides = [pattern for pattern in dynamic.raw if not pattern.startswith("-")] if dynamic else []
    if overrides:
        raise _unsupported(fields, f"GPTQ with other settings for {shown(overrides[0])}")
    offset = 1 if version == "gptq" else 0
    reordered = fields.boolean("desc_act", default=False)
    return QuantizationConfig(
        format="gptq", bits=bits, group_size=_group_size(fields, 128), zero_offset=offset, reordered=reordered
    )


def _group_size(fields: Fields, default: int | None) -> int | None:
    size = fields.integer("group_size", -1, _MOST_GROUP, default=-1 if default is None else default)
    if size == 0:
        raise CheckpointError(f"{fields.where}: group_size is 0.")
    return None if size == -1 else size


def _compressed(fields: Fields) -> QuantizationConfig:
    sparsity = fields.table("sparsity_config")
    if sparsity is not None and sparsity.text("format", "dense") != "dense":
        raise _unsupported(fields, "a sparse checkpoint")
    if fields.raw.get("kv_cache_scheme"):
        raise _unsupported(fields, "a quantized cache (kv_cache_scheme)")
    groups = fields.table("config_groups")
    found = {_scheme(fields, groups, name) for name in groups.raw} if groups else set()
    if len(found) != 1:
        raise _unsupported(fields, f"compressed-tensors with {len(found)} different config_groups")
    return found.pop()


def _scheme(fields: Fields, groups: Fields, name: str) -> QuantizationConfig:
    group = groups.table(name)
    weights = group.table("weights") if group else None
    if group is None or weights is None:
        raise CheckpointError(f"{groups.where}: the group {shown(name)} has no weights.")
    storage = group.text("format", fields.text("format"))
    activations = group.table("input_activations")
    if activations and (activations.text("type", "int") != "int" or activations.raw.get("dynamic") is not True):
        raise _unsupported(fields, "activations with stored scales, or in floating point")
    kind, bits, strategy = weights.text("type", "int"), weights.integer("num_bits", 1, 64), weights.text("strategy")
    symmetric = weights.boolean("symmetric", default=True)
    group_size = _group_size(weights, None) if strategy == "group" else None
    if strategy == "group" and group_size is None:
        raise CheckpointError(f"{weights.where}: the strategy is group, and group_size is missing.")
    if kind == "int" and storage == "int-quantized" and bits == 8 and symmetric and strategy in ("channel", "tensor"):
        return QuantizationConfig(format="int-quantized", symmetric=True, per_tensor=strategy == "tensor")
    if kind == "int" and storage == "pack-quantized" and bits in (4, 8) and strategy in ("channel", "group"):
        reordered = weights.raw.get("actorder") in ("group", "dynamic", True)
        return QuantizationConfig(
            format="pack-quantized", bits=bits, group_size=group_size, symmetric=symmetric, reordered=reordered
        )
    raise _unsupported(
        fields,
        f"compressed-tensors as {shown(storage)} of {bits}-bit {shown(kind)} per {shown(strategy)}"
        f"{'' if symmetric else ', asymmetric,'}",
    )


def _unsupported(fields: Fields, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{fields.where}: {what} is not supported.",
        hint="Supported: AWQ (gemm, 4 bits), GPTQ (4 and 8 bits), compressed-tensors (int-quantized in 8 bits, "
        "pack-quantized in 4 and 8), fp8 in 128x128 blocks.",
    )


def _unfit(key: str, rows: int, columns: int, what: str) -> CheckpointError:
    return CheckpointError(f"{shown(key)} is {rows} x {columns} by config.json, which does not fit {what}.")
