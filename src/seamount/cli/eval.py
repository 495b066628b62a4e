"""`seamount eval`: score a model on the held-out items of the training's skills."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from seamount.core.errors import InvalidRequestError

from . import flags, wire

if TYPE_CHECKING:
    from seamount.training.evaluate import Cell

DESCRIPTION = """Ask a model held-out items of each skill, in English and Chinese, and score its answers by exact match.
No item occurs in the training of the embedded model.

With --data the questions are those of a file of examples, in any format that `seamount tune` reads: the last answer of
each is what is wanted, compared behind the reasoning; JSON in any spelling is the same."""
ARGUMENTS = "[MODEL] [FLAGS]"
EXAMPLES = """  seamount eval seamount-tiny
  seamount eval seamount-tiny --skills arithmetic,masking --items 20
  seamount eval seamount-tiny --json
  seamount eval seamount-tiny --data held-out.jsonl --adapter runs/mine/adapter"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    flags.add_model(parser)
    parser.add_argument("--skills", metavar="NAME[,NAME]", help="only these skills")
    parser.add_argument("--items", type=_positive, default=50, metavar="N", help="of each skill and language (50)")
    parser.add_argument("--data", type=Path, metavar="FILE", help="ask what this file of examples asks")
    parser.add_argument("--json", action="store_true", help="print JSON")
    flags.add_engine_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Score and print the table."""
    if args.data is not None:
        return _run_data(args)
    from seamount.training.evaluate import evaluate

    skills = None if args.skills is None else _skills(args.skills)  # before a model is loaded
    llm = wire.open_llm(flags.settings_from(args).engine)
    report = evaluate(
        llm,
        llm.prompt_encoder,
        model=llm.facts.name,
        skills=skills,
        num_items=args.items,
        progress=None if args.json else _tell,
    )
    if args.json:
        print(report.to_json())
    else:
        from rich.console import Console

        Console().print(report.table())
    return 0


def _run_data(args: argparse.Namespace) -> int:
    from seamount.training.examples.load import load
    from seamount.training.examples.rendering import Renderer
    from seamount.training.shards.dataset import ExampleList
    from seamount.training.tuning.scoring import questions, score

    llm = wire.open_llm(flags.settings_from(args).engine)
    renderer = Renderer(llm.prompt_encoder, max_length=llm.facts.max_model_len)
    data = ExampleList(load(args.data, renderer).examples)
    found = score(llm, llm.prompt_encoder, questions(data, len(data)), context=llm.facts.max_model_len)
    if args.json:
        told = {"model": llm.facts.name, "data": str(args.data), "share": round(found.accuracy, 4)}
        print(json.dumps(told | {"num_right": found.num_right, "num_items": found.num_items}, indent=2))
    else:
        print(f"{llm.facts.name}: {found.num_right} of {found.num_items} right ({found.accuracy:.1%})")
    return 0


def _skills(text: str) -> list[str]:
    from seamount.training.skills import SKILLS

    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in SKILLS:
            raise InvalidRequestError(f"There is no skill {name!r}.", hint=f"There are: {', '.join(SKILLS)}.")
    return names


def _tell(cell: Cell) -> None:
    print(f"{cell.skill} {cell.language}: {cell.num_right} of {cell.num_items}", file=sys.stderr)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number
