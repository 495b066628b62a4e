"""What activations of a training step take, with checkpointing and without.

    python bench/activation_memory.py [MODEL] --tokens 4096

A LoRA step over one micro-batch, each way in a process of its own: the most memory that the process held during the
step, less what it held before. `--json` prints the numbers. It measures and never fails on one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import psutil

LENGTH = 128


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="seamount-tiny")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--arm", choices=("plain", "checkpointed"), help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(step_bytes(args.model, args.tokens, checkpointed=args.arm == "checkpointed")))
        return
    told: dict[str, Any] = {}
    for arm in ("plain", "checkpointed"):
        done = subprocess.run([sys.executable, *sys.argv, "--arm", arm], check=True, stdout=subprocess.PIPE, text=True)
        told[arm] = json.loads(done.stdout.splitlines()[-1])
    told["share"] = told["checkpointed"] / told["plain"]
    if args.json:
        print(json.dumps(told))
    else:
        plain, checkpointed = told["plain"] / 1e6, told["checkpointed"] / 1e6
        print(f"plain {plain:,.0f} MB, checkpointed {checkpointed:,.0f} MB: {told['share']:.0%}")


def step_bytes(model: str, num_tokens: int, *, checkpointed: bool) -> int:
    """Bytes that the second of two equal steps took at its peak beyond those that the process held before."""
    from seamount.training.examples.example import Example
    from seamount.training.shards.dataset import ExampleList
    from seamount.training.tuning.distributed import World
    from seamount.training.tuning.network import open_network
    from seamount.training.tuning.recipe import TuneRecipe
    from seamount.training.tuning.trainer import Trainer

    count = num_tokens // LENGTH
    recipe = TuneRecipe.checked(
        {
            "model": model,
            "output": "unused",
            "data": {"max_length": LENGTH},
            "batch": {"examples": count, "micro_tokens": num_tokens},
            "schedule": {"steps": 4},
            "activation_checkpointing": checkpointed,
        },
        where="bench",
    )
    tuned = open_network(recipe, World.join("cpu").device)
    tokens = np.random.default_rng(0).integers(10, 4000, (count, LENGTH)).astype(np.int32)
    trained = np.arange(LENGTH) >= LENGTH - 8  # few, so that logits do not hide what is measured
    data = ExampleList([Example(row, trained) for row in tokens])
    trainer = Trainer(recipe, tuned.model, data, world=World.join("cpu"))
    tuned.model.train()
    trainer.step()  # what the libraries keep for good is not a step's
    process = psutil.Process()
    before = process.memory_info().rss
    seen, ended = [before], threading.Event()

    def watch() -> None:
        while not ended.wait(0.001):
            seen.append(process.memory_info().rss)

    watching = threading.Thread(target=watch)
    watching.start()
    trainer.step()
    ended.set()
    watching.join()
    return max(seen) - before


if __name__ == "__main__":
    main()
