"""What a newcomer meets first: the environment is made with a Python that is new enough, or they are told plainly."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def make_environment(folder: Path, path: Path, python: str = "python3") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["/bin/sh", str(ROOT / ".ci" / "environment"), str(folder)],
        env={"PATH": f"{path}:/usr/bin/none", "PYTHON": python},
        capture_output=True,
        text=True,
        check=False,
    )


def program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)


def test_a_python_that_is_too_old_is_told_with_its_version(tmp_path: Path) -> None:
    program(tmp_path / "python3", '[ "$1" = --version ] && echo "Python 3.9.2"; [ "$1" != -c ]')
    done = make_environment(tmp_path / "venv", tmp_path)
    assert done.returncode == 1
    assert "error: Seamount needs Python 3.11 or newer; python3 is: Python 3.9.2." in done.stderr
    assert "hint: " in done.stderr


def test_no_python_is_told(tmp_path: Path) -> None:
    done = make_environment(tmp_path / "venv", tmp_path, "python9")
    assert done.returncode == 1
    assert "python9 is:" in done.stderr


def test_a_newer_python_under_another_name_is_found(tmp_path: Path) -> None:
    program(tmp_path / "python3", "exit 1")
    program(tmp_path / "python3.12", '[ "$1" = -m ] && echo "$@" >"$(dirname "$0")/called"; true')
    os.symlink(shutil.which("dirname") or "", tmp_path / "dirname")
    done = make_environment(tmp_path / "venv", tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "called").read_text() == f"-m venv {tmp_path / 'venv'}\n"


def test_a_python_without_venv_is_told(tmp_path: Path) -> None:
    program(tmp_path / "python3", '[ "$1" != -m ]')
    os.symlink(shutil.which("rm") or "", tmp_path / "rm")
    done = make_environment(tmp_path / "venv", tmp_path)
    assert done.returncode == 1
    assert "python3-venv" in done.stderr
