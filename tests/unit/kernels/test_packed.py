"""Products with packed weights are those of the numbers that they round to, in plain torch, on every instruction set.

int8 and int4 are held to exact integer arithmetic, the others to the bound of their accumulation. A row's bits depend
on nothing but the row.
"""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from seamount.kernels import packed, reference
from seamount.kernels.library import ISA_NAMES, library
from seamount.kernels.packed import PackedMatrix, PackedStack

LIBRARY = library()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="no compiler: there are no compiled kernels")

KINDS = ("float32", "float16", "bfloat16", "int8", "int4")
FLOATS = KINDS[:3]
UNIT = 2.0**-24  # of fp32
EPS = 1e-6


def product(x: Tensor, matrix: PackedMatrix, rounding: Any) -> tuple[Tensor, Tensor]:
    """`x @ weight.T` of what both round to, fp64 `[T, n]`, and how far fp32 sums may be from it."""
    values, scales = rounding.unpacked(matrix)
    if scales:
        if matrix.kind == "int4":
            values = rounding.int4_levels(values, scales["multiplier"], scales["zero"], matrix.group)
        total, size = rounding.integer_product(x, values, scales["scale"])
        return total, size * 4 * UNIT
    if matrix.kind == "bfloat16":
        x = x.bfloat16()
    total, size = x.double() @ values.double().T, x.double().abs() @ values.double().abs().T
    # Sums of k terms, in whatever order; AMX takes subnormal numbers for zero.
    return total, size * (matrix.num_inputs + 4) * UNIT + 1e-36


def normed(x: Tensor, weight: Tensor) -> Tensor:
    """The norm by the kernel itself: its last bit decides what a value rounds to."""
    return packed.rms_norm(x, weight, EPS)


def random_case(seed: int) -> dict[str, Any]:
    choose = random.Random(seed)
    kind = KINDS[seed % len(KINDS)]
    return {
        "kind": kind,
        "k": choose.choice([1, 7, 31, 64, 65, 100, 513, 1025 if kind == "bfloat16" else 2049, 4200]),
        "width": choose.choice([1, 5, 16, 17, 33, 48, 70]),
        "rows": choose.choice([1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 48, 64, 65, 70]),
        "group": choose.choice([32, 64, 128]),
        "gated": choose.random() < 0.3,
        "bias": choose.random() < 0.5,
        "add": choose.random() < 0.5,
        "norm": choose.random() < 0.5,
    }


@pytest.mark.parametrize("seed", range(40))
def test_products_are_those_of_the_rounded_numbers(seed: int, each_isa: str, rounding: Any) -> None:
    case = random_case(seed)
    torch.manual_seed(seed)
    n = case["width"] * (2 if case["gated"] else 1)
    weight, x = torch.randn(n, case["k"]), torch.randn(case["rows"], case["k"])
    bias = torch.randn(n) if case["bias"] else None
    matrix = rounding.pack(case["kind"], weight, group=case["group"], gated=case["gated"], bias=bias)
    norm = torch.rand(case["k"]) + 0.5 if case["norm"] else None
    base = torch.randn(case["rows"], n) if case["add"] and not case["gated"] else None
    out = matrix.multiply(x, norm=norm, eps=EPS, add_to=None if base is None else base.clone())
    expected, bound = product(x if norm is None else normed(x, norm), matrix, rounding)
    for more in (bias, base):
        if more is not None:
            expected, bound = expected + more, bound + more.abs() * 4 * UNIT
    bound += expected.abs() * 4 * UNIT
    if case["gated"]:
        gate, up = expected.chunk(2, dim=1)
        gate_bound, up_bound = bound.chunk(2, dim=1)
        expected = rounding.silu(gate) * up
        # Of silu, the slope is at most 1.1; its own error is a few units of the last place.
        bound = 1.1 * gate_bound * (up.abs() + up_bound) + gate.abs() * up_bound + expected.abs() * 2e-6
    assert out.shape == (case["rows"], case["width"])
    assert ((out - expected).abs() <= bound).all(), case


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("k", [1, 100, 2048])
def test_integers_are_exact_within_a_chunk(k: int, kind: str, each_isa: str, rounding: Any) -> None:
    torch.manual_seed(k)
    x = torch.randn(37, k) * torch.logspace(-6, 6, 37)[:, None]
    matrix = rounding.pack(kind, torch.randn(50, k))
    expected, _ = product(x, matrix, rounding)
    assert torch.equal(matrix.multiply(x), expected.float())


