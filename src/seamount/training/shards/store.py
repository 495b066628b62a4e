"""What a folder of token shards holds: the manifest, the files, and `ShardWriter`, which makes them.

Called by `dataset` to read and by `build` to write. A folder holds

    manifest.json                        written last: a folder without it is not finished
    tokens-00000.bin, tokens-00001.bin   token ids, little-endian, 16 bits where the vocabulary allows, else 32
    trained-00000.bin, ...               a bit per token of the shard, the first the highest of its byte
    starts.bin [N] int64                 the example's first token, counted over all shards
    lengths.bin, num_trained.bin [N] int32

An example never spans shards. It must not know what made the examples.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from seamount.core.errors import ConfigError, IntegrityError
from seamount.training.examples.example import Example

MANIFEST, UNFINISHED = "manifest.json", "progress.json"
INDEX = {"starts": "int64", "lengths": "int32", "num_trained": "int32"}
TokenType = Literal["uint16", "uint32"]
EMPTY_DIGEST = bytes(hashlib.sha256().digest_size)


def extend_digest(running: bytes, example: Example) -> bytes:
    """The digest of a list of examples and one more.

    A chain of SHA-256 over the digest so far, token ids as int32 and trained flags as bytes: it needs no more than its
    last value to go on, so that a job that was killed does not read again what it has written.
    """
    tokens = example.token_ids.astype("<i4").tobytes()
    return hashlib.sha256(running + tokens + example.trained.astype(np.uint8).tobytes()).digest()


def token_type(vocab_size: int) -> TokenType:
    """The narrowest type that holds every id below `vocab_size`."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def tokens_name(number: int) -> str:
    """File of a shard's token ids."""
    return f"tokens-{number:05}.bin"


def trained_name(number: int) -> str:
    """File of a shard's trained flags."""
    return f"trained-{number:05}.bin"


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Shard(_Facts):
    """One shard. `digest` is of all examples from the first shard to the end of this one."""

    number: int
    num_examples: int
    num_tokens: int
    num_trained: int
    digest: str


class Source(_Facts):
    """A file of records; `digest` is SHA-256 of its bytes."""

    name: str
    num_bytes: int
    digest: str


class Origin(_Facts):
    """What examples are made of, and by which rules: with the same origin a build gives the same bytes.

    Attributes:
        renderer: digest of tokenizer, template and rules; the longest example is part of them.
        overlong, duplicates, invalid, language: what becomes of such records, as of `build.Job`.
        shard_tokens: a shard ends when it has so many.
    """

    sources: tuple[Source, ...]
    renderer: str
    vocab_size: int
    overlong: Literal["error", "skip", "cut"]
    duplicates: Literal["keep", "drop"]
    invalid: Literal["error", "skip"]
    language: str | None = None
    shard_tokens: int


class Counts(_Facts):
    """Of records: those that say what an earlier one says, kept or not; the invalid and over-long ones that were left
    out; and those that were cut.
    """

    num_records: int = 0
    num_duplicates: int = 0
    num_invalid: int = 0
    num_overlong: int = 0
    num_cut: int = 0

    def plus(self, other: Counts) -> Counts:
        """Both together."""
        return Counts(**{name: value + getattr(other, name) for name, value in self})


class Manifest(_Facts):
    """A finished folder.

    Attributes:
        counts: what became of the sources' records.
        digest: of all examples and their order, as `extend_digest` makes it.
    """

    format: Literal["seamount token shards"] = "seamount token shards"
    version: Literal[1] = 1
    num_examples: int
    num_tokens: int
    num_trained: int
    counts: Counts
    token_type: TokenType
    digest: str
    origin: Origin
    shards: tuple[Shard, ...]


