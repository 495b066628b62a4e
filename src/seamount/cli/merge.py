"""`seamount merge`: add an adapter to its model, and write the sum as a checkpoint of its own."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from seamount.models.locate import locate_model

from .progress import LoadingProgress

DESCRIPTION = """Add a LoRA adapter (a folder as PEFT writes it) to its model and write a whole checkpoint: config,
tokenizer and templates are copied, sums are formed in fp32 and rounded once to the type that each tensor has. Weights
of few bits are written in 16. One tensor is in memory at a time. Both sources stay as they are; a merge that is stopped
leaves OUTPUT.partial at most, which the next one replaces. `seamount serve --adapter` needs no merging."""
ARGUMENTS = "MODEL ADAPTER --output FOLDER"
EXAMPLES = """  seamount merge seamount-tiny runs/mine/adapter --output mine
  seamount merge /models/folder /models/adapter --output /models/merged"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("model", metavar="MODEL", help="folder of a checkpoint, or the name of an embedded model")
    parser.add_argument("adapter", metavar="ADAPTER", type=Path, help="folder of the adapter")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="folder to be made")


def run(args: argparse.Namespace) -> int:
    """Merge and say where the result is."""
    folder = locate_model(args.model)
    from seamount.training.adapters.merge import merge

    # A merge that is told to end cleans up, as one that is interrupted does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with LoadingProgress(args.model, verb="Merging") as progress:

        def written(done: int, total: int) -> None:
            progress("weights", done, total)

        merge(folder, args.adapter.expanduser(), args.output, progress=written)
    print(f"{args.output} holds the merged checkpoint.", file=sys.stderr)
    return 0