@pytest.mark.parametrize("kind", KINDS)
def test_layout_and_rounding_of_weights(kind: str, each_isa: str, rounding: Any) -> None:
    torch.manual_seed(1)
    for (n, k), gated, group in itertools.product([(1, 1), (50, 131), (34, 64)], [False, True], [32, 64, 128]):
        if gated and n % 2:
            continue
        weight = torch.randn(n, k)
        codes, scales = rounding.unpacked(rounding.pack(kind, weight, gated=gated, group=group))
        if kind in FLOATS:
            assert torch.equal(codes, weight.to(getattr(torch, kind)))
        elif kind == "int8":
            expected, scale = rounding.int8_weight(weight)
            assert torch.equal(codes.float(), expected)
            assert torch.equal(scales["scale"], scale)
        else:
            # No value is further from its level than half a step (a step is the multiplier's sixteenth) and what level
            # and zero are rounded by.
            levels = rounding.int4_levels(codes, scales["multiplier"], scales["zero"], group)
            step = scales["multiplier"].float().repeat_interleave(group, 1)[:, :k] / 16
            error = (weight / scales["scale"][:, None] - levels).abs()
            assert (levels.abs() <= 127).all()
            assert (error <= step / 2 + 1.6).all()
        if kind not in ("int8", "int4"):
            assert not scales


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16])
def test_slices_of_rows_in_any_type_pack_like_the_whole(
    source: torch.dtype, kind: Any, each_isa: str, rounding: Any
) -> None:
    torch.manual_seed(2)
    weight = torch.randn(50, 77).to(source)
    whole, sliced = rounding.pack(kind, weight.float()), PackedMatrix(kind, 50, 77)
    for start, stop in ((32, 50), (0, 16), (16, 32)):
        sliced.pack_rows(start, weight[start:stop].contiguous())
    assert torch.equal(rounding.dequantized(sliced), rounding.dequantized(whole))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gated", [False, True], ids=["", "gated"])
@pytest.mark.parametrize("k", [100, 4200])
def test_a_row_has_its_own_bits(
    k: int, gated: bool, kind: Any, each_isa: str, rounding: Any, rows_alone_and_together: Any
) -> None:
    torch.manual_seed(3)
    x, base = torch.randn(70, k), torch.randn(70, 48)
    bias, norm = torch.randn(48), torch.rand(k) + 0.5
    matrix = rounding.pack(kind, torch.randn(48, k) * k**-0.5, gated=gated, bias=bias)

    def run(rows: Tensor) -> Tensor:
        add_to = None if gated else base[rows].contiguous()
        return matrix.multiply(x[rows].contiguous(), norm=norm, eps=EPS, add_to=add_to)

    rows_alone_and_together(run, 70, (1, 2, 3, 8, 9, 16, 17, 33, 64, 65))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gated", [False, True], ids=["", "gated"])
