"""`seamount inspect`: what a checkpoint is and whether it runs here, without loading its weights."""

from __future__ import annotations

import argparse

from seamount.models.locate import locate_model

from . import flags
from .screen import harmless

DESCRIPTION = """Say what a checkpoint is: family, parameters, precision, bytes on disk, cache per token, chat template;
what would run it on this machine, whether it fits in memory, and with how much context. No weights are loaded.
The exit code is 0 also when the model does not fit; --json has the field "fits"."""
ARGUMENTS = "FOLDER [FLAGS]"
EXAMPLES = """  seamount inspect /models/folder
  seamount inspect seamount-tiny --json
  seamount inspect /models/folder --dtype float32"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument(
        "model", metavar="FOLDER", help="folder of a checkpoint, a .gguf file, or the name of an embedded model"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    flags.add_engine_flags(parser, ("dtype", "quantization", "device"))


def run(args: argparse.Namespace) -> int:
    """Inspect and print."""
    config = flags.settings_from(args).engine
    folder = locate_model(config.model)
    from seamount.ops.inspection import inspect_checkpoint

    found = inspect_checkpoint(folder, dtype=config.dtype, quantization=config.quantization, device=config.device)
    if args.json:
        print(found.to_json())
        return 0
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False, emoji=False)
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in found.rows():
        table.add_row(name, harmless(value))
    console.print(table)
    for warning in found.warnings:
        console.print(f"warning: {harmless(warning)}", style="yellow", soft_wrap=True)
    return 0
