"""What a continual run has become so far: a version for each task that was learned, and which one is current.

Called by `pipeline`. A run's folder holds

    versions.json               the list, and the current one
    versions/checkpoint-N/      version N: weights, Fisher information, remembered and evaluation examples
    learning/                   checkpoints of the task that is being learned

Versions form a tree: after a rollback the next one has another parent than the last. Nothing is ever removed from it.
Version 0 is the model as it was. A version counts when it is whole on the disk, even if a kill kept it from the list.
It must not know what the tensors mean.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from seamount.core.errors import CheckpointError, NotFoundError
from seamount.training.tuning.state import CheckpointStore

from .accuracy import replace_file

LIST_NAME = "versions.json"
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Version:
    """A run's state when a task had been learned.

    Attributes:
        number: from 1; 0 is the model as it was.
        task_id: the task that made it of `parent`.
        data: digest of the task's examples.
        accuracy: on each task so far, in the order in which they were learned, 0 to 1.
        num_seen: examples of all tasks so far.
        num_steps: steps that this task took.
        is_current: what comes next goes on from this one.
    """

    number: int
    task_id: str
    parent: int
    data: str
    accuracy: tuple[float, ...]
    num_seen: int
    num_steps: int
    is_current: bool = False


BASE = Version(0, "", 0, "", (), 0, 0)


class Versions:
    """The versions of the run in a folder; every call reads the list anew.

    Methods raise CheckpointError where the list or a version is damaged, or cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / LIST_NAME
        # Each holds all of it: what is built on another would be lost with that one.
        self._store = CheckpointStore(folder / "versions", full_every=1)

    @property
    def exist(self) -> bool:
        """Whether the folder holds a run."""
        return self._path.exists()

    def all(self) -> list[Version]:
        """All versions in the order in which they were made, the model as it was first."""
        current, made = self._read()
        return [replace(version, is_current=version.number == current) for version in (BASE, *made)]

    def current(self) -> Version:
        """The one that is current."""
        return next(version for version in self.all() if version.is_current)

    def lineage(self) -> list[Version]:
        """From the first task to the current version: those that it was made of, and itself."""
        by_number = {version.number: version for version in self.all()}
        number, found = self.current().number, list[Version]()
        while number:
            found.append(by_number[number])
            number = by_number[number].parent
        return found[::-1]

    def begin(self) -> None:
        """Make the list, or take up a version that a kill kept from it."""
        if not self.exist:
            self._write(0, [])
        _, made = self._read()
        steps = self._store.steps()
        if steps and steps[-1] > len(made):
            _, facts = self.load(steps[-1])
            self._write(steps[-1], [*made, _version(facts)])
        for step in steps:
            self._store.pin(step)

    def add(self, version: Version, tensors: Mapping[str, Tensor]) -> None:
        """Write a version, whose number is one above the newest's, and make it current."""
        _, made = self._read()
        self._store.save(version.number, tensors, _fields(version))
        self._store.pin(version.number)
        self._write(version.number, [*made, version])

    def load(self, number: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors and facts of a version, every byte compared with what was written; of version 0 there are none.

        Raises:
            CheckpointError: it is damaged.
        """
        if number == 0:
            return {}, {}
        try:
            return self._store.load(number)
        except CheckpointError as cause:
            raise CheckpointError(
                f"Version {number} cannot be used: {cause.message}",
                hint="Roll back to another version, or bring its files back from a backup.",
            ) from cause

    def make_current(self, number: int) -> Version:
        """Go back, or forth, to a version. It is read whole first.

        Raises:
            NotFoundError: there is no such version.
            CheckpointError: it is damaged; the current one stays.
        """
        version = self.find(number)
        self.load(number)
        self._write(number, self._read()[1])
        return version

    def find(self, number: int) -> Version:
        """The version of this number. Raises NotFoundError: there is none."""
        known = self.all()
        for version in known:
            if version.number == number:
                return version
        raise NotFoundError(
            f"There is no version {number} in {self._path.parent}.",
            hint=f"There are versions {', '.join(str(version.number) for version in known)}.",
        )

    def _read(self) -> tuple[int, list[Version]]:
        try:
            fields = json.loads(self._path.read_bytes())
            made = [_version(row) for row in fields["versions"]]
            numbers = [version.number for version in made]
            if fields["format"] != _FORMAT or fields["current"] not in (0, *numbers):
                raise ValueError("it is of another format, or its current version is not in it")
            if numbers != list(range(1, len(made) + 1)) or any(not 0 <= v.parent < v.number for v in made):
                raise ValueError("its versions do not follow each other")
            return int(fields["current"]), made
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as cause:
            raise CheckpointError(
                f"{self._path} cannot be read: {cause}.", hint="Bring it back from a backup; versions/ is as it was."
            ) from cause

    def _write(self, current: int, made: list[Version]) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            rows = [_fields(version) for version in made]
            replace_file(self._path, {"format": _FORMAT, "current": current, "versions": rows})
        except OSError as cause:
            raise CheckpointError(
                f"{self._path} cannot be written: {cause.strerror}.", hint="All versions are whole: make room."
            ) from cause


def _fields(version: Version) -> dict[str, Any]:
    return {name: value for name, value in asdict(version).items() if name != "is_current"}


def _version(fields: Mapping[str, Any]) -> Version:
    return Version(**{**fields, "accuracy": tuple(fields["accuracy"])})
