"""Calls of the compiled kernels, and whole steps of them, recorded once and made again by a single call.

Between two kernels of a step Python would take as long as a small kernel does. `record` runs a step as ever and notes
every call; `Recording.replay` makes the same calls on the same memory, so whoever replays writes new numbers into the
tensors that the step read. `packed` and `cpu_attention` make their calls through `StepFunction` and take memory for
results from `empty`; `engine.replay` decides what is recorded. Knows nothing of models. One thread at a time.
"""

from __future__ import annotations

import bisect
import ctypes
import math
import struct
import weakref
from collections.abc import Callable, Sequence
from ctypes import c_float, c_int64, c_uint64, c_void_p
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .library import library

T = TypeVar("T")
_MOST_ARGUMENTS = 20
_MASK = 2**64 - 1
_ALIGNMENT = 64
_ALLOCATIONS = {torch.ops.aten.empty, torch.ops.aten.new_empty, torch.ops.aten.empty_like}


class _Call(ctypes.Structure):
    """`struct Call` of native/replay.h."""

    _fields_ = [("run", c_void_p), ("arguments", c_uint64 * _MOST_ARGUMENTS)]


class StepFunction:
    """A kernel that steps are made of; called with tensors, structs and numbers, tensors for their addresses.

    Args:
        types: of its arguments; tensors go where `c_void_p` is.
    """

    def __init__(self, lib: ctypes.CDLL, name: str, *types: Any) -> None:
        self._types = types
        self._function = getattr(lib, name)
        self._function.argtypes, self._function.restype = types, None
        self._from_words = ctypes.cast(getattr(lib, f"{name}_from_words"), c_void_p).value or 0

    def __call__(self, *arguments: Any) -> None:
        self._function(*[x.data_ptr() if isinstance(x, Tensor) else x for x in arguments])
        if _making is not None:
            words = [_word(kind, x) for kind, x in zip(self._types, arguments, strict=True)]
            _making.add(self._from_words, words, arguments)


class Arena:
    """Memory for the results within recorded steps: one for all of them, since only one runs at a time.

    Args:
        num_bytes: what the largest step holds at once. Where that is not enough, the arena grows; what no step has
            reached takes no memory of the system.
    """

    def __init__(self, num_bytes: int) -> None:
        self._pieces = [torch.empty(max(num_bytes, _ALIGNMENT), dtype=torch.uint8)]

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        return sum(piece.nbytes for piece in self._pieces)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Address and size of every piece."""
        return [(piece.data_ptr(), piece.nbytes) for piece in self._pieces]

    def grow(self, num_bytes: int) -> tuple[int, int]:
        """Add a piece of at least that size; return its span."""
        # Twice what there was, or shapes that grow one by one would each add a piece of their own.
        self._pieces.append(torch.empty(max(num_bytes, self.num_bytes), dtype=torch.uint8))
        return self.spans[-1]

    def holds(self, tensor: Tensor) -> bool:
        """Whether the tensor's memory is part of it."""
        address = tensor.data_ptr()
        return any(start <= address < start + size for start, size in self.spans)


class Recording:
    """A step's calls, and everything that they point to.

    Attributes:
        num_calls: how many.
    """

    def __init__(self, calls: Sequence[tuple[int, list[int]]], kept: list[Any]) -> None:
        lib = library()
        if lib is None:
            raise RuntimeError("the compiled kernels are not there: ask library.why_missing()")
        self.num_calls = len(calls)
        self._kept = kept
        self._calls = (_Call * len(calls))()
        for place, (run, words) in enumerate(calls):
            self._calls[place].run = run
            self._calls[place].arguments[: len(words)] = words
        self._replay = lib.seamount_replay
        self._replay.argtypes, self._replay.restype = [c_void_p, c_int64], None
        self._address = ctypes.addressof(self._calls)

    def replay(self) -> None:
        """Make the calls again, in order. What earlier replays and recordings of the same arena gave is gone then."""
        self._replay(self._address, self.num_calls)


