"""Tasks learned one after the other from records: versions, resuming to the bit, rollback, export, bad input."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from continual_site import records, tasks
from held_folder import held_elsewhere
from torch import Tensor

from seamount.core.errors import CheckpointError, ConfigError, InvalidRequestError, NotFoundError, SeamountError
from seamount.models.config import ModelConfig
from seamount.models.loading import load_model
from seamount.training.continual.pipeline import ContinualLearning
from seamount.training.continual.versions import Versions
from seamount.training.tuning.log import read_log
from seamount.training.tuning.pipeline import Silent
from seamount.training.tuning.trainer import StepRecord

Begin = Callable[..., ContinualLearning]


class Killed(Exception):
    """What a kill is in these tests."""


class KilledAt(Silent):
    """Ends the process's work after so many steps, or when a stage begins."""

    def __init__(self, steps: int = -1, stage: str = "") -> None:
        self._left, self._stage = steps, stage

    def step(self, record: StepRecord) -> None:
        self._left -= 1
        if not self._left:
            raise Killed

    def stage(self, text: str) -> None:
        if self._stage and self._stage in text:
            raise Killed


def tensors_of(run: ContinualLearning, number: int) -> dict[str, Tensor]:
    return Versions(run.recipe.output).load(number)[0]


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_each_task_becomes_a_version(begin: Begin) -> None:
    run = begin()
    accuracy = run.train(tasks())
    assert accuracy.tasks == ("first", "second", "third")
    assert [len(row) for row in accuracy.matrix] == [1, 2, 3]
    assert [(v.number, v.task_id, v.num_seen) for v in run.versions()] == [
        (0, "", 0),
        (1, "first", 10),
        (2, "second", 20),
        (3, "third", 30),
    ]
    tensors = tensors_of(run, 3)
    assert len(tensors["memory.lengths"]) == 6
    assert len(tensors["evaluation.0.lengths"]) == 3 and len(tensors["evaluation.2.lengths"]) == 10
    told = json.loads((run.recipe.output / "accuracy.json").read_text(encoding="utf-8"))
    assert told == accuracy.to_fields()
    lines = [line for line in read_log(run.recipe.output / "metrics.jsonl") if line is not None]
    steps = [line for line in lines if line["kind"] == "step"]
    assert [line["step"] for line in steps] == list(range(1, 16))
    assert [line["task"] for line in steps[::5]] == ["first", "second", "third"]
    assert not (run.recipe.output / "learning").exists()


@pytest.mark.parametrize(
    ("kills", "fields"),
    [
        ((KilledAt(8), KilledAt(1)), {}),
        ((KilledAt(2), KilledAt(5)), {"method": "lora"}),
        ((KilledAt(stage="Measuring second"), KilledAt(stage="Measuring second")), {"precision": "bf16"}),
        ((KilledAt(8),), {"ema_decay": 0.9, "experts": {"bias_rate": 0.01, "mtp_weight": 0.1}}),
    ],
)
def test_a_killed_run_comes_to_the_same_weights(
    begin: Begin, kills: tuple[Silent, ...], fields: dict[str, Any]
) -> None:
    given = tasks("first", "second")
    whole = begin("whole", **fields)
    wanted = whole.train(given)
    for kill in kills:
        with pytest.raises(Killed):
            begin("killed", **fields).train(given, watcher=kill)
    again = begin("killed", **fields)
    assert again.train(given) == wanted
    for number in (1, 2):
        assert same(tensors_of(whole, number), tensors_of(again, number))


def test_a_stopped_run_returns_what_is_finished(begin: Begin) -> None:
    run = begin()

    class Stopping(Silent):
        def step(self, record: StepRecord) -> None:
            if record.step == 2:
                run.stop()

    assert run.train(tasks(), watcher=Stopping()).tasks == ()
    assert run.train(tasks("first")).tasks == ("first",)
    assert run.versions()[1].num_steps == 5


