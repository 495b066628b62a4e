"""Joins the chunks of several steps into one message where steps are so short that messages would cost more than they.

Used by `worker`. A step of a small model takes about two milliseconds; a message per step and stream would take the
processors from it, here, in the server and in every client. A person sees no difference: what is held is held for
hundredths of a second at most, and nothing is where steps take longer than that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace

from seamount.core.requests import Chunk

MAX_CHUNKS_PER_S = 400
"""Chunks of all streams together that are handed over per second, where that keeps none longer than `MAX_HOLD_S`."""
MIN_HOLD_S, MAX_HOLD_S = 0.005, 0.05
"""Seconds that a chunk may be held, few streams or many. Beginnings and ends of answers are never held."""


class Pacer:
    """Chunks on their way out.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._held: dict[tuple[str, int], Chunk] = {}
        self._is_urgent = False
        self._last_s = clock()

    def add(self, chunks: Iterable[Chunk]) -> None:
        """Take what a step brought."""
        for chunk in chunks:
            key = (chunk.request_id, chunk.index)
            before = self._held.get(key)
            self._held[key] = chunk if before is None else joined(before, chunk)
            # The first chunk of an answer is what its reader waits for, and so is the last.
            self._is_urgent |= chunk.num_cached_tokens is not None or chunk.finish_reason is not None

    def is_due(self) -> bool:
        """Say whether what is held is to be sent now."""
        hold_s = min(max(len(self._held) / MAX_CHUNKS_PER_S, MIN_HOLD_S), MAX_HOLD_S)
        return self._is_urgent or self._clock() - self._last_s >= hold_s

    def take(self) -> tuple[Chunk, ...]:
        """Return what is held, one chunk per sequence."""
        taken = tuple(self._held.values())
        self._held.clear()
        self._is_urgent = False
        self._last_s = self._clock()
        return taken


def joined(first: Chunk, then: Chunk) -> Chunk:
    """Return two chunks of one sequence, the one after the other, as one."""
    return replace(
        then,
        token_ids=first.token_ids + then.token_ids,
        text=first.text + then.text,
        logprobs=first.logprobs + then.logprobs,
        num_cached_tokens=first.num_cached_tokens,
        queue_s=first.queue_s,
        prefill_s=first.prefill_s,
    )
