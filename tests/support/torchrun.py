"""Starts the programs of this folder as ranks: `ranks`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def ranks(program: str, count: int, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a program of this folder in so many processes, under torchrun where there are several, to its end."""
    folder = Path(__file__).parent
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    command = [*(launcher if count > 1 else [sys.executable]), str(folder / program), *words]
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)
