"""The fused experts equal the reference with the weights that they round to; a token's bits are its own."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from seamount.kernels import packed, reference
from seamount.kernels.library import library
from seamount.kernels.packed import PackedStack

pytestmark = pytest.mark.skipif(library() is None, reason="no compiler: there are no compiled kernels")

KINDS = ("float32", "float16", "bfloat16", "int8", "int4")
# What rounding the activations leaves of the result, of its norm: 8 bits of an even spread, 8 bits of mantissa.
MOST = {"float32": 1e-6, "float16": 1e-6, "bfloat16": 0.01, "int8": 0.025, "int4": 0.025}


class Layer:
    """Random experts, packed, and what they stand for."""

    def __init__(self, kind: Any, rounding: Any, *, num_experts: int, width: int, inner: int) -> None:
        gate_up = torch.randn(num_experts, 2 * inner, width) * width**-0.5
        down = torch.randn(num_experts, width, inner) * inner**-0.5
        self.packed_gate_up = PackedStack([rounding.pack(kind, weight, gated=True) for weight in gate_up])
        self.packed_down = PackedStack([rounding.pack(kind, weight) for weight in down])
        self.gate_up = torch.stack([rounding.dequantized(m) for m in self.packed_gate_up.matrices])
        self.down = torch.stack([rounding.dequantized(m) for m in self.packed_down.matrices])

    def run(self, x: Tensor, weights: Tensor, ids: Tensor, base: Tensor) -> Tensor:
        out = base.clone()
        packed.run_packed_experts(
            x.contiguous(), weights.contiguous(), ids.contiguous(), self.packed_gate_up, self.packed_down, out
        )
        return out


def routed(num_tokens: int, num_experts: int, num_chosen: int) -> tuple[Tensor, Tensor]:
    ids = torch.rand(num_tokens, num_experts).topk(num_chosen).indices.to(torch.int32)
    return torch.rand(num_tokens, num_chosen), ids


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_experts_equal_the_reference(seed: int, kind: str, each_isa: str, rounding: Any) -> None:
    choose = random.Random(seed)
    torch.manual_seed(seed)
    num_experts, num_tokens = choose.choice([1, 3, 8]), choose.choice([1, 2, 17, 40])
    width, inner = choose.choice([24, 65, 100]), choose.choice([5, 16, 70])
    layer = Layer(kind, rounding, num_experts=num_experts, width=width, inner=inner)
    weights, ids = routed(num_tokens, num_experts, choose.randint(1, num_experts))
    x, base = torch.randn(num_tokens, width), torch.randn(num_tokens, width)
    out = layer.run(x, weights, ids, base) - base
    expected = reference.run_experts(x, weights, ids.long(), layer.gate_up, layer.down)
    assert (out - expected).norm() < MOST[kind] * expected.norm() + 1e-6 * base.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_an_expert_is_the_feed_forward_network_of_its_matrices(kind: str, each_isa: str, rounding: Any) -> None:
    """To the bit: so a token's result does not depend on who shares its experts."""
    torch.manual_seed(5)
    layer = Layer(kind, rounding, num_experts=4, width=70, inner=37)
    x, base = torch.randn(40, 70), torch.zeros(40, 70)
    ids = torch.randint(4, (40, 1), dtype=torch.int32)
    out = layer.run(x, torch.ones(40, 1), ids, base)
    for token in range(40):
        expert = int(ids[token])
        gate_up, down = layer.packed_gate_up.matrices[expert], layer.packed_down.matrices[expert]
        between = rounding.between(kind, gate_up.multiply(x[token : token + 1]))
        assert torch.equal(out[token], down.multiply(between)[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [70, 2100])
def test_a_token_has_its_own_bits(
    width: int, kind: str, each_isa: str, rounding: Any, rows_alone_and_together: Any
) -> None:
    torch.manual_seed(6)
    layer = Layer(kind, rounding, num_experts=5, width=width, inner=33)
    weights, ids = routed(70, 5, 3)
    x, base = torch.randn(70, width), torch.randn(70, width)
    rows_alone_and_together(
        lambda rows: layer.run(x[rows], weights[rows], ids[rows], base[rows]), 70, (1, 2, 7, 16, 17, 40)
    )


def test_all_tokens_may_want_one_expert(each_isa: str, rounding: Any, rows_alone_and_together: Any) -> None:
    torch.manual_seed(7)
    layer = Layer("int8", rounding, num_experts=64, width=64, inner=32)
    x, base = torch.randn(150, 64), torch.zeros(150, 64)
    ids, weights = torch.full((150, 1), 63, dtype=torch.int32), torch.ones(150, 1)
    rows_alone_and_together(
        lambda rows: layer.run(x[rows], weights[rows], ids[rows], base[rows]), 150, (1, 63, 65, 130)
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_a_token_that_is_not_finite_spoils_no_other(bad: float, kind: str, each_isa: str, rounding: Any) -> None:
    torch.manual_seed(8)
    layer = Layer(kind, rounding, num_experts=3, width=70, inner=20)
    weights, ids = routed(20, 3, 2)
    x, base = torch.randn(20, 70), torch.randn(20, 70)
    good = layer.run(x, weights, ids, base)
    x[4, 9] = bad
    out = layer.run(x, weights, ids, base)
    others = torch.arange(20) != 4
    assert torch.equal(out[others], good[others])
    assert not out[4].isfinite().any()


def test_terms_are_added_in_the_order_of_choice(each_isa: str, rounding: Any) -> None:
    """Weights of zero and one pick single terms, whose sum in order is the whole."""
    torch.manual_seed(9)
    layer = Layer("float32", rounding, num_experts=4, width=24, inner=16)
    _, ids = routed(9, 4, 3)
    x, base, ones = torch.randn(9, 24), torch.randn(9, 24), torch.ones(9, 3)
    expected = base
    for place in range(3):
        expected = layer.run(x, ones[:, place : place + 1], ids[:, place : place + 1], expected)
    assert torch.equal(layer.run(x, ones, ids, base), expected)
