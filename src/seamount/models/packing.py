"""A network's weight matrices go from checkpoint files into the compiled kernels' layout, one matrix at a time.

Called by `models.loading` when the kernels of this CPU are used. Each matrix is read into a buffer, rounded or only
reordered into its packed form, and the buffer is used again: peak memory is the packed weights plus two buffers. The
next matrix is read while one is packed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from seamount import kernels
from seamount.core.errors import CheckpointError
from seamount.kernels import PackedMatrix, PackedStack

from .keymap import Placement
from .layers import Experts, LatentAttention, RMSNorm, Router
from .linear import Linear
from .network import CausalLM

# A matrix beyond this is read in slices of whole panels.
_SLICE_BYTES = 64 * 2**20
_SLICE_ROWS = 128
_LARGEST_HALF = 65504.0


@dataclasses.dataclass(frozen=True)
class Part:
    """Rows of one matrix that come from one checkpoint tensor.

    Attributes:
        place: the tensor's placement.
        first_row: of the stored tensor (all axes but the last flattened) at which the part begins.
        num_rows: how many.
        at_row: of the matrix, where they go.
    """

    place: Placement
    first_row: int
    num_rows: int
    at_row: int


# Reads a part into `[num_rows, K]` of a buffer and returns the bytes read.
ReadPart = Callable[[Part, Tensor], int]


@dataclasses.dataclass(frozen=True)
class _Job:
    """One packed matrix to be made: where its rows come from, and what is done with it."""

    shape: tuple[int, int]
    parts: tuple[Part, ...]
    source_dtype: torch.dtype
    pack: Callable[[int, Tensor], None]
    at_once: bool = False

    def slices(self) -> Iterator[tuple[int, tuple[Part, ...], int]]:
        """First row, parts and number of rows of each slice; a matrix made of several tensors is one slice."""
        rows, columns = self.shape
        step = max(_SLICE_BYTES // (columns * self.source_dtype.itemsize) // _SLICE_ROWS, 1) * _SLICE_ROWS
        if self.at_once or len(self.parts) > 1 or rows <= step:
            yield 0, self.parts, rows
            return
        (part,) = self.parts
        for start in range(0, rows, step):
            count = min(step, rows - start)
            yield start, (dataclasses.replace(part, first_row=part.first_row + start, num_rows=count, at_row=0),), count


def packed_names(model: CausalLM) -> set[str]:
    """Names of the parameters that packing replaces."""
    names = set()
    for name, module in model.named_modules():
        if isinstance(module, Linear | Router):
            names.add(f"{name}.weight")
        elif isinstance(module, Experts):
            names |= {f"{name}.gate_up_proj", f"{name}.down_proj"}
    return names


def pack_model(
    model: CausalLM,
    kind: kernels.Kind,
    places: dict[str, list[Placement]],
    dtype_of: Callable[[Placement], torch.dtype],
    read: ReadPart,
    advance: Callable[[int], None],
) -> None:
    """Fill the packed forms of all matrices of `model` and switch its layers to them.

    Args:
        model: everything but the parameters in `packed_names` has its values.
        kind: how matrices are stored. Routers are fp32 always; under int8 and int4 the up-projections of latent
            attention are bf16, and under int4 the head is int8.
        places: by parameter name, what fills it.
        dtype_of: in which floating type a tensor is best read.
        advance: told the bytes of every slice once it is packed.
    """
    jobs = list(_Maker(kind, places, dtype_of).jobs(model))
    with ThreadPoolExecutor(1) as reader:
        pending: tuple[_Job, int, Future[tuple[Tensor, int]]] | None = None
        for job in jobs:
            for start, parts, rows in job.slices():
                following = reader.submit(_read_slice, job, parts, rows, read)
                if pending is not None:
                    _finish(*pending, advance)
                pending = (job, start, following)
        if pending is not None:
            _finish(*pending, advance)
    if model.lm_head is None:
        _pack_tied_head(model, kind)
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.weight = torch.nn.Parameter(module.weight.float(), requires_grad=False)
    model.is_packed = True


def _read_slice(job: _Job, parts: tuple[Part, ...], rows: int, read: ReadPart) -> tuple[Tensor, int]:
    buffer = torch.empty(rows, job.shape[1], dtype=job.source_dtype)
    return buffer, sum(read(part, buffer[part.at_row : part.at_row + part.num_rows]) for part in parts)


def _finish(job: _Job, start: int, following: Future[tuple[Tensor, int]], advance: Callable[[int], None]) -> None:
    buffer, num_bytes = following.result()
    job.pack(start, buffer)
    advance(num_bytes)


class _Maker:
    """Makes the jobs of a model; what they share is held once.

    Args: see `pack_model`.
    """

    def __init__(
        self, kind: kernels.Kind, places: dict[str, list[Placement]], dtype_of: Callable[[Placement], torch.dtype]
    ) -> None:
        self._kind, self._places, self._dtype_of = kind, places, dtype_of

    def jobs(self, model: CausalLM) -> Iterator[_Job]:
        """Every matrix of the model, in its order."""
        for name, module in model.named_modules():
            if isinstance(module, LatentAttention):
                yield self._up_projections(f"{name}.kv_b_proj.weight", module)
            elif isinstance(module, Router):
                shape = tuple(module.weight.shape)
                yield self._matrix(f"{name}.weight", shape, module.use_packed, kind="float32")
            elif isinstance(module, Experts):
                yield from self._experts(name, module)
            elif isinstance(module, Linear) and not name.endswith(".kv_b_proj"):
                head = module is model.lm_head
                kind = _head_kind(self._kind) if head else self._kind
                shape = (module.out_features, module.in_features)
                yield self._matrix(f"{name}.weight", shape, module.use_packed, kind=kind, bias=module.bias)

    def _matrix(
        self,
        parameter: str,
        shape: tuple[int, int],
        done: Callable[[PackedMatrix], None],
        *,
        kind: kernels.Kind,
        bias: Tensor | None = None,
        parts: tuple[Part, ...] | None = None,
    ) -> _Job:
        matrix: list[PackedMatrix] = []
        gated = parameter.removesuffix(".weight").endswith("gate_up_proj")

        def pack(start: int, rows: Tensor) -> None:
            if not matrix:
                matrix.append(PackedMatrix(kind, *shape, gated=gated, bias=bias))
            _pack_rows(matrix[0], start, rows, parameter)
            if start + rows.shape[0] == shape[0]:
                done(matrix[0])

        parts = parts or _whole_parts(self._places[parameter])
        return _Job(shape, parts, self._widest(parts), pack, at_once=gated)

    def _experts(self, name: str, module: Experts) -> Iterator[_Job]:
        num_experts, double, width = module.gate_up_proj.shape
        stacks: dict[str, list[PackedMatrix]] = {"gate_up_proj": [], "down_proj": []}

        def complete() -> None:
            if all(len(found) == num_experts for found in stacks.values()):
                module.use_packed(PackedStack(stacks["gate_up_proj"]), PackedStack(stacks["down_proj"]))

        for leaf, (rows, columns) in (("gate_up_proj", (double, width)), ("down_proj", (width, double // 2))):

            def done(matrix: PackedMatrix, leaf: str = leaf) -> None:
                stacks[leaf].append(matrix)
                complete()

            found = self._places[f"{name}.{leaf}"]
            for expert in range(num_experts):
                own = [place for place in found if place.expert == expert] if len(found) > 1 else []
                parts = _whole_parts(own) if own else (Part(found[0], expert * rows, rows, 0),)
                yield self._matrix(f"{name}.{leaf}", (rows, columns), done, kind=self._kind, parts=parts)

    def _up_projections(self, parameter: str, module: LatentAttention) -> _Job:
        """`kv_b_proj` serves in two small products per head: queries times keys' part, values' part times the mix."""
        kind: kernels.Kind = "bfloat16" if self._kind in ("int8", "int4") else self._kind
        widths = module.latent
        rank, nope, value = widths.kv_lora_rank, widths.qk_nope_head_dim, widths.v_head_dim

        def pack(start: int, rows: Tensor) -> None:
            keys, values = [], []
            for head in rows.unflatten(0, (module.num_heads, nope + value)):
                keys.append(PackedMatrix(kind, rank, nope))
                _pack_rows(keys[-1], 0, head[:nope].T.contiguous(), parameter)
                values.append(PackedMatrix(kind, value, rank))
                _pack_rows(values[-1], 0, head[nope:], parameter)
            module.use_packed(PackedStack(keys), PackedStack(values))

        parts = _whole_parts(self._places[parameter])
        shape = (module.num_heads * (nope + value), rank)
        return _Job(shape, parts, self._widest(parts), pack, at_once=True)

    def _widest(self, parts: tuple[Part, ...]) -> torch.dtype:
        found = {self._dtype_of(part.place) for part in parts}
        return found.pop() if len(found) == 1 else torch.float32


def _whole_parts(places: list[Placement]) -> tuple[Part, ...]:
    return tuple(Part(place, 0, place.shape[0], place.start_row) for place in places)


def _head_kind(kind: kernels.Kind) -> kernels.Kind:
    """Four bits cost the head more accuracy than the rest, and it is a small part of the whole."""
    return "int8" if kind == "int4" else kind


def _pack_tied_head(model: CausalLM, kind: kernels.Kind) -> None:
    table = model.embed_tokens.weight
    matrix = PackedMatrix(_head_kind(kind), *table.shape)
    _pack_rows(matrix, 0, table.detach(), "embed_tokens.weight")
    with torch.device("meta"):
        head = Linear(table.shape[1], table.shape[0], bias=False)
    head.use_packed(matrix)
    model.lm_head = head


def _pack_rows(matrix: PackedMatrix, start: int, rows: Tensor, parameter: str) -> None:
    if matrix.kind == "float16" and rows.dtype != torch.float16 and not bool(rows.abs().max() <= _LARGEST_HALF):
        raise CheckpointError(
            f"{parameter} holds values that float16 cannot hold.", hint="Use dtype bfloat16 or float32."
        )
    matrix.pack_rows(start, rows)
