"""Where a run's numbers go beside its own log: TensorBoard's event files and an MLflow store.

Called by `log`. Both packages are optional and imported when asked for. Nothing is sent but to the MLflow store that
the user names: MLflow's own reports of its use are switched off before it is imported.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from seamount.core.errors import BackendError, ConfigError
from seamount.core.settings import tell_libraries

_T = TypeVar("_T")
_FLUSH_S = 5.0
# MLflow takes 1,000 metrics at once, and 500 characters of a parameter on its older servers.
_BATCH, _PARAMETERS_AT_ONCE, _PARAMETER_CHARACTERS = 1000, 100, 500
# It writes to folders on request only, and without limits a server that is gone would hold up the training for minutes.
_MLFLOW_DEFAULTS = {
    "MLFLOW_ALLOW_FILE_STORE": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
}
_EXPERIMENT = "seamount"
_RUN_NAME = "mlflow.json"
_NOT_IN_NAMES = re.compile(r"[^\w/.\- ]")


class Tracker(Protocol):
    """A place for numbers. Every method raises BackendError when it cannot be reached any more."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Note the numbers of a step, by name."""

    def rewind(self, step: int) -> None:
        """What lies behind `step` will be written anew."""

    def flush(self) -> None:
        """Bring what was noted to its place."""

    def close(self, *, finished: bool) -> None:
        """The run is over."""


def open_trackers(folder: Path, *, tensorboard: bool, mlflow: str | None, recipe: Mapping[str, Any]) -> list[Tracker]:
    """Those that are asked for. Raises ConfigError: a package is missing, or the store cannot be used."""
    trackers: list[Tracker] = [TensorBoard(folder, recipe)] if tensorboard else []
    if mlflow is not None:
        trackers.append(MLflow(folder, mlflow, recipe))
    return trackers


class TensorBoard:
    """Event files in `folder/tensorboard`, one for each time that the run was started."""

    _what = "TensorBoard's event files"

    def __init__(self, folder: Path, recipe: Mapping[str, Any]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as cause:
            raise ConfigError(
                "tracking.tensorboard is set, and the package `tensorboard` is not installed.",
                hint="pip install tensorboard",
            ) from cause
        self._open: Callable[..., Any] = SummaryWriter
        self._folder = folder / "tensorboard"
        try:
            self._writer: Any = self._open(self._folder)
        except OSError as cause:
            raise ConfigError(f"{self._folder} cannot be written: {cause.strerror}.") from cause
        rows = "".join(f"| {name} | {value} |\n" for name, value in _flat(recipe))
        self._call(partial(self._writer.add_text, "recipe", f"| field | value |\n|---|---|\n{rows}"))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        for name, value in values.items():
            self._call(partial(self._writer.add_scalar, name, value, step))

    def rewind(self, step: int) -> None:
        """See `Tracker`. The files stay as they are; a mark in a new one hides what lies behind."""
        self._call(self._writer.close)
        self._writer = _reached(self._what, OSError, partial(self._open, self._folder, purge_step=step + 1))

    def flush(self) -> None:
        """See `Tracker`."""
        self._call(self._writer.flush)

    def close(self, *, finished: bool) -> None:
        """See `Tracker`."""
        self._call(self._writer.close)

    def _call(self, action: Callable[[], object]) -> None:
        _reached(self._what, OSError, action)


class MLflow:
    """A run in the experiment "seamount" of an MLflow store; started again, it is the same run there.

    Numbers are sent every few seconds. After a rewind, what lies behind is sent again: MLflow keeps both.
    """

    def __init__(self, folder: Path, uri: str, recipe: Mapping[str, Any]) -> None:
        # Before the import, which is where its reporting would begin.
        tell_libraries({"MLFLOW_DISABLE_TELEMETRY": "true"}, unless_set=_MLFLOW_DEFAULTS)
        try:
            import mlflow
            from mlflow.entities import Metric, Param
            from mlflow.exceptions import MlflowException
        except ImportError as cause:
            raise ConfigError(
                "tracking.mlflow is set, and the package `mlflow` is not installed.",
                hint="pip install mlflow; for a tracking server `mlflow-skinny` is enough.",
            ) from cause
        self._make_metric, self._error = Metric, MlflowException
        self._pending: list[Any] = []
        self._sent_at = time.monotonic()
        try:
            self._client = mlflow.MlflowClient(tracking_uri=uri)
            self._run = self._open_run(folder, uri, [Param(name, value) for name, value in _flat(recipe)])
        except (MlflowException, OSError, ImportError, ValueError) as cause:
            raise ConfigError(
                f"The MLflow store {without_secrets(uri)} cannot be used: {_first_line(cause)}",
                hint="Databases need the whole package `mlflow`; `mlflow-skinny` writes to tracking servers.",
            ) from cause

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        now = int(time.time() * 1000)
        for name, value in values.items():
            self._pending.append(self._make_metric(_NOT_IN_NAMES.sub("_", name), value, now, step))
        if time.monotonic() - self._sent_at > _FLUSH_S or len(self._pending) >= _BATCH:
            self.flush()

    def rewind(self, step: int) -> None:
        """See `Tracker`."""
        self._pending = [metric for metric in self._pending if metric.step <= step]

    def flush(self) -> None:
        """See `Tracker`."""
        for start in range(0, len(self._pending), _BATCH):
            part = self._pending[start : start + _BATCH]
            self._call(partial(self._client.log_batch, self._run, metrics=part))
        self._pending.clear()
        self._sent_at = time.monotonic()

    def close(self, *, finished: bool) -> None:
        """See `Tracker`."""
        self.flush()
        self._call(lambda: self._client.set_terminated(self._run, "FINISHED" if finished else "KILLED"))

    def _open_run(self, folder: Path, uri: str, parameters: list[Any]) -> str:
        """The run that this folder had in this store, or a new one, whose number is kept in the folder."""
        kept = folder / _RUN_NAME
        if kept.exists():
            known = json.loads(kept.read_text(encoding="utf-8"))
            if known["store"] == without_secrets(uri):
                self._client.update_run(known["run"], status="RUNNING")
                return str(known["run"])
        experiment = self._client.get_experiment_by_name(_EXPERIMENT)
        number = self._client.create_experiment(_EXPERIMENT) if experiment is None else experiment.experiment_id
        run = str(self._client.create_run(number, run_name=folder.name).info.run_id)
        for start in range(0, len(parameters), _PARAMETERS_AT_ONCE):
            self._client.log_batch(run, params=parameters[start : start + _PARAMETERS_AT_ONCE])
        partial_file = kept.with_name(_RUN_NAME + ".tmp")
        partial_file.write_text(json.dumps({"store": without_secrets(uri), "run": run}), encoding="utf-8")
        os.replace(partial_file, kept)
        return run

    def _call(self, action: Callable[[], object]) -> None:
        _reached("MLflow's store", (self._error, OSError), action)


def _reached(what: str, errors: type[Exception] | tuple[type[Exception], ...], action: Callable[[], _T]) -> _T:
    try:
        return action()
    except errors as cause:
        raise BackendError(f"{what} could not be written: {_first_line(cause)}") from cause


def _flat(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """A recipe's fields by their way, "optimizer.learning_rate"."""
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", without_secrets(str(value))[:_PARAMETER_CHARACTERS]


def without_secrets(text: str) -> str:
    """A text whose addresses name no user and password any more."""
    return re.sub(r"(?<=//)[^/@\s]*@", "", text)


def _first_line(cause: BaseException) -> str:
    text = without_secrets((str(cause).strip().splitlines() or [type(cause).__name__])[0])
    return text if text.endswith(".") else text + "."
