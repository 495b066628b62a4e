"""What a person sees of a run: plain lines in a log, a panel on a terminal."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from seamount.training.tuning.view import RunView, Trend, duration


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def record(step: int, **changes: Any) -> dict[str, Any]:
    fields = {
        "step": step,
        "num_steps": 100,
        "epoch": step / 50,
        "loss": 4.0 / step,
        "learning_rate": 2e-4,
        "gradient_norm": 0.5123,
        "tokens_per_s": 12345.6,
        "memory_bytes": 1_700_000_000,
    }
    return fields | changes


def console(*, terminal: bool = False) -> Console:
    options: dict[str, Any] = {"force_terminal": True, "width": 120, "legacy_windows": False} if terminal else {}
    return Console(file=io.StringIO(), highlight=False, soft_wrap=not terminal, **options)


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_a_run_of_tasks_says_which_of_how_many(terminal: bool) -> None:
    screen = console(terminal=terminal)
    with RunView("tiny", console=screen) as view:
        view.step(record(1, task="support", task_number=2, num_tasks=5))
    assert "support (2 of 5)" in shown(screen)


def test_without_a_terminal_there_is_a_line_every_ten_seconds() -> None:
    clock, screen = Clock(), console()
    with RunView("tiny", console=screen, clock=clock) as view:
        view.stage("Reading [data] ...")
        view.progress("Loading", 1, 2)
        for step in range(1, 101):
            clock.now = step * 1.0
            view.step(record(step))
        view.evaluation({"step": 100, "loss": 1.5, "accuracy": 0.925})
    lines = shown(screen).splitlines()
    assert lines[0] == "Reading [data] ..."
    assert [line.split()[1] for line in lines[1:-1]] == [f"{n}/100" for n in (*range(1, 100, 10), 100)]
    assert lines[1] == "step 1/100  epoch 0.02  loss 4.0000  rate 2.00e-04  norm 0.512  12,346 tokens/s  1.7 GB"
    assert lines[6].endswith("1.7 GB  49 s left")
    assert lines[-1] == "evaluation at step 100: loss 1.5000, accuracy 92.5%"


def test_a_terminal_has_a_panel_with_all_of_it() -> None:
    clock, screen = Clock(), console(terminal=True)
    with RunView("a [model]", console=screen, clock=clock) as view:
        view.stage("Loading the model")
        view.progress("Loading", 1, 4)
        for step in range(1, 41):
            clock.now = step * 2.0
            view.step(record(step))
        view.evaluation({"step": 40, "loss": 1.5})
        view.stage("Answering evaluation examples")
    text = shown(screen)
    for part in (
        "a [model]",
        "0.1000",
        "█",
        "▁",
        "2.00e-04",
        "12,346 tokens/s",
        "1.7 GB",
        "40 of 100",
        "2 min 00 s left",
    ):
        assert part in text
    assert "loss 1.5000 (step 40)" in text
    assert "Answering evaluation examples" in text


def test_what_is_not_known_is_left_out() -> None:
    screen = console()
    with RunView("tiny", console=screen, clock=Clock()) as view:
        view.step({"step": 1, "loss": float("nan"), "gradient_norm": float("nan")})
        view.evaluation({"step": 1, "loss": None, "accuracy": 0.5})
    assert shown(screen).splitlines() == ["step 1  loss nan  norm nan", "evaluation at step 1: accuracy 50.0%"]


def test_the_time_left_counts_from_where_this_process_began_and_anew_for_each_task() -> None:
    clock, screen = Clock(), console()
    view = RunView("tiny", console=screen, clock=clock)
    for now, step in ((1000.0, 50), (1100.0, 60), (1200.0, 1), (1300.0, 2)):
        clock.now = now
        view.step(record(step))
    ends = [line.partition("GB  ")[2] for line in shown(screen).splitlines()]
    assert ends == ["", "6 min 40 s left", "", "2 h 43 min left"]


def test_a_trend_of_any_length_keeps_its_shape() -> None:
    trend = Trend()
    assert trend.bars(8) == ""
    trend.add(1.0)
    assert trend.bars(8) == "▁"
    for value in (float("nan"), float("inf")):
        trend.add(value)
    assert trend.bars(8) == "▁"
    long = Trend()
    for step in range(50_000):
        long.add(1.0 - step / 50_000)
    assert long.bars(8) == "█▇▆▅▄▃▂▁"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
