"""The differentiable forms of experts and attention equal the reference, in value and in gradient."""

import pytest
import torch
import torch.nn.functional as F

from seamount import kernels
from seamount.kernels import differentiable, reference


def naive_experts(x, weights, ids, gate_up, down):
    """Every expert on every token, then weighted."""
    every = torch.stack([F.linear(reference.swiglu(F.linear(x, g)), d) for g, d in zip(gate_up, down, strict=True)])
    chosen = F.one_hot(ids, gate_up.shape[0]).to(x.dtype) * weights.unsqueeze(-1)
    return torch.einsum("etc,tae->tc", every, chosen)


@pytest.mark.parametrize("num_tokens", [1, 7, 300])
@pytest.mark.parametrize("skewed", [False, True])
def test_experts_equal_the_plain_sum_in_value_and_gradient(num_tokens, skewed):
    generator = torch.Generator().manual_seed(num_tokens)

    def leaf(*shape):
        return torch.randn(*shape, generator=generator).requires_grad_()

    x, gate_up, down = leaf(num_tokens, 12), leaf(5, 16, 12), leaf(5, 12, 8)
    scores = torch.rand(num_tokens, 5, generator=generator) + (torch.tensor([9.0, 8, 0, 0, 0]) if skewed else 0)
    ids = scores.topk(2, dim=-1).indices
    weights = torch.rand(num_tokens, 2, generator=generator).requires_grad_()
    leaves = (x, weights, gate_up, down)
    results = []
    for function in (differentiable.run_experts, naive_experts):
        out = function(x, weights, ids, gate_up, down)
        gradients = torch.autograd.grad((out * torch.arange(12)).sum(), leaves)
        results.append((out, *gradients))
    with torch.no_grad():
        results[0] += (reference.run_experts(x, weights, ids, gate_up, down),)
        results[1] += (results[1][0],)
    for found, wanted in zip(*results, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-3)


def test_attention_with_and_without_gradients_is_the_same():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(60, 3, 8, generator=generator, requires_grad=True) for _ in range(2))
    v = torch.randn(60, 3, 6, generator=generator, requires_grad=True)
    starts = (0, 20, 40, 60)
    written_out = kernels.causal_attention(q, k, v, starts, 0.3)
    with torch.no_grad():
        fused = kernels.causal_attention(q, k, v, starts, 0.3)
    assert torch.allclose(written_out, fused, atol=1e-5)
