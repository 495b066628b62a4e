"""Examples of small data, in memory: `load`. Called by the trainer's pipeline; large data goes through `shards`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from .example import Example
from .reading import Source
from .record import RecordError
from .rendering import Renderer
from .stream import Counts, ExampleStream, Overlong


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a source holds.

    Attributes:
        examples: in the source's order.
        counts: what became of all records.
    """

    examples: list[Example]
    counts: Counts

    @property
    def num_overlong(self) -> int:
        """Records that were too long, and were skipped or cut."""
        return self.counts.num_skipped + self.counts.num_cut


def load(
    source: Source,
    renderer: Renderer,
    *,
    overlong: Overlong = "error",
    language: str | None = None,
    on_bad: Literal["error"] | Callable[[RecordError], Any] = "error",
) -> Loaded:
    """Return all examples of a source.

    Args:
        source, overlong, language: as of `ExampleStream`.
        on_bad: is told of each bad record, which is then left out; "error" refuses a source that has any.

    Raises:
        RecordError: a record is bad, or there are no examples; names the first one and says how many more there are.
        ConfigError: as of `ExampleStream`.
    """
    stream = ExampleStream(source, renderer, overlong=overlong, language=language)
    examples: list[Example] = []
    first: RecordError | None = None
    for item in stream:
        if not isinstance(item, RecordError):
            examples.append(item[1])
        elif on_bad == "error":
            first = first or item
        else:
            on_bad(item)
    counts = stream.counts
    if first is not None:
        more = counts.num_bad - 1
        if more:
            said = f"{more} more {'is' if more == 1 else 'are'} bad; `seamount data check` lists them."
            first.hint = f"{first.hint} {said}" if first.hint else said
        raise first
    if not examples:
        raise RecordError(
            "The data holds no examples.",
            hint=f"Of {counts.num_records} records {counts.num_bad} are bad and {counts.num_skipped} are over-long.",
        )
    return Loaded(examples, counts)
