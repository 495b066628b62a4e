"""A run's folder as a run leaves it, with numbers that are made up, and names that try to break out of a page."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from seamount.training.tuning.log import RunLog

HOSTILE = """<script>alert(1)</script>'"&<img src=x onerror=alert(2)>{{ 7 * 7 }}</style></pre>"""


def write_run(folder: Path, *, num_steps: int = 400, done: int | None = None, tasks: tuple[str, ...] = ()) -> None:
    """Fill `folder` with a log, facts, scores and a recipe; with `tasks`, as continual learning does."""
    log = RunLog(folder)
    for step in range(1, (done or num_steps) + 1):
        record: dict[str, Any] = {
            "step": step,
            "num_steps": num_steps,
            "loss": 0.05 + 3 * math.exp(-step / 60) * (1 + 0.1 * math.sin(step)),
            "learning_rate": 2e-4 * min(step / 20, 1),
            "gradient_norm": float("nan") if step == 7 else 0.5 + 0.1 * math.cos(step),
            "tokens_per_s": 20_000 + step,
            "imbalance": 1.2,
            "num_tokens": 4_000,
            "num_trained_tokens": 1_000,
            "seconds": 0.2,
            "memory_bytes": 1_700_000_000,
        }
        log.step(record | ({"task": tasks[(step - 1) * len(tasks) // num_steps]} if tasks else {}))
        if step % 100 == 0:
            log.evaluation({"step": step, "phase": "during", "loss": 0.1 + 3 * math.exp(-step / 60)})
            log.event(f"checkpoint-{step} {HOSTILE}")
    log.evaluation({"step": 0, "phase": "before", "skills": {HOSTILE: 0.04, "sums": 0.5}})
    log.evaluation({"step": num_steps, "phase": "after", "skills": {HOSTILE: 0.97, "sums": 0.49}})
    log.close()
    files: dict[str, Any] = {
        "facts.json": {
            "model": f"tiny {HOSTILE}",
            "num_weights": 6_000_000,
            "groups": {"attention": 81_920, f"experts {HOSTILE}": 12_288},
            "data": {
                "leaks": 0,
                "train": {"examples": 2_000, "digest": "ab" * 32, HOSTILE: HOSTILE, "overlong": None},
            },
            "machine": {"processor": HOSTILE, "memory_bytes": 25_000_000_000, "has_gpu": False},
            "software": {"torch": "2.13.0", "names": ["a", HOSTILE]},
        },
        "scores.json": {
            "before": {"num_right": 14, "num_items": 200},
            "after": {"num_right": 193, "num_items": 200},
        },
    }
    if tasks:
        files["accuracy.json"] = {
            "tasks": list(tasks),
            "matrix": [[0.9 if j <= i else None for j in range(len(tasks))] for i in range(len(tasks))],
            "average": 0.9,
            "forgetting": 0.045,
            "backward_transfer": -0.045,
        }
    for name, fields in files.items():
        (folder / name).write_text(json.dumps(fields), encoding="utf-8")
    recipe = f"model: tiny\nnote: {HOSTILE}\ntracking:\n  mlflow: http://me:secret@host:5000\n"
    (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
