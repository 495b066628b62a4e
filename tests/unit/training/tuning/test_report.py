"""The page about a run: what it says, that nothing can break out of it, and that missing parts are left out."""

from __future__ import annotations

import base64
import errno
import hashlib
import html
import json
import os
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from run_folder import HOSTILE, write_run

from seamount.core.errors import CapacityError, ConfigError
from seamount.training.tuning.curves import Curve, draw
from seamount.training.tuning.log import RunLog
from seamount.training.tuning.report import write_report
from seamount.training.tuning.surroundings import surroundings


class Page(HTMLParser):
    """Tags with their attributes, and the text that a reader sees."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.parts: list[str] = []
        self.feed(text)
        self.text = re.sub(r"\s+", " ", " ".join(self.parts))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.parts.append(data)


def page_of(folder: Path) -> tuple[Page, str]:
    write_report(folder, folder / "report.html")
    text = (folder / "report.html").read_text(encoding="utf-8")
    return Page(text), text


def test_it_says_what_the_run_was(tmp_path: Path) -> None:
    write_run(tmp_path / "my-run")
    page, _ = page_of(tmp_path / "my-run")
    for part in (
        "Finished · run my-run",
        "7.0 % → 96.5 %",
        "(4 to 11)",  # Wilson's interval of 14 in 200
        "+89.5 points",
        "-1.0 points",
        "400,000 trained tokens seen",
        "1 min 20 s in steps",
        "1.7 GB memory at most",
        "attention 81,920 1.365%",
        "trained in all 94,208 1.570%",
        "examples 2,000",
        "digest abababababababab…",
        "memory 25 GB",
        "has gpu no",
        "Step 100: checkpoint-100",
        "mlflow: http://host:5000",
    ):
        assert part in page.text, part
    pictures = [attributes["aria-label"] for tag, attributes in page.tags if attributes.get("class") == "chart"]
    assert pictures == [
        "Loss over steps",
        "Learning rate over steps",
        "Gradient norm over steps",
        "Tokens per second over steps",
        "Busiest expert's load over the mean over steps",
    ]
    assert "secret" not in page.text


def test_nothing_breaks_out_and_nothing_is_loaded(tmp_path: Path) -> None:
    write_run(tmp_path, tasks=(HOSTILE, "b"))
    page, text = page_of(tmp_path)
    assert {tag for tag, _ in page.tags} & {"script", "img", "link", "iframe", "a", "object", "form"} == set()
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on") or name == "style"]
    assert not [name for _, attributes in page.tags for name in attributes if name in ("href", "src")]
    assert HOSTILE not in text
    assert page.text.count("{{ 7 * 7 }}") >= 8  # shown as it is, never computed
    (policy,) = [attributes["content"] for tag, attributes in page.tags if tag == "meta" and "http-equiv" in attributes]
    style = text[text.index("<style>") + 7 : text.index("</style>")]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    assert "url(" not in style
    assert "@import" not in style


def test_tasks_in_sequence_have_their_matrix(tmp_path: Path) -> None:
    write_run(tmp_path, tasks=("sums", "units", "dates"))
    page, text = page_of(tmp_path)
    assert "Accuracy after sums units dates sums 90.0 % units 90.0 % 90.0 %" in page.text
    assert "4.5 points forgetting" in page.text  # in short
    assert "Forgetting 4.5 points Backward transfer -4.5 points" in page.text
    assert len(re.findall(r'class="mark"', text)) == 15  # three tasks begin, in five pictures
    assert "dates" in text[text.index('<svg class="chart"') :]


def test_a_run_that_was_stopped_says_so(tmp_path: Path) -> None:
    write_run(tmp_path, done=150)
    page, _ = page_of(tmp_path)
    assert "Stopped after step 150 of 400" in page.text


def test_what_is_missing_is_left_out(tmp_path: Path) -> None:
    page, _ = page_of(tmp_path)
    assert "No step was done" in page.text
    titles = ("Accuracy before", "Course", "What was trained", "Data", "Events", "Recipe")
    assert not any(title in page.text.partition("</style>")[2] for title in titles)
    log = RunLog(tmp_path)
    log.step({"step": 1, "loss": 2.0})
    log.close()
    (tmp_path / "scores.json").write_text(json.dumps({"asked_of": "x", "before": {"num_right": 1, "num_items": 2}}))
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b"\xff damaged\n")
    page, text = page_of(tmp_path)
    assert "Finished · run" in page.text
    assert "1 lines of metrics.jsonl cannot be read" in page.text
    assert '<circle class="dot curve-0"' in text


@pytest.mark.parametrize("content", ["{", "[1]", "\ud800"])
def test_a_damaged_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "facts.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(ConfigError, match="facts.json"):
        write_report(tmp_path, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_a_full_disk_leaves_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "report.html").write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CapacityError, match="No space left"):
        write_report(tmp_path, tmp_path / "report.html")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("report.html", "old")]


def _places(picture: str, tag: str) -> list[tuple[float, float]]:
    (points,) = re.findall(rf'<{tag} [^>]*points="([^"]*)"', picture)
    return [tuple(map(float, pair.split(","))) for pair in points.split()]  # type: ignore[misc]


@pytest.mark.parametrize("span", [1e-9, 1.0, 25.0, 1e4])
def test_a_curve_lies_where_its_values_are(span: float) -> None:
    """Higher is higher, later is further right, and all of it within the picture; on both kinds of axis."""
    picture = draw("x", [Curve("line", [(step, 1.0 + span * step / 99) for step in range(100)])], is_wide=True)
    places = _places(picture, "polyline")
    assert len(places) == 100
    assert all(a[0] < b[0] and a[1] >= b[1] for a, b in pairwise(places))
    width, height = map(int, re.findall(r'viewBox="0 0 (\d+) (\d+)"', picture)[0])
    assert all(0 <= x <= width and 0 <= y <= height for x, y in places)
    assert 1 < len(re.findall('class="grid"', picture)) < 12


def test_many_steps_become_few_points_and_a_band() -> None:
    values = [(float(step), 1.0 + step % 2) for step in range(100_000)]
    picture = draw("x", [Curve("line", values)])
    assert len(_places(picture, "polyline")) == 240
    assert len(_places(picture, "polygon")) == 480
    assert len(picture) < 30_000


@pytest.mark.parametrize("points", [[], [(1.0, float("nan"))], [(1.0, float("inf"))]])
def test_no_points_are_no_picture(points: list[tuple[float, float]]) -> None:
    assert draw("x", [Curve("line", points)]) == ""


@pytest.mark.parametrize("value", [0.0, -3.0, 5e-7, 4e9])
def test_a_value_that_never_changes_can_be_drawn(value: float) -> None:
    for from_zero in (False, True):
        picture = draw(html.escape("x"), [Curve("dots", [(1.0, value), (2.0, value)])], from_zero=from_zero)
        assert picture.count("<circle") == 2


def test_surroundings_are_names_and_versions() -> None:
    told: dict[str, Any] = surroundings(torch.device("cpu"))
    assert told["software"]["torch"] == torch.__version__
    assert told["machine"]["memory_bytes"] > 0
    assert json.loads(json.dumps(told)) == told
