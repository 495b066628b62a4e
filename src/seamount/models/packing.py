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

from seamount.core.errors import CheckpointError
from seamount.kernels import PackedMatrix, PackedStack

from .encoded import PLAIN, Form, empty_weight, rows_of, values_of
from .keymap import Placement
from .layers import Experts, LatentAttention, RMSNorm, Router
from .linear import Linear
from .load_plan import LoadPlan
from .network import CausalLM
from .precision import EMBEDDING, HEAD, Precision, is_gated
from .quantized import ChannelQuantized, GroupQuantized
from .quantized_formats import Weight
from .reading import Part

# A matrix beyond this is read in slices of whole panels.
_SLICE_BYTES = 64 * 2**20
_SLICE_ROWS = 128
_LARGEST_HALF = 65504.0


# Reads a part into `num_rows` rows of a buffer and returns the bytes read.
ReadPart = Callable[[Part, Weight], int]


@dataclasses.dataclass(frozen=True)
class _Job:
    """One packed matrix to be made: where its rows come from, and what is done with it."""

    shape: tuple[int, int]
    parts: tuple[Part, ...]
    form: Form
    source_dtype: torch.dtype
    pack: Callable[[int, Weight], None]
    at_once: bool = False

    def slices(self) -> Iterator[tuple[int, tuple[Part, ...], int]]:
        """First row, parts and number of rows of each slice; a matrix made of several tensors is one slice."""
        rows, columns = self.shape
        width = 1 if self.form.has_codes else self.source_dtype.itemsize
        step = max(_SLICE_BYTES // (columns * width) // _SLICE_ROWS, 1) * _SLICE_ROWS
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
    plan: LoadPlan,
    precision: Precision,
    read: ReadPart,
    advance: Callable[[int], None],
) -> None:
    """Fill the packed forms of all matrices of `model` and switch its layers to them.

    Args:
        model: everything but the parameters in `packed_names` has its values.
        precision: how each matrix is stored.
        advance: told the bytes of every slice once it is packed.
    """
    jobs = list(_Maker(plan, precision).jobs(model))
    with ThreadPoolExecutor(1) as reader:
        pending: tuple[_Job, int, Future[tuple[Weight, int]]] | None = None
        for job in jobs:
            for start, parts, rows in job.slices():
                following = reader.submit(_read_slice, job, parts, rows, read)
                if pending is not None:
                    _finish(*pending, advance)
                pending = (job, start, following)
        if pending is not None:
            _finish(*pending, advance)
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.weight = torch.nn.Parameter(module.weight.float(), requires_grad=False)
    model.is_packed = True


def resident_bytes(model: CausalLM) -> int:
    """Memory that the weights of a loaded model take, packed or not."""
    total = sum(value.nbytes for value in [*model.parameters(), *model.buffers()])
    for module in model.modules():
        if isinstance(module, Linear | Router) and module.packed is not None:
            total += module.packed.num_bytes
        elif isinstance(module, Experts) and module.packed is not None:
            total += sum(stack.num_bytes for stack in module.packed)
        elif isinstance(module, LatentAttention) and module.up_packed is not None:
            total += sum(stack.num_bytes for stack in module.up_packed)
    return total


def _read_slice(job: _Job, parts: tuple[Part, ...], rows: int, read: ReadPart) -> tuple[Weight, int]:
    buffer = empty_weight(job.form, (rows, job.shape[1]), job.source_dtype)
    return buffer, sum(read(part, rows_of(buffer, part.at_row, part.num_rows)) for part in parts)


def _finish(job: _Job, start: int, following: Future[tuple[Weight, int]], advance: Callable[[int], None]) -> None:
    buffer, num_bytes = following.result()
    job.pack(start, buffer)
    advance(num_bytes)


