"""What each rank of a distributed test runs: a whole run of `FineTuningPipeline`, in which rank 1 may come to harm.

pipeline_ranks.py MODEL FOLDER STRATEGY [HARM]: HARM is `killed` (SIGKILL, after some steps), `asked` to end
(SIGTERM, likewise), `recipe` (it has another one) or `data` (it cannot read its own).
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch
from continual_site import records

from seamount import FineTuningPipeline
from seamount.core.settings import ranks

SIGNALS = {"killed": signal.SIGKILL, "asked": signal.SIGTERM}


def main() -> None:
    """Run one rank."""
    model, folder, strategy, *rest = sys.argv[1:]
    torch.set_num_threads(1)
    harm = rest[0] if rest and ranks().rank == 1 else ""
    if harm in SIGNALS:
        threading.Thread(target=harmed, args=(Path(folder) / "metrics.jsonl", SIGNALS[harm]), daemon=True).start()
    FineTuningPipeline(
        model,
        "no-such-file.jsonl" if harm == "data" else [row for name in ("first", "second") for row in records(name)],
        evaluation=records("first", 14)[10:],
        output=folder,
        learning_rate=2e-3 if harm == "recipe" else 1e-3,
        strategy=strategy,
        device="cpu",
        data={"max_length": 64, "scored": 0},
        batch={"examples": 4, "micro_tokens": 128},
        schedule={"steps": 40 if rest else 4},
        saving={"checkpoint_every_steps": 2},
    ).run()


def harmed(metrics: Path, number: int) -> None:
    """Send this process a signal when some steps are done."""
    while not metrics.exists() or len(metrics.read_bytes().splitlines()) < 5:
        time.sleep(0.01)
    os.kill(os.getpid(), number)


if __name__ == "__main__":
    main()
