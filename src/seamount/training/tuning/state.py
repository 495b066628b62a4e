"""Checkpoints of a run in steps: `CheckpointStore` decides what a save holds, what stays, and what may be trusted.

Called by `trainer` and by `continual`. A checkpoint is a folder `checkpoint-N` (see `state_files`) that holds those
tensors which changed since the one before; the others it names by digest and folder. Each manifest holds the digests of
those that it is built on, which makes a chain; every so many saves one is full, so that a bad byte on the disk costs no
more than the saves up to there.

A folder gets its name when all of it is on the disk, and loses its name before anything of it is removed: a kill at any
moment leaves whole checkpoints, and a folder `checkpoint-N.tmp` that the next save removes. One process at a time
writes to a store. It must not know what the tensors mean.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from seamount.core.errors import CheckpointError, ConfigError
from seamount.core.sizes import size_text

from .state_files import (
    MANIFEST_NAME,
    TENSORS_NAME,
    Manifest,
    read_tensor,
    stored_tensors,
    sync_folder,
    write_synced,
    write_tensors,
)

_NAME = re.compile(r"checkpoint-(\d+)")
_PINNED = "pinned"
_REWIND = "A run that goes on from an earlier step removes the checkpoints behind it first: `--resume N` does."
_FULL = (errno.ENOSPC, errno.EDQUOT)


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: that holds the `checkpoint-N` folders; made at the first save.
        full_every: of the saves every so many holds all tensors.
        keep: so many of the newest can be restored; older ones are removed once nothing that stays is built on them.

    Raises:
        ConfigError: a number is below 1.
    """

    def __init__(self, folder: Path, *, full_every: int = 8, keep: int = 3) -> None:
        if full_every < 1 or keep < 1:
            raise ConfigError(f"full_every is {full_every} and keep is {keep}; both are 1 at least.")
        self._folder, self._full_every, self._keep = folder, full_every, keep

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, whole or not, ascending."""
        if not self._folder.is_dir():
            return []
        found = [_NAME.fullmatch(path.name) for path in self._folder.iterdir() if path.is_dir()]
        return sorted(int(match[1]) for match in found if match)

    def save(self, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Path:
        """Write `checkpoint-N`, then remove what is no longer needed.

        To save the newest step once more, with the same tensors, replaces its facts.

        Args:
            step: above those of all other checkpoints.
            tensors: of any device; sharded ones already gathered. At most one is copied at a time.
            facts: what JSON can hold; keys become strings, and tuples lists.

        Returns:
            The checkpoint's folder.

        Raises:
            CheckpointError: the disk is full or fails, and nothing half written is left there; or `step` was saved
                before with other tensors, or there are newer checkpoints.
        """
        plain: dict[str, Any] = json.loads(json.dumps(dict(facts)))
        steps = self.steps()
        if steps and step < steps[-1]:
            raise CheckpointError(
                f"{self._path(step)} cannot be written: {self._path(steps[-1])} is newer.",
                hint=_REWIND,
            )
        final = self._path(step)
        partial = final.with_name(final.name + ".tmp")
        try:
            self._remove_leftovers()
            partial.mkdir(parents=True)
            try:
                if step in steps:
                    self._renew(partial, step, tensors, plain)
                else:
                    self._write(partial, step, tensors, plain)
                    os.rename(partial, final)
                    sync_folder(self._folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        except OSError as cause:
            raise self._not_written(final, tensors, cause) from cause
        self._remove_old()
        return final

    def load(self, step: int | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Read a checkpoint, every byte of it compared with what was written.

        Args:
            step: None is the newest. An older one is never taken in its place.

        Returns:
            Tensors on the CPU, and facts.

        Raises:
            CheckpointError: there is none, or a file of it is missing or changed: the message names the file, the hint
                the newest step that is whole.
        """
        steps = self.steps()
        if not steps:
            raise CheckpointError(f"{self._folder} holds no checkpoint.", hint="Start the run without `--resume`.")
        chosen = steps[-1] if step is None else step
        if chosen not in steps:
            raise CheckpointError(
                f"{self._folder} holds no checkpoint of step {chosen}.",
                hint=f"There are steps {', '.join(map(str, steps))}.",
            )
        try:
            manifest, _ = self._manifest(chosen)
            return dict(self._tensors(manifest)), manifest.facts
        except CheckpointError as cause:
            raise CheckpointError(cause.message, hint=self._advice(chosen)) from cause

    def pin(self, step: int) -> None:
        """Keep a checkpoint, and what it is built on, for ever. Raises CheckpointError: there is none of that step."""
        if step not in self.steps():
            raise CheckpointError(f"{self._folder} holds no checkpoint of step {step}, so it cannot be kept.")
        try:
            (self._path(step) / _PINNED).touch()
            sync_folder(self._path(step))
        except OSError as cause:
            raise CheckpointError(f"{self._path(step)} cannot be marked to stay: {cause.strerror}.") from cause

    def rewind(self, step: int) -> None:
        """Remove all checkpoints behind `step`, because the run goes on from there.

        Raises:
            CheckpointError: one of them is pinned; none is removed then.
        """
        behind = [newer for newer in self.steps() if newer > step]
        pinned = [newer for newer in behind if self._is_pinned(newer)]
        if pinned:
            raise CheckpointError(
                f"{self._path(pinned[0])} is to stay for ever, so the run cannot go on from step {step}.",
                hint="Start another run from there, with a folder of its own.",
            )
        for newer in reversed(behind):
            self._remove(newer)

    def _write(self, folder: Path, step: int, tensors: Mapping[str, Tensor], facts: dict[str, Any]) -> None:
        """Write a checkpoint into a new folder."""
        before, chain = self._base()
        known = {} if before is None else before.tensors
        entries, header_sha256 = write_tensors(folder / TENSORS_NAME, tensors, known, step)
        since_full = 0 if before is None else before.since_full + 1
        needed = {entry.step for entry in entries.values()}
        if before is not None:
            needed.add(before.step)
        chain = {holder: digest for holder, digest in chain.items() if holder in needed}
        manifest = Manifest(step, since_full, chain, header_sha256, entries, facts)
        write_synced(folder / MANIFEST_NAME, manifest.to_bytes())
        sync_folder(folder)

    def _base(self) -> tuple[Manifest | None, dict[int, str]]:
        """The newest checkpoint's manifest, with the digests of it and of its chain; none when a full save is due."""
        steps = self.steps()
        try:
            before, digest = self._manifest(steps[-1]) if steps else (None, "")
        except CheckpointError:
            # A damaged one is nothing to build on. This save then needs no other; loading the damaged one says what
            # is wrong with it.
            before = None
        if before is None or before.since_full + 1 >= self._full_every:
            return None, {}
        return before, {**before.chain, before.step: digest}

    def _renew(self, folder: Path, step: int, tensors: Mapping[str, Tensor], facts: dict[str, Any]) -> None:
        """Replace the facts of the newest checkpoint. Nothing is built on its manifest yet."""
        manifest, _ = self._manifest(step)
        entries, _ = write_tensors(folder / TENSORS_NAME, tensors, manifest.tensors, step)
        if entries != manifest.tensors:
            raise CheckpointError(
                f"{self._path(step)} holds other tensors than those of this moment.",
                hint=_REWIND,
            )
        write_synced(folder / MANIFEST_NAME, replace(manifest, facts=facts).to_bytes())
        os.replace(folder / MANIFEST_NAME, self._path(step) / MANIFEST_NAME)
        sync_folder(self._path(step))

    def _tensors(self, manifest: Manifest) -> Iterator[tuple[str, Tensor]]:
        """The tensors of a checkpoint, one after the other. Raises CheckpointError: a file is not as it was written."""
        places = {}
        for holder in sorted(manifest.holders):
            own = manifest if holder == manifest.step else self._manifest(holder, manifest.chain[holder])[0]
            places[holder] = stored_tensors(self._path(holder), own.header_sha256)
        for name, entry in manifest.tensors.items():
            yield name, read_tensor(places[entry.step][name], entry)

    def _manifest(self, step: int, sha256: str | None = None) -> tuple[Manifest, str]:
        return Manifest.from_file(self._path(step) / MANIFEST_NAME, sha256=sha256)

    def _advice(self, broken: int) -> str:
        whole = next((step for step in reversed(self.steps()) if step != broken and self._is_whole(step)), None)
        if whole is None:
            return "No checkpoint there is whole: bring the folder back from a backup, or start the run again."
        return f"The newest checkpoint that is whole is that of step {whole}: go on from it with `--resume {whole}`."

    def _is_whole(self, step: int) -> bool:
        try:
            for _ in self._tensors(self._manifest(step)[0]):
                pass
        except CheckpointError:
            return False
        return True

    def _is_pinned(self, step: int) -> bool:
        return (self._path(step) / _PINNED).exists()

    def _remove_old(self) -> None:
        """Remove what is neither among the newest, nor pinned, nor built on by one of those."""
        steps = self.steps()
        needed = {*steps[-self._keep :], *(step for step in steps if self._is_pinned(step))}
        try:
            needed.update(*(self._manifest(step)[0].holders for step in sorted(needed)))
        except CheckpointError:
            return  # One that stays is damaged; what it is built on cannot be told, so everything stays.
        # From the newest on, so that a kill leaves none without what it is built on.
        for step in reversed(steps):
            if step not in needed:
                self._remove(step)

    def _remove(self, step: int) -> None:
        path = self._path(step)
        try:
            self._remove_leftovers()
            os.rename(path, path.with_name(path.name + ".tmp"))
            self._remove_leftovers()
        except OSError as cause:
            raise CheckpointError(f"{path}, which is no longer needed, cannot be removed: {cause.strerror}.") from cause

    def _remove_leftovers(self) -> None:
        for path in self._folder.glob("checkpoint-*.tmp"):
            shutil.rmtree(path)

    def _not_written(self, path: Path, tensors: Mapping[str, Tensor], cause: OSError) -> CheckpointError:
        if cause.errno not in _FULL:
            return CheckpointError(f"{path} cannot be written: {cause.strerror}.", hint="The earlier ones are whole.")
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        free = shutil.disk_usage(self._folder).free
        return CheckpointError(
            f"{path} cannot be written, the disk is full: it takes up to {size_text(size)}, and {size_text(free)} are "
            "free.",
            hint="The earlier checkpoints are whole: make room, and go on with `--resume auto`.",
            code="disk_full",
        )

    def _path(self, step: int) -> Path:
        return self._folder / f"checkpoint-{step}"
