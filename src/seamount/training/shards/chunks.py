"""Records become examples, a few hundred at a time and in threads: `chunks`, `ChunkMaker`.

Called by `build`. What a chunk holds depends on the record it begins with and on nothing else, and chunks come out in
the order of the records: so a build that goes on makes the same of them. It must not know of shards and output files.
"""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from seamount.models.prompt import PromptEncoder
from seamount.training.examples.example import Example
from seamount.training.examples.formats import Format
from seamount.training.examples.record import Record, RecordError
from seamount.training.examples.rendering import Renderer
from seamount.training.examples.sample import Sample
from seamount.training.shards.cursor import Position, records
from seamount.training.shards.duplicates import Duplicates
from seamount.training.shards.scan import Rows
from seamount.training.shards.store import Counts
from seamount.training.shards.windows import text_windows

_CHUNK_CHARS, _CHUNK_RECORDS = 2**19, 256


@dataclass(frozen=True, slots=True)
class Rules:
    """What becomes of records that are too long, were there before, or are broken; as of `build.Job`."""

    overlong: Literal["error", "skip", "cut"]
    duplicates: Literal["keep", "drop"]
    invalid: Literal["error", "skip"]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some records, each with the position behind it."""

    items: list[tuple[Position, Record | RecordError]]


@dataclass(frozen=True, slots=True)
class Made:
    """What became of a chunk: its examples, lines of the report, counts, and the position behind it."""

    examples: list[Example]
    report: bytes
    counts: Counts
    end: Position


def chunks(files: Sequence[Path], after: Position) -> Iterator[Chunk]:
    """Yield the records behind a position in chunks of about half a million characters."""
    items: list[tuple[Position, Record | RecordError]] = []
    num_chars = 0
    for item, position in records(files, after):
        items.append((position, item))
        num_chars += _num_chars(item.value) if isinstance(item, Record) else 0
        if num_chars >= _CHUNK_CHARS or len(items) >= _CHUNK_RECORDS:
            yield Chunk(items)
            items, num_chars = [], 0
    if items:
        yield Chunk(items)


class ChunkMaker:
    """Makes examples of chunks in threads: tokenizer and template work outside of Python's lock.

    Args:
        formats: of each file.
        found: the records that say what an earlier one says.
        ids: those that call themselves what an earlier one does, which makes them invalid.
        rows: where records stand.
    """

    def __init__(
        self,
        rules: Rules,
        renderer: Renderer,
        encoder: PromptEncoder,
        formats: Sequence[Format],
        found: Duplicates,
        ids: Duplicates,
        rows: Rows,
    ) -> None:
        self._rules, self._renderer, self._encoder = rules, renderer, encoder
        self._formats, self._duplicates, self._ids, self._rows = formats, found, ids, rows

    def run(self, given: Iterator[Chunk], num_threads: int) -> Iterator[Made]:
        """Yield what becomes of the chunks, in order; few are under way at once.

        Raises:
            RecordError: the first record that the rules do not allow to be left out.
        """
        pending: deque[Future[Made]] = deque()
        with ThreadPoolExecutor(num_threads) as pool:
            try:
                for chunk in given:
                    pending.append(pool.submit(self._make, chunk))
                    if len(pending) > num_threads + 1:
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _make(self, chunk: Chunk) -> Made:
        notes = _Notes(self._rules)
        samples: list[Sample] = []
        for position, item in chunk.items:
            place = position.place - 1
            first = self._duplicates.first_of(place)
            if first is not None:
                notes.tell_duplicate(item, self._rows.where(first)[0])
                if self._rules.duplicates == "drop":
                    continue
            same_id = self._ids.first_of(place)
            try:
                if isinstance(item, RecordError):
                    raise item
                if same_id is not None:
                    raise self._rows.same_id(place, same_id)
                samples.append(self._formats[position.source].sample(item))
            except RecordError as error:
                notes.leave_out(error)
        examples = self._examples(samples, notes)
        return Made(examples, "".join(notes.lines).encode(), Counts(**notes.counts), chunk.items[-1][0])

    def _examples(self, samples: Sequence[Sample], notes: _Notes) -> list[Example]:
        """The samples' examples, in order: of conversations as rendered, of plain text its windows."""
        plain = [sample for sample in samples if _is_plain(sample)]
        chats = [sample for sample in samples if not _is_plain(sample)]
        windows = iter(text_windows(self._encoder, plain, self._renderer.max_length) if plain else [])
        rendered = iter(self._renderer.render(chats) if chats else [])
        found: list[Example] = []
        for sample in samples:
            made = next(windows) if _is_plain(sample) else next(rendered)
            if isinstance(made, RecordError) and made.is_overlong and self._rules.overlong == "cut":
                notes.tell_cut(made)
                made = self._renderer.render([sample], cut=True)[0]
            if isinstance(made, RecordError):
                notes.leave_out(made)
            else:
                found += made
        return found


@dataclass(slots=True)
class _Notes:
    """What is told of a chunk's records: lines of JSON, and counts by the fields of `Counts`."""

    rules: Rules
    lines: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def tell_duplicate(self, item: Record | RecordError, first: str) -> None:
        self.counts["num_duplicates"] += 1
        self._tell(item.where, item.row, "", f"says the same as {first}", left_out=self.rules.duplicates == "drop")

    def tell_cut(self, error: RecordError) -> None:
        self.counts["num_cut"] += 1
        self._tell(error.where, error.row, error.field, error.reason, left_out=False)

    def leave_out(self, error: RecordError) -> None:
        """Note that a record is left out.

        Raises:
            RecordError: it may not be.
        """
        if error.is_overlong and self.rules.overlong != "error":
            self.counts["num_overlong"] += 1
        elif not error.is_overlong and self.rules.invalid == "skip":
            self.counts["num_invalid"] += 1
        else:
            raise error
        self._tell(error.where, error.row, error.field, error.reason, left_out=True)

    def _tell(self, where: str, row: int, field_: str, reason: str, *, left_out: bool) -> None:
        line = {"where": where, "row": row, "field": field_, "reason": reason, "left_out": left_out}
        self.lines.append(json.dumps(line, ensure_ascii=False) + "\n")


def _is_plain(sample: Sample) -> bool:
    return not sample.messages and not sample.prompt


def _num_chars(value: Any) -> int:
    """Characters of all texts in a record."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_num_chars, value.values()))
    return sum(map(_num_chars, value)) if isinstance(value, list | tuple) else 0
