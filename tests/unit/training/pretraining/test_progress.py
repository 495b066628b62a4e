"""The run's log: what is written can be read again, a kill leaves no double records, the curve is a picture."""

import io
from xml.etree import ElementTree

import pytest
from rich.console import Console

from seamount.training.evaluate import Cell
from seamount.training.pretraining.loop import Progress, StepRecord
from seamount.training.pretraining.progress import RunLog, loss_curve, read_records


def log_of(folder):
    return RunLog(folder, Console(file=io.StringIO(), width=200))


def record_of(step, loss=1.0):
    return StepRecord(step, "main", loss, 0.01, 0.5, 1.2, 100, 0.5)


def test_speed_loss_and_time_left_are_shown(tmp_path):
    out = io.StringIO()
    log = RunLog(tmp_path, Console(file=out, width=300))
    for step in range(1, 41):
        log.step(record_of(step), Progress(step, 160, 10, num_tokens=100 * step))
    text = out.getvalue()
    assert "step 40/160" in text
    assert "200 tokens/s" in text
    assert "loss 1.0000" in text
    assert "1 min left" in text


def test_going_on_from_a_checkpoint_forgets_later_records(tmp_path):
    log = log_of(tmp_path)
    for step in range(1, 8):
        log.step(record_of(step), Progress(step, 10, 2, num_tokens=step))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    log.rewind(4)
    log.step(record_of(5), Progress(5, 10, 2, num_tokens=5))
    assert [record["step"] for record in read_records(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]


def test_the_curve_is_an_svg_without_references(tmp_path):
    log = log_of(tmp_path)
    for step in range(1, 101):
        log.step(record_of(step, 8.0 / step), Progress(step, 100, 2, num_tokens=step))
    log.probe([Cell("arithmetic", "en", 3, 4)], Progress(50, 100, 2))
    metrics, probes = read_records(tmp_path / "metrics.jsonl"), read_records(tmp_path / "probes.jsonl")
    picture = loss_curve(metrics, probes, "a run")
    root = ElementTree.fromstring(picture)
    assert root.tag.endswith("svg")
    assert "href" not in picture
    lines = [element for element in root if element.tag.endswith("polyline")]
    heights = [float(point.split(",")[1]) for point in lines[0].get("points").split()]
    assert heights[0] < heights[-1]  # the loss falls, and y grows downwards
    assert probes[0]["overall"] == pytest.approx(0.75)
