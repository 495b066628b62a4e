"""Writes the fields of recipes into docs/tuning.md, from the docstrings that describe them: run it after a change.

    python tests/support/recipe_table.py

A test compares the document with what this makes.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from seamount.training.tuning import recipe

DOCUMENT = Path(__file__).parents[2] / "docs" / "tuning.md"
BEGIN, END = "docstrings of src/seamount/training/tuning/recipe.py; a test compares -->\n", "<!-- end of fields -->"


def table() -> str:
    """The fields as Markdown, a table for the recipe and one for each of its sections."""
    parts = [_section(recipe.TuneRecipe, "")]
    for name, field in recipe.TuneRecipe.model_fields.items():
        kind = next((k for k in (field.annotation, *_inner(field.annotation)) if _is_section(k)), None)
        if kind is not None:
            parts.append(_section(kind, f"{name}."))
    return "\n".join(parts)


def written() -> str:
    """What the document holds between its marks."""
    text = DOCUMENT.read_text(encoding="utf-8")
    return text.partition(BEGIN)[2].partition(END)[0]


def _section(kind: type[BaseModel], prefix: str) -> str:
    summary, _, told = inspect.getdoc(kind).partition("\nAttributes:\n")  # type: ignore[union-attr]
    lines = [
        f"\n**{prefix[:-1] or 'The recipe'}**: {' '.join(summary.split())}\n",
        "| field | value | |",
        "|---|---|---|",
    ]
    described = _attributes(told)
    for name, field in kind.model_fields.items():
        if _is_section(field.annotation) or any(map(_is_section, _inner(field.annotation))):
            continue
        words = next((text for names, text in described if name in names), "")
        lines.append(f"| `{prefix}{name}` | {_value(field)} | {words} |")
    return "\n".join(lines) + "\n"


def _attributes(text: str) -> list[tuple[set[str], str]]:
    """The entries of a docstring's `Attributes`: names, and what is said of them."""
    found = re.findall(r"^    ([\w, ]+): (.*(?:\n        .*)*)", text, re.M)
    return [({name.strip() for name in names.split(",")}, " ".join(said.split())) for names, said in found]


def _value(field: Any) -> str:
    if field.is_required():
        return "(must be given)"
    value = field.default
    if isinstance(value, tuple):
        return f"`[{', '.join(value)}]`"
    return f"`{'null' if value is None else str(value).lower() if isinstance(value, bool) else value}`"


def _inner(kind: Any) -> tuple[Any, ...]:
    return getattr(kind, "__args__", ())


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


if __name__ == "__main__":
    text = DOCUMENT.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    DOCUMENT.write_text(before + BEGIN + table() + END + rest.partition(END)[2], encoding="utf-8")