def test_a_run_goes_on_with_new_tasks_from_its_folder(begin: Begin) -> None:
    apart, given = begin("apart"), tasks("first", "second")
    apart.train(given[:1])
    later = ContinualLearning.load(apart.recipe.output)
    assert later.train(given[1:]).tasks == ("first", "second")
    whole = begin("whole")
    whole.train(given)
    assert same(tensors_of(later, 2), tensors_of(whole, 2))


def test_rolling_back_brings_everything_back(begin: Begin) -> None:
    run, given = begin(), tasks("first", "second")
    run.train(given)
    assert run.rollback(1).task_id == "first"
    assert run.accuracy().tasks == ("first",)
    run.train(given)
    assert [(v.number, v.parent) for v in run.versions()] == [(0, 0), (1, 0), (2, 1), (3, 1)]
    assert same(tensors_of(run, 2), tensors_of(run, 3))


def test_another_task_after_a_rollback_knows_nothing_of_the_one_that_was_left(begin: Begin) -> None:
    run = begin()
    run.train(tasks("first", "second"))
    run.rollback(1)
    assert run.train(tasks("first", "third")).tasks == ("first", "third")
    assert [(v.number, v.parent, v.task_id) for v in run.versions()][2:] == [(2, 1, "second"), (3, 1, "third")]
    apart = begin("apart")
    apart.train(tasks("first", "third"))
    assert same(tensors_of(run, 3), tensors_of(apart, 2))


def test_the_report_follows_what_is_current(begin: Begin) -> None:
    run = begin()
    run.train(tasks())
    page = (run.recipe.output / "report.html").read_text(encoding="utf-8")
    for said in ("Finished", "Forgetting", "Backward transfer", "second", "What was trained", "version"):
        assert said in page
    assert page.count('class="mark"') == 15  # three tasks begin, in five pictures
    facts = json.loads((run.recipe.output / "facts.json").read_text(encoding="utf-8"))
    assert [facts["data"][name]["num_examples"] for name in ("first", "second", "third")] == [10, 10, 10]
    run.rollback(1)
    assert "Forgetting" not in (run.recipe.output / "report.html").read_text(encoding="utf-8").partition("</dl>")[0]


