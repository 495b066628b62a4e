"""`seamount tune` as a person runs it: each recipe in small, stopped and killed and gone on, and what is wrong said."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from held_folder import held_elsewhere
from safetensors.torch import load_file

from seamount import LLM, FineTuningPipeline, SamplingParams
from seamount.cli.main import main
from seamount.core.errors import SeamountError

RECIPES = Path(__file__).parents[2] / "recipes"
QUICK = ("schedule.steps=3", "batch.examples=4", "data.scored=2", "data.max_length=128")


def write_examples(path: Path, count: int = 40) -> Path:
    rows = (
        {"messages": [{"role": "user", "content": f"Code of {n}?"}, {"role": "assistant", "content": f"X{n * 7}"}]}
        for n in range(count)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def words(recipe: str, data: Path, output: Path, *changes: str) -> list[str]:
    every = (f"data.train={data}", f"output={output}", *QUICK, *changes)
    return ["tune", str(RECIPES / f"{recipe}.yaml"), *(part for change in every for part in ("--set", change))]


def result_of(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return dict(json.loads(capsys.readouterr().out))


@pytest.mark.parametrize("recipe", ["full", "lora", "qlora"])
def test_each_recipe_runs_and_what_comes_out_answers(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, output = write_examples(tmp_path / "data.jsonl"), tmp_path / "run"
    assert main([*words(recipe, data, output), "--json"]) == 0
    told = result_of(capsys)
    assert told["step"] == told["num_steps"] == 3
    assert 0 <= told["before"] <= 1 and 0 <= told["after"] <= 1
    llm = LLM(told["result"]) if recipe == "full" else LLM("seamount-tiny", adapter=told["result"])
    assert llm.chat([{"role": "user", "content": "Code of 3?"}], SamplingParams(max_tokens=4))[0].token_ids
    steps = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in steps if line["kind"] == "step"] == [1, 2, 3]
    assert "<html" in (output / "report.html").read_text(encoding="utf-8")


def test_a_file_of_examples_is_what_an_evaluation_asks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    question = {
        "messages": [{"role": "user", "content": "17 + 25?"}, {"role": "assistant", "content": "The answer is 42."}]
    }
    wrong = {"messages": [{"role": "user", "content": "17 + 25?"}, {"role": "assistant", "content": "41"}]}
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in (question, wrong)), encoding="utf-8")
    assert main(["eval", "seamount-tiny", "--data", str(data), "--json"]) == 0
    told = result_of(capsys)
    assert (told["num_right"], told["num_items"]) == (1, 2)


def final_weights(output: Path) -> dict[str, Any]:
    return load_file(output / "adapter" / "adapter_model.safetensors")


def test_killed_again_and_again_it_ends_with_the_same_weights(tmp_path: Path) -> None:
    data = write_examples(tmp_path / "data.jsonl")
    changes = ("schedule.steps=6", "saving.checkpoint_every_steps=1", "data.scored=0", "adapter.dropout=0.1")

    def command(output: Path) -> list[str]:
        return [sys.executable, "-m", "seamount", *words("lora", data, output, *changes), "--quiet"]

    subprocess.run(command(tmp_path / "whole"), check=True, stdout=subprocess.DEVNULL)
    broken = tmp_path / "broken"
    for until in (1, 3):  # killed at the first look behind this checkpoint, whatever it is doing then
        with subprocess.Popen(command(broken), stdout=subprocess.DEVNULL) as process:
            while not any((broken / "checkpoints" / f"checkpoint-{n}").exists() for n in range(until, 7)):
                assert process.poll() is None
            process.kill()
    subprocess.run(command(broken), check=True, stdout=subprocess.DEVNULL)
    wanted, found = final_weights(tmp_path / "whole"), final_weights(broken)
    assert wanted.keys() == found.keys()
    assert all(wanted[name].equal(found[name]) for name in wanted)


def test_ctrl_c_makes_a_checkpoint_and_says_how_to_go_on(tmp_path: Path) -> None:
    data, output = write_examples(tmp_path / "data.jsonl"), tmp_path / "run"
    changes = ("schedule.steps=400", "saving.checkpoint_every_steps=1000", "data.scored=0")
    command = [sys.executable, "-m", "seamount", *words("lora", data, output, *changes), "--quiet"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while not (output / "metrics.jsonl").exists() or '"step"' not in (output / "metrics.jsonl").read_text():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "goes on from there" in said
    assert [path.name for path in (output / "checkpoints").iterdir() if path.name.startswith("checkpoint-")]


def test_a_dry_run_says_what_would_be_trained_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, output = write_examples(tmp_path / "data.jsonl"), tmp_path / "run"
    assert main([*words("lora", data, output), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "attention" in said and "3 steps" in said
    assert "⟦‹</think>›X0‹<｜end▁of▁sentence｜>›⟧" in said
    assert not output.exists()
    assert main([*words("lora", data, output), "--dry-run", "--json"]) == 0
    assert result_of(capsys)["num_steps"] == 3


def test_the_same_in_python_over_an_iterable(tmp_path: Path) -> None:
    rows = [{"prompt": f"Code of {n}?", "completion": f" X{n}"} for n in range(12)]
    pipeline = FineTuningPipeline(
        model="seamount-tiny",
        data_loader=rows,
        learning_rate=1e-4,
        epochs=1,
        output=tmp_path / "run",
        batch={"examples": 4},
        data={"max_length": 64},
    )
    result = pipeline.run()
    assert result.finished and result.step == 3
    assert result.result is not None and (result.result / "model.safetensors").exists()


def flip_a_byte(output: Path) -> None:
    path = max(output.glob("checkpoints/checkpoint-*/state.safetensors"))
    held = bytearray(path.read_bytes())
    held[-5] ^= 1
    path.write_bytes(held)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("", "no records"),
        ('{"messages": []}', "messages"),
        ('{"messages": [{"role": "user", "content": "only a question"}]}', "messages"),
        ('{"text": ' + json.dumps("long " * 500) + "}", "128"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "loss": false}]}', ""),
        ("{not json", "JSON"),
    ],
)
def test_bad_data_is_named_and_nothing_is_trained(
    rows: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(rows + "\n" if rows else "", encoding="utf-8")
    assert main([*words("lora", data, tmp_path / "run"), "--quiet"]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_damaged_checkpoint_another_recipe_and_a_folder_in_use_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, output = write_examples(tmp_path / "data.jsonl"), tmp_path / "run"
    quick = words("lora", data, output, "data.scored=0")
    assert main([*quick, "--quiet"]) == 0
    assert main([*quick, "--quiet", "--resume", "never"]) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert main([*quick, "--set", "adapter.rank=4", "--quiet"]) == 2
    assert "adapter.rank 16; it is 4 now" in capsys.readouterr().err
    flip_a_byte(output)
    assert main([*quick, "--quiet"]) == 2
    assert "state.safetensors" in capsys.readouterr().err


def test_what_is_refused_on_going_on_leaves_all_as_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, output = write_examples(tmp_path / "data.jsonl"), tmp_path / "run"
    fixed = ("data.scored=0", "data.evaluation_share=0", "saving.checkpoint_every_steps=1")
    quick = words("lora", data, output, *fixed)
    assert main([*quick, "--quiet"]) == 0

    def files() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in sorted(output.rglob("*")) if path.is_file()}

    before = files()
    other = write_examples(tmp_path / "other.jsonl", 30)
    for changes, said in (
        (["--resume", "0"], "no checkpoint of step 0"),
        (["--resume", "-1"], "no checkpoint of step -1"),
        (["--resume", "2", "--set", f"data.train={other}"], "training data is not that"),
        (["--set", "adapter.alpha=64"], "adapter.alpha 32.0; it is 64.0 now"),
        (["--set", "optimizer.learning_rate=5e-4"], "optimizer.learning_rate 0.001; it is 0.0005 now"),
        (["--set", "seed=7"], "seed 0; it is 7 now"),
    ):
        assert main([*quick, "--quiet", *changes]) == 2
        assert said in capsys.readouterr().err
        assert files() == before


def test_damaged_scores_are_made_anew(tmp_path: Path) -> None:
    quick = words("lora", write_examples(tmp_path / "data.jsonl"), tmp_path / "run")
    assert main([*quick, "--quiet"]) == 0
    scores = tmp_path / "run" / "scores.json"
    held = json.loads(scores.read_text(encoding="utf-8"))
    scores.write_bytes(b"{\xff")
    assert main([*quick, "--quiet"]) == 0
    assert json.loads(scores.read_text(encoding="utf-8")) == held


def test_one_process_at_a_time_works_in_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "run"
    quick = words("lora", write_examples(tmp_path / "data.jsonl"), output, "data.scored=0")
    with held_elsewhere(output):
        assert main([*quick, "--quiet"]) == 2
        assert "Another process is working in" in capsys.readouterr().err
    assert main([*quick, "--quiet"]) == 0


def test_an_evaluation_example_that_is_trained_on_stops_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_examples(tmp_path / "data.jsonl")
    held_out = write_examples(tmp_path / "held-out.jsonl", 2)
    changes = (f"data.evaluation={held_out}", "data.evaluation_share=0")
    assert main([*words("lora", data, tmp_path / "run", *changes), "--quiet"]) == 2
    assert "occur in the training data" in capsys.readouterr().err


def test_a_full_disk_is_said_and_the_run_goes_on_afterwards(tmp_path: Path) -> None:
    data, output = write_examples(tmp_path / "data.jsonl"), tmp_path / "run"

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    full_disk = pytest.MonkeyPatch()
    full_disk.setattr("seamount.training.tuning.state.write_tensors", full)
    fields: dict[str, Any] = {
        "data": {"max_length": 128},
        "batch": {"examples": 4},
        "schedule": {"steps": 2},
    }
    pipeline = FineTuningPipeline(data_loader=data, method="lora", output=output, **fields)
    with pytest.raises(SeamountError, match="disk is full"):
        pipeline.run()
    full_disk.undo()
    assert pipeline.run().finished
