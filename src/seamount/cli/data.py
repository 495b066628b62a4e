"""`seamount data`: looks at training data before anything is trained on it. Each action is a module of its own."""

from __future__ import annotations

import argparse
from importlib import import_module

DESCRIPTION = """Check training data, show what of it would be learned, and build token shards of large data. Read are
JSON, JSON lines, CSV and TSV (each also as .gz) and parquet; the format of the records is recognised."""
ARGUMENTS = "check | show | build FILE... [FLAGS]"
EXAMPLES = """  seamount data check train.jsonl
  seamount data check train.jsonl held-out.csv --max-length 4096 --language zh --json
  seamount data show train.jsonl --number 3 --model /models/folder
  seamount data build corpus/ --output corpus-shards --model /models/folder"""

# The module of an action is `data_` and its name.
_ACTIONS = {
    "check": "say what is in the data, and what is wrong with it; exit code 1 if anything is",
    "show": "show a record as the model would see it, with what is learned set apart",
    "build": "make token shards, which training maps into memory; goes on where it was stopped",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the actions and their flags."""
    # Without prog, argparse puts the arguments of our own usage line before each action's name.
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION", prog=parser.prog)
    for name, purpose in _ACTIONS.items():
        action = actions.add_parser(name, help=purpose, description=f"{purpose.capitalize()}.", allow_abbrev=False)
        import_module(f"{__package__}.data_{name}").add_arguments(action)


def run(args: argparse.Namespace) -> int:
    """Do what was asked."""
    code: int = import_module(f"{__package__}.data_{args.action}").run(args)
    return code
