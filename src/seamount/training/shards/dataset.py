"""Examples that can be taken by number: in memory (`ExampleList`) or memory-mapped (`TokenShards`).

Called by the trainer and by whatever looks through a whole data set (leaks, replay). Readers know nothing of how
examples are made; what a folder of shards holds, `store` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from seamount.core.errors import ConfigError, IntegrityError
from seamount.training.examples.example import Example
from seamount.training.shards import store


class Dataset(Protocol):
    """Examples by number, from 0. What it gives never changes."""

    def __len__(self) -> int: ...

    def example(self, index: int) -> Example:
        """Example number `index`. Raises IndexError beyond the last; there are no negative numbers."""
        ...

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example: `[N]` int32."""
        ...

    @property
    def num_trained(self) -> np.ndarray:
        """Trained tokens of each example: `[N]` int32."""
        ...

    @property
    def digest(self) -> str:
        """Of the examples and their order: equal for equal examples, wherever and however they are kept."""
        ...


class ExampleList(Dataset):
    """Examples in memory."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self._examples = list(examples)
        self._lengths = np.array([len(example.token_ids) for example in self._examples], dtype=np.int32)
        self._num_trained = np.array([example.trained.sum() for example in self._examples], dtype=np.int32)
        self._digest = ""

    def __len__(self) -> int:
        return len(self._examples)

    def example(self, index: int) -> Example:
        return self._examples[_checked(index, len(self))]

    @property
    def lengths(self) -> np.ndarray:
        return self._lengths

    @property
    def num_trained(self) -> np.ndarray:
        return self._num_trained

    @property
    def digest(self) -> str:
        if not self._digest:
            running = store.EMPTY_DIGEST
            for example in self._examples:
                running = store.extend_digest(running, example)
            self._digest = running.hex()
        return self._digest


class TokenShards(Dataset):
    """A folder that `build` made. Opening maps the index and looks at no example; a shard is mapped at first use.

    Attributes:
        folder: where it lies.
        manifest: what it holds, and what it was made of.
    """

    def __init__(self, folder: Path, manifest: store.Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self._index = {name: self._map(f"{name}.bin", dtype) for name, dtype in store.INDEX.items()}
        self._first_tokens = np.cumsum([0, *(shard.num_tokens for shard in manifest.shards)])
        self._shards: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    @classmethod
    def open(cls, folder: Path, *, renderer: str | None = None) -> TokenShards:
        """Open a finished folder.

        Args:
            renderer: `Renderer.digest` of who will train: the shards must have been made by the same.

        Raises:
            ConfigError: it holds no token shards, unfinished ones, those of another version, or of another tokenizer
                or chat template.
            IntegrityError: a file is missing or has another size than it should.
        """
        manifest = store.read_manifest(folder)
        if renderer not in (None, manifest.origin.renderer):
            raise ConfigError(
                f"The token shards in {folder} were made with another tokenizer, chat template or rendering rule "
                "than the model's.",
                hint="Build them again with `seamount data build`, for this model.",
            )
        store.check_sizes(folder, manifest)
        return cls(folder, manifest)

    def __len__(self) -> int:
        return self.manifest.num_examples

    def example(self, index: int) -> Example:
        start = int(self._index["starts"][_checked(index, len(self))])
        length = int(self._index["lengths"][index])
        number = int(np.searchsorted(self._first_tokens, start, side="right")) - 1
        tokens, bits = self._shard(number)
        start -= int(self._first_tokens[number])
        trained = np.unpackbits(bits[start // 8 : -(-(start + length) // 8)])
        return Example(
            tokens[start : start + length].astype(np.int32), trained[start % 8 : start % 8 + length].astype(bool)
        )

    @property
    def lengths(self) -> np.ndarray:
        return self._index["lengths"]

    @property
    def num_trained(self) -> np.ndarray:
        return self._index["num_trained"]

    @property
    def digest(self) -> str:
        return self.manifest.digest

    def verify(self) -> None:
        """Read everything and compare it with the digests.

        Raises:
            IntegrityError: a shard is not what was written; names it.
        """
        running, first = store.EMPTY_DIGEST, 0
        for shard in self.manifest.shards:
            for index in range(first, first + shard.num_examples):
                running = store.extend_digest(running, self.example(index))
            first += shard.num_examples
            if running.hex() != shard.digest:
                raise IntegrityError(
                    f"{self.folder / store.tokens_name(shard.number)}, its trained flags or the index were changed "
                    "after they were written.",
                    hint="Build the data again.",
                )

    def _shard(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        if number not in self._shards:
            shard = self.manifest.shards[number]
            self._shards[number] = (
                self._map(store.tokens_name(shard.number), self.manifest.token_type),
                self._map(store.trained_name(shard.number), "uint8"),
            )
        return self._shards[number]

    def _map(self, name: str, dtype: str) -> np.ndarray:
        little_endian = np.dtype(dtype).newbyteorder("<")
        # A plain array over the mapping: memmap's own class costs microseconds at each slice.
        return np.asarray(np.memmap(self.folder / name, dtype=little_endian, mode="r"))


def _checked(index: int, size: int) -> int:
    if not 0 <= index < size:
        raise IndexError(f"example {index} of {size}")
    return index
