"""Recipe files as they are written by people: YAML and `--set` to plain fields, and what is wrong with fields in words.

Called by `recipe`. It must not know which fields a recipe has: it asks the classes that are handed to it.

Of YAML a recipe takes what a list of settings needs. Anchors, tags and merges are refused: they make files of a
kilobyte that grow to gigabytes, and objects that no field holds. `on`, `yes` and dates stay text, as in YAML 1.2.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from seamount.core.errors import ConfigError

_MAX_BYTES = 2**20
_MAX_DEPTH = 64
_MAX_WRONG = 10
_SHOWN_CHARACTERS = 40
_YAML = "tag:yaml.org,2002:"
_NO_TEXT = re.compile("[\0\ud800-\udfff]")
# By the first word of pydantic's name for an error. Numbers may be text: YAML 1.1 reads 1e-3 as such.
_EXPECTED = {
    "int": "must be a whole number",
    "float": "must be a number",
    "bool": "must be true or false",
    "string": "must be text, in quotes where it looks like something else",
    "path": "must be a path, in quotes where it looks like something else",
    "tuple": "must be a list, such as [a, b]",
    "model": "must be a section with fields of its own",
    "dict": "must be a section with fields of its own",
    "finite": "must be a finite number",
    "none": "must be left out or null here",
    "invalid": "has a name that is no text",
}


class _RefusedError(yaml.YAMLError):
    """What is YAML, but not of a recipe; `line` counts from 1."""

    def __init__(self, said: str, line: int) -> None:
        super().__init__(said)
        self.said, self.line = said, line


class _Loader(yaml.SafeLoader):
    """Reads the YAML of recipes. Raises YAMLError, never another."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise _RefusedError("anchors (&name, *name) are not for recipes; write the value out", line)
        if getattr(event, "tag", None) is not None:
            raise _RefusedError("tags (!name) are not for recipes; write the value alone", line)
        if self._depth == _MAX_DEPTH:
            raise _RefusedError(f"values lie more than {_MAX_DEPTH} deep in each other", line)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(node, yaml.MappingNode):
            _check_names(node)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if isinstance(node, yaml.ScalarNode) and _NO_TEXT.search(node.value):
            raise _RefusedError(
                "the text holds a character that cannot be written (NUL, or half of a pair)", node.start_mark.line + 1
            )
        try:
            return super().construct_object(node, deep)
        except (ValueError, OverflowError) as cause:  # an int of more digits than Python reads
            raise _RefusedError("the number is too large", node.start_mark.line + 1) from cause


