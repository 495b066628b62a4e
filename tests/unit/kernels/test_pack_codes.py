"""Weights that are codes already: the packed matrix multiplies by exactly what documented rounding makes of them."""

from __future__ import annotations

import pytest
import torch

from seamount import kernels
from seamount.kernels import PackedMatrix

pytestmark = pytest.mark.skipif(kernels.library() is None, reason=f"no compiled kernels: {kernels.why_missing()}")


def spread(per_group: torch.Tensor, group: int, columns: int) -> torch.Tensor:
    return per_group.repeat_interleave(group, 1)[:, :columns]


def levels(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, group: int) -> torch.Tensor:
    """The weights that are multiplied with: a scale per row times integers of 8 bits."""
    columns = codes.shape[1]
    ends = torch.stack(((scales * zeros).abs() / 127, (scales * (15 - zeros)).abs() / 127, scales * 16 / 255))
    peak = ends.amax((0, 2)).unsqueeze(1)
    inverse = 1 / peak
    multiplier = (16 * scales * inverse).round().clamp(1, 255)
    lowest = torch.floor((15 * multiplier + 8) / 16) - 127
    zero = (zeros * scales * inverse).round().maximum(lowest).clamp(0, 128)
    level = torch.floor((codes * spread(multiplier, group, columns) + 8) / 16) - spread(zero, group, columns)
    assert level.min() >= -128 and level.max() <= 127
    return peak * level


def weights_of(matrix: PackedMatrix) -> torch.Tensor:
    """Read back by products with unit vectors, which are exact in 8 bits."""
    return matrix.multiply(torch.eye(matrix.num_inputs)).T


@pytest.mark.parametrize(("rows", "columns", "group"), [(48, 128, 64), (33, 160, 32), (16, 200, 128), (5, 30, 64)])
def test_four_bits(rows: int, columns: int, group: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    shape = (rows, -(-columns // group))
    codes = torch.randint(0, 16, (rows, columns), generator=generator, dtype=torch.uint8)
    scales = torch.rand(shape, generator=generator) * 0.1 + 0.01
    zeros = torch.randint(0, 16, shape, generator=generator).float()
    matrix = PackedMatrix("int4", rows, columns, group=group)
    matrix.pack_codes(0, codes, scales, zeros)
    expected = levels(codes, scales, zeros, group)
    torch.testing.assert_close(weights_of(matrix), expected, rtol=1e-5, atol=1e-7)
    meant = spread(scales, group, columns) * (codes - spread(zeros, group, columns))
    assert (expected - meant).norm() < 0.015 * meant.norm()
    # A negative scale counts codes from the other end; the values are the same, and so is what is packed.
    flipped = PackedMatrix("int4", rows, columns, group=group)
    flipped.pack_codes(0, 15 - codes, -scales, 15 - zeros)
    assert torch.equal(weights_of(flipped), weights_of(matrix))


def test_groups_without_a_zero_among_their_levels() -> None:
    """All values on one side of zero, or all zero: codes are made anew, and the values stay near."""
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 16, (16, 64), generator=generator, dtype=torch.uint8)
    scales = torch.rand((16, 1), generator=generator) * 0.1 + 0.01
    zeros = -torch.rand((16, 1), generator=generator) * 20
    zeros[8:] = 40.0
    scales[5] = 0
    matrix = PackedMatrix("int4", 16, 64)
    matrix.pack_codes(0, codes, scales, zeros)
    meant = scales * (codes - zeros)
    error = (weights_of(matrix) - meant).abs().amax(1)
    assert (error <= meant.abs().amax(1) / 15).all()


def test_eight_bits_by_strips() -> None:
    generator = torch.Generator().manual_seed(4)
    codes = torch.randint(-128, 128, (40, 100), generator=generator, dtype=torch.int8)
    scales = torch.rand(40, generator=generator)
    matrix = PackedMatrix("int8", 40, 100)
    for start, stop in ((0, 16), (16, 40)):
        matrix.pack_codes(start, codes[start:stop], scales[start:stop])
    torch.testing.assert_close(weights_of(matrix), scales.unsqueeze(1) * codes, rtol=1e-6, atol=0)


def test_gates_and_what_they_gate() -> None:
    generator = torch.Generator().manual_seed(5)
    codes = torch.randint(-128, 128, (40, 64), generator=generator, dtype=torch.int8)
    scales = torch.rand(40, generator=generator) * 0.01
    matrix = PackedMatrix("int8", 40, 64, gated=True)
    matrix.pack_codes(0, codes, scales)
    x = torch.randint(-127, 128, (3, 64), generator=generator).float()
    x[:, 0] = 127
    gate, up = (x @ (scales.unsqueeze(1) * codes).T).chunk(2, dim=1)
    torch.testing.assert_close(matrix.multiply(x), torch.nn.functional.silu(gate) * up, rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_refused() -> None:
    codes, scales = torch.zeros((16, 64), dtype=torch.uint8), torch.ones(16, 1)
    with pytest.raises(ValueError, match="do not fit"):
        PackedMatrix("int4", 16, 64).pack_codes(0, codes, scales)
    with pytest.raises(ValueError, match="do not fit"):
        PackedMatrix("int4", 16, 64, group=32).pack_codes(0, codes, scales, scales)
    with pytest.raises(ValueError, match="do not fit"):
        PackedMatrix("bfloat16", 16, 64).pack_codes(0, codes, scales, scales)
    with pytest.raises(ValueError, match="by themselves"):
        PackedMatrix("int4", 64, 64).pack_codes(3, codes, scales, scales)


def test_sizes_are_known_before() -> None:
    for kind in ("float32", "float16", "bfloat16", "int8", "int4"):
        for gated in (False, True):
            matrix = PackedMatrix(kind, 40, 100, group=32, gated=gated)
            assert kernels.packed_num_bytes(kind, 40, 100, group=32, gated=gated) == matrix.num_bytes
