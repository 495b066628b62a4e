"""From a source of records to examples, in order and in bounded memory: `ExampleStream`.

Called by `load`, `check` and the CLI. Every record comes out as its examples, as the error that names what is wrong
with it, or in a count that says why it was left out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

from .example import Example
from .formats import PROBED_RECORDS, Format, recognise
from .languages import check_language, in_language
from .reading import Source, read_records, sources_of
from .record import Record, RecordError
from .rendering import Renderer
from .sample import Sample
from .seen import Seen

Overlong = Literal["error", "skip", "cut"]
_CHUNK = 128
_CHUNK_CHARS = 1 << 20
_ROW_BITS = 40


@dataclass(slots=True)
class Counts:
    """What became of the records so far.

    Attributes:
        num_records: read, bad ones included.
        num_examples: made; a conversation may give several.
        num_bad: told as errors.
        num_skipped, num_cut: over-long records that were left out, or lost their end.
    """

    num_records: int = 0
    num_examples: int = 0
    num_bad: int = 0
    num_skipped: int = 0
    num_cut: int = 0


class ExampleStream:
    """Examples of a source, made as they are asked for. Goes through it once.

    Args:
        source: as of `read_records`.
        overlong: what becomes of records that are longer than the renderer allows.
        language: what the assistant's words should be in, such as `en` or `zh`; told by their script. None: anything.

    Attributes:
        counts: what became of the records so far.
        formats: name of the format of each file, or of the iterable.

    Raises:
        ConfigError: a file does not exist or is of an unknown kind, or the language's script is not known.
    """

    def __init__(
        self, source: Source, renderer: Renderer, *, overlong: Overlong = "error", language: str | None = None
    ) -> None:
        if language is not None:
            check_language(language)
        self.counts = Counts()
        self.formats: dict[str, str] = {}
        self._parts = sources_of(source)
        self._renderer = renderer
        self._overlong = overlong
        self._language = language
        self._ids = Seen()

    def __iter__(self) -> Iterator[tuple[Record, Example] | RecordError]:
        for number, part in enumerate(self._parts):
            name = str(part) if isinstance(part, Path) else "the data"
            for chunk in _chunks(self._samples(number, name, read_records(part))):
                yield from self._rendered(chunk)

    def _samples(
        self, number: int, name: str, read: Iterator[Record | RecordError]
    ) -> Iterator[tuple[Record, Sample] | RecordError]:
        probed = _probe(read)
        try:
            form = recognise(item for item in probed if isinstance(item, Record))
        except RecordError as error:
            broken = [item for item in probed if isinstance(item, RecordError)]
            yield from broken
            if not broken or any(isinstance(item, Record) for item in probed):
                yield RecordError(name, 0, reason="holds no records") if not probed else error
            return
        self.formats[name] = form.name
        if self._language is not None:
            form = in_language(form, self._language)
        for item in chain(probed, read):
            if isinstance(item, RecordError):
                yield item
                continue
            try:
                yield item, self._sample(form, item, number)
            except RecordError as error:
                yield error

    def _sample(self, form: Format, record: Record, part: int) -> Sample:
        sample = form.sample(record)
        if sample.id is not None:
            place = self._ids.first(sample.id.encode("utf-8", "surrogatepass"), part << _ROW_BITS | record.row)
            if place is not None:
                there, row = self._parts[place >> _ROW_BITS], place & ((1 << _ROW_BITS) - 1)
                file = f" of {there}" if isinstance(there, Path) and len(self._parts) > 1 else ""
                raise sample.error("id", f"is that of row {row}{file} too")
        return sample

    def _rendered(
        self, chunk: list[tuple[Record, Sample] | RecordError]
    ) -> Iterator[tuple[Record, Example] | RecordError]:
        made = deque(self._renderer.render([item[1] for item in chunk if not isinstance(item, RecordError)]))
        for item in chunk:
            self.counts.num_records += 1
            if isinstance(item, RecordError):
                self.counts.num_bad += 1
                yield item
                continue
            record, sample = item
            examples = made.popleft()
            if isinstance(examples, RecordError) and examples.is_overlong and self._overlong == "skip":
                self.counts.num_skipped += 1
                continue
            if isinstance(examples, RecordError) and examples.is_overlong and self._overlong == "cut":
                examples = self._renderer.render([sample], cut=True)[0]
                self.counts.num_cut += not isinstance(examples, RecordError)
            if isinstance(examples, RecordError):
                self.counts.num_bad += 1
                yield examples
                continue
            for example in examples:
                self.counts.num_examples += 1
                yield record, example


def _probe(read: Iterator[Record | RecordError]) -> list[Record | RecordError]:
    """Take as many as are needed to recognise a format."""
    probed: list[Record | RecordError] = []
    num_records = 0
    for item in read:
        probed.append(item)
        num_records += isinstance(item, Record)
        if num_records == PROBED_RECORDS:
            break
    return probed


def _chunks(
    items: Iterable[tuple[Record, Sample] | RecordError],
) -> Iterator[list[tuple[Record, Sample] | RecordError]]:
    """Cut into lists that are rendered together: many, but not much text."""
    held: list[tuple[Record, Sample] | RecordError] = []
    num_chars = 0
    for item in items:
        held.append(item)
        num_chars += 0 if isinstance(item, RecordError) else len(item[1].learned_text())
        if len(held) == _CHUNK or num_chars > _CHUNK_CHARS:
            yield held
            held, num_chars = [], 0
    if held:
        yield held
