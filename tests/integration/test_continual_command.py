"""Tasks one after the other as a person runs them: `seamount tune` with a recipe of tasks, and `seamount versions`."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from continual_site import records, write_model
from safetensors.torch import load_file

from seamount import LLM, SamplingParams
from seamount.cli.main import main

RECIPE = Path(__file__).parents[2] / "recipes" / "continual.yaml"
QUICK = ("schedule.steps=3", "batch.examples=4", "data.scored=4", "data.max_length=64", "device=cpu")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "run"


def words(model: Path, output: Path, *changes: str, names: tuple[str, ...] = ("first", "second")) -> list[str]:
    tasks = []
    for name in names:
        path = output.parent / f"{name}.jsonl"
        path.write_text("".join(f"{json.dumps(row)}\n" for row in records(name, 20)), encoding="utf-8")
        tasks.append({"task_id": name, "data": str(path)})
    every = (f"model={model}", f"output={output}", f"tasks={json.dumps(tasks)}", *QUICK, *changes)
    return ["tune", str(RECIPE), *(part for change in every for part in ("--set", change))]


def result_of(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return dict(json.loads(capsys.readouterr().out))


def test_the_recipe_runs_and_what_comes_out_answers(
    model: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(model, output)) == 0
    said = capsys.readouterr()
    assert "when learned" in said.out and "forgetting" in said.out
    assert f"Report: {output}/report.html" in said.out and f"seamount serve {output}/model" in said.out
    assert "first (1 of 2)" in said.err and "second (2 of 2)" in said.err
    assert LLM(str(output / "model")).generate("first: number 3?", SamplingParams(max_tokens=3))[0].token_ids
    assert "Backward transfer" in (output / "report.html").read_text(encoding="utf-8")
    # The same again has nothing to do, and says so in JSON.
    assert main([*words(model, output), "--json"]) == 0
    told = result_of(capsys)
    assert told["finished"] and told["tasks"] == ["first", "second"] and told["result"] == f"{output}/model"


def test_an_adapter_comes_out_where_one_is_trained(
    model: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words(model, output, 'adapter={"rank": 2}'), "--quiet"]) == 0
    assert f"seamount serve {model} --adapter {output}/adapter" in capsys.readouterr().out
    assert (output / "adapter" / "adapter_model.safetensors").is_file()


def test_a_dry_run_says_what_each_task_holds_and_writes_nothing(
    model: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = ("schedule.steps=null", "schedule.epochs=2")
    assert main([*words(model, output, *changes), "--dry-run"]) == 0
    said = capsys.readouterr().out
    # 18 new examples each (two are held out), 4 in a step; beside remembered ones only 2 of the 4 are new.
    assert "first: 9 steps\n  train: 18 examples" in said and "evaluation: 2 examples" in said
    assert "second: 18 steps, 18 remembered examples beside" in said
    assert "27 steps of about" in said and "⟦" in said and "red" in said
    assert not output.exists()
    assert main([*words(model, output, *changes), "--dry-run", "--json"]) == 0
    told = result_of(capsys)
    assert [task["num_steps"] for task in told["tasks"]] == [9, 18] and told["plan"]["memory_bytes"] > 0
    assert main([*words(model, output, *changes, names=("first",)), "--quiet"]) == 0
    capsys.readouterr()
    steps = [line for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines() if '"step",' in line]
    assert len(steps) == 9
    assert main([*words(model, output, *changes), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "first: learned already" in said and "18 steps of about" in said


def test_ctrl_c_makes_a_checkpoint_and_the_same_command_goes_on(model: Path, output: Path) -> None:
    changes = ("schedule.steps=40", "saving.checkpoint_every_steps=1000", "saving.evaluate_every_steps=1000")
    command = [sys.executable, "-m", "seamount", *words(model, output, *changes), "--quiet"]
    metrics = output / "metrics.jsonl"
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while not metrics.exists() or '"second"' not in metrics.read_text(encoding="utf-8"):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Stopped with 1 of 2 tasks finished" in said and "goes on from there" in said
    assert list(output.glob("learning/*/checkpoint-*/state.safetensors")) and not (output / "model").exists()
    assert main(command[3:]) == 0
    steps = [line for line in metrics.read_text(encoding="utf-8").splitlines() if '"step",' in line]
    assert [json.loads(line)["step"] for line in steps] == list(range(1, 81))
    assert (output / "model").is_dir()


def test_versions_are_listed_gone_back_to_and_written_out(
    model: Path, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words(model, output), "--quiet"]) == 0
    capsys.readouterr()
    assert main(["versions", str(output)]) == 0
    said = capsys.readouterr().out
    assert "the model as it was" in said and "second" in said and "current" in said
    assert main(["versions", str(output), "--rollback", "1", "--json"]) == 0
    versions = result_of(capsys)["versions"]
    assert [(v["number"], v["task_id"], v["is_current"]) for v in versions] == [
        (0, "", False),
        (1, "first", True),
        (2, "second", False),
    ]
    assert main(["versions", str(output), "--export", str(tmp_path / "out"), "--version", "2"]) == 0
    assert f"Written: {tmp_path}/out/model" in capsys.readouterr().out
    exported, trained = (load_file(folder / "model" / "model.safetensors") for folder in (tmp_path / "out", output))
    assert all(exported[name].equal(trained[name]) for name in trained)
    assert main([*words(model, output, names=("first", "third")), "--json"]) == 0
    assert result_of(capsys)["tasks"] == ["first", "third"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--resume", "7"], "a version, not to a step"),
        (["--resume", "never"], "holds a run already"),
        (["--set", "data.train=x.jsonl"], "each of `tasks` has its own"),
        (["--set", "tasks=[]"], "no tasks"),
        (["--set", "continual.replay_share=2"], "replay_share"),
    ],
)
def test_what_is_wrong_is_said(
    model: Path, output: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words(model, output, names=("first",)), "--quiet"]) == 0
    assert main([*words(model, output, names=("first",)), "--quiet", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_versions_of_what_is_no_run_unknown_ones_and_damaged_ones(
    model: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["versions", str(output)]) == 2
    assert "holds no run of tasks" in capsys.readouterr().err
    assert main([*words(model, output, names=("first",)), "--quiet"]) == 0
    assert main(["versions", str(output), "--rollback", "4"]) == 2
    assert "no version 4" in capsys.readouterr().err
    assert main(["versions", str(output), "--version", "1"]) == 2
    assert "Add --export" in capsys.readouterr().err
    path = output / "versions" / "checkpoint-1" / "state.safetensors"
    held = bytearray(path.read_bytes())
    held[-5] ^= 1
    path.write_bytes(held)
    assert main(["versions", str(output), "--rollback", "1"]) != 0
    assert "Version 1 cannot be used" in capsys.readouterr().err
