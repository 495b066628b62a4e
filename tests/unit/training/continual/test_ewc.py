"""Fisher information: that of the definition, example by example; and the pull that is made of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import tuning_site as site
from torch import Tensor

from seamount.models.network import CausalLM
from seamount.training.continual.ewc import Penalty, fisher, joined
from seamount.training.examples.example import Example
from seamount.training.shards.dataset import ExampleList
from seamount.training.shards.packing import pack
from seamount.training.tuning.distributed import World
from seamount.training.tuning.loss import guesses
from seamount.training.tuning.optimizer import Optimizer

TRAINED = ("norm.weight", "layers.0.self_attn.kv_a_layernorm.weight")


def small_network() -> CausalLM:
    """Two small vectors are trained: their information can be computed from its definition."""
    model = site.network(vocab_size=12, num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in TRAINED)
    return model


def by_definition(model: CausalLM, data: ExampleList) -> dict[str, Tensor]:
    """Sum over examples, trained tokens and all tokens that might stand there of p * (gradient of log p)**2.

    p is softened to temperature 2.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for index in range(len(data)):
        micro = pack([(index, data.example(index))], micro_tokens=1)[0]
        hidden = model.hidden_states(micro.batch(), None).index_select(0, guesses(micro).rows)
        chances = (model.logits(model.norm(hidden)) / 2).log_softmax(dim=-1)
        for chance in chances.flatten():
            gradients = torch.autograd.grad(chance, list(parameters.values()), retain_graph=True)
            for name, gradient in zip(parameters, gradients, strict=True):
                found[name] += chance.detach().exp() * gradient**2
    total = sum(float(tensor.sum()) for tensor in found.values())
    return {name: tensor / total for name, tensor in found.items()}


def test_fisher_is_that_of_the_definition() -> None:
    rows = [(3, 7, 1, 4), (9, 2, 2)]
    data = ExampleList([Example(np.array(row, np.int32), np.arange(len(row)) > 1) for row in rows])
    repeated = ExampleList([data.example(index % 2) for index in range(300)])
    model = small_network()
    estimated = fisher(model, repeated, 300, seed=5, world=site.ALONE)
    for name, wanted in by_definition(model, data).items():
        # 150 draws of each example: a squared normal number is off by a ninth then; sums by less.
        torch.testing.assert_close(estimated[name].sum(), wanted.sum(), rtol=0.1, atol=0.0)
        assert float((estimated[name] - wanted).abs().sum() / wanted.sum()) < 0.2


def test_it_adds_up_to_one_leaves_no_gradients_and_is_the_same_again() -> None:
    model, data = site.network(), site.examples()
    first, second = (fisher(model, data, 8, seed=1, world=site.ALONE) for _ in range(2))
    assert sum(float(tensor.sum()) for tensor in first.values()) == pytest.approx(1.0, abs=1e-5)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(parameter.grad is None for parameter in model.parameters())
    other = fisher(model, data, 8, seed=2, world=site.ALONE)
    assert not torch.equal(first["norm.weight"], other["norm.weight"])


def test_ranks_share_the_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = site.network(), site.examples(count=6)
    whole = fisher(model, data, 6, seed=1, world=site.ALONE)
    sent: list[list[Tensor]] = []
    monkeypatch.setattr(World, "add_up", lambda world, tensors: sent.append([t.clone() for t in tensors]))
    for rank in range(2):
        fisher(model, data, 6, seed=1, world=World(rank, 2, torch.device("cpu")))
    sums = [first + second for first, second in zip(*sent, strict=True)]
    total = sum(float(tensor.sum()) for tensor in sums)
    for tensor, wanted in zip(sums, whole.values(), strict=True):
        torch.testing.assert_close(tensor / total, wanted, rtol=1e-4, atol=1e-9)


def test_tasks_add_up_and_old_ones_may_fade() -> None:
    old, new = {"a": torch.tensor([0.5, 0.5])}, {"a": torch.tensor([1.0, 0.0])}
    assert joined({}, new, 0.5)["a"].tolist() == [1.0, 0.0]
    assert joined(old, new, 1.0)["a"].tolist() == [1.5, 0.5]
    assert joined(old, new, 0.5)["a"].tolist() == [1.25, 0.25]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_pull_is_the_gradient_of_the_penalty(dtype: torch.dtype) -> None:
    model = site.network(dtype)
    recipe = site.recipe()
    optimizer = Optimizer(dict(model.named_parameters()), recipe.optimizer, scales_loss=dtype == torch.float16)
    anchor = {name: master.detach() - 0.25 for name, master in optimizer.masters.items()}
    information = {name: torch.rand(master.shape) for name, master in optimizer.masters.items()}
    first = next(iter(optimizer.masters))
    optimizer.masters[first].grad = torch.ones_like(optimizer.masters[first])
    Penalty(8.0, information, anchor).add_gradients(optimizer)
    for name, gradient in optimizer.gradients().items():
        wanted = 2.0 * information[name] * optimizer.loss_scale + (1.0 if name == first else 0.0)
        torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-4)
