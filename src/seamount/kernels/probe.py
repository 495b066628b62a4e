"""What the compiled kernels get out of this machine at best; the benchmark compares what the engine reaches with it."""

from __future__ import annotations

import time
from ctypes import c_int64, c_uint64, c_void_p

import torch
from torch import Tensor

from .library import library
from .packed import Kind, PackedMatrix

_SIDE = 4096
_ROWS = 512


def read_pass(array: Tensor) -> float:
    """Seconds in which all threads read `array` (contiguous, a multiple of 256 bytes) once.

    Raises:
        RuntimeError: there is no compiled library.
    """
    lib = library()
    if lib is None:
        raise RuntimeError("the compiled kernels are not there")
    read = lib.seamount_read
    read.argtypes, read.restype = [c_void_p, c_int64], c_uint64
    started = time.perf_counter()
    read(array.data_ptr(), array.nbytes)
    return time.perf_counter() - started


class MatrixProbe:
    """A product of 512 rows with a 4096 x 4096 weight.

    Args:
        kind: how the weight is stored.
    """

    operations = 2 * _ROWS * _SIDE * _SIDE

    def __init__(self, kind: Kind) -> None:
        self._matrix = PackedMatrix(kind, _SIDE, _SIDE)
        self._matrix.pack_rows(0, torch.randn(_SIDE, _SIDE))
        self._rows = torch.randn(_ROWS, _SIDE)

    def run(self) -> Tensor:
        """Compute it once."""
        return self._matrix.multiply(self._rows)
