"""Looks through data without training on it: `check`, and the `Report` that it makes.

Called by `seamount data check` and by dry runs. Holds four bytes per example, whatever the data's size.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import numpy as np

from .reading import Source
from .record import RecordError
from .rendering import Renderer
from .seen import Seen
from .stream import Counts, ExampleStream, Overlong

KEPT_ERRORS = 1000
_PROGRESS_EVERY = 500


@dataclass(frozen=True, slots=True)
class Report:
    """What is in some data.

    Attributes:
        formats: name of the format of each file.
        counts: of records and examples.
        bad: the first `KEPT_ERRORS` bad records; `counts.num_bad` says how many there are.
        lengths: [examples] uint32, tokens of each.
        num_trained: tokens that are learned.
        num_duplicates: examples that occurred before, token for token.
    """

    formats: dict[str, str]
    counts: Counts
    bad: list[RecordError] = field(repr=False)
    lengths: np.ndarray
    num_trained: int
    num_duplicates: int

    @property
    def is_good(self) -> bool:
        """Whether a run may begin: there is something to learn, and nothing bad."""
        return self.counts.num_bad == 0 and self.counts.num_examples > 0

    @property
    def num_tokens(self) -> int:
        """Tokens of all examples."""
        return int(self.lengths.sum(dtype=np.int64))

    def length_at(self, share: float) -> int:
        """Tokens that this share of the examples do not exceed; 0 without examples."""
        return int(np.quantile(self.lengths, share, method="higher")) if len(self.lengths) else 0

    def rows(self) -> list[tuple[str, str]]:
        """Return the report as names and values for people."""
        counts, tokens = self.counts, self.num_tokens
        formats = dict.fromkeys(self.formats.values())
        rows = [
            ("format", ", ".join(formats) or "none"),
            ("records", f"{counts.num_records:,}"),
            ("bad", f"{counts.num_bad:,}"),
            ("examples", f"{counts.num_examples:,}"),
            ("duplicates", f"{self.num_duplicates:,}"),
            ("tokens", f"{tokens:,}"),
            ("trained", f"{self.num_trained:,} ({100 * self.num_trained / max(tokens, 1):.1f} %)"),
            (
                "length",
                f"half up to {self.length_at(0.5):,} tokens, 95 % up to {self.length_at(0.95):,}, "
                f"longest {self.length_at(1):,}",
            ),
        ]
        told = {"over-long, skipped": counts.num_skipped, "over-long, cut": counts.num_cut}
        return rows[:3] + [(name, f"{count:,}") for name, count in told.items() if count] + rows[3:]

    def to_json(self) -> str:
        """Return the report as JSON text."""
        fields = {
            "is_good": self.is_good,
            "formats": self.formats,
            **asdict(self.counts),
            "num_duplicates": self.num_duplicates,
            "num_tokens": self.num_tokens,
            "num_trained": self.num_trained,
            "length_p50": self.length_at(0.5),
            "length_p95": self.length_at(0.95),
            "length_max": self.length_at(1),
            "bad": [error.to_fields() for error in self.bad],
        }
        return json.dumps(fields, ensure_ascii=False, indent=2)


def check(
    source: Source,
    renderer: Renderer,
    *,
    overlong: Overlong = "error",
    language: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> Report:
    """Read, validate and render all of a source, and say what is in it.

    Args:
        source, overlong, language: as of `ExampleStream`.
        progress: gets the number of records so far, now and then.

    Raises:
        ConfigError: as of `ExampleStream`, or the checkpoint cannot render conversations.
    """
    stream = ExampleStream(source, renderer, overlong=overlong, language=language)
    lengths = array("I")
    bad: list[RecordError] = []
    seen = Seen()
    num_trained = num_duplicates = told = 0
    for item in stream:
        if isinstance(item, RecordError):
            if len(bad) < KEPT_ERRORS:
                bad.append(item)
        else:
            example = item[1]
            lengths.append(len(example.token_ids))
            num_trained += int(example.trained.sum())
            num_duplicates += seen.first(example.token_ids.tobytes(), 0) is not None
        if progress is not None and stream.counts.num_records >= told + _PROGRESS_EVERY:
            told = stream.counts.num_records
            progress(told)
    return Report(stream.formats, stream.counts, bad, np.array(lengths, dtype=np.uint32), num_trained, num_duplicates)
