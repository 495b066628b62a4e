"""Whether guessing tokens makes decoding faster, found out while running. Used by `speculative`; no tensors, no clock.

A step that verifies guesses takes longer than a plain one, by how much depends on model, machine and load: with few
sequences side by side it waits for memory and the additional rows are nearly free, with many it does not. So both kinds
of step are timed, for every doubling of the number of sequences apart. Of each `_ROUND` steps the first `_TRIAL` guess,
the next `_TRIAL` do not, and the rest do what gave more tokens per second: `1 + acceptance` tokens per sequence in the
median time of one kind, or 1 in that of the other. So 1.6 % of all steps are spent on the worse kind.

A step that does not guess still writes the block's cache, so that guessing can begin again: what is compared with is
therefore slower than a decode step without the block (docs/log.md has numbers).

Acceptance is counted over the last guesses of all loads, since it depends on the text and not on the load.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

_TRIAL = 16
_ROUND = 1024
# Guesses that acceptance is counted over, at least; twice as many at most.
_MEMORY = 512


@dataclass(slots=True)
class _Load:
    """What is known of steps with one number of sequences."""

    num_steps: int = 0
    verdict: bool = False
    plain_s: list[float] = field(default_factory=list)
    guessing_s: list[float] = field(default_factory=list)


class Payoff:
    """Decides, step by step, whether to guess."""

    def __init__(self) -> None:
        self._loads: dict[int, _Load] = {}
        self._num_drafts = 0.0
        self._num_accepted = 0.0
        self._guesses = False

    @property
    def acceptance(self) -> float:
        """Share of the latest guesses that were right."""
        return self._num_accepted / self._num_drafts if self._num_drafts else 0.0

    def pays(self, num_sequences: int) -> bool:
        """Decide whether this step ends with a guess for each of its sequences."""
        load = self._load(num_sequences)
        place = load.num_steps % _ROUND
        load.num_steps += 1
        if place == 0:
            load.plain_s, load.guessing_s = [], []
        elif place == 2 * _TRIAL and load.plain_s and load.guessing_s:
            gain = (1 + self.acceptance) * statistics.median(load.plain_s) / statistics.median(load.guessing_s)
            load.verdict = gain > 1
        self._guesses = place < _TRIAL or (place >= 2 * _TRIAL and load.verdict)
        return self._guesses

    def count(self, num_drafts: int, num_accepted: int) -> None:
        """Learn how many of a step's guesses were right."""
        self._num_drafts += num_drafts
        self._num_accepted += num_accepted
        if self._num_drafts > 2 * _MEMORY:
            self._num_drafts /= 2
            self._num_accepted /= 2

    def time(self, num_sequences: int, num_drafts: int, step_s: float) -> None:
        """Learn how long a step took that decoded `num_sequences` and did nothing else.

        Steps in which one kind goes over into the other count for neither.
        """
        load = self._load(num_sequences)
        if (load.num_steps - 1) % _ROUND >= 2 * _TRIAL:
            return
        if num_drafts == num_sequences and self._guesses:
            load.guessing_s.append(step_s)
        elif num_drafts == 0 and not self._guesses:
            load.plain_s.append(step_s)

    def _load(self, num_sequences: int) -> _Load:
        return self._loads.setdefault((num_sequences - 1).bit_length(), _Load())
