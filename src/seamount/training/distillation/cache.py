"""A teacher's likeliest guesses on disk, made once and learned from as often as wanted: `build`, `TopCache`.

Called by `pipeline`. A folder holds

    cache.json                  of which teacher and which data, and in what form (`CacheFacts`)
    ids-00000.bin [N, k] int32, guesses-00000.bin [N, k + 1] float16
    part-00000.json             the digests of both, written when they are on the disk

little-endian, a row per trained token, in the order of the data. A part is of whole examples. Rows hold what
`Teacher.top` gives: the ids of the k likeliest tokens, their log-probabilities, and that of all others together. What a
stopped build wrote stays, and the next one goes on. It must not know the loss.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from seamount.core.errors import CapacityError, ConfigError, IntegrityError
from seamount.core.sizes import size_text
from seamount.training.compression.files import write_whole
from seamount.training.shards.dataset import Dataset
from seamount.training.shards.packing import MicroBatch, pack
from seamount.training.tuning.distributed import World

from .objective import TopGuide
from .teacher import Teacher

# Told the trained tokens that have been guessed, and how many there are.
CacheProgress = Callable[[int, int], None]

_FACTS = "cache.json"
_PART_ROWS = 2**16
_AGAIN = "Remove the folder to make it anew."


class CacheFacts(BaseModel):
    """What a cache was made of; another teacher, other data or another form is another cache.

    Attributes:
        teacher: digest of its config and weights; precision: in which it ran.
        data: `Dataset.digest`.
        top_k: tokens per row.
        temperature: at which the log-probabilities stand.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["seamount teacher cache"] = "seamount teacher cache"
    version: Literal[1] = 1
    teacher: str
    precision: str
    data: str
    top_k: int
    temperature: float

    def num_bytes(self, num_rows: int) -> int:
        """What so many rows take on disk."""
        return num_rows * (4 * self.top_k + 2 * (self.top_k + 1))


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    ids_sha256: str
    guesses_sha256: str


