"""Flags that the actions of `seamount data` share, and the renderer that they ask for."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from seamount.models.prompt import PromptEncoder
    from seamount.training.examples.rendering import Renderer


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """Add files, model and rules; they are named as in a recipe's `data` section."""
    parser.add_argument("files", nargs="+", type=_path, metavar="FILE", help="data file, or a folder of such")
    parser.add_argument(
        "--model", metavar="MODEL", help="folder or name of the model that is to be trained (seamount-tiny)"
    )
    parser.add_argument("--max-length", type=_length, default=2048, metavar="N", help="tokens of one example (2048)")
    parser.add_argument("--train-on", choices=("last", "all"), default="all", help="assistant turns to learn (all)")
    parser.add_argument(
        "--thinking",
        choices=("auto", "on", "off"),
        default="auto",
        help="whether prompts ask for reasoning: where a turn has it (auto), always, never",
    )


def add_language_flag(parser: argparse.ArgumentParser) -> None:
    """Add what all records should be in."""
    parser.add_argument("--language", metavar="CODE", help="what answers should be in, such as en or zh (anything)")


def open_renderer(args: argparse.Namespace) -> tuple[PromptEncoder, Renderer]:
    """Return the model's prompt encoder, which the caller closes, and the renderer of examples; no weights are read.

    Raises:
        ConfigError: there is no such model, or it cannot be trained as asked.
    """
    from seamount.models.locate import locate_model
    from seamount.models.prompt import PromptEncoder
    from seamount.training.examples.rendering import Renderer

    from . import flags

    encoder = PromptEncoder.from_folder(locate_model(flags.settings_from(args).engine.model))
    return encoder, Renderer(encoder, max_length=args.max_length, train_on=args.train_on, thinking=args.thinking)


def positive(text: str) -> int:
    """Return a whole number from 1 on, for `type`.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _path(text: str) -> Path:
    if not text.strip():
        raise argparse.ArgumentTypeError("has an empty name; . is this folder")
    return Path(text)


def _length(text: str) -> int:
    number = int(text)
    if number < 2:
        raise argparse.ArgumentTypeError("must be at least 2")
    return number
