"""Records out of tables: CSV and parquet. Called by `reading`; knows no other format."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from .lines import MAX_RECORD_BYTES, lines_of
from .record import Record, RecordError

_ROWS = 256


def read_csv(path: Path, separator: str) -> Iterator[Record | RecordError]:
    """Yield the rows of a table whose first one names the columns; a quoted field may hold line breaks.

    Raises:
        OSError: the file cannot be read.
    """
    source = _TextLines(path)
    # Process-wide, and only ever this: the default refuses fields that are longer than 128 KiB.
    csv.field_size_limit(MAX_RECORD_BYTES)
    rows = csv.reader(source, delimiter=separator, strict=True)
    columns: list[str] | None = None
    row = 0
    while True:
        first = source.number + 1
        where = f"{path}:{first}"
        try:
            cells = next(rows, None)
        except csv.Error as cause:
            row += 1
            yield RecordError(where, row, reason=source.taken_problem() or f"is no row of the table: {cause}")
            continue
        if problem := source.taken_problem():
            row += 1
            yield RecordError(f"{path}:{source.number}", row, reason=problem)
            continue
        if cells is None:
            return
        if not cells:
            continue  # an empty line
        if columns is None:
            columns = [name.strip() for name in cells]
            if bad := _column_problem(columns):
                yield RecordError(where, 0, reason=bad, hint="The first line names the columns.")
                return
            continue
        row += 1
        if len(cells) != len(columns):
            yield RecordError(where, row, reason=f"has {len(cells)} cells, and the table {len(columns)} columns")
        else:
            yield Record(where, row, dict(zip(columns, cells, strict=True)))


def read_parquet(path: Path) -> Iterator[Record | RecordError]:
    """Yield the rows of a parquet file, a few hundred in memory at a time.

    Raises:
        OSError: the file cannot be read.
        ModuleNotFoundError: pyarrow is not installed.
    """
    import pyarrow
    from pyarrow import parquet

    row = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_ROWS):
                for value in batch.to_pylist():
                    row += 1
                    yield Record(f"{path} row {row}", row, value)
    except (pyarrow.ArrowException, UnicodeDecodeError) as cause:
        problem = str(cause).partition("\n")[0][:200]
        yield RecordError(
            f"{path} row {row + 1}", row + 1, reason=f"cannot be read: {problem}; no more of the file was"
        )


class _TextLines:
    """What csv reads: lines, those with a problem left out and remembered."""

    def __init__(self, path: Path) -> None:
        self._lines = lines_of(path)
        self._problem = ""
        self.number = 0

    def __iter__(self) -> _TextLines:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.number = line.number
        if line.problem:
            self._problem = self._problem or line.problem
            return "\n"
        return line.text

    def taken_problem(self) -> str:
        """Return the problem of the lines since the last call, if there was one."""
        problem, self._problem = self._problem, ""
        return problem


def _column_problem(columns: list[str]) -> str:
    if not all(columns):
        return "names a column with nothing"
    if len(set(columns)) < len(columns):
        return "names a column twice"
    return ""
