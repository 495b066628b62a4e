"""Ctrl-C while a model in this process answers: the engine's step is let to its end."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from seamount.cli.backends import interrupted_between


def test_ctrl_c_waits_for_the_step_and_then_ends_the_answer() -> None:
    finished: list[int] = []
    before = signal.getsignal(signal.SIGINT)

    def steps() -> Iterator[int]:
        for step in range(5):
            if step == 2:
                os.kill(os.getpid(), signal.SIGINT)
            finished.append(step)
            yield step

    taken = []
    with pytest.raises(KeyboardInterrupt):
        for step in interrupted_between(steps()):
            taken.append(step)
    assert finished == [0, 1, 2]
    assert taken == [0, 1]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_does_not_wait() -> None:
    def steps() -> Iterator[int]:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        yield pytest.fail("the step went on")

    with pytest.raises(KeyboardInterrupt):
        next(interrupted_between(steps()))


def test_items_pass_unchanged() -> None:
    assert list(interrupted_between(iter("abc"))) == ["a", "b", "c"]
