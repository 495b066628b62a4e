"""`seamount quantize` as a person or a script runs it, over the embedded model and a small one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from seamount.cli.main import main
from seamount.models.locate import locate_model


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Calibration text for a tokenizer of bytes and for the embedded model's."""
    path = tmp_path / "texts.jsonl"
    said = [f"What is {number} + {number * 7}? Please answer with the number alone." for number in range(40)]
    path.write_text("\n".join(json.dumps({"messages": [{"role": "user", "content": text}]}) for text in said))
    return path


def test_the_embedded_model_becomes_smaller_and_the_report_says_so(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "tiny-awq"
    words = ["quantize", "seamount-tiny", "--calibration", str(texts), "--samples", "16", "--output", str(output)]
    assert main([*words, "--json"]) == 0
    shown = capsys.readouterr()
    report = json.loads(shown.out)
    assert report["group_size"] == 32
    assert len(report["relative_errors"]) == 6
    assert report["bytes_after"] < 0.5 * report["bytes_before"]
    assert "6 layers, groups of 32" in shown.err
    assert "6 of 6 layers (100%)" in shown.err
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (output / name).read_bytes() == (locate_model("seamount-tiny") / name).read_bytes()


def test_a_person_gets_a_table(small_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "int8"
    assert main(["quantize", str(small_checkpoint), "--method", "rtn", "--bits", "8", "--output", str(output)]) == 0
    shown = capsys.readouterr().out
    assert "rtn, 8 bits" in shown
    assert "bits per weight" in shown


def test_a_killed_job_goes_on(small_checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    """Killed where no handler runs; what stands then is no model, and the same command finishes it."""
    words = ["quantize", str(small_checkpoint), "--calibration", str(texts), "--output"]
    killed = tmp_path / "killed"
    program = (
        "import os, signal, sys\n"
        "from seamount.cli.main import main\n"
        "from seamount.training.compression import compress\n"
        "compress._Run._write_outer = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"main({[*words, str(killed)]!r})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, env=dict(os.environ), check=False)
    assert done.returncode == -signal.SIGKILL
    assert not killed.exists()
    assert main([*words, str(killed)]) == 0
    assert main([*words, str(tmp_path / "whole")]) == 0
    names = sorted(path.name for path in killed.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert all((killed / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in names)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "no calibration file is given"),
        (["--calibration", "missing.txt"], "cannot be read"),
        (["--method", "rtn", "--group-size", "64"], "Groups of 64 do not divide"),
    ],
)
def test_what_is_wrong_is_told_in_two_lines(
    small_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert main(["quantize", str(small_checkpoint), "--output", str(tmp_path / "out"), *arguments]) == 2
    error, hint = capsys.readouterr().err.splitlines()
    assert said in error
    assert hint.startswith("hint: ")
    assert not (tmp_path / "out.partial").exists()