class _Making:
    """A recording while it is made: its calls so far, and which memory of the arena is free.

    A result's memory is free again when its last tensor is gone, as everywhere in torch; calls are replayed in the
    order in which they were made, so what was safe then stays safe.
    """

    def __init__(self, arena: Arena) -> None:
        self.calls: list[tuple[int, list[int]]] = []
        self.kept: list[Any] = [arena]
        self._arena = arena
        self._free = sorted(arena.spans)

    def add(self, run: int, words: list[int], arguments: Sequence[Any]) -> None:
        self.calls.append((run, words))
        for x in arguments:
            # Results in the arena must not be kept: their memory is used again.
            if isinstance(x, Tensor):
                if not self._arena.holds(x):
                    self.kept.append(x)
            elif isinstance(x, ctypes.Structure | ctypes.Array):
                self.kept.append(x)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        count = math.prod(shape)
        size = -(-max(count, 1) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        address = self._take(size)
        memory = (ctypes.c_char * size).from_address(address)
        weakref.finalize(memory, self._give, address, size).atexit = False
        return torch.frombuffer(memory, dtype=dtype, count=max(count, 1))[:count].view(*shape)

    def _take(self, size: int) -> int:
        for place, (start, room) in enumerate(self._free):
            if room >= size:
                self._free[place : place + 1] = [(start + size, room - size)] if room > size else []
                return start
        self._give(*self._arena.grow(size))
        return self._take(size)

    def _give(self, start: int, size: int) -> None:
        place = bisect.bisect(self._free, (start, size))
        self._free.insert(place, (start, size))
        for left in (place, place - 1):
            if 0 <= left < len(self._free) - 1 and sum(self._free[left]) == self._free[left + 1][0]:
                self._free[left : left + 2] = [(self._free[left][0], self._free[left][1] + self._free[left + 1][1])]


_making: _Making | None = None


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory for a result, not set: what `torch.empty` gives, or, within a step that is recorded, of its arena."""
    return torch.empty(shape, dtype=dtype) if _making is None else _making.empty(shape, dtype)


def is_recording() -> bool:
    """Whether a step is being recorded."""
    return _making is not None


def record(step: Callable[[], T], arena: Arena) -> tuple[T, Recording | None]:
    """Run `step` and note the calls that it makes.

    Args:
        step: reads tensors that stay where they are, and works on memory of `arena` or its own alone.

    Returns:
        What `step` returned, of which tensors hold the new result after every replay; and the recording, None where
        something beside kernels and views took part, so that a replay would give other numbers.
    """
    global _making
    if _making is not None:
        raise RuntimeError("a step within a recorded step cannot be recorded by itself")
    guard, made = _OnlyViews(), _Making(arena)
    _making = made
    try:
        with guard:
            result = step()
    finally:
        _making = None
    return result, None if guard.refused else Recording(made.calls, made.kept)


class _OnlyViews(TorchDispatchMode):
    """Notes whether anything of torch computes, beside kernels: allocations and views are harmless."""

    def __init__(self) -> None:
        super().__init__()
        self.refused = ""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Otherwise torch guards the method against its compiler, whose import takes a second and 140 MB."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket in _ALLOCATIONS:
            return func(*args, **kwargs)
        with self:
            # `reshape`, `to` and the like say that they are views, and copy where they cannot be.
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        if not _is_view(func):
            self.refused = self.refused or str(func)
        return func(*args, **kwargs)


def _is_view(func: Any) -> bool:
    """Whether all that an operation returns is memory that it was given, and it writes none."""
    schema = func._schema
    returned = [part.alias_info for part in schema.returns]
    written = [part.alias_info for part in schema.arguments]
    return (
        bool(returned)
        and all(alias is not None and not alias.is_write for alias in returned)
        and not any(alias is not None and alias.is_write for alias in written)
    )


def _word(kind: Any, value: Any) -> int:
    """An argument as 64 bits: an address, an integer, or the bits of a float."""
    if value is None:
        return 0
    if isinstance(value, Tensor):
        return value.data_ptr()
    if kind is c_float:
        return int.from_bytes(struct.pack("<f", value), "little")
    if isinstance(value, ctypes.Structure | ctypes.Array):
        return ctypes.addressof(value)
    return int(value) & _MASK
