"""A kill, or a full disk, at every single call that a save makes to the system."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from seamount.core.errors import CheckpointError
from seamount.training.tuning.state import CheckpointStore

_CALLS = ("write", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir", "open")
_KILLED, _DONE = 9, 0


def state(step: int) -> dict[str, Tensor]:
    return {"frozen": torch.arange(10), "trained": torch.full((300,), float(step))}


def _save(folder: Path, step: int) -> None:
    CheckpointStore(folder, full_every=3, keep=2).save(step, state(step), {"step": step})


def _newest_is_whole(folder: Path) -> int:
    store = CheckpointStore(folder)
    tensors, facts = store.load()
    assert all(torch.equal(tensor, state(facts["step"])[name]) for name, tensor in tensors.items())
    for step in store.steps()[-2:]:
        store.load(step)
    return int(facts["step"])


def _killed_at(call: int, action: Callable[[], None]) -> bool:
    """Run `action` in a child that dies at its n-th call, half way through if that writes; whether it died."""
    child = os.fork()
    if child == 0:
        left = call

        def dying(name: str) -> Callable[..., Any]:
            real, write = getattr(os, name), os.write

            def call_or_die(*args: Any, **options: Any) -> Any:
                nonlocal left
                left -= 1
                if left == 0:
                    if name == "write":
                        write(args[0], args[1][: len(args[1]) // 2])
                    os._exit(_KILLED)
                return real(*args, **options)

            return call_or_die

        code = 1
        try:
            for name in _CALLS:
                setattr(os, name, dying(name))
            action()
            code = _DONE
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (_KILLED, _DONE)
    return code == _KILLED


@pytest.mark.parametrize("step", [4, 5])
def test_a_kill_at_any_call_leaves_whole_checkpoints(tmp_path: Path, step: int) -> None:
    """Step 4 is full and lets older ones go, step 5 is built on it."""
    for earlier in range(1, step):
        _save(tmp_path / "before", earlier)
    seen = []
    for call in range(1, 1000):
        folder = tmp_path / "run"
        shutil.copytree(tmp_path / "before", folder)
        died = _killed_at(call, lambda folder=folder: _save(folder, step))
        seen.append(_newest_is_whole(folder))
        if seen[-1] < step:
            _save(folder, step)  # what the killed one left behind is in nobody's way
        _save(folder, step + 1)
        assert _newest_is_whole(folder) == step + 1
        assert not list(folder.glob("*.tmp"))
        shutil.rmtree(folder)
        if not died:
            break
    assert seen == sorted(seen)
    assert set(seen) == {step - 1, step}
    assert len(seen) > 10


@pytest.mark.parametrize("kind", ["write", "fsync", "rename", "mkdir"])
def test_a_full_disk_leaves_the_earlier_ones_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    _save(tmp_path, 1)
    real = getattr(os, kind)
    for allowed in range(100):
        left = allowed

        def full(*args: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(os, kind, full)
            try:
                _save(tmp_path, 2)
            except CheckpointError as error:
                assert error.code == "disk_full"
                assert "checkpoint-2" in error.message
                assert "kB" in error.message
                if list(tmp_path.iterdir()) == [tmp_path / "checkpoint-1"]:
                    assert _newest_is_whole(tmp_path) == 1
                    continue
                # The name was there already when the last sync failed.
                assert kind == "fsync"
                assert _newest_is_whole(tmp_path) == 2
                CheckpointStore(tmp_path).rewind(1)
                continue
        break
    assert allowed > 0
    assert _newest_is_whole(tmp_path) == 2


def test_a_short_write_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:7]))
    _save(tmp_path, 1)
    monkeypatch.undo()
    assert _newest_is_whole(tmp_path) == 1


def test_another_fault_of_the_disk_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written: Not a directory"):
        _save(tmp_path / "file" / "inside", 1)
