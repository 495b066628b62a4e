"""New and remembered examples in one data set, and which of them each step takes. Called by `pipeline`.

Like `shards.order`, a pure function of the step: a run that goes on needs no state. It must not know tensors.
"""

from __future__ import annotations

import hashlib

import numpy as np

from seamount.training.examples.example import Example
from seamount.training.shards.dataset import Dataset
from seamount.training.shards.order import Order


class MixedData(Dataset):
    """The new examples, then the remembered ones."""

    def __init__(self, new: Dataset, remembered: Dataset) -> None:
        self._parts = (new, remembered)
        self._lengths = np.concatenate([part.lengths for part in self._parts])
        self._num_trained = np.concatenate([part.num_trained for part in self._parts])

    def __len__(self) -> int:
        return len(self._lengths)

    def example(self, index: int) -> Example:
        new, remembered = self._parts
        return new.example(index) if index < len(new) else remembered.example(index - len(new))

    @property
    def lengths(self) -> np.ndarray:
        return self._lengths

    @property
    def num_trained(self) -> np.ndarray:
        return self._num_trained

    @property
    def digest(self) -> str:
        return hashlib.sha256("\n".join(part.digest for part in self._parts).encode()).hexdigest()


class MixedOrder:
    """Steps of `batch_size` examples of a `MixedData`, of which a share is remembered ones.

    Both kinds go through permutations of their own, so that each is used as often as the others of its kind.

    Args:
        share: of remembered examples in each step; at least one of both kinds, where there are any remembered.
    """

    def __init__(self, num_new: int, num_remembered: int, batch_size: int, share: float, seed: int) -> None:
        taken = min(max(round(batch_size * share), 1), batch_size - 1) if num_remembered else 0
        self._num_new = num_new
        self._new = Order(num_new, batch_size - taken, seed)
        self._remembered = Order(num_remembered, taken, seed + 1) if taken else None

    @property
    def steps_per_epoch(self) -> float:
        """Steps in which every new example is seen once."""
        return self._new.steps_per_epoch

    def step(self, step: int) -> np.ndarray:
        """The examples of step number `step`, from 0: `[batch_size]` int64."""
        new = self._new.step(step)
        if self._remembered is None:
            return new
        return np.concatenate([new, self._remembered.step(step) + self._num_new])