def read_manifest(folder: Path) -> Manifest:
    """Read what a finished folder holds.

    Raises:
        ConfigError: there are no shards, unfinished ones, or those of another version.
    """
    try:
        return Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except FileNotFoundError as cause:
        if (folder / UNFINISHED).is_file():
            raise ConfigError(
                f"The token shards in {folder} are not finished.",
                hint="Give the `seamount data build` command again; it goes on where it stopped.",
            ) from cause
        raise ConfigError(
            f"{folder} holds no token shards.", hint="`seamount data build` makes them of a data file."
        ) from cause
    except OSError as cause:
        raise ConfigError(f"{folder / MANIFEST} cannot be read: {cause.strerror}.") from cause
    except ValidationError as cause:
        first = cause.errors()[0]
        raise ConfigError(
            f"{folder / MANIFEST} is not a manifest of this version: "
            f"{'.'.join(map(str, first['loc']))}: {first['msg']}.",
            hint="Build the data again.",
        ) from cause


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """Compare every file's size with the manifest's numbers.

    Raises:
        IntegrityError: one is missing or has another size; names it.
    """
    wanted = {f"{name}.bin": manifest.num_examples * np.dtype(dtype).itemsize for name, dtype in INDEX.items()}
    for shard in manifest.shards:
        wanted[tokens_name(shard.number)] = shard.num_tokens * np.dtype(manifest.token_type).itemsize
        wanted[trained_name(shard.number)] = -(-shard.num_tokens // 8)
    for name, num_bytes in wanted.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != num_bytes:
            said = "is missing" if found is None else f"has {found} bytes"
            raise IntegrityError(f"{path} {said}; the manifest says {num_bytes}.", hint="Build the data again.")


class ShardWriter:
    """Appends examples to the shards of a folder. A context manager, which closes the files.

    What was written after the last `end_shard` is not part of the data: the next writer over the same shards cuts it
    off. Writing raises OSError where the disk is full, and nothing that was ended is lost by it.
    """

    def __init__(self, folder: Path, dtype: TokenType, shards: Sequence[Shard]) -> None:
        self._folder, self._dtype = folder, np.dtype(dtype).newbyteorder("<")
        self._digest = bytes.fromhex(shards[-1].digest) if shards else EMPTY_DIGEST
        self._end = sum(shard.num_tokens for shard in shards)
        num_examples = sum(shard.num_examples for shard in shards)
        self._index = {
            name: AppendFile(folder / f"{name}.bin", num_examples * np.dtype(kind).itemsize)
            for name, kind in INDEX.items()
        }
        self._number = len(shards)
        self._shard: _OpenShard | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._shard is not None:
            self._shard.close()
        for file in self._index.values():
            file.close()

    @property
    def num_tokens(self) -> int:
        """Tokens in the shard that is being written."""
        return 0 if self._shard is None else self._shard.num_tokens

    def write(self, examples: Sequence[Example]) -> None:
        """Append examples to the shard."""
        if not examples:
            return
        lengths = np.array([len(example.token_ids) for example in examples], dtype="<i4")
        num_trained = np.array([example.trained.sum() for example in examples], dtype="<i4")
        starts = self._end + np.cumsum(lengths, dtype="<i8") - lengths
        if self._shard is None:
            self._shard = _OpenShard(self._folder, self._number, self._dtype)
        self._shard.append(examples)
        self._index["starts"].append(starts.tobytes())
        self._index["lengths"].append(lengths.tobytes())
        self._index["num_trained"].append(num_trained.tobytes())
        self._end += int(lengths.sum())
        for example in examples:
            self._digest = extend_digest(self._digest, example)

    def end_shard(self) -> Shard:
        """Bring all that was written since the last shard to the disk, as one shard."""
        if self._shard is None:
            raise ValueError("a shard without examples")
        shard = self._shard.finish(self._digest.hex())
        for file in self._index.values():
            file.sync()
        self._number, self._shard = self._number + 1, None
        return shard


class _OpenShard:
    """The shard that is being written: its two files."""

    def __init__(self, folder: Path, number: int, dtype: np.dtype) -> None:
        self._number, self._dtype = number, dtype
        self._num_examples = self.num_tokens = self._num_trained = 0
        self._flags = np.zeros(0, dtype=bool)  # those that do not fill a byte yet
        self._tokens = AppendFile(folder / tokens_name(number), 0)
        self._trained = AppendFile(folder / trained_name(number), 0)

    def append(self, examples: Sequence[Example]) -> None:
        tokens = np.concatenate([example.token_ids for example in examples])
        if tokens.min() < 0 or tokens.max() > np.iinfo(self._dtype).max:
            raise ValueError(f"token ids {tokens.min()} to {tokens.max()} do not fit into {self._dtype}")
        flags = np.concatenate([example.trained for example in examples])
        self._tokens.append(tokens.astype(self._dtype).tobytes())
        waiting = np.concatenate([self._flags, flags])
        num_whole = len(waiting) // 8 * 8
        self._trained.append(np.packbits(waiting[:num_whole]).tobytes())
        self._flags = waiting[num_whole:]
        self._num_examples += len(examples)
        self.num_tokens += len(tokens)
        self._num_trained += int(flags.sum())

    def finish(self, digest: str) -> Shard:
        self._trained.append(np.packbits(self._flags).tobytes())
        for file in (self._tokens, self._trained):
            file.sync()
        self.close()
        return Shard(
            number=self._number,
            num_examples=self._num_examples,
            num_tokens=self.num_tokens,
            num_trained=self._num_trained,
            digest=digest,
        )

    def close(self) -> None:
        self._tokens.close()
        self._trained.close()


class AppendFile:
    """A file that is written from byte `size` on; what lies behind that is cut off. A context manager."""

    def __init__(self, path: Path, size: int) -> None:
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115
        if self._file.seek(0, os.SEEK_END) < size:
            self._file.close()
            raise IntegrityError(
                f"{path} is shorter than the {size} bytes that were written.", hint="Build the data again."
            )
        self._file.truncate(size)
        self.size = size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def append(self, data: bytes) -> None:
        """Write all of `data`."""
        left = memoryview(data)
        while left:
            left = left[self._file.write(left) :]
        self.size += len(data)

    def sync(self) -> None:
        """Bring everything to the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Let go of the file. Idempotent."""
        self._file.close()


def write_whole(path: Path, content: bytes) -> None:
    """Write a small file beside its place, and rename it into it once it is on the disk."""
    partial = path.with_name(path.name + ".tmp")
    with AppendFile(partial, 0) as file:
        file.append(content)
        file.sync()
    os.replace(partial, path)
