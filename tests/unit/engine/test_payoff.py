"""Guessing is kept up where it gives more tokens per second, and costs little where it does not."""

from __future__ import annotations

import random

import pytest

from seamount.engine.payoff import Payoff


def drive(payoff: Payoff, num_steps: int, num_sequences: int, plain_s: float, guessing_s: float, right: float) -> int:
    """Run steps that take so long; returns how many of them guessed."""
    chance = random.Random(num_sequences)
    num_drafts, num_guessing = 0, 0
    for _ in range(num_steps):
        guesses = payoff.pays(num_sequences)
        payoff.count(num_drafts, sum(chance.random() < right for _ in range(num_drafts)))
        noise = chance.choice([1.0, 1.0, 1.0, 1.1, 3.0])
        payoff.time(num_sequences, num_drafts, noise * (guessing_s if num_drafts else plain_s))
        num_drafts = num_sequences if guesses else 0
        num_guessing += guesses
    return num_guessing


@pytest.mark.parametrize(
    ("guessing_s", "right", "pays"),
    [(1.3, 0.8, True), (1.3, 0.1, False), (1.9, 0.8, False), (0.9, 0.0, True), (1.05, 0.9, True)],
)
def test_it_follows_acceptance_and_cost(guessing_s: float, right: float, pays: bool) -> None:
    payoff = Payoff()
    drive(payoff, 100, 2, 1.0, guessing_s, right)
    num_guessing = drive(payoff, 5000, 2, 1.0, guessing_s, right)
    assert num_guessing > 4800 if pays else num_guessing < 150


def test_each_load_is_judged_by_itself() -> None:
    payoff = Payoff()
    for _ in range(3):
        assert drive(payoff, 512, 1, 1.0, 1.1, 0.7) > 450
        assert drive(payoff, 512, 32, 1.0, 1.9, 0.7) < 60


def test_it_notices_that_things_have_changed() -> None:
    payoff = Payoff()
    drive(payoff, 2000, 4, 1.0, 1.3, 0.0)
    assert not payoff.pays(4)
    drive(payoff, 10_000, 4, 1.0, 1.3, 0.9)
    assert payoff.pays(4)


def test_without_a_measurement_it_does_not_guess_on() -> None:
    """Steps that always hold a prompt's chunk are never timed."""
    payoff = Payoff()
    assert sum(payoff.pays(3) for _ in range(3000)) < 60
