"""Turns shards of samples into batches of equal row length. Called by `loop`.

What a step trains on is a function of the recipe and the step's number alone, so a run that was killed goes on with the
data that it would have seen. It must not know the network or what the samples say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from seamount.core.errors import ConfigError
from seamount.training.pretraining.recipe import DataSection

# Bucket choices are drawn in one go per stage; a run longer than this in one stage is refused by `batch`.
_MOST_STEPS = 1_000_000


@dataclass(frozen=True, slots=True)
class TrainingBatch:
    """Rows of samples, padded on the right.

    Attributes:
        token_ids: `[S, L]` int64.
        trained: `[S, L]` bool: the loss counts the guess of this token.
        real: `[S, L]` bool: not padding.
    """

    token_ids: Tensor
    trained: Tensor
    real: Tensor


class Shard:
    """Samples on disk, memory-mapped: sample i is `tokens[offsets[i]:offsets[i + 1]]`."""

    def __init__(self, folder: Path) -> None:
        self.tokens = np.load(folder / "tokens.npy", mmap_mode="r")
        self.trained = np.load(folder / "trained.npy", mmap_mode="r")
        self.offsets = np.load(folder / "offsets.npy")

    def lengths(self) -> np.ndarray:
        """Tokens of each sample."""
        return np.diff(self.offsets)

    def num_longer_than(self, limit: int) -> int:
        """Samples of more than `limit` tokens."""
        return int((self.lengths() > limit).sum())


class StageData:
    """The batches of one stage."""

    def __init__(self, shard: Shard, section: DataSection, seed: int, pad_id: int) -> None:
        self._shard, self._seed, self._pad_id = shard, seed, pad_id
        lengths = shard.lengths()
        bucket_of = np.searchsorted(section.buckets, lengths)
        self._buckets = []
        for index, width in enumerate(section.buckets):
            members = np.flatnonzero(bucket_of == index)
            if len(members):
                self._buckets.append((width, max(section.batch_tokens // width, 1), members))
        if not self._buckets:
            raise ConfigError("No sample fits into the longest of data.buckets.")
        # A bucket is drawn as often as it has batches, so that all samples are used at the same pace.
        shares = np.array([len(members) / rows for _, rows, members in self._buckets])
        draws = np.random.default_rng([seed, 0]).random(_MOST_STEPS, dtype=np.float32)
        self._choices = np.searchsorted(np.cumsum(shares / shares.sum())[:-1], draws).astype(np.int8)
        self._orders: dict[tuple[int, int], np.ndarray] = {}

    def batch(self, step: int) -> TrainingBatch:
        """The batch of the stage's step number `step`, from 0."""
        choice = int(self._choices[step])
        width, num_rows, members = self._buckets[choice]
        first = int((self._choices[:step] == choice).sum()) * num_rows
        chosen = [
            members[self._order(choice, place // len(members))[place % len(members)]]
            for place in range(first, first + num_rows)
        ]
        token_ids = np.full((num_rows, width), self._pad_id, dtype=np.int64)
        trained = np.zeros((num_rows, width), dtype=bool)
        real = np.zeros((num_rows, width), dtype=bool)
        for row, sample in enumerate(chosen):
            start, end = self._shard.offsets[sample], self._shard.offsets[sample + 1]
            token_ids[row, : end - start] = self._shard.tokens[start:end]
            trained[row, : end - start] = self._shard.trained[start:end]
            real[row, : end - start] = True
        return TrainingBatch(torch.from_numpy(token_ids), torch.from_numpy(trained), torch.from_numpy(real))

    def _order(self, choice: int, epoch: int) -> np.ndarray:
        """The order of a bucket's samples in its `epoch`-th pass."""
        if (choice, epoch) not in self._orders:
            rng = np.random.default_rng([self._seed, 1, choice, epoch])
            self._orders = {
                key: order for key, order in self._orders.items() if key[0] != choice or key[1] == epoch - 1
            }
            self._orders[choice, epoch] = rng.permutation(len(self._buckets[choice][2]))
        return self._orders[choice, epoch]


class TrainingData:
    """The batches of a whole run.

    Args:
        shard_of: makes (or finds) the shard of stage number i; called when the run reaches the stage.
        pad_id: token that fills rows up; it is never trained.
    """

    def __init__(self, section: DataSection, seed: int, pad_id: int, shard_of: Callable[[int], Shard]) -> None:
        self._section, self._seed, self._pad_id, self._shard_of = section, seed, pad_id, shard_of
        self._stage: tuple[int, StageData] | None = None

    def batch(self, step: int) -> TrainingBatch:
        """The batch of step number `step`, from 0."""
        number = max(i for i, stage in enumerate(self._section.stages) if stage.from_step <= step)
        if self._stage is None or self._stage[0] != number:
            data = StageData(self._shard_of(number), self._section, self._seed + number, self._pad_id)
            self._stage = number, data
        return self._stage[1].batch(step - self._section.stages[number].from_step)
