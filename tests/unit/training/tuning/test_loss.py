"""The loss by pieces is the loss: values, gradients, and no guess across the border of two examples."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import tuning_site as site

from seamount.training.examples.example import Example
from seamount.training.shards.packing import pack
from seamount.training.tuning import loss as module
from seamount.training.tuning.loss import causal_and_mtp_loss, causal_loss, cross_entropy, guesses


@pytest.mark.parametrize("rows_at_once", [1, 7, 1024])
def test_cross_entropy_in_pieces_is_torchs(rows_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROWS_AT_ONCE", rows_at_once)
    hidden, head = torch.randn(20, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    targets = torch.randint(0, 30, (20,))
    ours = cross_entropy(hidden, head, targets) * 0.5
    found = torch.autograd.grad(ours, (hidden, head))
    wanted = F.cross_entropy(hidden @ head.T, targets, reduction="sum") * 0.5
    torch.testing.assert_close(ours, wanted)
    for mine, theirs in zip(found, torch.autograd.grad(wanted, (hidden, head)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_with_a_frozen_head_its_gradient_is_not_made() -> None:
    hidden, head = torch.randn(4, 8, requires_grad=True), torch.randn(30, 8)
    cross_entropy(hidden, head, torch.tensor([1, 2, 3, 4])).backward()
    assert hidden.grad is not None and head.grad is None


def test_a_token_is_guessed_from_its_own_example_only() -> None:
    tokens = np.arange(6, dtype=np.int32)
    everything = Example(tokens, np.array([False, True, True, True, True, True]))
    (micro,) = pack([(0, everything), (1, everything)], micro_tokens=64)
    near, far = guesses(micro), guesses(micro, 2)
    assert near.rows.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10]
    assert near.targets.tolist() == [1, 2, 3, 4, 5] * 2
    assert far.rows.tolist() == [0, 1, 2, 3, 6, 7, 8, 9]
    assert far.targets.tolist() == [2, 3, 4, 5] * 2


@pytest.mark.parametrize("mtp_weight", [0.0, 0.3])
def test_the_loss_of_packed_examples_is_the_sum_of_each_alone(mtp_weight: float) -> None:
    model, data = site.network(), site.examples(6)
    examples = [(index, data.example(index)) for index in range(6)]

    def total(parts: list[list[tuple[int, Example]]]) -> float:
        micros = [micro for part in parts for micro in pack(part, micro_tokens=1000)]
        losses = [causal_and_mtp_loss(model, m, mtp_weight) if mtp_weight else causal_loss(model, m) for m in micros]
        return float(sum(loss.detach() for loss in losses))

    assert total([examples]) == pytest.approx(total([[example] for example in examples]), rel=1e-5)
