"""What a run wrote down: `metrics.jsonl` always, and the same numbers to TensorBoard and MLflow by choice.

Called by `trainer` and by `continual`; `report` reads it back. Numbers, names and short remarks only: no text of
anybody's data. A line is on its way to the disk whole or not at all, so that a full disk or a kill leaves a file that
can be read.

Lines are JSON objects with `kind` ("step", "evaluation" or "event") and `step`, the steps done when they were written.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from seamount.core.errors import BackendError, CapacityError

from .trackers import Tracker, open_trackers

METRICS_NAME = "metrics.jsonl"


class RunLog:
    """The log of one run; it goes on with the lines that are there.

    Args:
        folder: of the run; made where it is not.
        tensorboard: write event files to `folder/tensorboard`.
        mlflow: tracking URI, such as `sqlite:///runs.db` or `http://tracking:5000`. Nothing is sent anywhere else.
        recipe: shown by both as parameters.
        tell: is told when MLflow or TensorBoard fails in the middle of a run, which goes on without.

    Raises:
        ConfigError: a tracker's package is missing, or its store cannot be used.
        CapacityError: the folder cannot be written; also from each method, with what was written before left whole.
    """

    def __init__(
        self,
        folder: Path,
        *,
        tensorboard: bool = False,
        mlflow: str | None = None,
        recipe: Mapping[str, Any] | None = None,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        self._path, self._tell, self._step = folder / METRICS_NAME, tell, 0
        self._trackers: list[Tracker] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = _open_whole(self._path)
        except OSError as cause:
            raise self._not_written(cause) from cause
        try:
            self._trackers = open_trackers(folder, tensorboard=tensorboard, mlflow=mlflow, recipe=recipe or {})
        except BaseException:
            os.close(self._file)
            raise

    def step(self, record: Mapping[str, Any]) -> None:
        """One step was done.

        Args:
            record: `step`, and what is known of epoch, loss, learning_rate, gradient_norm, tokens_per_s, num_tokens,
                num_trained_tokens, memory_bytes, seconds and phase; other names may stand beside. A number that is
                not finite becomes null in the file.
        """
        self._add("step", record)
        self._track("train", record)

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """Held-out examples were tried.

        Args:
            record: `step`, `phase` ("before", "during" or "after" the run), and what is known of loss, `accuracy` (0
                to 1), `skills` (name to accuracy) and num_examples.
        """
        self._add("evaluation", record)
        self._track("evaluation", record)
        self._each_tracker(lambda tracker: tracker.flush())

    def event(self, text: str) -> None:
        """Something else happened: a checkpoint was written, the run was stopped."""
        self._add("event", {"step": self._step, "text": text})

    def rewind(self, step: int) -> None:
        """Drop the lines behind `step`, because the run goes on from there. The file is replaced when that is done."""
        partial = self._path.with_name(METRICS_NAME + ".tmp")
        try:
            with open(self._path, "rb") as old, open(partial, "wb") as new:
                for line in old:
                    record = _parsed(line)
                    # What cannot be read stays: nothing is lost that a person might mend.
                    if record is None or record["step"] <= step:
                        new.write(line)
                new.flush()
                os.fsync(new.fileno())
            os.replace(partial, self._path)
            replaced, self._file = self._file, _open_whole(self._path)
            os.close(replaced)
        except OSError as cause:
            partial.unlink(missing_ok=True)
            raise self._not_written(cause) from cause
        self._step = step
        self._each_tracker(lambda tracker: tracker.rewind(step))

    def close(self, *, finished: bool = True) -> None:
        """Bring everything to the disk. `finished`: the run came to its end; MLflow shows it else as stopped."""
        self._each_tracker(lambda tracker: tracker.close(finished=finished))
        self._trackers = []
        os.fsync(self._file)
        os.close(self._file)

    def _add(self, kind: str, record: Mapping[str, Any]) -> None:
        line = json.dumps({"kind": kind} | _plain(record), ensure_ascii=False).encode() + b"\n"
        size = os.fstat(self._file).st_size
        data = memoryview(line)
        try:
            while data:
                data = data[os.write(self._file, data) :]
        except OSError as cause:
            os.ftruncate(self._file, size)
            raise self._not_written(cause) from cause
        self._step = int(record["step"])

    def _track(self, prefix: str, record: Mapping[str, Any]) -> None:
        if self._trackers:
            step, values = int(record["step"]), dict(_scalars(prefix, record))
            self._each_tracker(lambda tracker: tracker.write(step, values))

    def _each_tracker(self, action: Callable[[Tracker], None]) -> None:
        """Days of training are not ended by a tracking server that went away; it is said, and the lines here go on."""
        for tracker in tuple(self._trackers):
            try:
                action(tracker)
            except BackendError as error:
                self._trackers.remove(tracker)
                text = f"{error} The run goes on, and {METRICS_NAME} has all of it."
                self.event(text)
                if self._tell is not None:
                    self._tell(text)

    def _not_written(self, cause: OSError) -> CapacityError:
        return CapacityError(
            f"{self._path} cannot be written: {cause.strerror}.",
            hint="What was written before is whole: make room, and go on with `--resume auto`.",
            code="disk_full",
        )


def read_log(path: Path) -> Iterator[dict[str, Any] | None]:
    """The lines of a `metrics.jsonl`, in order; None for one that cannot be read. No file is an empty one."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        for line in file:
            yield _parsed(line)


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_one = isinstance(record, dict) and isinstance(record.get("step"), int) and isinstance(record.get("kind"), str)
    return record if is_one else None


def _open_whole(path: Path) -> int:
    """Open for appending, behind the last whole line: a power cut may have left a part of one."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    end = size = os.fstat(descriptor).st_size
    while end:
        begin = max(end - 65536, 0)
        found = os.pread(descriptor, end - begin, begin).rfind(b"\n")
        if found >= 0:
            end = begin + found + 1
            break
        end = begin
    if end < size:
        os.ftruncate(descriptor, end)
    return descriptor


def _plain(value: Any) -> Any:
    """As JSON has it: nine digits, which hold any fp32 number; null for what is not finite."""
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return float(f"{value:.9g}") if math.isfinite(value) else None
    return value


def _scalars(prefix: str, record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The finite numbers of a record, named by their way: "evaluation/skills/arithmetic"."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _scalars(f"{prefix}/{name}", value)
        elif name != "step" and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            yield f"{prefix}/{name}", float(value)
