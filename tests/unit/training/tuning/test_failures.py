"""What the others do when a rank fails, each case in one process; whole runs are in tests/integration."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from seamount.core.errors import CapacityError, ConfigError
from seamount.training.tuning.distributed import World
from seamount.training.tuning.failures import (
    RankFailedError,
    failure_of_others,
    forget_failures,
    note_failure,
    together,
)
from seamount.training.tuning.writing import writing

GONE = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4242")


def rank(number: int, processes: dict[int, int] | None = None) -> World:
    return World(number, 2, torch.device("cpu"), processes or {})


def test_a_note_says_which_rank_failed_and_of_what(tmp_path: Path) -> None:
    note_failure(tmp_path, rank(1), ConfigError("The data is gone.", hint="Bring it back."))
    failure = failure_of_others(tmp_path, rank(0), GONE)
    assert failure is not None
    assert failure.message == "Rank 1 failed: The data is gone. (Bring it back.)"
    forget_failures(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_is_gone_is_named(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    world = rank(0, {0: os.getpid(), 1: child.pid})
    child.send_signal(signal.SIGKILL)
    # Dead and not yet buried: torchrun may be busy.
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    for _ in range(2):
        failure = failure_of_others(tmp_path, world, GONE)
        assert failure is not None
        assert failure.message.startswith(f"Rank 1 (process {child.pid}) ended without a word: it was killed")
        child.communicate()


def test_an_interrupt_is_told_as_the_failure_that_it_came_from(tmp_path: Path) -> None:
    assert failure_of_others(tmp_path, rank(0, {0: os.getpid()}), KeyboardInterrupt()) is None
    note_failure(tmp_path, rank(1), OSError(errno.EIO, "Input/output error"))
    failure = failure_of_others(tmp_path, rank(0), KeyboardInterrupt())
    assert failure is not None
    assert "Rank 1 failed: OSError" in failure.message


def test_an_error_of_this_rank_stays_what_it_is(tmp_path: Path) -> None:
    assert failure_of_others(tmp_path, rank(0), RuntimeError("a size is wrong")) is None
    alone = World(0, 1, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="gloo"), together(tmp_path, alone):
        raise GONE
    assert list(tmp_path.iterdir()) == []


def test_what_is_whole_is_kept_when_another_rank_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(World, "wait", lambda world: None)
    kept = []
    with (
        pytest.raises(RankFailedError, match="Rank 1 failed: ConfigError"),
        together(tmp_path, rank(0), lambda: kept.append(True)),
    ):
        note_failure(tmp_path, rank(1), ConfigError("ConfigError"))
        raise GONE
    assert kept == [True]


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    alone = World(0, 1, torch.device("cpu"))
    told = pytest.raises(CapacityError, match=r"file/run cannot be written: Not a directory\.")
    with told, together(tmp_path / "file" / "run", alone):
        pass


def test_a_full_disk_keeps_nothing_half_written(tmp_path: Path) -> None:
    (tmp_path / "whole.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CapacityError, match="No space left on device") as told, writing(tmp_path):
        (tmp_path / "whole.json.tmp").write_text("{", encoding="utf-8")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert told.value.code == "disk_full"
    assert [path.name for path in tmp_path.iterdir()] == ["whole.json"]


def test_a_port_that_is_taken_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        given = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ConfigError, match=r"Rank 0 cannot meet the other 1: .*address already in use") as told:
            World.join("cpu")
    assert "--master-port" in str(told.value)


@pytest.mark.parametrize(("name", "value"), [("RANK", "2"), ("RANK", "first"), ("WORLD_SIZE", "0")])
def test_a_rank_that_cannot_be_is_refused(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"There is no such rank: .*{name}={value}"):
        World.join("cpu")
