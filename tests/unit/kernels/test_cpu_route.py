"""The compiled choice of experts equals the reference's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from seamount.kernels import cpu_attention, packed, reference
from seamount.kernels.library import library

pytestmark = pytest.mark.skipif(library() is None, reason="no compiler: there are no compiled kernels")
# Experts, chosen, groups, chosen groups: V2-Lite, V2, V3, small and odd ones.
SHAPES = [(64, 6, 1, 1), (160, 6, 8, 3), (256, 8, 8, 4), (5, 2, 1, 1), (18, 4, 6, 3), (16, 16, 4, 4)]


def same_choice(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> bool:
    return torch.equal(found[1].long(), wanted[1]) and torch.allclose(found[0], wanted[0], rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_tokens", [1, 50])
def test_softmax(shape: tuple[int, ...], num_tokens: int) -> None:
    experts, chosen, groups, chosen_groups = shape
    packed.set_threads(2)
    logits = torch.randn(num_tokens, experts, generator=torch.Generator().manual_seed(experts)) * 3
    options = {"num_groups": groups, "num_chosen_groups": chosen_groups, "scale": 1.5}
    found = cpu_attention.route_softmax(logits, chosen, **options)
    assert same_choice(found, reference.route_softmax(logits, chosen, **options))


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[0] > s[2]])
@pytest.mark.parametrize("normalize", [False, True])
def test_sigmoid(shape: tuple[int, ...], normalize: bool) -> None:
    experts, chosen, groups, chosen_groups = shape
    generator = torch.Generator().manual_seed(experts)
    logits, bias = torch.randn(40, experts, generator=generator) * 2, torch.randn(experts, generator=generator) / 4
    options = {"num_groups": groups, "num_chosen_groups": chosen_groups, "normalize": normalize, "scale": 2.5}
    found = cpu_attention.route_sigmoid(logits, bias, chosen, **options)
    assert same_choice(found, reference.route_sigmoid(logits, bias, chosen, **options))


def test_of_equal_scores_the_lowest_index_wins() -> None:
    _, ids = cpu_attention.route_softmax(torch.zeros(2, 8), 3, num_groups=1, num_chosen_groups=1, scale=1.0)
    assert ids.tolist() == [[0, 1, 2]] * 2


def test_extreme_and_broken_logits_still_choose_experts_that_exist() -> None:
    logits = torch.tensor([[1e30, -1e30, 0, 1e30], [float("nan")] * 4, [float("inf"), 0, 0, 0], [-200.0] * 4])
    weights, ids = cpu_attention.route_softmax(logits, 2, num_groups=1, num_chosen_groups=1, scale=1.0)
    assert all(len(set(row)) == 2 and set(row) <= set(range(4)) for row in ids.tolist())
    assert weights[0].tolist() == [0.5, 0.5]
    assert weights[1].isnan().all()
    assert weights[3].tolist() == [0.25, 0.25]


def test_a_token_is_routed_the_same_alone_and_among_others() -> None:
    logits = torch.randn(60, 72, generator=torch.Generator().manual_seed(3))
    options = {"num_groups": 8, "num_chosen_groups": 3, "scale": 1.0}
    packed.set_threads(2)
    weights, ids = cpu_attention.route_softmax(logits, 6, **options)
    for i in range(0, 60, 7):
        alone = cpu_attention.route_softmax(logits[i : i + 1], 6, **options)
        assert torch.equal(alone[0][0], weights[i])
        assert torch.equal(alone[1][0], ids[i])


def test_misuse_is_refused() -> None:
    options = {"num_groups": 1, "num_chosen_groups": 1, "scale": 1.0}
    with pytest.raises(ValueError):
        cpu_attention.route_softmax(torch.zeros(2, 8).double(), 2, **options)
    with pytest.raises(ValueError):
        cpu_attention.route_softmax(torch.zeros(2, 8), 9, **options)
