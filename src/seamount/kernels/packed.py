"""Weight matrices in the compiled kernels' layout, and products with them.

Made by `models.packing` while a checkpoint is read, used by `models.linear` and `models.layers`. Activations are fp32
in and out; what a matrix's kind rounds them to on the way is the kernel's business. A row's result has the same bits
whatever other rows are in the call. Layouts are described in `native/matrix.h`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import byref, c_double, c_float, c_int32, c_int64, c_void_p
from typing import Literal

import torch
from torch import Tensor

from .library import library
from .recording import StepFunction, empty

Kind = Literal["float32", "float16", "bfloat16", "int8", "int4"]
PANEL = 16
DEFAULT_GROUP = 64
_KINDS: dict[str, int] = {"float32": 0, "float16": 1, "bfloat16": 2, "int8": 3, "int4": 4}
_SOURCES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_PAGE = 4096
_LARGE_PAGE = 2 * 2**20
_PIECE_BYTES = 64 * 2**20
# The kernels fetch a little ahead of what they read.
_SLACK = 2 * _PAGE


class _Matrix(ctypes.Structure):
    """`struct Matrix` of native/matrix.h; whoever makes one puts what it points to into `memory`."""

    memory: object

    _fields_ = [
        ("kind", c_int32),
        ("group", c_int32),
        ("gated", c_int32),
        ("n", c_int64),
        ("k", c_int64),
        ("data", c_void_p),
        ("scale", c_void_p),
        ("group_scale", c_void_p),
        ("bias", c_void_p),
    ]


class _Functions:
    """The library's entry points with their argument types set once."""

    def __init__(self, lib: ctypes.CDLL) -> None:
        matrix = ctypes.POINTER(_Matrix)
        p, i, n, f = c_void_p, c_int32, c_int64, c_float
        self.linear = StepFunction(lib, "seamount_linear", matrix, p, n, n, p, f, p, n, i)
        self.feed_forward = StepFunction(lib, "seamount_feed_forward", matrix, matrix, p, n, n, p, f, p, n)
        self.linear_per_head = StepFunction(lib, "seamount_linear_per_head", matrix, n, p, n, n, n, p, n, n)
        self.experts = StepFunction(lib, "seamount_experts", matrix, matrix, n, p, n, n, p, p, n, p, n)
        self.norm = StepFunction(lib, "seamount_norm", p, n, p, f, n, n, p, n)
        self.pack = lib.seamount_pack
        self.pack.argtypes = [matrix, c_void_p, c_int32, c_int64, c_int64]
        self.pack_codes = lib.seamount_pack_codes
        self.pack_codes.argtypes = [matrix, c_void_p, c_void_p, c_void_p, c_int64, c_int64]
        self.packed_bytes = lib.seamount_packed_bytes
        self.packed_bytes.argtypes, self.packed_bytes.restype = [matrix], c_int64
        self.argmax = lib.seamount_argmax
        self.argmax.argtypes = [c_void_p, c_int64, c_int64, c_int64, c_void_p, c_void_p]
        self.candidates = lib.seamount_candidates
        self.candidates.argtypes = [c_void_p, c_int64, c_float, c_float, c_float, c_void_p, c_void_p, c_void_p]
        self.candidates.restype = c_int64
        self.want_large_pages = lib.seamount_want_large_pages
        self.want_large_pages.argtypes = [c_void_p, c_int64]
        self.set_threads = lib.seamount_set_threads
        self.set_threads.argtypes = [c_int32]
        for function in (self.pack, self.pack_codes, self.argmax, self.want_large_pages, self.set_threads):
            function.restype = None


_functions: _Functions | None = None


def functions() -> _Functions:
    """The entry points; raises RuntimeError where the library could not be built."""
    global _functions
    if _functions is None:
        lib = library()
        if lib is None:
            raise RuntimeError("the compiled kernels are not there: ask library.why_missing()")
        _functions = _Functions(lib)
    return _functions