class _Maker:
    """Makes the jobs of a model; what they share is held once.

    Args: see `pack_model`.
    """

    def __init__(self, plan: LoadPlan, precision: Precision) -> None:
        self._plan, self._precision = plan, precision
        self._places: dict[str, list[Placement]] = {}
        for place in plan.places.values():
            self._places.setdefault(place.parameter, []).append(place)

    def jobs(self, model: CausalLM) -> Iterator[_Job]:
        """Every matrix of the model, in its order."""
        for name, module in model.named_modules():
            if isinstance(module, LatentAttention):
                yield self._up_projections(f"{name}.kv_b_proj.weight", module)
            elif isinstance(module, Router):
                shape = (module.weight.shape[0], module.weight.shape[1])
                yield self._matrix(f"{name}.weight", shape, module.use_packed)
            elif isinstance(module, Experts):
                yield from self._experts(name, module)
            elif isinstance(module, Linear) and not name.endswith(".kv_b_proj"):
                shape = (module.out_features, module.in_features)
                yield self._matrix(f"{name}.weight", shape, module.use_packed, bias=module.bias)
        if model.lm_head is None and model.config.has_head:
            yield self._tied_head(model)

    def _matrix(
        self,
        parameter: str,
        shape: tuple[int, int],
        done: Callable[[PackedMatrix], None],
        *,
        bias: Tensor | None = None,
        places: list[Placement] | None = None,
        parts: tuple[Part, ...] | None = None,
    ) -> _Job:
        """`places` fill the parameter, `parts` this matrix; the first decide its storage."""
        matrix: list[PackedMatrix] = []
        gated = is_gated(parameter)
        places = places or self._places[parameter]
        storage = self._precision.storage_of(parameter, places)

        def pack(start: int, rows: Weight) -> None:
            if not matrix:
                matrix.append(PackedMatrix(storage.kind, *shape, group=storage.group, gated=gated, bias=bias))
            if _pack_rows(matrix[0], start, rows, parameter) == shape[0]:
                done(matrix[0])

        parts = parts or _whole_parts(places)
        # Encoded tensors come in steps of rows, which slices would have to keep to.
        at_once = gated or any(self._row_step(part.place) > 1 for part in parts)
        return _Job(shape, parts, storage.form, self._widest(parts), pack, at_once=at_once)

    def _row_step(self, place: Placement) -> int:
        encoded = self._plan.encoded.get(place.key)
        return 1 if encoded is None else encoded.row_step

    def _tied_head(self, model: CausalLM) -> _Job:
        rows, columns = model.embed_tokens.weight.shape

        def done(matrix: PackedMatrix) -> None:
            with torch.device("meta"):
                head = Linear(columns, rows, bias=False)
            head.use_packed(matrix)
            model.lm_head = head

        return self._matrix(HEAD, (rows, columns), done, places=self._places[EMBEDDING])

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
            by_expert: dict[int | None, list[Placement]] = {}
            for place in found:
                by_expert.setdefault(place.expert, []).append(place)
            for expert in range(num_experts):
                own = by_expert.get(expert)
                parts = _whole_parts(own) if own else (Part(found[0], expert * rows, rows, 0),)
                yield self._matrix(f"{name}.{leaf}", (rows, columns), done, parts=parts)

    def _up_projections(self, parameter: str, module: LatentAttention) -> _Job:
        """`kv_b_proj` serves in two small products per head: queries times keys' part, values' part times the mix."""
        kind = self._precision.storage_of(parameter, self._places[parameter]).kind
        widths = module.latent
        rank, nope, value = widths.kv_lora_rank, widths.qk_nope_head_dim, widths.v_head_dim

        def pack(start: int, rows: Weight) -> None:
            keys, values = [], []
            for head in values_of(rows).unflatten(0, (module.num_heads, nope + value)):
                keys.append(PackedMatrix(kind, rank, nope))
                _pack_rows(keys[-1], 0, head[:nope].T.contiguous(), parameter)
                values.append(PackedMatrix(kind, value, rank))
                _pack_rows(values[-1], 0, head[nope:], parameter)
            module.use_packed(PackedStack(keys), PackedStack(values))

        parts = _whole_parts(self._places[parameter])
        shape = (module.num_heads * (nope + value), rank)
        return _Job(shape, parts, PLAIN, self._widest(parts), pack, at_once=True)

    def _widest(self, parts: tuple[Part, ...]) -> torch.dtype:
        found = {self._plan.dtype_of(part.place) for part in parts}
        return found.pop() if len(found) == 1 else torch.float32


def _whole_parts(places: list[Placement]) -> tuple[Part, ...]:
    return tuple(Part(place, 0, place.shape[0], place.start_row) for place in places)


def _pack_rows(matrix: PackedMatrix, start: int, rows: Weight, parameter: str) -> int:
    """Pack rows, as codes where they are such; returns the row after the last."""
    if isinstance(rows, GroupQuantized):
        matrix.pack_codes(start, rows.codes, rows.scales, rows.zeros)
        return start + rows.codes.shape[0]
    if isinstance(rows, ChannelQuantized):
        matrix.pack_codes(start, rows.codes, rows.scales)
        return start + rows.codes.shape[0]
    if matrix.kind == "float16" and rows.dtype != torch.float16 and not bool(rows.abs().max() <= _LARGEST_HALF):
        raise CheckpointError(
            f"{parameter} holds values that float16 cannot hold.", hint="Use dtype bfloat16 or float32."
        )
    matrix.pack_rows(start, rows)
    return start + rows.shape[0]