# YAML 1.1 makes `thinking: on` a boolean, `language: no` too, and `output: 2024-01-02` a date.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in forms if tag in (f"{_YAML}null", f"{_YAML}int", f"{_YAML}float")]
    for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(f"{_YAML}bool", re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


def read_fields(path: Path, changes: tuple[str, ...] = ()) -> dict[str, Any]:
    """The fields of a recipe file with `changes`, not checked yet. Raises ConfigError that names the file."""
    try:
        raw = _parsed(_text(path))
    except OSError as cause:
        raise ConfigError(f"{path} cannot be read: {cause.strerror}.", hint="Give a recipe file.") from cause
    except UnicodeDecodeError as cause:
        raise ConfigError(f"{path} is not valid YAML: it is not UTF-8 text.", hint="Give a recipe file.") from cause
    except yaml.YAMLError as cause:
        raise ConfigError(f"{path} {_yaml_said(cause)}.", hint="recipes/ has examples for each method.") from cause
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds no recipe.", hint="recipes/ has examples for each method.")
    return with_changes(raw, changes)


def with_changes(raw: dict[str, Any], changes: tuple[str, ...]) -> dict[str, Any]:
    """Return a copy of `raw` with `section.field=value` set each. Raises ConfigError for what is none."""
    result = dict(raw)
    for change in changes:
        name, separator, text = change.partition("=")
        parts = name.strip().split(".")
        if not separator or not all(parts) or len(parts) > _MAX_DEPTH:
            raise ConfigError(
                f"--set {_short(change)} is not of the form section.field=value.", hint="--set schedule.epochs=1"
            )
        place = result
        for part in parts[:-1]:
            inner = place.get(part)
            place[part] = dict(inner) if isinstance(inner, dict) else {}
            place = place[part]
        try:
            place[parts[-1]] = _parsed(text)
        except yaml.YAMLError as cause:
            raise ConfigError(
                f"--set {_short(change)}: the value {_yaml_said(cause, lines=False)}.",
                hint="Values are YAML: --set 'data.train=[a.jsonl, b.jsonl]'.",
            ) from cause
    return result


def wrong_fields(cause: ValidationError, kind: type[BaseModel]) -> str:
    """What is wrong with the fields of a `kind`, each with its way, "batch.examples: must be above 0, not -1"."""
    said = []
    errors = cause.errors(include_url=False)
    for error in errors[:_MAX_WRONG]:
        way = ".".join(_short(str(part)) for part in error["loc"])
        words = _words(error, kind)
        said.append(f"{way}: {words}" if way else words)
    if len(errors) > _MAX_WRONG:
        said.append(f"and {len(errors) - _MAX_WRONG} more")
    return "; ".join(said)


def _text(path: Path) -> str:
    if not stat.S_ISREG(path.stat().st_mode):  # a pipe would hold the reader up, a device has no end
        raise ConfigError(f"{path} cannot be read: it is no file.", hint="Give a recipe file.")
    with path.open("rb") as file:
        content = file.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise ConfigError(f"{path} is larger than 1 MiB: no recipe.", hint="Give a recipe file.")
    return content.decode("utf-8")


def _parsed(text: str) -> Any:
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def _check_names(node: yaml.MappingNode) -> None:
    lines: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if key.tag != f"{_YAML}str":
            raise _RefusedError("the name of a field must be text", line)
        if key.value in lines:
            first = lines[key.value]
            raise _RefusedError(f"the field {_short(key.value)} is given twice, first in line {first}", line)
        lines[key.value] = line


def _yaml_said(cause: yaml.YAMLError, *, lines: bool = True) -> str:
    """What is wrong with a text, as the end of a sentence."""
    if isinstance(cause, _RefusedError):
        return f"cannot be used: {f'line {cause.line}: ' if lines else ''}{cause.said}"
    mark = getattr(cause, "problem_mark", None)
    parts = (getattr(cause, name, None) for name in ("context", "problem", "reason"))
    what = ", ".join(str(part) for part in parts if part)
    return f"is not valid YAML: {f'line {mark.line + 1}: ' if lines and mark is not None else ''}{what}"


def _words(error: Mapping[str, Any], kind: type[BaseModel]) -> str:
    name, given, limits = error["type"], error["input"], error.get("ctx", {})
    if name == "missing":
        return "must be given"
    if name == "extra_forbidden":
        return f"there is no such field{_nearest(error['loc'], kind)}"
    if name == "value_error":
        return str(limits["error"])
    if name == "too_short" or name == "string_too_short":
        return "must not be empty"
    if name == "literal_error":
        return f"must be {limits['expected']}{_but(given)}"
    for limit, words in (("gt", "above"), ("ge", "at least"), ("lt", "below"), ("le", "at most")):
        if limit in limits:
            return f"must be {words} {_number(limits[limit])}{_but(given)}"
    expected = _EXPECTED.get(name.partition("_")[0])
    return f"{expected}{_but(given)}" if expected else f"{error['msg'][:1].lower()}{error['msg'][1:]}"


def _nearest(way: tuple[int | str, ...], kind: type[BaseModel]) -> str:
    """The known field that was most likely meant, as the end of a sentence."""
    known = list(_ways(kind))
    *home, given = (part for part in way if isinstance(part, str))
    beside = {name: full for full, name in known if full == ".".join((*home, name))}
    for names in (beside, {name: full for full, name in reversed(known)}):
        found = get_close_matches(given, names, n=1, cutoff=0.7)
        if found:
            return f"; {names[found[0]]} is one"
    return ""


def _ways(kind: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    """All fields of a class and its sections: the way to each, and its name."""
    for name, field in kind.model_fields.items():
        yield f"{prefix}{name}", name
        for inner in (field.annotation, *get_args(field.annotation)):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from _ways(inner, f"{prefix}{name}.")


def _number(limit: float) -> str:
    return f"{int(limit):,}" if limit == int(limit) else f"{limit}"


def _but(given: Any) -> str:
    """What was given instead, as the end of a sentence; nothing where that is long, or an address with a password."""
    if given is None:
        return ", not null"
    if isinstance(given, bool):
        return f", not {str(given).lower()}"
    if isinstance(given, int) and given.bit_length() > 64:  # Python writes none of more than 4,300 digits
        return ", not one so large"
    if isinstance(given, int | float):
        return f", not {given}"
    if isinstance(given, str) and "://" not in given:
        return f", not {_short(given)!r}"
    return ", not a list" if isinstance(given, list | tuple) else ""


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[: _SHOWN_CHARACTERS - 3]}..."