def test_a_row_has_its_own_bits_in_a_long_prompt(
    gated: bool, kind: Any, rounding: Any, rows_alone_and_together: Any
) -> None:
    """On the best instruction set: more rows than pass at a time, several chunks, a last panel by itself."""
    torch.manual_seed(4)
    k, n = 2100, 66
    x = torch.randn(530, k)
    matrix = rounding.pack(kind, torch.randn(n, k) * k**-0.5, gated=gated)
    rows_alone_and_together(lambda rows: matrix.multiply(x[rows].contiguous()), 530, (1, 5, 64, 65, 512, 513))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_what_is_not_finite_stays_in_its_row(bad: float, kind: Any, each_isa: str, rounding: Any) -> None:
    torch.manual_seed(5)
    for k, gated in itertools.product((70, 2100), (False, True)):
        x, base = torch.randn(19, k), torch.randn(19, 32)
        matrix = rounding.pack(kind, torch.randn(32, k) * k**-0.5, gated=gated)
        for norm in (None, torch.ones(k)):
            good = matrix.multiply(x, norm=norm, eps=EPS, add_to=None if gated else base.clone())
            spoilt = x.clone()
            spoilt[3, k - 1] = bad
            out = matrix.multiply(spoilt, norm=norm, eps=EPS, add_to=None if gated else base.clone())
            others = torch.arange(19) != 3
            assert torch.equal(out[others], good[others])
            assert not out[3].isfinite().any() or (norm is not None and kind in FLOATS)
            assert not out[3].isfinite().all()


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_a_weight_that_is_not_finite_spoils_its_output_and_no_other(
    bad: float, kind: Any, each_isa: str, rounding: Any
) -> None:
    torch.manual_seed(6)
    weight, x = torch.randn(20, 70), torch.randn(5, 70)
    good = rounding.pack(kind, weight).multiply(x)
    weight[7, 69] = bad
    out = rounding.pack(kind, weight).multiply(x)
    others = torch.arange(20) != 7
    assert torch.equal(out[:, others], good[:, others])
    assert not out[:, 7].isfinite().any()


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_and_outliers(kind: Any, each_isa: str, rounding: Any) -> None:
    torch.manual_seed(7)
    weight, x = torch.randn(40, 300), torch.randn(9, 300)
    weight[:, 11] *= 100
    weight[5] = 0
    x[2, 17] = 1e4
    x[4] = 0
    matrix = rounding.pack(kind, weight)
    out = matrix.multiply(x)
    expected, bound = product(x, matrix, rounding)
    assert ((out - expected).abs() <= bound).all()
    assert not out[4].any()
    assert not out[:, 5].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1e-30, 1e-15, 1e15, 1e34])
def test_very_large_and_very_small_activations(size: float, kind: Any, each_isa: str, rounding: Any) -> None:
    torch.manual_seed(8)
    x = torch.randn(9, 300) * size
    matrix = rounding.pack(kind, torch.randn(40, 300))
    expected, bound = product(x, matrix, rounding)
    assert ((matrix.multiply(x) - expected).abs() <= bound).all()


def test_the_largest_halves_are_kept(each_isa: str, rounding: Any) -> None:
    weight = torch.full((16, 3), 65504.0)
    weight[1] = 2.0**-24  # the smallest
    assert torch.equal(rounding.pack("float16", weight).multiply(torch.eye(3)), weight.T)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_integer_products_have_the_same_bits_on_every_instruction_set(kind: Any, rounding: Any) -> None:
    """Of up to 2,048 inputs and with nothing added: what one chip rounds once then, another rounds twice."""
    torch.manual_seed(9)
    weight, x, outs = torch.randn(33, 2048), torch.randn(20, 2048), []
    for isa in range(len(ISA_NAMES)):
        LIBRARY.seamount_choose_isa(isa)
        outs.append(rounding.pack(kind, weight).multiply(x))
    LIBRARY.seamount_choose_isa(len(ISA_NAMES) - 1)
    assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.parametrize(
    ("kind", "group", "most"), [("int8", 64, 0.01), ("int4", 32, 0.095), ("int4", 64, 0.11), ("int4", 128, 0.125)]
)
@pytest.mark.parametrize("k", [256, 1000])
def test_how_much_rounding_changes_gaussian_weights(k: int, kind: Any, group: int, most: float, rounding: Any) -> None:
    """Sixteen levels over the range of 64 Gaussian numbers (about 4.7 deviations) leave 4.7 / 15 / sqrt(12) = 9 %."""
    torch.manual_seed(10)
    weight = torch.randn(61, k) * 0.02
    error = rounding.dequantized(rounding.pack(kind, weight, group=group)) - weight
    assert error.norm() / weight.norm() < most


@pytest.mark.parametrize("kind", KINDS)
def test_heads_multiply_their_own_columns(
    kind: Any, each_isa: str, rounding: Any, rows_alone_and_together: Any
) -> None:
    torch.manual_seed(11)
    heads, k, n = 3, 24, 40
    matrices = [rounding.pack(kind, torch.randn(n, k)) for _ in range(heads)]
    stack, x = PackedStack(matrices), torch.randn(21, heads, k + 8)

    def run(rows: Tensor) -> Tensor:
        out = torch.full((len(rows), heads, n + 8), 777.0)
        stack.multiply_heads(x[rows], out)
        return out.flatten(1)

    out = run(torch.arange(21)).view(21, heads, -1)
    assert (out[..., n:] == 777.0).all()
    for head, matrix in enumerate(matrices):
        assert torch.equal(out[:, head, :n], matrix.multiply(x[:, head, :k]))
    rows_alone_and_together(run, 21, (1, 2, 9, 17))


