"""What activations of a training step take, with checkpointing and without.

    python bench/activation_memory.py [MODEL] --tokens 4096

A LoRA step over one micro-batch, each way in a process of its own: the most bytes of tensors that lived at once during
the step beside those that lived before it, as torch's allocator counts them. (What a process holds of the system would
hide a part: memory that an earlier step freed stays with it.) `--json` prints the numbers. It measures and never fails
on one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from itertools import accumulate
from typing import Any

import numpy as np

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
    """Bytes that the second of two equal steps took at its peak beyond those that lived before."""
    from torch.profiler import ProfilerActivity, profile

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
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        trainer.step()
    changes = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in changes))


if __name__ == "__main__":
    main()
