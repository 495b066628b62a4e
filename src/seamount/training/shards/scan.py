"""The first pass over the sources: every record read and checked, and a key of what it says kept. Called by `build`.

It takes a small part of the time of a build, and finds broken records and all duplicates before the long part begins.
In the work folder it leaves

    keys.bin [N, 16] uint8   of what each record says, in order
    ids.bin [N, 16] uint8    of what it calls itself; something unique where it does not
    rows.bin [N] uint64      where it stands: number of its file times 2**40, plus its row
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Self

from seamount.core.errors import ConfigError
from seamount.training.examples.formats import Format, recognise
from seamount.training.examples.languages import in_language
from seamount.training.examples.record import Record, RecordError
from seamount.training.examples.sample import Sample
from seamount.training.shards import store
from seamount.training.shards.cursor import Position, records
from seamount.training.shards.duplicates import KEY_BYTES, key_of

KEYS, IDS, ROWS = "keys.bin", "ids.bin", "rows.bin"
_ROW_BYTES, _ROW_BITS = 8, 40
_SAVED_EVERY = 2**16  # records
_READ_BYTES = 2**22


def identify(files: Sequence[Path], progress: Callable[[int], None]) -> tuple[store.Source, ...]:
    """Digests of the files; `progress` is told the bytes that were read.

    Raises:
        ConfigError: a file cannot be read.
    """
    found, done = [], 0
    for path in files:
        digest, size = hashlib.sha256(), 0
        try:
            with open(path, "rb") as file:
                while block := file.read(_READ_BYTES):
                    digest.update(block)
                    size += len(block)
                    progress(done + size)
        except OSError as cause:
            raise ConfigError(f"{path} cannot be read: {cause.strerror}.") from cause
        found.append(store.Source(name=path.name, num_bytes=size, digest=digest.hexdigest()))
        done += size
    return tuple(found)


def formats_of(files: Sequence[Path], language: str | None) -> list[Format]:
    """The format of each file's records, whose words should be in the language, if one is given.

    Raises:
        ConfigError: the language's script is not known.
        RecordError: a file holds none of a known format.
    """
    found = [recognise(_only_records([path])) for path in files]
    return found if language is None else [in_language(form, language) for form in found]


def scan(
    files: Sequence[Path], formats: Sequence[Format], after: Position, work: Path, *, skip_invalid: bool
) -> Iterator[tuple[Position, bool]]:
    """Note each record's key and place, going on behind `after`; yields positions up to which all is on the disk.

    The second of each pair is True once, at the end.

    Raises:
        RecordError: a record is broken, and may not be left out.
    """
    new: tuple[list[bytes], ...] = ([], [], [])
    position = after
    with (
        store.AppendFile(work / KEYS, after.place * KEY_BYTES) as keys,
        store.AppendFile(work / IDS, after.place * KEY_BYTES) as ids,
        store.AppendFile(work / ROWS, after.place * _ROW_BYTES) as rows,
    ):
        for item, position in records(files, after):
            said, name = _keys(item, formats[position.source], position.place, skip_invalid=skip_invalid)
            row = (position.source << _ROW_BITS | item.row).to_bytes(_ROW_BYTES, "little")
            for column, value in zip(new, (said, name, row), strict=True):
                column.append(value)
            if len(new[0]) >= _SAVED_EVERY:
                _save((keys, ids, rows), new)
                yield position, False
        _save((keys, ids, rows), new)
        yield position, True


def _save(files: Sequence[store.AppendFile], columns: Sequence[list[bytes]]) -> None:
    for file, column in zip(files, columns, strict=True):
        file.append(b"".join(column))
        file.sync()
        column.clear()


class Rows:
    """Where records stand, by their number over all files. A context manager, which closes the file."""

    def __init__(self, work: Path, files: Sequence[Path]) -> None:
        self._descriptor = os.open(work / ROWS, os.O_RDONLY)
        self._files = files

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def where(self, place: int) -> tuple[str, int]:
        """For people, "file:row"; and the row."""
        packed = int.from_bytes(os.pread(self._descriptor, _ROW_BYTES, place * _ROW_BYTES), "little")
        row = packed & (2**_ROW_BITS - 1)
        return f"{self._files[packed >> _ROW_BITS]}:{row}", row

    def same_id(self, place: int, first: int) -> RecordError:
        """The error of a record that calls itself what an earlier one does."""
        return RecordError(*self.where(place), "id", f"is that of {self.where(first)[0]} too")


def _keys(item: Record | RecordError, form: Format, place: int, *, skip_invalid: bool) -> tuple[bytes, bytes]:
    """Of what the record says, and of its id."""
    own = place.to_bytes(KEY_BYTES, "little")  # like no other
    try:
        if isinstance(item, RecordError):
            raise item
        sample = form.sample(item)
        return key_of(_said(sample)), own if sample.id is None else key_of([sample.id])
    except RecordError:
        if not skip_invalid:
            raise
        return own, own


def _said(sample: Sample) -> Iterator[str]:
    """All that a sample says, as texts."""
    for message in sample.messages:
        for name, value in sorted(message.items()):
            yield name
            yield value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    yield from (json.dumps(tool, sort_keys=True) for tool in sample.tools)
    yield from ("prompt", sample.prompt, "completion", sample.completion)


def _only_records(files: Sequence[Path]) -> Iterable[Record]:
    return (item for item, _ in records(files, Position()) if isinstance(item, Record))
