"""Mixed steps, drift, accuracy and its measures, stored examples."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import tuning_site as site

from seamount.training.continual.accuracy import Accuracy, num_right
from seamount.training.continual.drift import Drift
from seamount.training.continual.mixing import MixedData, MixedOrder
from seamount.training.continual.objective import loss_of
from seamount.training.continual.stored import from_tensors, to_tensors
from seamount.training.examples.example import Example
from seamount.training.shards.dataset import ExampleList
from seamount.training.shards.packing import pack
from seamount.training.tuning.loss import causal_loss


def test_a_step_holds_new_and_remembered_examples_in_their_share() -> None:
    order = MixedOrder(40, 10, 8, 0.25, seed=1)
    steps = [order.step(number) for number in range(20)]
    assert all(len(step) == 8 and (step >= 40).sum() == 2 for step in steps)
    assert order.steps_per_epoch == 40 / 6
    used = np.bincount(np.concatenate(steps), minlength=50)
    assert set(used[:40]) == {3} and set(used[40:]) == {4}


@pytest.mark.parametrize(("share", "taken"), [(0.01, 1), (0.99, 7)])
def test_no_step_is_without_one_kind(share: float, taken: int) -> None:
    assert (MixedOrder(40, 10, 8, share, seed=1).step(0) >= 40).sum() == taken


def test_without_a_memory_all_examples_are_new() -> None:
    order = MixedOrder(40, 0, 8, 0.5, seed=1)
    assert order.step(3).max() < 40 and order.steps_per_epoch == 5


def test_mixed_data_are_both_in_turn() -> None:
    new, remembered = site.examples(count=3), site.examples(count=2, seed=9)
    mixed = MixedData(new, remembered)
    assert len(mixed) == 5
    assert mixed.lengths.tolist() == [*new.lengths, *remembered.lengths]
    assert mixed.num_trained.tolist() == [*new.num_trained, *remembered.num_trained]
    assert mixed.example(4) is remembered.example(1) and mixed.example(0) is new.example(0)
    assert mixed.digest not in (new.digest, MixedData(remembered, new).digest)


def test_the_rate_falls_as_remembered_answers_move_and_rises_again() -> None:
    losses = iter([1.0, 1.1, 1.3, 0.9])
    drift = Drift(lambda: next(losses), tolerance=0.1, every_steps=5)
    factors = [drift.factor(step) for step in range(20)]
    wanted = [1.0, 1 / 2, 1 / 4, 1.0]
    assert factors == pytest.approx([factor for factor in wanted for _ in range(5)])


def test_drift_goes_on_from_its_state() -> None:
    first = Drift(iter([1.0, 1.2]).__next__, tolerance=0.1, every_steps=2)
    for step in range(3):
        first.factor(step)
    second = Drift(iter([1.1]).__next__, tolerance=0.1, every_steps=2)
    second.load_state(first.state())
    assert second.factor(3) == first.factor(3) == pytest.approx(1 / 3)
    assert second.factor(4) == pytest.approx(1 / 2)


def test_the_loss_that_drift_follows_is_the_mean_over_trained_tokens() -> None:
    model, data = site.network(), site.examples(count=5)
    model.train()
    whole = pack([(i, data.example(i)) for i in range(5)], micro_tokens=10_000)[0]
    wanted = float(causal_loss(model, whole).detach()) / int(data.num_trained.sum())
    assert loss_of(model, data, micro_tokens=64, world=site.ALONE)() == pytest.approx(wanted, rel=1e-4)
    assert model.training


def greedy(prompt: list[int], count: int) -> list[int]:
    """What the network says, token by token."""
    model, tokens = site.network(), list(prompt)
    flags = np.zeros(1, bool)
    for _ in range(count):
        example = Example(np.array(tokens, np.int32), np.resize(flags, len(tokens)))
        micro = pack([(0, example)], micro_tokens=1)[0]
        with torch.no_grad():
            tokens.append(int(model.logits(model(micro.batch(), None))[-1].argmax()))
    return tokens[len(prompt) :]


def test_right_is_what_greedy_decoding_would_say() -> None:
    examples = []
    for seed in range(6):
        prompt = np.random.default_rng(seed).integers(0, site.VOCABULARY, 4 + seed).tolist()
        answer = greedy(prompt, 3)
        for wrong in (None, 0, 2):
            told = [token if place != wrong else (token + 1) % 64 for place, token in enumerate(answer)]
            trained = np.arange(len(prompt) + 3) >= len(prompt)
            trained[1] = True  # an earlier turn, which does not count
            examples.append(Example(np.array(prompt + told, np.int32), trained))
    for micro_tokens in (16, 1000):
        assert num_right(site.network(), ExampleList(examples), micro_tokens=micro_tokens, world=site.ALONE) == 6


def test_measures_are_those_of_the_papers(tmp_path: Path) -> None:
    accuracy = Accuracy(("a", "b", "c"), ((0.9,), (0.5, 0.8), (0.7, 0.6, 1.0)))
    assert accuracy.average == pytest.approx((0.7 + 0.6 + 1.0) / 3)
    assert accuracy.forgetting == pytest.approx(((0.9 - 0.7) + (0.8 - 0.6)) / 2)
    assert accuracy.backward_transfer == pytest.approx(((0.7 - 0.9) + (0.6 - 0.8)) / 2)
    accuracy.write(tmp_path)
    told = json.loads((tmp_path / "accuracy.json").read_text(encoding="utf-8"))
    assert told["tasks"] == ["a", "b", "c"] and told["matrix"][0] == [0.9, None, None]
    assert set(told) == {"tasks", "matrix", "average", "forgetting", "backward_transfer"}


def test_forgetting_counts_from_the_best_there_ever_was() -> None:
    accuracy = Accuracy(("a", "b", "c"), ((0.5,), (0.9, 0.8), (0.6, 0.8, 1.0)))
    assert accuracy.forgetting == pytest.approx(0.15) and accuracy.backward_transfer == pytest.approx(0.05)


def test_one_task_has_nothing_to_forget() -> None:
    assert Accuracy().average is None
    one = Accuracy(("a",), ((0.5,),))
    assert one.average == 0.5 and one.forgetting is None and one.backward_transfer is None


def test_stored_examples_are_the_same() -> None:
    data = site.examples(count=4)
    examples = [data.example(index) for index in range(4)]
    tensors = to_tensors(examples, "memory")
    found = from_tensors(tensors, "memory")
    assert ExampleList(found).digest == data.digest
    assert from_tensors(tensors, "evaluation.0") == [] and to_tensors([], "memory") == {}
