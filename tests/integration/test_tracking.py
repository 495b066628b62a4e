"""What TensorBoard's and MLflow's own readers find of a run that was killed and went on."""

from __future__ import annotations

import http.server
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from seamount.core.errors import ConfigError
from seamount.training.tuning.log import RunLog

RECIPE = {"model": "seamount-tiny", "optimizer": {"learning_rate": 1e-4}, "data": {"train": ["a.jsonl"]}}


def _two_starts(folder: Path, **options: Any) -> None:
    """Three steps, of which the third is lost; then from the second on again."""
    first = RunLog(folder, recipe=RECIPE, **options)
    for step in (1, 2, 3):
        first.step({"step": step, "loss": 4.0 / step, "phase": "train", "learning_rate": 1e-4})
    first.close(finished=False)
    second = RunLog(folder, recipe=RECIPE, **options)
    second.rewind(2)
    second.step({"step": 3, "loss": 1.25})
    second.evaluation({"step": 3, "accuracy": 0.75, "skills": {"算术 (zh)": 0.5}})
    second.close()


def test_tensorboard_shows_each_step_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _two_starts(tmp_path, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 4.0), (2, 2.0), (3, 1.25)]
    assert set(events.Tags()["scalars"]) == {
        "train/loss",
        "train/learning_rate",
        "evaluation/accuracy",
        "evaluation/skills/算术 (zh)",
    }
    text = events.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| optimizer.learning_rate | 0.0001 |" in text


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The package; and a working folder of the test's own, so that what it might leave there is seen."""
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    for name in ("MLFLOW_ALLOW_FILE_STORE", "MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return pytest.importorskip("mlflow", reason="mlflow is not installed")


@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")  # MLflow's use of SQLAlchemy
@pytest.mark.parametrize("kind", ["file", "sqlite"])
def test_mlflow_shows_one_run_with_the_recipe(mlflow: Any, tmp_path: Path, kind: str) -> None:
    if kind == "sqlite":
        pytest.importorskip("sqlalchemy", reason="only the whole mlflow package writes to databases")
    uri = f"file:{tmp_path}/store" if kind == "file" else f"sqlite:///{tmp_path}/store.db"
    _two_starts(tmp_path / "my run", mlflow=uri)
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("seamount")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "my run"
    assert run.info.status == "FINISHED"
    assert run.data.params == {
        "model": "seamount-tiny",
        "optimizer.learning_rate": "0.0001",
        "data.train": "['a.jsonl']",
    }
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert {(metric.step, metric.value) for metric in history} == {(1, 4.0), (2, 2.0), (3, 4 / 3), (3, 1.25)}
    assert run.data.metrics["train/loss"] == 1.25
    assert run.data.metrics["evaluation/skills/算术 _zh_"] == 0.5
    assert list((tmp_path / "cwd").iterdir()) == []


@pytest.fixture
def dying_server() -> Iterator[tuple[str, list[str]]]:
    """An MLflow server as far as a run needs one, which answers the first logged batch and no other."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self) -> None:
            assert b"secret" not in self.rfile.read(int(self.headers.get("Content-Length") or 0))
            name = self.path.partition("?")[0].removeprefix("/api/2.0/mlflow/")
            asked.append(name)
            body = {
                "experiments/get-by-name": b'{"experiment": {"experiment_id": "7", "name": "seamount"}}',
                "runs/create": b'{"run": {"info": {"run_id": "r1", "run_uuid": "r1", "experiment_id": "7"}}}',
            }.get(name, b"{}")
            self.send_response(400 if asked.count("runs/log-batch") > 1 else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = answer

        def log_message(self, *_: Any) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://name:secret@127.0.0.1:{server.server_address[1]}", asked
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_tracking_server_that_goes_away_does_not_end_the_run(
    mlflow: Any, tmp_path: Path, dying_server: tuple[str, list[str]]
) -> None:
    uri, asked = dying_server
    told: list[str] = []
    log = RunLog(tmp_path / "run", mlflow=uri, recipe={"tracking": {"mlflow": uri}}, tell=told.append)
    log.step({"step": 1, "loss": 1.0})
    log.evaluation({"step": 1, "accuracy": 0.5})  # sends
    log.step({"step": 2, "loss": 1.0})
    log.close()
    assert asked.count("runs/log-batch") == 2
    assert len(told) == 1
    assert told[0].startswith("MLflow's store could not be written")
    written = [path.read_text() for path in (tmp_path / "run").iterdir()]
    assert sum(text.count('"kind": "step"') for text in written) == 2
    assert not any("secret" in text for text in written)


def test_a_store_that_cannot_be_used_is_said_before_the_run(mlflow: Any, tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        with pytest.raises(ConfigError, match=r"The MLflow store http://127.0.0.1:\d+ cannot be used") as caught:
            RunLog(tmp_path / "run", mlflow=f"http://u:secret@127.0.0.1:{closed.getsockname()[1]}")
    assert "secret" not in str(caught.value)


def test_mlflow_tells_nobody(mlflow: Any, tmp_path: Path) -> None:
    """In a process of its own, without the variables by which MLflow knows tests: no address is asked for."""
    program = """
import socket, sys
def refuse(*arguments, **_):
    print("asked for", arguments, flush=True)
    raise OSError("no network")
socket.socket.connect = socket.getaddrinfo = refuse
from pathlib import Path
from seamount.training.tuning.log import RunLog
log = RunLog(Path("run"), mlflow="file:store", recipe={"a": 1})
log.step({"step": 1, "loss": 1.0})
log.close()
import time; time.sleep(1)
from mlflow.telemetry.client import get_telemetry_client
assert get_telemetry_client() is None
"""
    known = ("PYTEST_CURRENT_TEST", "CI", "GITHUB_ACTIONS", "MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK")
    environment = {name: value for name, value in os.environ.items() if name not in known}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "asked for" not in done.stdout
