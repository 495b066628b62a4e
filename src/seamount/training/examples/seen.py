"""Remembers what has occurred, for hundreds of millions of things, in 16 bytes each: `Seen`. Knows no records."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np

_RECENT = 1 << 18


class Seen:
    """Keys and the place of their first occurrence. Two keys are taken for one with probability 2^-64."""

    def __init__(self) -> None:
        self._recent: dict[int, int] = {}
        self._sorted: list[tuple[np.ndarray, np.ndarray]] = []  # each at most half as long as the one before

    def first(self, key: bytes, place: int) -> int | None:
        """Return where the key occurred first; None if that is here, which is remembered.

        Args:
            place: a number below 2^63.
        """
        digest = int.from_bytes(blake2b(key, digest_size=8).digest())
        found = self._recent.get(digest)
        if found is not None:
            return found
        for keys, places in self._sorted:
            at = int(np.searchsorted(keys, np.uint64(digest)))
            if at < len(keys) and int(keys[at]) == digest:
                return int(places[at])
        self._recent[digest] = place
        if len(self._recent) >= _RECENT:
            self._settle()
        return None

    def _settle(self) -> None:
        count = len(self._recent)
        keys = np.fromiter(self._recent.keys(), dtype=np.uint64, count=count)
        places = np.fromiter(self._recent.values(), dtype=np.int64, count=count)
        self._recent = {}
        while self._sorted and len(self._sorted[-1][0]) < 2 * len(keys):
            older_keys, older_places = self._sorted.pop()
            keys, places = np.concatenate((older_keys, keys)), np.concatenate((older_places, places))
        order = np.argsort(keys)
        self._sorted.append((keys[order], places[order]))
