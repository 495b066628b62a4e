"""Goes through the records of several files from any place on: `records`. Called by `scan` and `build`.

In files of JSON lines a place is found by its byte; others are read from their beginning, and what lies before the
place is passed over. It must not know what is done with records.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from seamount.core.errors import ConfigError
from seamount.training.examples.lines import lines_of
from seamount.training.examples.reading import read_records, record_of_line
from seamount.training.examples.record import Record, RecordError

_JSON_LINES = (".jsonl", ".ndjson")


class Position(BaseModel):
    """Behind a record.

    Attributes:
        source: number of its file, from 0.
        row: its number in the file, from 1, broken ones counted; 0 is before the first.
        offset: bytes of the file up to its end; 0 where the format has none.
        place: records before this position, in all files, broken ones counted.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: int = 0
    row: int = 0
    offset: int = 0
    place: int = 0


def records(files: Sequence[Path], after: Position) -> Iterator[tuple[Record | RecordError, Position]]:
    """Yield what follows a position, each with the position behind it.

    Raises:
        ConfigError: a file cannot be read.
    """
    place = after.place
    for source in range(after.source, len(files)):
        start = after if source == after.source else Position()
        for item, row, offset in _records_of(files[source], start):
            place += 1
            yield item, Position(source=source, row=row, offset=offset, place=place)


def _records_of(path: Path, start: Position) -> Iterator[tuple[Record | RecordError, int, int]]:
    if path.suffix.lower() not in _JSON_LINES:
        for number, item in enumerate(read_records(path), 1):
            if number > start.row:
                yield item, number, 0
        return
    if start.row and not start.offset:
        return  # behind a line from which on the file cannot be read
    try:
        for line in lines_of(path, offset=start.offset, number=start.row):
            item_of_line = record_of_line(path, line)
            if item_of_line is not None:
                yield item_of_line, line.number, line.end
    except OSError as cause:
        raise ConfigError(f"{path} cannot be read: {cause.strerror}.") from cause
