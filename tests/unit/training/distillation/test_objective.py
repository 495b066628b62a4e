"""What a student minimises, against the formula written plainly and torch's own gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import tuning_site as site
from torch import Tensor

from seamount.training.distillation.objective import (
    DistillationObjective,
    Guide,
    TopGuide,
    WholeGuide,
    distilled_loss,
)
from seamount.training.distillation.teacher import Teacher
from seamount.training.shards.packing import pack
from seamount.training.tuning.loss import causal_loss
from seamount.training.tuning.trainer import Trainer

ROWS, WIDTH, TAUGHT_WIDTH, VOCABULARY = 7, 6, 5, 40


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.empty(shape).normal_(generator=torch.Generator().manual_seed(seed))


def student() -> tuple[Tensor, Tensor, Tensor]:
    hidden, head = numbers(ROWS, WIDTH, seed=1).requires_grad_(), numbers(VOCABULARY, WIDTH, seed=2).requires_grad_()
    return hidden, head, torch.arange(ROWS) * 3


def gradients(loss: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss * 1.7, of)


def top(log_p: Tensor, count: int) -> TopGuide:
    values, ids = log_p.topk(count, dim=-1)
    rest = log_p.scatter(1, ids, float("-inf")).logsumexp(dim=-1, keepdim=True)
    return TopGuide(ids, torch.cat((values, rest), dim=-1))


@pytest.mark.parametrize("taught_vocabulary", [VOCABULARY, VOCABULARY - 4, VOCABULARY + 4])
@pytest.mark.parametrize(("weight", "temperature"), [(1.0, 1.0), (0.3, 1.0), (0.6, 2.5)])
def test_the_loss_is_hintons(weight: float, temperature: float, taught_vocabulary: int) -> None:
    hidden, head, targets = student()
    taught, taught_head = numbers(ROWS, TAUGHT_WIDTH, seed=3), numbers(taught_vocabulary, TAUGHT_WIDTH, seed=4)
    shared = min(VOCABULARY, taught_vocabulary)

    logits = hidden @ head.T
    p = torch.softmax((taught @ taught_head.T)[:, :shared] / temperature, dim=-1)
    log_q = torch.log_softmax(logits / temperature, dim=-1)[:, :shared]
    divergence = F.kl_div(log_q, p, reduction="sum") * temperature**2
    expected = weight * divergence + (1 - weight) * F.cross_entropy(logits, targets, reduction="sum")

    guide = WholeGuide(taught, taught_head, temperature)
    found = distilled_loss(hidden, head, targets, guide, weight=weight, temperature=temperature)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    for mine, plain in zip(gradients(found, hidden, head), gradients(expected, hidden, head), strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [1, 5, VOCABULARY])
def test_the_likeliest_tokens_and_a_bucket_are_a_divergence_of_their_own(count: int) -> None:
    hidden, head, targets = student()
    log_p = torch.log_softmax(numbers(ROWS, VOCABULARY, seed=5) * 3, dim=-1)
    guide = top(log_p, count)

    q = torch.softmax(hidden @ head.T, dim=-1)
    ids = log_p.topk(count, dim=-1).indices
    chosen = q.gather(1, ids)
    p = log_p.exp().gather(1, ids)
    expected = (p * (p.log() - chosen.log())).sum()
    if count < VOCABULARY:
        rest, q_rest = 1 - p.sum(-1), 1 - chosen.sum(-1)
        expected = expected + (rest * (rest.log() - q_rest.log())).sum()

    found = distilled_loss(hidden, head, targets, guide, weight=1.0, temperature=1.0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for mine, plain in zip(gradients(found, hidden, head), gradients(expected, hidden, head), strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-3, atol=1e-4)


def test_more_tokens_say_more_and_all_of_them_everything() -> None:
    hidden, head, targets = student()
    taught, taught_head = numbers(ROWS, TAUGHT_WIDTH, seed=3), numbers(VOCABULARY, TAUGHT_WIDTH, seed=4)

    def loss(guide: Guide) -> float:
        return float(distilled_loss(hidden, head, targets, guide, weight=1.0, temperature=2.0).detach())

    log_p = torch.log_softmax(taught @ taught_head.T / 2.0, dim=-1)
    partial = [loss(top(log_p, count)) for count in (1, 2, 8, 20)]
    whole = loss(WholeGuide(taught, taught_head, 2.0))
    assert partial == sorted(partial) and partial[-1] < whole
    assert loss(top(log_p, VOCABULARY)) == pytest.approx(whole, rel=1e-5)


def test_a_teacher_that_rules_all_else_out_gives_finite_gradients() -> None:
    hidden, head, targets = student()
    sure = torch.tensor([[0.0, float("-inf")]]).expand(ROWS, 2)
    loss = distilled_loss(hidden, head, targets, TopGuide(targets.unsqueeze(1), sure), weight=1.0, temperature=1.0)
    plain = F.cross_entropy(hidden @ head.T, targets, reduction="sum")
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=1e-5)
    assert all(gradient.isfinite().all() for gradient in gradients(loss, hidden, head))


def test_while_training_the_teacher_counts_and_in_an_evaluation_only_the_data() -> None:
    teacher = Teacher(site.network(seed=9).requires_grad_(False), 2.0)
    objective, model = DistillationObjective(teacher.guide, 0.5, 2.0), site.network()
    micro = pack([(0, site.examples().example(0))], micro_tokens=64)[0]
    plain = causal_loss(model, micro)
    assert float(objective.loss(model.train(), micro).detach()) != pytest.approx(float(plain.detach()), rel=1e-3)
    assert float(objective.loss(model.eval(), micro).detach()) == pytest.approx(float(plain.detach()), rel=1e-6)


def test_a_student_comes_to_guess_as_its_teacher_does() -> None:
    teacher = Teacher(site.network(seed=9).requires_grad_(False), 1.0)
    recipe = site.recipe(schedule={"steps": 60}, optimizer={"method": "muon", "learning_rate": 1e-2})
    losses: list[float] = []
    trainer = Trainer(
        recipe,
        site.network(num_nextn_predict_layers=0),
        site.examples(),
        world=site.ALONE,
        objective=DistillationObjective(teacher.guide, 1.0, 1.0),
        on_step=lambda record: losses.append(record.loss),
    )
    trainer.run()
    assert sum(losses[-5:]) < 0.3 * sum(losses[:5])
