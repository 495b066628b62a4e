"""What the machine itself gives at this moment: reading memory, and multiplying bfloat16 matrices.

Run by the driver in a process of its own, so that its threads are gone afterwards; prints one JSON object.
"""

from __future__ import annotations

import json
import sys
import time

import torch

_READ_BYTES = 2**30
_SIZE = 4096
_REPEATS = 7


def main() -> None:
    """Measure with as many threads as the first argument says."""
    torch.set_num_threads(int(sys.argv[1]))
    print(json.dumps({"read_bytes_per_s": read_rate(), "bf16_flops": matrix_rate()}))


def read_rate() -> float:
    """Bytes per second of summing a block far larger than any cache; the best of several."""
    block = torch.ones(_READ_BYTES // 8, dtype=torch.float64)
    return _READ_BYTES / _best(lambda: block.sum())


def matrix_rate() -> float:
    """Floating-point operations per second of a square bfloat16 product; the best of several."""
    left, right = (torch.randn(_SIZE, _SIZE).to(torch.bfloat16) for _ in range(2))
    return 2 * _SIZE**3 / _best(lambda: left @ right)


def _best(work) -> float:
    times = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


if __name__ == "__main__":
    main()