def test_a_full_disk_is_said_and_the_run_goes_on_afterwards(begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    whole = begin("whole")
    wanted = whole.train(tasks("first", "second"))
    for module, name in (("tuning.state", "write_tensors"), ("continual.versions", "replace_file")):
        run = begin(name)
        run.train(tasks("first"))
        with monkeypatch.context() as patched:
            patched.setattr(f"seamount.training.{module}.{name}", full)
            with pytest.raises(SeamountError, match=r"disk is full|No space left"):
                run.train(tasks("first", "second"))
        assert begin(name).train(tasks("first", "second")) == wanted
        assert same(tensors_of(run, 2), tensors_of(whole, 2))


def test_a_watcher_is_told_which_task_of_how_many(begin: Begin) -> None:
    told: list[Any] = []

    class Listening(Silent):
        def step(self, record: StepRecord) -> None:
            told.append((getattr(record, "task", ""), getattr(record, "task_number", 0), record.step))

    begin().train(tasks("first"), watcher=Listening())
    begin().train(tasks("first", "second"), watcher=Listening())
    assert told == [(name, number, step) for number, name in ((1, "first"), (2, "second")) for step in range(1, 6)]


def test_a_version_becomes_a_model_and_an_adapter(begin: Begin, tmp_path: Path) -> None:
    run = begin()
    run.train(tasks("first", "second"))
    for version in (1, None):
        folder = run.export(tmp_path / f"out-{version}", version)
        config = ModelConfig.from_folder(folder)
        model = load_model(folder, config, dtype=torch.float32, device=torch.device("cpu"), packed=False)
        wanted = tensors_of(run, version or 2)["weights.norm.weight"]
        assert torch.equal(dict(model.named_parameters())["norm.weight"], wanted)
    lora = begin("lora", method="lora")
    lora.train(tasks("first"))
    assert (lora.export(tmp_path / "lora-out") / "adapter_model.safetensors").is_file()


def test_memory_and_consolidation_can_be_left_out(begin: Begin) -> None:
    run = begin(drift_every_steps=1)
    run.train(tasks("first", "second"), memory_buffer_size=0, elastic_weight_consolidation=False)
    names = {name.partition(".")[0] for name in tensors_of(run, 2)}
    assert names == {"weights", "evaluation"}


def test_consolidation_keeps_the_weights_that_matter(begin: Begin) -> None:
    moved = {}
    for weight in (1e-6, 1e3):
        run = begin(f"weight-{weight}", ewc_weight=weight, memory_buffer_size=0)
        run.train(tasks("first", "second"))
        before, after = tensors_of(run, 1), tensors_of(run, 2)
        names = [name.removeprefix("weights.") for name in before if name.startswith("weights.")]
        changes = {name: before[f"weights.{name}"] - after[f"weights.{name}"] for name in names}
        moved[weight] = sum(float((before[f"fisher.{name}"] * changes[name] ** 2).sum()) for name in names)
    assert moved[1e3] < 0.2 * moved[1e-6]


def test_what_is_wrong_with_tasks_is_said_before_any_is_learned(begin: Begin) -> None:
    good = tasks("first")[0]
    for wrong, kind, said in (
        ([], ConfigError, "no tasks"),
        ([good, good], ConfigError, "Two tasks have the id 'first'"),
        ([good, {"task_id": "x"}], ConfigError, "Task 2 has no data"),
        ([good, {**good, "task_id": "x", "dta": 1}], ConfigError, "'dta'"),
        ([good, {"task_id": "x", "data": []}], InvalidRequestError, "no records"),
        ([good, {"task_id": "x", "data": [{"prompt": "a"}]}], InvalidRequestError, "completion"),
        ([{**good, "task_id": 7}], ConfigError, "task_id of task 1"),
    ):
        run = begin()
        with pytest.raises(kind, match=said):
            run.train(wrong)
        assert [version.number for version in run.versions()] == [0]


def test_a_known_task_with_other_data_is_no_task_that_is_finished(begin: Begin) -> None:
    run = begin()
    run.train(tasks("first"))
    with pytest.raises(ConfigError, match="learned already, with other data"):
        run.train([{"task_id": "first", "data": records("second")}])


@pytest.mark.parametrize("changes", [{"memory_buffer_size": 7}, {"seed": 2}, {"method": "lora"}])
def test_a_run_goes_on_as_it_was_begun(begin: Begin, changes: dict[str, Any]) -> None:
    begin().train(tasks("first"))
    with pytest.raises(ConfigError, match="begun with another"):
        begin(**changes).train(tasks())


def test_an_unknown_and_a_damaged_version_are_typed_errors(begin: Begin) -> None:
    run = begin()
    run.train(tasks("first", "second"))
    with pytest.raises(NotFoundError, match="no version 5"):
        run.rollback(5)
    path = run.recipe.output / "versions" / "checkpoint-1" / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b"first", b"fIrst"))
    with pytest.raises(CheckpointError, match="Version 1 cannot be used"):
        run.rollback(1)
    with pytest.raises(CheckpointError, match="Version 1 cannot be used"):
        run.export(run.recipe.output / "out", 1)
    assert run.rollback(2).is_current


def test_a_task_that_is_none_and_a_file_in_the_way_are_named(begin: Begin, tmp_path: Path) -> None:
    run = begin()
    with pytest.raises(ConfigError, match="Task 1 is str"):
        run.train(["first"])  # type: ignore[list-item]
    run.train(tasks()[:1])
    (tmp_path / "taken").write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match="taken cannot be made"):
        run.export(tmp_path / "taken")


def test_nobody_goes_back_while_another_process_learns(begin: Begin) -> None:
    run = begin()
    run.train(tasks()[:1])
    with held_elsewhere(run.recipe.output), pytest.raises(ConfigError, match="Another process is working in"):
        run.rollback(0)
    assert [version.number for version in run.versions() if version.is_current] == [1]
    assert run.rollback(0).is_current
