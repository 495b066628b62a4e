"""Muon and Adam: orthogonal updates, fp32 masters under bf16 weights, state that can be moved."""

import pytest
import torch
from torch import nn

from seamount.core.errors import CheckpointError
from seamount.training.muon import orthogonalize
from seamount.training.pretraining.optimizer import Optimizer
from seamount.training.pretraining.recipe import OptimizerSection


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 8, 24), (2, 24, 8)])
def test_orthogonalized_matrices_have_singular_values_near_one(shape):
    values = torch.linalg.svdvals(orthogonalize(torch.randn(shape, generator=torch.Generator().manual_seed(0))))
    assert values.min() > 0.4
    assert values.max() < 1.4


def parameters(dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(1)
    shapes = {
        "embed_tokens.weight": (10, 4),
        "proj.weight": (6, 4),
        "experts.down_proj": (3, 4, 6),
        "norm.weight": (4,),
    }
    return {name: nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for name, s in shapes.items()}


def loss_of(weights):
    return sum(((w - 0.5) ** 2).sum() for w in weights.values())


def test_both_kinds_of_parameter_approach_the_minimum():
    weights = parameters(torch.float32)
    optimizer = Optimizer(weights.items(), OptimizerSection(learning_rate=0.2, weight_decay=0.0, clip_norm=1e6))
    before = {name: float((w.detach() - 0.5).abs().mean()) for name, w in weights.items()}
    for step in range(150):
        loss_of(weights).backward()
        optimizer.step(0.2 * (1 - step / 150))
    assert all(float((w.detach() - 0.5).abs().mean()) < 0.2 * before[name] for name, w in weights.items())


def test_steps_too_small_for_bf16_add_up_in_the_masters():
    weights = {"norm.weight": nn.Parameter(torch.ones(4, dtype=torch.bfloat16))}
    optimizer = Optimizer(weights.items(), OptimizerSection(learning_rate=1e-3))
    for _ in range(20):
        weights["norm.weight"].sum().backward()
        optimizer.step(1e-3)
    assert torch.allclose(optimizer.masters()["norm.weight"], torch.full((4,), 0.98), atol=1e-3)
    assert (weights["norm.weight"] < 1).all()


def test_a_parameter_without_gradient_stays():
    weights = parameters()
    optimizer = Optimizer(weights.items(), OptimizerSection(learning_rate=0.1))
    kept = {name: w.detach().clone() for name, w in weights.items()}
    weights["norm.weight"].sum().backward()
    optimizer.step(0.1)
    assert {name for name, w in weights.items() if not torch.equal(w, kept[name])} == {"norm.weight"}


def test_the_reported_norm_is_before_clipping():
    weights = {"norm.weight": nn.Parameter(torch.zeros(4))}
    optimizer = Optimizer(weights.items(), OptimizerSection(learning_rate=0.1, clip_norm=1.0))
    (100 * weights["norm.weight"]).sum().backward()
    assert optimizer.step(0.1) == pytest.approx(200.0)


def test_moved_state_goes_on_alike_and_foreign_state_is_refused():
    first, second = parameters(), parameters()
    section = OptimizerSection(learning_rate=0.05)
    one, two = Optimizer(first.items(), section), Optimizer(second.items(), section)
    for _ in range(3):
        loss_of(first).backward()
        one.step(0.05)
    two.load_state({name: tensor.clone() for name, tensor in one.state().items()})
    for weights, optimizer in ((first, one), (second, two)):
        loss_of(weights).backward()
        optimizer.step(0.05)
    assert all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(CheckpointError):
        two.load_state({"master.other": torch.zeros(1)})
