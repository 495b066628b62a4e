"""Runs the kernels' cases in processes of their own: in Triton's interpreter, and through its compiler without a GPU.

Whether Triton interprets is decided once per process, when it is imported; so the variable that says it is set for a
child only, and this process never imports Triton. `tests/gpu` runs the same cases on a GPU.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[3]
INTERPRETED = ["attention", "experts", "network", "rows"]

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def run_cases(names: list[str], tmp_path: Path, **variables: str) -> None:
    command = [sys.executable, "-m", "pytest", "-o", "python_files=cases_*.py", "-o", f"pythonpath={FOLDER}"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", *(str(FOLDER / f"cases_{name}.py") for name in names)],
        cwd=ROOT,
        env={**os.environ, **variables, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_case_is_run() -> None:
    assert sorted(path.stem.removeprefix("cases_") for path in FOLDER.glob("cases_*.py")) == sorted(
        ["compile", *INTERPRETED]
    )


def test_kernels_in_the_interpreter(tmp_path: Path) -> None:
    run_cases(INTERPRETED, tmp_path, TRITON_INTERPRET="1")


def test_kernels_compile_for_an_h100(tmp_path: Path) -> None:
    run_cases(["compile"], tmp_path)
