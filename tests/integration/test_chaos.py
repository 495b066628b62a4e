"""A small storm over a real server with a real worker; `bench/chaos.py` says what is checked, and makes larger ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

CHAOS = Path(__file__).parents[2] / "bench" / "chaos.py"


def test_after_a_storm_nothing_is_left_and_every_counter_is_right() -> None:
    words = ["--requests", "300", "--clients", "32", "--kills", "1"]
    done = subprocess.run([sys.executable, str(CHAOS), *words], capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    report = json.loads(done.stdout)
    assert report["wrong"] == []
    assert sum(report["storm"]["outcomes"].values()) == 300
    assert {"ok", "bad", "cancelled"} <= report["storm"]["outcomes"].keys()
    assert done.returncode == 0
