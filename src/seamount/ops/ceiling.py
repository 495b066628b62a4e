"""What this machine can do at best: bytes read per second, and multiplications per second by precision.

Called by the benchmark, in the same run that it measures the engine in, because shared machines change from minute to
minute. Knows nothing of models. The two measuring functions are the only ones that touch the hardware.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch

from seamount import kernels
from seamount.kernels.probe import MatrixProbe, read_pass
from seamount.models.memory import available_bytes

# Far beyond any processor's cache, its own and those it shares; a quarter of what is free where memory is short.
_READ_BYTES = 2**30
_READ_PASSES = 5
# Sides of the square matrices. Large ones come nearer to the best rate; where one takes too long, the rest is left out.
_SIDES = (512, 1024, 2048)
_PASSES = 8
_LONG_PASS_S = 0.1


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    """The best rates that were seen.

    Attributes:
        read_bytes_per_s: memory read by all threads together.
        matrix_ops_per_s: per precision (`bfloat16`, `float16`, `float32`, `int8`), multiplications and additions of a
            product of large matrices; one multiply-add is two.
    """

    read_bytes_per_s: float
    matrix_ops_per_s: dict[str, float]

    def best_of(self, other: Ceiling) -> Ceiling:
        """Return the better of the two in each number: what disturbs a measurement only ever makes it slower."""
        rates = dict(self.matrix_ops_per_s)
        for precision, rate in other.matrix_ops_per_s.items():
            rates[precision] = max(rate, rates.get(precision, 0.0))
        return Ceiling(
            read_bytes_per_s=max(self.read_bytes_per_s, other.read_bytes_per_s),
            matrix_ops_per_s=rates,
        )


def measure_ceiling(
    threads: int, precisions: tuple[str, ...] = ("bfloat16", "int8"), device: torch.device | None = None
) -> Ceiling:
    """Measure reading and multiplying, best of several passes each; takes a second or two.

    Args:
        threads: CPU threads to measure with; torch's own setting is put back afterwards.
        precisions: whose matrix rates are wanted.
        device: the CPU where none is given.
    """
    where = device or torch.device("cpu")
    if kernels.library() is not None:
        kernels.set_threads(threads)
    with _threads(threads):
        return Ceiling(
            read_bytes_per_s=_read_rate(where),
            matrix_ops_per_s={precision: _matrix_rate(precision, where) for precision in precisions},
        )


def _read_rate(device: torch.device) -> float:
    """Bytes per second of the best pass over an array, as sums of 8-byte numbers."""
    num_bytes = min(_READ_BYTES, available_bytes(device) // 4) // 256 * 256
    array = torch.empty(num_bytes // 8, dtype=torch.float64, device=device)
    kernels.want_large_pages(array)
    array.fill_(1.0)
    if device.type == "cpu" and kernels.library() is not None:
        return array.nbytes / min(read_pass(array) for _ in range(_READ_PASSES))
    return array.nbytes / min(_passes(array.sum, _READ_PASSES, device))


def _matrix_rate(precision: str, device: torch.device) -> float:
    """Operations per second of the best product of large matrices, by torch (oneDNN) or by the compiled kernels."""
    best = 0.0
    if device.type == "cpu" and kernels.library() is not None:
        probe = MatrixProbe(cast("kernels.Kind", precision))
        best = probe.operations / min(_passes(probe.run, _PASSES, device))
    for side in _SIDES:
        fastest = min(_passes(_product(precision, side, device), _PASSES, device))
        best = max(best, 2 * side**3 / fastest)
        if fastest > _LONG_PASS_S:
            break
    return best


def _product(precision: str, side: int, device: torch.device) -> Callable[[], torch.Tensor]:
    if precision == "int8":
        whole = torch.randint(-128, 128, (side, side), dtype=torch.int8, device=device)
        return lambda: torch._int_mm(whole, whole)
    real = torch.randn(side, side, device=device).to(getattr(torch, precision))
    return lambda: real @ real


def _passes(action: Callable[[], torch.Tensor], number: int, device: torch.device) -> Iterator[float]:
    """Yield the seconds of each pass but the first, which warms up; stop early when passes are long."""
    for index in range(number + 1):
        start = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken = time.perf_counter() - start
        if index or taken > _LONG_PASS_S:
            yield taken
        if taken > 10 * _LONG_PASS_S:
            return


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
