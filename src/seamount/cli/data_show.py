"""`seamount data show`: shows a record as the model would see it, with its trained tokens set apart."""

from __future__ import annotations

import argparse
from contextlib import closing
from itertools import groupby
from typing import TYPE_CHECKING

from seamount.core.errors import InvalidRequestError

from .data_flags import add_data_flags, open_renderer, positive
from .screen import harmless

if TYPE_CHECKING:
    from collections.abc import Iterable

    from seamount.models.prompt import PromptEncoder
    from seamount.training.examples.example import Example
    from seamount.training.examples.record import Record, RecordError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the action's flags."""
    add_data_flags(parser)
    parser.add_argument(
        "--number", type=positive, default=1, metavar="N", help="the record to show, counted from 1 (1)"
    )


def run(args: argparse.Namespace) -> int:
    """Show one record's examples; a bad record is an error."""
    from seamount.training.examples.stream import ExampleStream

    encoder, renderer = open_renderer(args)
    with closing(encoder):
        record, examples = _numbered(ExampleStream(args.files, renderer), args.number)
        _print(record, examples, encoder)
    return 0


def _numbered(stream: Iterable[tuple[Record, Example] | RecordError], number: int) -> tuple[Record, list[Example]]:
    """Return a record and its examples, which follow each other.

    Raises:
        RecordError: it is bad.
        InvalidRequestError: there are not so many.
    """
    from seamount.training.examples.record import RecordError

    place = 0
    for _, group in groupby(stream, lambda item: item.where if isinstance(item, RecordError) else item[0].where):
        place += 1
        if place < number:
            continue
        items = list(group)
        if isinstance(items[0], RecordError):
            raise items[0]
        return items[0][0], [item[1] for item in items if not isinstance(item, RecordError)]
    raise InvalidRequestError(f"There is no record {number}; the data has {place}.", hint="They are counted from 1.")


def _print(record: Record, examples: list[Example], encoder: PromptEncoder) -> None:
    from rich.console import Console

    from seamount.training.examples.showing import as_plain, as_text

    console = Console(highlight=False, markup=False, emoji=False)
    for number, example in enumerate(examples, 1):
        which = f", example {number} of {len(examples)}" if len(examples) > 1 else ""
        trained = int(example.trained.sum())
        console.print(
            harmless(f"{record.where}{which}: {len(example.token_ids)} tokens, {trained} of them learned"),
            style="bold",
            soft_wrap=True,
        )
        has_colours = console.is_terminal and not console.no_color
        console.print(as_text(example, encoder) if has_colours else as_plain(example, encoder), soft_wrap=True)
        console.print()
