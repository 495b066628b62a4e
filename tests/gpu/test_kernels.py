"""The Triton kernels on a GPU against the reference: the cases of `tests/unit/kernels/gpu`, compiled.

In a process of their own, because that folder's helper modules are imported by their plain names.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CASES = ROOT / "tests" / "unit" / "kernels" / "gpu"


@pytest.mark.parametrize("name", ["attention", "experts", "rows", "network"])
def test_kernels(name: str) -> None:
    variables = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pytest", "-o", "python_files=cases_*.py", "-o", f"pythonpath={CASES}"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", str(CASES / f"cases_{name}.py")],
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