class _Arena:
    """Memory for packed weights in large pieces on large pages, so that a small matrix is read as fast as a big one.

    A piece goes back to the system when the last matrix in it is gone.
    """

    def __init__(self) -> None:
        self._piece = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def take(self, num_bytes: int) -> Tensor:
        """`num_bytes` bytes that begin at a page, with some readable bytes behind them."""
        size = -(-(num_bytes + _SLACK) // _PAGE) * _PAGE
        if self._used + size > self._piece.numel():
            memory = torch.empty(max(size, _PIECE_BYTES) + _LARGE_PAGE, dtype=torch.uint8)
            offset = -memory.data_ptr() % _LARGE_PAGE
            self._piece, self._used = memory[offset : memory.numel() - _LARGE_PAGE + offset], 0
            functions().want_large_pages(self._piece.data_ptr(), self._piece.numel())
        self._used += size
        return self._piece[self._used - size : self._used - size + num_bytes]


_arena = _Arena()


def packed_num_bytes(
    kind: Kind, num_outputs: int, num_inputs: int, *, group: int = DEFAULT_GROUP, gated: bool = False
) -> int:
    """What `PackedMatrix.num_bytes` of such a matrix will be."""
    struct = _Matrix(_KINDS[kind], group, gated, num_outputs, num_inputs, None, None, None, None)
    outputs = (-(-(num_outputs // 2) // PANEL) * 2 if gated else -(-num_outputs // PANEL)) * PANEL
    per_output = {"int8": 4, "int4": 4 + 2 * -(-num_inputs // group)}.get(kind, 0)
    return int(functions().packed_bytes(struct)) + outputs * per_output


class PackedMatrix:
    """One weight `[num_outputs, num_inputs]`, packed.

    Args:
        kind: how weights are stored. int8: a scale per output; int4: that, and a multiplier and a zero level per
            group of inputs. Rounding is to nearest.
        group: int4 only: inputs per group, 32 or a multiple of 64.
        gated: the first half of the outputs are gates: the product is `silu(first half) * second half`.
        bias: `[num_outputs]`, added to every product (before gating).
    """

    def __init__(
        self,
        kind: Kind,
        num_outputs: int,
        num_inputs: int,
        *,
        group: int = DEFAULT_GROUP,
        gated: bool = False,
        bias: Tensor | None = None,
    ) -> None:
        self.kind, self.num_outputs, self.num_inputs, self.group, self.gated = (
            kind,
            num_outputs,
            num_inputs,
            group,
            gated,
        )
        self.width = num_outputs // 2 if gated else num_outputs
        self._functions = functions()
        self.struct = _Matrix(_KINDS[kind], group, gated, num_outputs, num_inputs, None, None, None, None)
        num_panels = -(-self.width // PANEL) * (2 if gated else 1)
        self._num_panels = num_panels
        padded = num_panels * PANEL
        num_bytes = int(self._functions.packed_bytes(self.struct))
        self._data = _arena.take(num_bytes)
        self.struct.data = self._data.data_ptr()
        memory = [self._data]
        self.num_bytes = num_bytes
        if kind in ("int8", "int4"):
            self._scale = torch.zeros(padded)
            self.struct.scale = self._scale.data_ptr()
            memory.append(self._scale)
            self.num_bytes += self._scale.nbytes
        if kind == "int4":
            num_groups = -(-num_inputs // group)
            self._group_scale = torch.zeros(padded // PANEL * num_groups * 2 * PANEL, dtype=torch.uint8)
            self.struct.group_scale = self._group_scale.data_ptr()
            memory.append(self._group_scale)
            self.num_bytes += self._group_scale.nbytes
        if bias is not None:
            self._bias = self._packed_order(bias)
            self.struct.bias = self._bias.data_ptr()
            memory.append(self._bias)
        self.struct.memory = memory

    def pack_rows(self, start: int, rows: Tensor) -> None:
        """Pack `rows [R, num_inputs]` (fp32, fp16 or bf16, contiguous) as outputs `start` to `start + R`.

        `start` is a multiple of 16, and so is R unless these are the last outputs; a gated matrix is packed as a whole.
        """
        panels = self._panels_of(start, rows)
        self._functions.pack(self.struct, _origin(rows, start), _SOURCES[rows.dtype], *panels)

    def pack_codes(self, start: int, codes: Tensor, scales: Tensor, zeros: Tensor | None = None) -> None:
        """Pack rows that are codes already, under the conditions of `pack_rows`; the codes stay as they are.

        Args:
            codes: `[R, num_inputs]`, contiguous. int8: int8, value = scale * code. int4: uint8 from 0 to 15,
                value = scale * (code - zero).
            scales: fp32, contiguous. int8: `[R]`; int4: `[R, groups]`, the last group may be short.
            zeros: int4 only: fp32 `[R, groups]`, in units of codes.
        """
        rows, groups = codes.shape[0], -(-self.num_inputs // self.group)
        wanted = (torch.uint8, (rows, groups), (rows, groups)) if self.kind == "int4" else (torch.int8, (rows,), None)
        given = (codes.dtype, tuple(scales.shape), None if zeros is None else tuple(zeros.shape))
        factors = [scales] if zeros is None else [scales, zeros]
        sound = all(part.dtype == torch.float32 and part.is_contiguous() for part in factors)
        if given != wanted or self.kind not in ("int8", "int4") or not sound:
            raise ValueError(f"codes, scales and zeros as {given} do not fit a matrix of {self.kind}: {wanted}")
        panels = self._panels_of(start, codes)
        of_zeros = None if zeros is None else _origin(zeros, start)
        self._functions.pack_codes(self.struct, _origin(codes, start), _origin(scales, start), of_zeros, *panels)

    def multiply(
        self,
        x: Tensor,
        *,
        norm: Tensor | None = None,
        eps: float = 0.0,
        add_to: Tensor | None = None,
    ) -> Tensor:
        """`x [T, num_inputs] @ weight.T + bias`, gated where the matrix is; fp32 `[T, width]`.

        Args:
            norm: fp32 `[num_inputs]`: x is RMS-normalised with this weight and `eps` first.
            add_to: fp32 `[T, width]`: the product is added to it in place, and it is returned. Not with gates.
        """
        num_tokens = x.shape[0]
        if x.dtype != torch.float32 or x.stride(1) != 1 or x.shape[1] != self.num_inputs:
            raise ValueError(f"rows of shape {list(x.shape)} and {x.dtype} do not fit {self.num_inputs} inputs")
        out = empty(num_tokens, self.width) if add_to is None else add_to
        add = add_to is not None
        self._functions.linear(self.struct, x, x.stride(0), num_tokens, norm, eps, out, out.stride(0), add)
        return out

    def _panels_of(self, start: int, rows: Tensor) -> tuple[int, int]:
        """First and last panel that rows from `start` on fill."""
        stop = start + rows.shape[0]
        last = stop == self.num_outputs
        whole = last and start == 0
        fits = rows.shape[1] == self.num_inputs and rows.is_contiguous() and (whole or not self.gated)
        if start % PANEL or (stop % PANEL and not last) or not fits:
            raise ValueError(f"rows {start}:{stop} of shape {list(rows.shape)} cannot be packed by themselves")
        return start // PANEL, self._num_panels if last else stop // PANEL

    def _packed_order(self, values: Tensor) -> Tensor:
        """One fp32 number per output, as the panels want them: `[panels * 16]`."""
        halves = values.float().view(2 if self.gated else 1, -1)
        padded = torch.zeros(halves.shape[0], -(-self.width // PANEL) * PANEL)
        padded[:, : self.width] = halves
        return padded.unflatten(1, (-1, PANEL)).transpose(0, 1).flatten().contiguous()


def _origin(rows: Tensor, start: int) -> int:
    """Where row 0 would lie if `rows` began at row `start`: the kernel counts rows from the matrix's first one."""
    return rows.data_ptr() - start * rows.stride(0) * rows.element_size()


class PackedStack:
    """Matrices of one shape and kind: the experts of a layer, or the heads of an attention.

    Args:
        matrices: not empty, all alike.
    """

    def __init__(self, matrices: Sequence[PackedMatrix]) -> None:
        self.matrices = tuple(matrices)
        self.structs = (_Matrix * len(matrices))(*(m.struct for m in matrices))
        # A recorded step keeps the array only, and the array what it points to.
        self.structs.memory = self.matrices  # type: ignore[attr-defined]
        self.num_bytes = sum(m.num_bytes for m in matrices)
        self._functions = functions()

    def multiply_heads(self, x: Tensor, out: Tensor) -> None:
        """`out[t, h, :n] = matrices[h] @ x[t, h, :k]`; both fp32 `[T, H, ...]` with unit stride in the last axis.

        Columns of `out` past n are left alone.
        """
        count = len(self.matrices)
        self._functions.linear_per_head(
            self.structs, count, x, x.stride(0), x.stride(1), x.shape[0], out, out.stride(0), out.stride(1)
        )


def packed_feed_forward(
    x: Tensor, gate_up: PackedMatrix, down: PackedMatrix, norm: Tensor | None, eps: float, add_to: Tensor
) -> Tensor:
    """Add a SwiGLU network of `x [T, C]`, normed first where `norm` is given, to `add_to [T, C]`; both fp32."""
    functions().feed_forward(
        gate_up.struct, down.struct, x, x.stride(0), x.shape[0], norm, eps, add_to, add_to.stride(0)
    )
    return add_to


def run_packed_experts(
    x: Tensor, weights: Tensor, ids: Tensor, gate_up: PackedStack, down: PackedStack, out: Tensor
) -> None:
    """Add the routed experts' weighted sum to `out`: what `reference.run_experts` means, fused.

    Args:
        x: fp32 `[T, C]`; weights: fp32 `[T, A]`; ids: int32 `[T, A]`; out: fp32 `[T, C]`.
    """
    count, (num_tokens, num_chosen) = len(gate_up.matrices), ids.shape
    functions().experts(
        *(gate_up.structs, down.structs, count, x, x.stride(0), num_tokens),
        *(weights, ids, num_chosen, out, out.stride(0)),
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """`reference.rms_norm` of fp32 rows `[T, C]`, with unit stride in the last axis; written to `out` where given."""
    out = empty(*x.shape) if out is None else out
    functions().norm(x, x.stride(0), weight, eps, x.shape[0], x.shape[1], out, out.stride(0))
    return out


def argmax(x: Tensor) -> tuple[Tensor, Tensor]:
    """Largest value and its first index of each row of fp32 `[N, V]`; a NaN anywhere is the row's largest value."""
    values, indices = torch.empty(x.shape[0]), torch.empty(x.shape[0], dtype=torch.int64)
    functions().argmax(x.data_ptr(), x.stride(0), x.shape[0], x.shape[1], values.data_ptr(), indices.data_ptr())
    return values, indices


def candidates(row: Tensor, best: float, temperature: float, floor: float) -> tuple[Tensor, Tensor, float]:
    """See `choice.candidates`."""
    size = row.shape[0]
    ids, weights, total = torch.empty(size, dtype=torch.int64), torch.empty(size), c_double()
    kept = functions().candidates(
        row.data_ptr(), size, best, 1 / temperature, floor, ids.data_ptr(), weights.data_ptr(), byref(total)
    )
    return ids[:kept], weights[:kept].double(), total.value


def want_large_pages(tensor: Tensor) -> None:
    """Ask the system for 2 MB pages behind a CPU tensor that has not been touched yet; it may not grant them."""
    if library() is not None and tensor.device.type == "cpu":
        functions().want_large_pages(tensor.data_ptr(), tensor.nbytes)


def set_threads(count: int) -> None:
    """Threads that the kernels use from now on, the caller's included."""
    functions().set_threads(count)
