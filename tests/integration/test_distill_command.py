"""`seamount distill` as a person runs it: the recipe in small, from both sources, stopped and gone on; bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from seamount import LLM, SamplingParams
from seamount.cli.main import main
from seamount.models.locate import locate_model

RECIPE = Path(__file__).parents[2] / "recipes" / "distill.yaml"
QUICK = ("schedule.steps=3", "batch.examples=4", "data.scored=2", "data.max_length=128")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    rows = (
        {"messages": [{"role": "user", "content": f"Code of {n}?"}, {"role": "assistant", "content": f"X{n * 7}"}]}
        for n in range(40)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def words(data: Path, output: Path, *changes: str) -> list[str]:
    every = (f"data.train={data}", f"output={output}", *QUICK, *changes)
    return ["distill", str(RECIPE), "--quiet", *(part for change in every for part in ("--set", change))]


def result_of(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return dict(json.loads(capsys.readouterr().out))


@pytest.mark.parametrize("source", [(), ("distillation.top_k=16",)])
def test_the_recipe_makes_a_student_that_answers(
    data: Path, tmp_path: Path, source: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    assert main([*words(data, output, *source), "--json"]) == 0
    told = result_of(capsys)
    sizes = told["sizes"]
    assert sizes["student_weights"] <= sizes["teacher_weights"] / 4
    assert told["run"]["step"] == told["run"]["num_steps"] == 3
    assert 0 <= told["teacher_accuracy"] <= 1 and 0 <= told["student_accuracy"] <= 1
    llm = LLM(told["run"]["result"])
    assert llm.chat([{"role": "user", "content": "Code of 3?"}], SamplingParams(max_tokens=4))[0].token_ids
    assert "teacher accuracy" in (output / "report.html").read_text(encoding="utf-8")
    assert (output / "teacher-cache" / "cache.json").exists() == bool(source)


def test_a_student_of_another_family_and_one_that_exists(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {
        "model_type": "qwen3",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 8,
        "tie_word_embeddings": True,
    }
    made = f"student={json.dumps({'config': config})}"
    assert main([*words(data, tmp_path / "first", made), "--json"]) == 0
    first = result_of(capsys)["run"]["result"]
    assert main([*words(data, tmp_path / "second", f"student={json.dumps({'model': first})}"), "--json"]) == 0
    second = result_of(capsys)["run"]
    assert second["before"] is not None and second["after"] is not None


def test_a_run_that_was_cut_off_goes_on(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = ("saving.checkpoint_every_steps=1", "data.scored=0")
    assert main([*words(data, tmp_path / "whole", *changes), "--json"]) == 0
    assert main([*words(data, tmp_path / "cut", *changes), "--json"]) == 0
    capsys.readouterr()
    shutil.rmtree(tmp_path / "cut" / "model")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "checkpoint-3")
    assert main([*words(data, tmp_path / "cut", *changes), "--json"]) == 0
    assert result_of(capsys)["run"]["step"] == 3
    results = [tmp_path / name / "model" / "model.safetensors" for name in ("whole", "cut")]
    assert results[0].read_bytes() == results[1].read_bytes()


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words(data, tmp_path / "run", "distillation.top_k=8"), "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "Student: 2,0" in told and "guesses take" in told and "3 steps" in told
    assert not (tmp_path / "run").exists()


def wrong(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(words) != 0
    return capsys.readouterr().err


def test_another_tokenizer_is_said(
    data: Path, tmp_path: Path, small_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student = f"student={json.dumps({'model': str(small_checkpoint)})}"
    assert "tokenizers of" in wrong(words(data, tmp_path / "run", student), capsys)


def test_a_cache_of_another_teacher_and_of_other_data_is_said(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = (f"distillation.cache={tmp_path / 'cache'}", "distillation.top_k=8", "data.scored=0")
    assert main(words(data, tmp_path / "run", *kept)) == 0
    data.write_text("".join(data.read_text(encoding="utf-8").splitlines(keepends=True)[:30]), encoding="utf-8")
    assert "another data" in wrong(words(data, tmp_path / "other", *kept), capsys)
    teacher = tmp_path / "teacher"
    shutil.copytree(locate_model("seamount-tiny"), teacher)
    content = bytearray((teacher / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (teacher / "model.safetensors").write_bytes(content)
    assert "another teacher" in wrong(words(data, tmp_path / "third", f"teacher={teacher}", *kept), capsys)


def test_a_student_larger_than_its_teacher_is_warned_of(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words(data, tmp_path / "small", "data.scored=0")]) == 0
    changes = (f"teacher={tmp_path / 'small' / 'model'}", 'student={"model": "seamount-tiny"}', "data.scored=0")
    loud = [word for word in words(data, tmp_path / "large", *changes) if word != "--quiet"]
    assert main(loud) == 0
    assert "more than its teacher" in capsys.readouterr().err
