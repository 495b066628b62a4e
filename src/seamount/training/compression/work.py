"""The work folder of a quantization: what is done already, so that a stopped one goes on; and its last step, a rename.

Called by `compress`. OUTPUT.partial holds the finished shards and `work/`: the job's digest, a mark per
finished layer, the activations that enter the next one. A mark is written when what it promises is on the disk.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from seamount.core.errors import CheckpointError, ConfigError
from seamount.models.checkpoint import INDEX_NAME
from seamount.models.saving import companions

from .files import Entry, write_whole
from .plan import Source

REPORT_NAME = "quantization_report.json"
_JOB = "job.json"


@dataclasses.dataclass(frozen=True)
class Mark:
    """One finished layer.

    Attributes:
        relative_error, num_plain_experts: see `LayerResult`.
        seconds: that it took.
        sha256: of its shard.
    """

    relative_error: float | None
    num_plain_experts: int
    seconds: float
    sha256: str


def job_digest(source: Source, arguments: Mapping[str, object], calibration: Path | None) -> str:
    """Identifies a job: its arguments, the calibration's content, and the source's files.

    Weight files count by name, size and time of change: reading terabytes twice would take longer than it is worth.
    """
    found: dict[str, object] = {"arguments": dict(arguments)}
    found["calibration"] = None if calibration is None else _content_digest(calibration)
    weights = {path.name: _status(path) for path in source.checkpoint.files}
    others = {
        path.name: _content_digest(path)
        for path in [source.folder / "config.json", *companions(source.folder, without=(REPORT_NAME,))]
    }
    found |= {"weights": weights, "others": others}
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


class WorkFolder:
    """OUTPUT.partial, locked against a second process while open.

    Args:
        output: where the result will stand.
        digest: of the job; a folder of another job is refused.
        num_shards: of the result: one per layer and one for the rest.

    Raises:
        ConfigError: the output exists, is being made, or was begun with other arguments.
    """

    def __init__(self, output: Path, digest: str, num_shards: int) -> None:
        self.output, self.folder = output, partial_of(output)
        self._work, self._digest, self._num_shards = self.folder / "work", digest, num_shards
        check_output(output)

    def __enter__(self) -> Self:
        job = self._work / _JOB
        if self.folder.exists() and not job.exists() and any(self.folder.iterdir()) and not self.is_complete():
            raise ConfigError(
                f"{self.folder} exists and is no unfinished quantization.", hint="Remove it, or choose another output."
            )
        self._work.mkdir(parents=True, exist_ok=True)
        self._lock = open(self._work / "lock", "w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not job.exists():
                write_whole(job, json.dumps({"digest": self._digest}).encode())
            if _read_json(job).get("digest") != self._digest:
                raise ConfigError(
                    f"{self.folder} was begun with other arguments, or from files that have changed since.",
                    hint="Give the same arguments to go on, or remove it to begin anew.",
                )
        except BlockingIOError as cause:
            self._lock.close()
            raise ConfigError(f"Another process is writing {self.folder}.") from cause
        except ConfigError:
            self._lock.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.close()

    def shard(self, index: int) -> Path:
        """The path of one shard; the last is that of embedding, norm and head."""
        return self.folder / f"model-{index + 1:05d}-of-{self._num_shards:05d}.safetensors"

    def activations(self, name: str) -> Path:
        """The path of a file of activations."""
        return self._work / f"activations-{name}.f32"

    def marks(self) -> list[Mark]:
        """Those of the layers that are done, from the first on without a gap."""
        found: list[Mark] = []
        while (path := self._work / f"layer-{len(found)}.json").exists():
            found.append(Mark(**_read_json(path)))
        return found

    def check_shards(self) -> None:
        """Compare the shards of the layers that are done with their marks.

        Raises:
            ConfigError: one is not what was written there.
        """
        for index, mark in enumerate(self.marks()):
            shard = self.shard(index)
            if not shard.exists() or sha256(shard) != mark.sha256:
                raise ConfigError(
                    f"{shard} is not what was written there: it is damaged, or was changed.",
                    hint=f"Remove {self.folder} to begin anew.",
                )

    def mark(self, index: int, mark: Mark) -> None:
        """Note that a layer is done, and drop the activations that only it needed."""
        write_whole(self._work / f"layer-{index}.json", json.dumps(dataclasses.asdict(mark)).encode())
        self.activations(str(index)).unlink(missing_ok=True)

    def is_complete(self) -> bool:
        """Whether all is written and only the rename is left."""
        report = self.folder / REPORT_NAME
        return report.exists() and _read_json(report).get("job") == self._digest

    def describe(self, source: Source, quantization: Mapping[str, Any], shards: list[list[Entry]]) -> None:
        """Write what stands beside weights and report: index, config, and copies of the source's other files."""
        placed = {entry.name: self.shard(index).name for index, entries in enumerate(shards) for entry in entries}
        total = sum(entry.num_bytes for entries in shards for entry in entries)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
        write_whole(self.folder / INDEX_NAME, _json(index))
        config = {**source.raw_config, "quantization_config": dict(quantization)}
        if "num_nextn_predict_layers" in config:
            config["num_nextn_predict_layers"] = source.config.num_mtp_layers
        write_whole(self.folder / "config.json", _json(config))
        for path in companions(source.folder, without=(REPORT_NAME,)):
            write_whole(self.folder / path.name, path.read_bytes())
        templates = source.folder / "chat_templates"
        if templates.is_dir():
            (self.folder / templates.name).mkdir(exist_ok=True)
            for path in sorted(templates.glob("*.jinja")):
                write_whole(self.folder / templates.name / path.name, path.read_bytes())

    def write_report(self, facts: Mapping[str, object]) -> None:
        """Write what is told of the result; it is complete then."""
        write_whole(self.folder / REPORT_NAME, _json({"job": self._digest, **facts}))

    def read_report(self) -> dict[str, Any]:
        """The facts of `write_report`."""
        facts = _read_json(self.folder / REPORT_NAME)
        del facts["job"]
        return facts

    def finish(self) -> None:
        """Let a complete folder take its name; stopped at any point, it can be called again."""
        shutil.rmtree(self._work)
        os.replace(self.folder, self.output)


def sha256(path: Path) -> str:
    """The digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def partial_of(output: Path) -> Path:
    """Where the work on `output` stands until it is done."""
    return output.with_name(output.name + ".partial")


def check_output(output: Path) -> None:
    """Raise ConfigError if something stands where the result will."""
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ConfigError(f"{output} exists already.", hint="Choose another output, or remove it.")


def bytes_on_disk(folder: Path) -> int:
    """Size of all files under a folder; 0 where there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _content_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _status(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError) as cause:
        raise CheckpointError(f"{path} cannot be read: {cause}.", hint="Remove the folder to begin anew.") from cause