class _Layout:
    """Which rows belong to which example, and which examples to which part."""

    def __init__(self, data: Dataset) -> None:
        self.first_rows = np.concatenate([[0], np.cumsum(data.num_trained, dtype=np.int64)])
        self.num_rows = int(self.first_rows[-1])
        bounds = [0]
        while bounds[-1] < len(data):
            wanted = self.first_rows[bounds[-1]] + _PART_ROWS
            bounds.append(max(int(np.searchsorted(self.first_rows, wanted, side="right")) - 1, bounds[-1] + 1))
        self.bounds = np.array(bounds)

    @property
    def num_parts(self) -> int:
        return len(self.bounds) - 1

    def examples_of(self, part: int) -> range:
        return range(int(self.bounds[part]), int(self.bounds[part + 1]))

    def rows_of(self, part: int) -> int:
        return int(self.first_rows[self.bounds[part + 1]] - self.first_rows[self.bounds[part]])

    def place_of(self, example: int) -> tuple[int, slice]:
        """The part that holds an example's rows, and which rows of it they are."""
        part = int(np.searchsorted(self.bounds, example, side="right")) - 1
        begin = self.first_rows[self.bounds[part]]
        return part, slice(int(self.first_rows[example] - begin), int(self.first_rows[example + 1] - begin))

    def gather(
        self, part: int, tops: Iterable[tuple[MicroBatch, tuple[Tensor, Tensor]]], top_k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The rows of a part in their order, from those of micro-batches."""
        ids = np.empty((self.rows_of(part), top_k), dtype="<i4")
        found = np.empty((self.rows_of(part), top_k + 1), dtype="<f2")
        for micro, (top_ids, log_p) in tops:
            rows = np.concatenate([np.r_[self.place_of(index)[1]] for index in micro.indices])
            ids[rows], found[rows] = top_ids.cpu().numpy(), log_p.half().cpu().numpy()
        return ids, found


def build(
    folder: Path,
    facts: CacheFacts,
    data: Dataset,
    load_teacher: Callable[[], Teacher],
    *,
    micro_tokens: int,
    world: World,
    progress: CacheProgress | None = None,
) -> None:
    """Make what is missing of a cache, each rank its share; nothing where all is there.

    Args:
        load_teacher: called if anything is missing.
        micro_tokens: most tokens that the teacher reads at once.

    Raises:
        ConfigError: the folder holds another cache, or something else.
        CapacityError: the disk is full, or cannot be written; what was made stays.
    """
    layout = _Layout(data)
    mine = range(world.rank, layout.num_parts, world.size)
    try:
        if world.is_main:
            _begin(folder, facts)
        world.wait()
        missing = [part for part in mine if not _part_path(folder, part).exists()]
        if missing:
            _check_room(folder, facts.num_bytes(sum(map(layout.rows_of, missing))))
            teacher = load_teacher()
            total = sum(map(layout.rows_of, mine))
            done = total - sum(map(layout.rows_of, missing))
            for part in missing:
                examples = [(index, data.example(index)) for index in layout.examples_of(part)]
                micros = pack(examples, micro_tokens=micro_tokens)
                tops = ((micro, teacher.top(micro.to(world.device), facts.top_k)) for micro in micros)
                ids, found = layout.gather(part, tops, facts.top_k)
                _write_part(folder, part, ids, found)
                done += len(ids)
                if progress is not None:
                    progress(done, total)
    except OSError as cause:
        raise CapacityError(
            f"{folder} cannot be written: {cause.strerror}.",
            hint="What was made stays: make room, and give the same command again.",
            code="disk_full",
        ) from cause
    world.wait()


def _begin(folder: Path, facts: CacheFacts) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / _FACTS).exists():
        _check_facts(folder, facts)
    elif any(folder.iterdir()):
        raise ConfigError(f"{folder} is no cache of a teacher's guesses.", hint="Choose another distillation.cache.")
    else:
        write_whole(folder / _FACTS, facts.model_dump_json(indent=2).encode())


def _check_facts(folder: Path, facts: CacheFacts) -> None:
    try:
        found = CacheFacts.model_validate_json((folder / _FACTS).read_bytes())
    except (OSError, ValidationError) as cause:
        raise ConfigError(f"{folder / _FACTS} cannot be read, or is of another version.", hint=_AGAIN) from cause
    for name, value in found:
        if value != getattr(facts, name):
            told = "" if name in ("teacher", "data") else f" {value}, and {getattr(facts, name)} is wanted"
            raise ConfigError(
                f"The cache in {folder} was made with another {name}{told}.",
                hint="Name another folder in distillation.cache, or remove this one.",
            )


def _check_room(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise CapacityError(
            f"The teacher's guesses take {size_text(num_bytes)} in {folder}; {size_text(free)} is free.",
            hint="Lower distillation.top_k, or name a folder on another disk in distillation.cache.",
            code="disk_full",
        )


def _write_part(folder: Path, part: int, ids: np.ndarray, found: np.ndarray) -> None:
    digests = []
    for path, array in ((_ids_path(folder, part), ids), (_guesses_path(folder, part), found)):
        content = array.tobytes()
        write_whole(path, content)
        digests.append(hashlib.sha256(content).hexdigest())
    mark = _Part(ids_sha256=digests[0], guesses_sha256=digests[1])
    write_whole(_part_path(folder, part), mark.model_dump_json().encode())


class TopCache:
    """A finished cache. Opening reads no row; a part is compared with its digest when it is first needed.

    Args:
        data: what it was made of.

    Raises:
        ConfigError: it is of another teacher, other data or another form, or is not finished.
    """

    def __init__(self, folder: Path, facts: CacheFacts, data: Dataset) -> None:
        _check_facts(folder, facts)
        self._folder, self._top_k = folder, facts.top_k
        self._layout = _Layout(data)
        missing = [part for part in range(self._layout.num_parts) if not _part_path(folder, part).exists()]
        if missing:
            raise ConfigError(f"The cache in {folder} is not finished.", hint="Give the same command again.")
        self._parts: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def guide(self, micro: MicroBatch) -> TopGuide:
        """What the teacher said of a micro-batch of the data.

        Raises:
            IntegrityError: a file was changed after it was written; names it.
        """
        pieces = [self._example(index) for index in (() if micro.is_filler else micro.indices)]
        ids = np.concatenate([np.empty((0, self._top_k), np.int32), *(ids for ids, _ in pieces)])
        found = np.concatenate([np.empty((0, self._top_k + 1), np.float16), *(found for _, found in pieces)])
        device = micro.token_ids.device
        log_p = torch.from_numpy(found).to(device).float()
        # What was rounded to 16 bits adds up to one again.
        log_p = log_p - log_p.logsumexp(dim=-1, keepdim=True)
        return TopGuide(torch.from_numpy(ids).to(device).long(), log_p)

    def _example(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        part, rows = self._layout.place_of(index)
        ids, found = self._part(part)
        return ids[rows], found[rows]

    def _part(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        if number not in self._parts:
            mark = _read_mark(_part_path(self._folder, number))
            num_rows = self._layout.rows_of(number)
            self._parts[number] = (
                _mapped(_ids_path(self._folder, number), "<i4", (num_rows, self._top_k), mark.ids_sha256),
                _mapped(_guesses_path(self._folder, number), "<f2", (num_rows, self._top_k + 1), mark.guesses_sha256),
            )
        return self._parts[number]


def _read_mark(path: Path) -> _Part:
    try:
        return _Part.model_validate(json.loads(path.read_bytes()))
    except (OSError, ValueError) as cause:
        raise IntegrityError(f"{path} cannot be read: {cause}.", hint=_AGAIN) from cause


def _mapped(path: Path, dtype: str, shape: tuple[int, int], sha256: str) -> np.ndarray:
    try:
        with open(path, "rb") as file:
            intact = hashlib.file_digest(file, "sha256").hexdigest() == sha256
    except OSError as cause:
        raise IntegrityError(f"{path} cannot be read: {cause.strerror}.", hint=_AGAIN) from cause
    if not intact:
        raise IntegrityError(f"{path} was changed after it was written.", hint=_AGAIN)
    if not shape[0]:
        return np.empty(shape, dtype=dtype)
    return np.asarray(np.memmap(path, dtype=dtype, mode="r", shape=shape))


def _ids_path(folder: Path, part: int) -> Path:
    return folder / f"ids-{part:05}.bin"


def _guesses_path(folder: Path, part: int) -> Path:
    return folder / f"guesses-{part:05}.bin"


def _part_path(folder: Path, part: int) -> Path:
    return folder / f"part-{part:05}.json"