@pytest.mark.parametrize("kind", KINDS)
def test_feed_forward_is_its_two_products(
    kind: Any, each_isa: str, rounding: Any, rows_alone_and_together: Any
) -> None:
    torch.manual_seed(12)
    width, inner, rows = 70, 37, 70
    gate_up = rounding.pack(kind, torch.randn(2 * inner, width) * 0.2, gated=True, bias=torch.randn(2 * inner))
    down = rounding.pack(kind, torch.randn(width, inner) * 0.2, bias=torch.randn(width))
    x, base, norm = torch.randn(rows, width), torch.randn(rows, width), torch.rand(width) + 0.5

    def run(chosen: Tensor) -> Tensor:
        return packed.packed_feed_forward(x[chosen], gate_up, down, norm, EPS, base[chosen])

    between = rounding.between(kind, gate_up.multiply(x, norm=norm, eps=EPS))
    one_by_one = down.multiply(between, add_to=base.clone())
    assert torch.equal(run(torch.arange(rows)), one_by_one)
    rows_alone_and_together(run, rows, (1, 3, 16, 65))


def test_feed_forward_of_a_long_prompt(rounding: Any, rows_alone_and_together: Any) -> None:
    torch.manual_seed(13)
    gate_up = rounding.pack("int8", torch.randn(96, 64) * 0.2, gated=True)
    down = rounding.pack("int8", torch.randn(64, 48) * 0.2)
    x, base = torch.randn(1100, 64), torch.randn(1100, 64)

    def run(chosen: Tensor) -> Tensor:
        return packed.packed_feed_forward(x[chosen], gate_up, down, None, 0.0, base[chosen])

    rows_alone_and_together(run, 1100, (1, 511, 513))


@pytest.mark.parametrize("width", [1, 16, 40, 1000])
def test_norm_equals_the_reference_row_by_row(width: int, each_isa: str, rows_alone_and_together: Any) -> None:
    torch.manual_seed(14)
    x, weight = torch.randn(40, width) * torch.logspace(-3, 6, 40)[:, None], torch.rand(width) + 0.5
    torch.testing.assert_close(packed.rms_norm(x, weight, EPS), reference.rms_norm(x, weight, EPS), rtol=2e-6, atol=0.0)
    rows_alone_and_together(lambda rows: packed.rms_norm(x[rows], weight, EPS), 40, (1, 15, 17))


def test_strided_rows_and_results(each_isa: str, rounding: Any) -> None:
    torch.manual_seed(15)
    matrix = rounding.pack("int8", torch.randn(40, 64))
    wide, out = torch.randn(20, 100), torch.zeros(20, 90)
    expected = matrix.multiply(wide[:, 10:74].contiguous())
    assert torch.equal(matrix.multiply(wide[:, 10:74]), expected)
    assert torch.equal(matrix.multiply(wide[:, 10:74], add_to=out[:, 30:70]), expected)
    assert not out[:, :30].any()
    assert not out[:, 70:].any()


@pytest.mark.parametrize(
    "x",
    [torch.zeros(2, 9), torch.zeros(2, 8, dtype=torch.bfloat16), torch.zeros(8, 2).T],
    ids=["width", "type", "stride"],
)
def test_rows_that_do_not_fit_are_refused(x: Tensor, rounding: Any) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        rounding.pack("int8", torch.zeros(16, 8)).multiply(x)


@pytest.mark.parametrize(("start", "count"), [(8, 16), (0, 8)])
def test_rows_between_panels_cannot_be_packed(start: int, count: int) -> None:
    with pytest.raises(ValueError, match="cannot be packed"):
        PackedMatrix("int8", 48, 8).pack_rows(start, torch.zeros(count, 8))
