"""Where the kernels' cases run: on a GPU, or on the CPU in Triton's interpreter when TRITON_INTERPRET is set."""

from __future__ import annotations

import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
# The interpreter multiplies the bit patterns of bfloat16 instead of their values, so only a GPU can judge that.
_HALVES = [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16]
DTYPES = [torch.float32, *_HALVES]
_TOLERANCES = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def with_dtypes(*shapes: tuple[int, ...]) -> list[tuple[int | torch.dtype, ...]]:
    """Every shape in fp32, and the first in the narrower types: the interpreter is slow."""
    return [*((*shape, torch.float32) for shape in shapes), *((*shapes[0], dtype) for dtype in _HALVES)]


def close(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, factor: float = 1.0) -> None:
    """Fail unless `got`, computed in `dtype`, is near `expected`, computed in fp32."""
    tolerance = _TOLERANCES[dtype] * factor
    torch.testing.assert_close(got.float(), expected.float(), rtol=tolerance, atol=tolerance)
