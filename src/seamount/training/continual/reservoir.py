"""Which examples of all that were seen are remembered: `Reservoir`, a uniform sample of bounded size.

Called by `pipeline` when a task has been learned. What is kept depends on the seed and on how many examples went
before, on nothing else, so that a run that is repeated remembers the same. It must not know what an example is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Reservoir(Generic[T]):
    """A sample of a stream: each thing in it so far is kept with the same probability, `size / num_seen`.

    Algorithm R (Vitter, "Random Sampling with a Reservoir", ACM TOMS 11, 1985): the first `size` fill the reservoir;
    thing number n, from 0, then takes the place drawn uniformly from 0 to n, if there is such a place.

    Attributes:
        size: most things that are kept.
        seed: of the draws.
        kept: those kept, by place.
        num_seen: how many there were.
    """

    size: int
    seed: int
    kept: tuple[T, ...] = ()
    num_seen: int = 0

    def extended(self, count: int, thing: Callable[[int], T]) -> Reservoir[T]:
        """The reservoir when `count` more have gone by.

        Args:
            thing: gives number i of these, from 0; asked only for those that are kept.
        """
        if not self.size:
            return Reservoir(0, self.seed, (), self.num_seen + count)
        chosen: dict[int, int] = {}
        for index in range(count):
            place = self._place(self.num_seen + index)
            if place < self.size:
                chosen[place] = index
        num_kept = min(self.size, self.num_seen + count)
        kept = tuple(thing(chosen[place]) if place in chosen else self.kept[place] for place in range(num_kept))
        return Reservoir(self.size, self.seed, kept, self.num_seen + count)

    def _place(self, number: int) -> int:
        """Where thing `number` of the stream goes; at `size` and above it goes by."""
        if number < self.size:
            return number
        digest = hashlib.blake2b(f"reservoir {self.seed} {number}".encode(), digest_size=16).digest()
        return int.from_bytes(digest, "little") % (number + 1)
