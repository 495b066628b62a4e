"""Which records occur more than once: exact duplicates among tens of millions, in bounded memory.

Called by `build`, which keeps a key per record in a file. Text counts as equal whatever its Unicode composition and
white space. Near-duplicates are not looked for. What is done about a duplicate is the caller's to decide; it must not
know what a record is.
"""

from __future__ import annotations

import hashlib
import io
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from seamount.training.shards import store

KEY_BYTES = 16
_KEYS = np.dtype([("high", "<u8"), ("low", "<u8")])
_READ_KEYS = 2**18  # at once: 4 MiB
_SORTED_KEYS = 2**21  # at once: some 180 MB with what sorting needs


@dataclass(frozen=True, slots=True)
class Duplicates:
    """Records that occurred before.

    Attributes:
        places: `[D]` int64, from 0, rising.
        first: `[D]` int64, where each of them occurred first.
    """

    places: np.ndarray
    first: np.ndarray

    def __len__(self) -> int:
        return len(self.places)

    def first_of(self, place: int) -> int | None:
        """Where what stands at a place occurred first; None if there."""
        index = int(np.searchsorted(self.places, place))
        return int(self.first[index]) if index < len(self) and self.places[index] == place else None


def key_of(parts: Iterable[str]) -> bytes:
    """A 128-bit digest of a record's texts, each in Unicode's composed form with single spaces for white space.

    That two of 50 million different records have the same has a chance of 4e-24.
    """
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    for part in parts:
        text = " ".join((part if part.isascii() else unicodedata.normalize("NFC", part)).split())
        # A lone surrogate has no UTF-8; whether it may stand in a record is not decided here.
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.digest()


def find(path: Path, *, progress: Callable[[float], None] | None = None) -> Duplicates:
    """Duplicates among the keys that lie one after the other in a file.

    The file is read once per two million keys, and each time a part of the keys, chosen by value, is sorted: 180 MB of
    memory and 16 bytes per duplicate, however many keys there are.

    Args:
        progress: told the share that is done.
    """
    count = path.stat().st_size // KEY_BYTES
    num_parts = max(-(-count // _SORTED_KEYS), 1)
    found: list[tuple[np.ndarray, np.ndarray]] = []
    for part in range(num_parts):
        places, keys = _keys_of_part(path, part, num_parts)
        found.append(_repeats(places, keys))
        if progress is not None:
            progress((part + 1) / num_parts)
    places, first = (np.concatenate(columns) for columns in zip(*found, strict=True))
    order = np.argsort(places)
    return Duplicates(places[order], first[order])


def save(found: Duplicates, path: Path) -> None:
    """Keep them in a file, whole or not at all."""
    data = io.BytesIO()
    np.save(data, np.stack([found.places, found.first]), allow_pickle=False)
    store.write_whole(path, data.getvalue())


def load(path: Path) -> Duplicates:
    """What `save` kept."""
    return Duplicates(*np.load(path, allow_pickle=False))


def _keys_of_part(path: Path, part: int, num_parts: int) -> tuple[np.ndarray, np.ndarray]:
    """Places and keys of those that fall into one of `num_parts` parts by value."""
    all_places, all_keys, place = [], [], 0
    with open(path, "rb") as file:
        while len(keys := np.frombuffer(file.read(_READ_KEYS * KEY_BYTES), dtype=_KEYS)):
            chosen = np.flatnonzero(keys["high"] % np.uint64(num_parts) == part)
            all_places.append(chosen + place)
            all_keys.append(keys[chosen])
            place += len(keys)
    if not all_keys:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=_KEYS)
    return np.concatenate(all_places), np.concatenate(all_keys)


def _repeats(places: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places whose key stands at an earlier place too, and the first such; `places` rise."""
    order = np.lexsort((keys["low"], keys["high"]))  # stable: equal keys stay in their order
    keys, places = keys[order], places[order]
    is_first = np.ones(len(keys), dtype=bool)
    is_first[1:] = keys[1:] != keys[:-1]
    first = places[np.maximum.accumulate(np.where(is_first, np.arange(len(keys)), 0))]
    return places[~is_first], first[~is_first]
