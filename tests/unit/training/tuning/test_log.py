"""The run's own log: whole lines or none, nothing behind a step that the run goes on from."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from seamount.core.errors import BackendError, CapacityError, ConfigError
from seamount.training.tuning import log as log_module
from seamount.training.tuning.log import RunLog, read_log


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_each_record_is_a_line_of_json(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "run")
    log.step({"step": 1, "loss": 0.1 + 0.2, "num_tokens": 512, "phase": "train", "gradient_norm": float("nan")})
    log.event("checkpoint-1 written")
    log.evaluation({"step": 1, "phase": "during", "accuracy": 0.5, "skills": {"算术": 1.0, "b": float("inf")}})
    log.close()
    assert lines(tmp_path / "run") == [
        {"kind": "step", "step": 1, "loss": 0.3, "num_tokens": 512, "phase": "train", "gradient_norm": None},
        {"kind": "event", "step": 1, "text": "checkpoint-1 written"},
        {"kind": "evaluation", "step": 1, "phase": "during", "accuracy": 0.5, "skills": {"算术": 1.0, "b": None}},
    ]
    assert list(read_log(tmp_path / "run" / "metrics.jsonl")) == lines(tmp_path / "run")


def test_a_run_that_goes_on_drops_what_it_will_do_again(tmp_path: Path) -> None:
    first = RunLog(tmp_path)
    for step in (1, 2, 3):
        first.step({"step": step, "loss": float(step)})
        first.event(f"done {step}")
    first.evaluation({"step": 3, "phase": "during", "loss": 1.0})
    first.close()
    second = RunLog(tmp_path)
    second.rewind(2)
    second.event("goes on")
    second.step({"step": 3, "loss": 3.5})
    second.close()
    assert [(line["step"], line.get("loss"), line.get("text")) for line in lines(tmp_path)] == [
        (1, 1.0, None),
        (1, None, "done 1"),
        (2, 2.0, None),
        (2, None, "done 2"),
        (2, None, "goes on"),
        (3, 3.5, None),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_line_that_a_power_cut_broke_off_is_taken_away(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.step({"step": 1, "loss": 1.0})
    log.close()
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    for torn in (b'{"kind": "st', b'{"kind": "step", "step": 2}', b"x" * 200_000):
        (tmp_path / "metrics.jsonl").write_bytes(whole + torn)
        RunLog(tmp_path).close()
        assert (tmp_path / "metrics.jsonl").read_bytes() == whole
    (tmp_path / "metrics.jsonl").write_bytes(b"no line at all")
    RunLog(tmp_path).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_a_damaged_line_is_told_of_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"kind":"step","step":1}\n\xff\x00 not JSON\n[1]\n{"kind":"step","step":2}\n')
    assert [record and record["step"] for record in read_log(path)] == [1, None, None, 2]
    log = RunLog(tmp_path)
    log.rewind(1)
    log.close()
    assert path.read_bytes() == b'{"kind":"step","step":1}\n\xff\x00 not JSON\n[1]\n'


def test_no_log_is_an_empty_one(tmp_path: Path) -> None:
    assert list(read_log(tmp_path / "metrics.jsonl")) == []


def _full_after(monkeypatch: pytest.MonkeyPatch, name: str, allowed: int) -> None:
    """Let a call to the system write `allowed` bytes, or succeed as often, before the disk is full."""
    real = getattr(os, name)
    left = allowed

    def full(first: Any, *rest: Any, **options: Any) -> Any:
        nonlocal left
        if name == "write":
            rest = (rest[0][:left],)
            left -= len(rest[0])
            if rest[0]:
                return real(first, *rest)
        elif left > 0:
            left -= 1
            return real(first, *rest, **options)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, name, full)


@pytest.mark.parametrize("allowed", [0, 1, 20])
def test_a_full_disk_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: int) -> None:
    log = RunLog(tmp_path)
    log.step({"step": 1, "loss": 1.0})
    with monkeypatch.context() as patch:
        _full_after(patch, "write", allowed)
        with pytest.raises(CapacityError, match=r"metrics.jsonl cannot be written: No space left") as caught:
            log.step({"step": 2, "loss": 2.0})
        assert caught.value.code == "disk_full"
    assert [line["step"] for line in lines(tmp_path)] == [1]
    log.step({"step": 2, "loss": 2.0})
    log.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_while_lines_are_dropped_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    log = RunLog(tmp_path)
    for step in (1, 2):
        log.step({"step": step})
    with monkeypatch.context() as patch:
        _full_after(patch, call, 0)
        with pytest.raises(CapacityError):
            log.rewind(1)
    log.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CapacityError, match="Not a directory"):
        RunLog(tmp_path / "file" / "run")


class _Leaving:
    """A tracker whose server goes away after two steps."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, dict[str, float]]] = []

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if step == 3:
            raise BackendError("MLflow's store could not be written: refused.")
        self.seen.append((step, dict(values)))

    def rewind(self, step: int) -> None: ...

    def flush(self) -> None: ...

    def close(self, *, finished: bool) -> None:
        raise BackendError("It is closed already.")


def test_a_tracker_that_fails_is_left_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker, told = _Leaving(), []
    monkeypatch.setattr(log_module, "open_trackers", lambda *_, **__: [tracker])
    log = RunLog(tmp_path, mlflow="http://127.0.0.1:1", tell=told.append)
    log.step({"step": 1, "loss": 2.0, "phase": "train", "done": True, "gradient_norm": float("inf")})
    log.evaluation({"step": 2, "accuracy": 0.5, "skills": {"a": 1}})
    for step in (3, 4):
        log.step({"step": step, "loss": 2.0})
    log.close()
    assert tracker.seen == [
        (1, {"train/loss": 2.0}),
        (2, {"evaluation/accuracy": 0.5, "evaluation/skills/a": 1.0}),
    ]
    assert [(line["step"], line["kind"]) for line in lines(tmp_path)] == [
        (1, "step"),
        (2, "evaluation"),
        (3, "step"),
        (3, "event"),
        (4, "step"),
    ]
    assert told == ["MLflow's store could not be written: refused. The run goes on, and metrics.jsonl has all of it."]


@pytest.mark.parametrize(("package", "options"), [("tensorboard", {"tensorboard": True}), ("mlflow", {"mlflow": "x"})])
def test_a_package_that_is_missing_is_said_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, options: dict[str, Any]
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ConfigError, match=f"the package `{package}` is not installed"):
        RunLog(tmp_path, **options)
