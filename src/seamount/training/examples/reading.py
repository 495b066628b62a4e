"""Reads records from files and from Python, one at a time: `read_records`.

Called by `stream`. Recognises how a file is written by its name and its first character; what the fields of a record
mean is for `formats`. A file is never held in memory as a whole, and whatever is broken in it becomes a `RecordError`
in its place among the records, so that nobody can overlook it.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from json.decoder import JSONDecodeError
from pathlib import Path
from typing import Any

from seamount.core.errors import ConfigError

from .lines import BROKEN_ARCHIVE, MAX_RECORD_BYTES, Line, blocks_of, lines_of, open_bytes
from .record import Record, RecordError

__all__ = ["SUFFIXES", "Record", "RecordError", "read_records", "sources_of"]

Source = Path | str | Iterable[Path | str] | Iterable[Any]
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_SPACE = re.compile(r"[ \t\r\n]*")
_UNREAD = "what follows in the file was not read"


def read_records(source: Source) -> Iterator[Record | RecordError]:
    """Yield what a source holds, in order; broken rows as the error that names them.

    Args:
        source: a file (JSON, JSON lines, CSV, TSV, each also as .gz; parquet), a folder of such files and folders,
            several of these; or an iterable of dicts, a torch DataLoader included.

    Raises:
        ConfigError: as of `sources_of`, or a file cannot be read.
    """
    for part in sources_of(source):
        yield from _read_file(part) if isinstance(part, Path) else _read_items(part)


def sources_of(source: Source) -> list[Path | Iterable[Any]]:
    """Return the files that a source names, folders opened; or the iterable itself.

    Folders are read in the order of names, with the folders in them, each once whatever links to it. What is hidden
    (its name begins with a dot) is passed over.

    Raises:
        ConfigError: a path does not exist, a folder holds no file, or one of them is no data: of an unknown kind, a
            broken link, a pipe or a device.
    """
    if isinstance(source, str | Path):
        return list(_files(source))
    if isinstance(source, list | tuple) and source and all(isinstance(part, str | Path) for part in source):
        return [file for part in source for file in _files(part)]
    if isinstance(source, Mapping | bytes) or not isinstance(source, Iterable):
        raise ConfigError(
            f"Training data cannot be {type(source).__name__}.", hint="Give files, or an iterable of dicts."
        )
    return [source]


def parse_json(text: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: it is not JSON, or holds what JSON cannot: NaN, Infinity, lone surrogates, endless depth.
    """
    try:
        value = _DECODER.decode(text)
    except RecursionError as cause:
        raise ValueError("it is nested too deeply") from cause
    _check_unicode(text, value)
    return value


def _files(given: Path | str) -> Iterator[Path]:
    if not str(given).strip():
        raise ConfigError("A data file has an empty name.", hint="Name a file, or a folder: . is this one.")
    path = Path(given)
    if not os.path.isdir(path):  # unlike Path's, False where it cannot be told; then the check says why
        _check_file(path)
        yield path
        return
    try:
        found = list(_files_in(path, set()))
    except OSError as cause:
        raise ConfigError(f"{cause.filename or path} cannot be read: {cause.strerror or cause}.") from cause
    if not found:
        raise ConfigError(f"The folder {path} holds no data files.", hint=f"Known are {', '.join(SUFFIXES)}.")
    yield from found


def _files_in(folder: Path, seen: set[Path]) -> Iterator[Path]:
    """Yield the files of a folder and of those in it; `seen` are the folders that were read, links resolved.

    Raises:
        OSError: a folder cannot be read.
        ConfigError: something is no data.
    """
    real = folder.resolve()
    if real in seen:
        return
    seen.add(real)
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _files_in(path, seen)
        else:
            _check_file(path, hint=f"Move it out of {folder}, or name the files to be read.")
            yield path


