"""Which examples a step takes: `Order`, a pure function of data set size, batch size, seed and step.

Called by the trainer. There is no state to save: a run that goes on at step k asks for step k. An epoch's permutation
is computed place by place and never stored, so that a step costs the same among ten examples and among ten billion.
The arithmetic is written out here, because a library's generator may change between versions, and with it the data
that a resumed run would see. It must not know what an example is.
"""

from __future__ import annotations

import hashlib
from math import isqrt

import numpy as np

from seamount.core.errors import ConfigError

_ROUNDS = 8  # as many 64-bit keys as one BLAKE2b digest holds


class Order:
    """Steps of `batch_size` examples; epochs follow each other without a gap, each of them a permutation.

    Args:
        num_examples: in the data set.
        batch_size: examples of a step, over all ranks and micro-batches. It may exceed `num_examples`.
        shuffle: without it, each epoch goes through the examples as they lie.

    Raises:
        ConfigError: there are no examples, or the batch is empty.
    """

    def __init__(self, num_examples: int, batch_size: int, seed: int, *, shuffle: bool = True) -> None:
        if num_examples < 1:
            raise ConfigError("The data set has no examples.", hint="See `seamount data check FILE`.")
        if batch_size < 1:
            raise ConfigError(f"A step of {batch_size} examples trains nothing.", hint="Set batch size to 1 or more.")
        self.num_examples, self.batch_size = num_examples, batch_size
        self._seed, self._shuffle = seed, shuffle

    @property
    def steps_per_epoch(self) -> float:
        """Steps in which every example is seen once; no whole number where a step spans two epochs."""
        return self.num_examples / self.batch_size

    def step(self, step: int) -> np.ndarray:
        """The examples of step number `step`, from 0: `[batch_size]` int64. A step may span epochs."""
        first = step * self.batch_size
        places = np.arange(first, first + self.batch_size, dtype=np.int64)
        epochs, places = np.divmod(places, self.num_examples)
        if not self._shuffle:
            return places
        chosen = [
            permute(places[epochs == epoch], self.num_examples, f"{self._seed} {epoch}")
            for epoch in range(int(epochs[0]), int(epochs[-1]) + 1)
        ]
        return np.concatenate(chosen)


def permute(places: np.ndarray, size: int, key: str) -> np.ndarray:
    """Where a pseudo-random permutation of `range(size)` puts `places` (int64): another one for each key.

    A Feistel network over pairs (l, r), l below a and r below b, where a * b is the least product that holds `size`
    near its square root; a result outside of it goes through again ("Ciphers with Arbitrary Finite Domains", Black and
    Rogaway, CT-RSA 2002, the generalised Feistel construction with cycle walking). At most `a` values lie outside.
    """
    digest = hashlib.blake2b(key.encode(), digest_size=8 * _ROUNDS).digest()
    keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)
    left_size = isqrt(size - 1) + 1
    right_size = -(-size // left_size)
    found = _feistel(places.astype(np.uint64), left_size, right_size, keys)
    outside = np.flatnonzero(found >= size)
    while len(outside):
        found[outside] = _feistel(found[outside], left_size, right_size, keys)
        outside = outside[found[outside] >= size]
    return found.astype(np.int64)


def _feistel(values: np.ndarray, left_size: int, right_size: int, keys: np.ndarray) -> np.ndarray:
    left, right = np.divmod(values, np.uint64(right_size))
    for index in range(0, _ROUNDS, 2):
        # A sum stays below 2**64, as both sizes are near a square root.
        left = (left + _mix(right ^ keys[index]) % np.uint64(left_size)) % np.uint64(left_size)
        right = (right + _mix(left ^ keys[index + 1]) % np.uint64(right_size)) % np.uint64(right_size)
    return left * np.uint64(right_size) + right


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's output function (Steele, Lea and Flood, OOPSLA 2014); products wrap around."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
