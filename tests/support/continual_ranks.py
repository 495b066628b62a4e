"""What each rank of a distributed test runs: two tasks, learned into FOLDER by the model in MODEL.

continual_ranks.py MODEL FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from continual_site import tasks

from seamount import ContinualLearning


def main() -> None:
    """Run one rank."""
    torch.set_num_threads(1)
    run = ContinualLearning.load(
        sys.argv[1],
        output=Path(sys.argv[2]),
        steps=4,
        learning_rate=1e-3,
        examples=4,
        memory_buffer_size=6,
        fisher_examples=5,
        drift_every_steps=1,
        max_length=64,
        device="cpu",
    )
    run.train(tasks("first", "second"))


if __name__ == "__main__":
    main()