def _check_file(path: Path, *, hint: str | None = None) -> None:
    """Refuse what is no data before it is opened: opening a pipe waits for who writes it, and a device may never end.

    Raises:
        ConfigError: the path is no regular file of a known kind.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as cause:
        if path.is_symlink():
            raise ConfigError(f"{path} is a link to a file that does not exist.", hint=hint) from cause
        raise ConfigError(f"There is no file {path}.", hint="Check the path.") from cause
    except OSError as cause:
        raise ConfigError(f"{path} cannot be read: {cause.strerror or cause}.", hint=hint) from cause
    if not stat.S_ISREG(mode):
        problem = "is no file but a pipe, a socket or a device"
        raise ConfigError(f"{path} {problem}.", hint=hint or "Write its content to a file first.")
    if _suffix(path) not in SUFFIXES:
        known = f"Known are {', '.join(SUFFIXES)}, also with .gz."
        raise ConfigError(f"{path} is of an unknown kind.", hint=f"{known} {hint}" if hint else known)


def _suffix(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def _read_file(path: Path) -> Iterator[Record | RecordError]:
    suffix = _suffix(path)
    try:
        if suffix == ".parquet":
            from .tables import read_parquet

            yield from read_parquet(path)
        elif suffix in (".csv", ".tsv"):
            from .tables import read_csv

            yield from read_csv(path, "\t" if suffix == ".tsv" else ",")
        elif suffix == ".json" and _begins_with_bracket(path):
            yield from _read_array(path)
        else:
            for line in lines_of(path):
                item = record_of_line(path, line)
                if item is not None:
                    yield item
    except OSError as cause:
        raise ConfigError(f"{path} cannot be read: {cause.strerror or cause}.") from cause


def _read_items(items: Iterable[Any]) -> Iterator[Record | RecordError]:
    from .batches import items_of

    for row, item in enumerate(items_of(items), 1):
        where = f"item {row}"
        if isinstance(item, Mapping):
            yield Record(where, row, {str(key): value for key, value in item.items()})
        else:
            yield RecordError(where, row, reason=f"is no dict but {type(item).__name__}")


def record_of_line(path: Path, line: Line) -> Record | RecordError | None:
    """Return what a line of a file of JSON lines says, or what is wrong with it; None where it is blank."""
    row, where = line.number, f"{path}:{line.number}"
    if line.problem:
        return RecordError(where, row, reason=line.problem)
    if not line.text.strip():
        return None
    try:
        value = parse_json(line.text)
    except ValueError as cause:
        return RecordError(where, row, reason=f"is not JSON: {_json_problem(cause)}")
    if not isinstance(value, dict):
        return RecordError(
            where, row, reason=f"is no object but {kind_of(value)}", hint="One {...} stands in each line."
        )
    return Record(where, row, value)


def _begins_with_bracket(path: Path) -> bool:
    """Whether a .json file is one array; many are JSON lines."""
    with open_bytes(path) as file:
        try:
            head = file.read(4096)
        except BROKEN_ARCHIVE:
            return False  # told with the first line
    return head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _read_array(path: Path) -> Iterator[Record | RecordError]:
    """Take values off the front of an array while the file is read on."""
    text = _Text(path)
    text.skip_space()
    text.take("[")
    row = 0
    while True:
        row += 1
        where = f"{path} item {row}"
        text.skip_space()
        if row == 1 and text.take("]"):
            return
        try:
            value = text.take_value()
        except ValueError as cause:
            yield RecordError(where, row, reason=f"{text.problem or f'is not JSON: {_json_problem(cause)}'}; {_UNREAD}")
            return
        if isinstance(value, dict):
            yield Record(where, row, value)
        else:
            yield RecordError(where, row, reason=f"is no object but {kind_of(value)}")
        text.skip_space()
        if text.take("]"):
            return
        if not text.take(","):
            yield RecordError(where, row, reason=f"{text.problem or 'is followed by neither comma nor ]'}; {_UNREAD}")
            return


class _Text:
    """A file's text, of which a part is held, and read from its front.

    Attributes:
        problem: why no more can be read.
    """

    def __init__(self, path: Path) -> None:
        self._blocks = blocks_of(path)
        self._held = ""
        self._at = 0
        self.problem = ""

    def skip_space(self) -> None:
        """Pass over white space."""
        while True:
            match = _SPACE.match(self._held, self._at)
            self._at = self._at if match is None else match.end()
            if self._at < len(self._held) or not self._read_on(1):
                return

    def take(self, character: str) -> bool:
        """Pass over this character, if it comes next."""
        is_next = self._held.startswith(character, self._at)
        self._at += is_next
        return is_next

    def take_value(self) -> Any:
        """Return the JSON value that comes next.

        Raises:
            ValueError: there is none.
        """
        wanted = 0
        while True:
            try:
                value, end = _DECODER.raw_decode(self._held, self._at)
            except RecursionError as cause:
                raise ValueError("it is nested too deeply") from cause
            except ValueError:
                # Perhaps only its beginning is held. Each time twice as much is, so that trying again stays cheap.
                wanted = 2 * (len(self._held) - self._at) + 1
                if wanted > 2 * MAX_RECORD_BYTES or not self._read_on(wanted):
                    raise
                continue
            if end == len(self._held) and self._read_on(len(self._held) - self._at + 1):
                continue  # a number may go on
            taken = self._held[self._at : end]
            self._at = end
            _check_unicode(taken, value)
            return value

    def _read_on(self, num_chars: int) -> bool:
        """Hold at least so many characters, where the file has them; False where it had no more at all."""
        parts = [self._held[self._at :]]
        num_held = len(parts[0])
        while num_held < num_chars and not self.problem:
            block = next(self._blocks, None)
            if block is None:
                break
            self.problem = block.problem
            parts.append(block.text)
            num_held += len(block.text)
        grew = num_held > len(parts[0])
        self._held, self._at = "".join(parts), 0
        return grew


def _check_unicode(text: str, value: Any) -> None:
    """Escapes may spell halves of characters, which are no Unicode."""
    if "\\ud" in text.lower():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as cause:
            raise ValueError("an escape spells half a character (a lone surrogate)") from cause


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)


def _json_problem(cause: ValueError) -> str:
    if isinstance(cause, JSONDecodeError):
        return f"{cause.msg} at character {cause.pos + 1}"
    return str(cause)[:200]


_KINDS: tuple[tuple[Callable[[Any], bool], str], ...] = (
    (lambda value: value is None, "null"),
    (lambda value: isinstance(value, bool), "true or false"),
    (lambda value: isinstance(value, int | float), "a number"),
    (lambda value: isinstance(value, str), "text"),
    (lambda value: isinstance(value, Mapping), "an object"),
    (lambda value: isinstance(value, list | tuple), "a list"),
)


def kind_of(value: Any) -> str:
    """Return what people call a value of this type."""
    return next((name for fits, name in _KINDS if fits(value)), type(value).__name__)
