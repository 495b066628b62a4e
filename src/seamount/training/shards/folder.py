"""The folder of a build that may be killed at any moment: `BuildFolder`, and `State`, what it remembers.

Called by `build`. The state is replaced as a whole after what it speaks of is on the disk, so that it never promises
more than there is. A second process is kept out. It must not know how examples are made.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

from seamount.core.errors import ConfigError
from seamount.training.shards import store
from seamount.training.shards.cursor import Position

_WORK = "work"


class State(BaseModel):
    """How far a build is.

    Attributes:
        stamps: of each source its size and time of change: while they are these, it is not read to be identified.
        scanned: records before this have their key on the disk.
        is_scanned: all of them.
        written: records before this are in the finished shards.
        report_bytes: of the report, up to there.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    origin: store.Origin
    stamps: tuple[tuple[int, int], ...]
    scanned: Position = Position()
    is_scanned: bool = False
    written: Position = Position()
    counts: store.Counts = store.Counts()
    report_bytes: int = 0
    shards: tuple[store.Shard, ...] = ()


class BuildFolder:
    """A folder that holds finished shards, unfinished ones, or nothing yet. A context manager, which holds its lock.

    Raises:
        ConfigError: the folder holds something else, or another process writes to it.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.work = path, path / _WORK

    def __enter__(self) -> Self:
        ours = (store.MANIFEST, store.UNFINISHED, _WORK)
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"{self.path} is a file.", hint="Name a folder.")
        if self.path.is_dir() and any(self.path.iterdir()) and not any((self.path / name).exists() for name in ours):
            raise ConfigError(f"{self.path} holds something else.", hint="Name a folder that is new or empty.")
        self.path.mkdir(parents=True, exist_ok=True)
        self._folder = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(self._folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as cause:
            os.close(self._folder)
            raise ConfigError(f"Another process is building {self.path}.") from cause
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._folder)

    def finished(self, origin: store.Origin) -> store.Manifest | None:
        """The manifest, where the folder is finished; what a kill after it left is removed.

        Raises:
            ConfigError: it was made of something else than `origin`.
        """
        if not (self.path / store.MANIFEST).exists():
            return None
        manifest = store.read_manifest(self.path)
        self._check(manifest.origin, origin)
        self._remove_work()
        return manifest

    def load(self) -> State | None:
        """What an earlier call left; None where it left nothing.

        Raises:
            ConfigError: another version of the program left it.
        """
        try:
            return State.model_validate_json((self.path / store.UNFINISHED).read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError as cause:
            raise ConfigError(
                f"{self.path / store.UNFINISHED} is not of this version.", hint="Remove the folder to build it anew."
            ) from cause

    def begin(self, origin: store.Origin, stamps: tuple[tuple[int, int], ...]) -> State:
        """The state to go on from.

        Raises:
            ConfigError: shards were made of something else than `origin`.
        """
        state = self.load()
        if state is None or (state.origin != origin and not state.shards):
            shutil.rmtree(self.work, ignore_errors=True)
            state = State(origin=origin, stamps=stamps)
        self._check(state.origin, origin)
        self.work.mkdir(exist_ok=True)
        kept = {name(shard.number) for shard in state.shards for name in (store.tokens_name, store.trained_name)}
        for path in self.path.glob("*-*.bin"):
            if path.name not in kept:
                path.unlink()
        state = state.model_copy(update={"stamps": stamps})
        self.save(state)
        return state

    def save(self, state: State) -> None:
        """Remember how far the build is."""
        store.write_whole(self.path / store.UNFINISHED, state.model_dump_json().encode())

    def finish(self, manifest: store.Manifest) -> None:
        """Write the manifest, and remove what only the building needed."""
        text = json.dumps(manifest.model_dump(mode="json"), indent=1, ensure_ascii=False)
        store.write_whole(self.path / store.MANIFEST, text.encode())
        self._remove_work()

    def _check(self, found: store.Origin, wanted: store.Origin) -> None:
        changes = _changes(found, wanted)
        if changes:
            raise ConfigError(
                f"{self.path} was made of something else: {'; '.join(changes)}.",
                hint="Remove the folder to build it anew, or name another.",
            )

    def _remove_work(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        (self.path / store.UNFINISHED).unlink(missing_ok=True)
        os.fsync(self._folder)


def _changes(found: store.Origin, wanted: store.Origin) -> list[str]:
    """What differs, in words."""
    told = []
    before, now = ({source.name: source for source in origin.sources} for origin in (found, wanted))
    told += [f"{name} was not among its files" for name in now if name not in before]
    told += [f"{name} was among its files" for name in before if name not in now]
    told += [f"{name} has changed since" for name in now if name in before and now[name] != before[name]]
    if not told and found.sources != wanted.sources:
        told.append("its files came in another order")
    if found.renderer != wanted.renderer or found.vocab_size != wanted.vocab_size:
        told.append("the tokenizer, the chat template, the longest example or what is trained on is another")
    for name in ("overlong", "duplicates", "invalid", "shard_tokens"):
        one, other = getattr(found, name), getattr(wanted, name)
        if one != other:
            told.append(f"{name} was {one}, not {other}")
    return told
