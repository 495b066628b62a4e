"""Routers and routed experts in Triton against the reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from device import DEVICE, DTYPES, close, with_dtypes

from seamount.kernels import gpu, reference
from seamount.kernels.gpu import experts


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def choose(num_tokens: int, num_experts: int, num_chosen: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Uneven choices: low experts are popular, some are chosen by nobody."""
    scores = random(num_tokens, num_experts, seed=5) - torch.arange(num_experts, device=DEVICE) * 0.2
    return reference.route_softmax(scores, num_chosen, num_groups=1, num_chosen_groups=1, scale=1.5)


def weights_of(
    num_experts: int, inner: int, width: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    gate_up = random(num_experts, 2 * inner, width, dtype=dtype, seed=6) * width**-0.5
    return gate_up, random(num_experts, width, inner, dtype=dtype, seed=7) * inner**-0.5


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "num_chosen", "inner", "width", "dtype"),
    with_dtypes((7, 5, 3, 33, 70), (1, 8, 2, 24, 40), (40, 16, 6, 16, 32), (90, 3, 2, 40, 24), (0, 4, 2, 8, 8)),
)
def test_run_experts(
    num_tokens: int, num_experts: int, num_chosen: int, inner: int, width: int, dtype: torch.dtype
) -> None:
    x = random(num_tokens, width, dtype=dtype)
    gate_up, down = weights_of(num_experts, inner, width, dtype)
    weights, ids = choose(num_tokens, num_experts, num_chosen)
    got = gpu.run_experts(x, weights, ids, gate_up, down)
    assert got.shape == x.shape
    if num_tokens:
        wide = reference.run_experts(x.float(), weights, ids, gate_up.float(), down.float())
        close(got, wide, dtype)


def test_more_choices_than_one_program_plans_are_sorted_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    x, (weights, ids), matrices = random(40, 32), choose(40, 16, 6), weights_of(16, 16, 32)
    planned = gpu.run_experts(x, weights, ids, *matrices)
    monkeypatch.setattr(experts, "_MOST_PLANNED", 100)
    assert torch.equal(gpu.run_experts(x, weights, ids, *matrices), planned)


def test_one_expert_may_get_every_token() -> None:
    x, matrices = random(21, 24), weights_of(9, 16, 24)
    ids = torch.full((21, 1), 8, device=DEVICE)
    weights = torch.ones(21, 1, device=DEVICE)
    close(
        gpu.run_experts(x, weights, ids, *matrices),
        reference.run_experts(x, weights, ids, *matrices),
        torch.float32,
    )


def test_a_token_does_not_depend_on_the_others() -> None:
    x, (weights, ids), matrices = random(23, 32), choose(23, 16, 6), weights_of(16, 16, 32)
    together = gpu.run_experts(x, weights, ids, *matrices)
    for i in (0, 11, 22):
        row = slice(i, i + 1)
        assert torch.equal(gpu.run_experts(x[row], weights[row], ids[row], *matrices), together[row])


def test_the_shared_experts_output_is_added_to_the_sum() -> None:
    x, (weights, ids), matrices = random(5, 32), choose(5, 16, 6), weights_of(16, 16, 32)
    plus = random(5, 32, seed=8)
    expected = gpu.run_experts(x, weights, ids, *matrices) + plus
    assert torch.equal(gpu.run_experts(x, weights, ids, *matrices, plus), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_router_logits_are_a_product_in_fp32(dtype: torch.dtype) -> None:
    x, weight = random(3, 600, dtype=dtype), random(10, 600, dtype=dtype, seed=1) * 0.1
    close(gpu.router_logits(x, weight), F.linear(x.float(), weight.float()), torch.float32)


@pytest.mark.parametrize(
    ("num_experts", "num_chosen", "groups", "chosen_groups"),
    [(64, 6, 1, 1), (60, 3, 6, 2), (16, 4, 4, 4), (5, 5, 1, 1)],
)
def test_routers(num_experts: int, num_chosen: int, groups: int, chosen_groups: int) -> None:
    logits, bias = random(9, num_experts) * 2, random(num_experts, seed=1) * 0.3
    limits = {"num_groups": groups, "num_chosen_groups": chosen_groups}
    pairs = [
        (
            gpu.route_softmax(logits, num_chosen, **limits, scale=1.7),
            reference.route_softmax(logits, num_chosen, **limits, scale=1.7),
        )
    ]
    for normalize in (True, False):
        more = {**limits, "normalize": normalize, "scale": 2.5}
        pairs.append(
            (
                gpu.route_sigmoid(logits, bias, num_chosen, **more),
                reference.route_sigmoid(logits, bias, num_chosen, **more),
            )
        )
    for (weights, ids), (expected_weights, expected_ids) in pairs:
        assert torch.equal(ids, expected_ids)
        close(weights, expected_weights, torch.float32)
