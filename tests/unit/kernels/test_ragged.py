"""Causal attention for training means what the reference means: values, gradients, any lengths, shared key heads."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from seamount import kernels
from seamount.kernels import ragged, reference


def run(attend, lengths: list[int], heads: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    """The output, and the gradients of q, k and v for one that depends on them."""
    generator = torch.Generator().manual_seed(1)
    starts = tuple(itertools.accumulate(lengths, initial=0))
    shapes = [(starts[-1], heads[0], 6), (starts[-1], heads[1], 6), (starts[-1], heads[1], 5)]
    q, k, v = (torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes)
    out = attend(q, k, v, starts, 0.4)
    out.backward(torch.linspace(-1, 1, out.numel()).view(out.shape).to(dtype))
    return [out.detach(), *(t.grad for t in (q, k, v))]


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 150), min_size=1, max_size=9), grouped=st.booleans())
def test_sequences_of_any_length_attend_within_themselves(lengths: list[int], grouped: bool) -> None:
    heads = (6, 2) if grouped else (3, 3)
    pairs = zip(
        run(ragged.causal_attention, lengths, heads, torch.float32),
        run(reference.causal_attention, lengths, heads, torch.float32),
        strict=True,
    )
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lengths", [[200], [7, 7, 7], [1, 640, 3, 2, 700]])
def test_in_16_bits_nothing_is_further_from_the_truth_than_the_reference(lengths: list[int]) -> None:
    truth = run(reference.causal_attention, lengths, (4, 2), torch.float32)
    ours = run(ragged.causal_attention, lengths, (4, 2), torch.bfloat16)
    theirs = run(reference.causal_attention, lengths, (4, 2), torch.bfloat16)
    for true, our, their in zip(truth, ours, theirs, strict=True):
        error, usual = (our.float() - true).norm() / true.norm(), (their.float() - true).norm() / true.norm()
        assert error < max(1.5 * usual, 0.01)


def test_no_grad_and_gradients_give_the_same() -> None:
    q, k, v = (torch.randn(30, 4, 8) for _ in range(3))
    with torch.no_grad():
        plain = kernels.causal_attention(q, k, v, (0, 10, 30), 0.3)
    trained = kernels.causal_attention(q.requires_grad_(), k, v, (0, 10, 30), 0.3)
    torch.testing.assert_close(trained, plain, rtol=1e-5, atol=1e-6)
