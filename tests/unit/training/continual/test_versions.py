"""The list of versions: a tree that only grows, whole after a kill, with errors that name what is damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from seamount.core.errors import CheckpointError, NotFoundError
from seamount.training.continual import versions as module
from seamount.training.continual.versions import Version, Versions


def add(versions: Versions, task_id: str) -> Version:
    """A version of the current one, whose only tensor holds its number."""
    parent, number = versions.current(), len(versions.all())
    version = Version(number, task_id, parent.number, f"digest of {task_id}", (*parent.accuracy, 0.5), number * 10, 4)
    versions.add(version, {"weights.a": torch.full((8,), float(number))})
    return version


@pytest.fixture
def versions(tmp_path: Path) -> Versions:
    """Three tasks, one after the other."""
    made = Versions(tmp_path)
    made.begin()
    for task_id in ("a", "b", "c"):
        add(made, task_id)
    return made


def test_a_version_for_each_task_and_the_model_as_it_was(versions: Versions) -> None:
    found = versions.all()
    assert [(v.number, v.task_id, v.parent, v.is_current) for v in found] == [
        (0, "", 0, False),
        (1, "a", 0, False),
        (2, "b", 1, False),
        (3, "c", 2, True),
    ]
    assert versions.load(0) == ({}, {})
    assert versions.load(2)[0]["weights.a"][0] == 2.0


def test_after_a_rollback_versions_branch_and_none_is_lost(versions: Versions) -> None:
    versions.make_current(1)
    assert add(versions, "d").parent == 1
    assert [version.task_id for version in versions.lineage()] == ["a", "d"]
    versions.make_current(3)
    assert [version.task_id for version in versions.lineage()] == ["a", "b", "c"]
    assert [int(versions.load(number)[0]["weights.a"][0]) for number in range(1, 5)] == [1, 2, 3, 4]
    versions.make_current(0)
    assert versions.lineage() == []


def test_many_versions_all_stay(versions: Versions) -> None:
    for number in range(12):
        add(versions, f"task {number}")
    assert [int(versions.load(number)[0]["weights.a"][0]) for number in range(1, 16)] == list(range(1, 16))


def test_a_kill_before_the_list_was_written_loses_nothing(
    versions: Versions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module, "replace_file", killed)
        with pytest.raises(KeyboardInterrupt):
            add(versions, "d")
    assert versions.current().number == 3
    again = Versions(tmp_path)
    again.begin()
    assert again.current() == Version(4, "d", 3, "digest of d", (0.5,) * 4, 40, 4, is_current=True)


def test_an_unknown_version_is_named_with_those_that_are(versions: Versions) -> None:
    with pytest.raises(NotFoundError, match="no version 9") as caught:
        versions.make_current(9)
    assert caught.value.hint == "There are versions 0, 1, 2, 3."


def test_a_damaged_version_does_not_become_current(versions: Versions, tmp_path: Path) -> None:
    path = tmp_path / "versions" / "checkpoint-2" / "state.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="Version 2 cannot be used: .*checkpoint-2"):
        versions.make_current(2)
    assert versions.current().number == 3
    assert versions.make_current(1).task_id == "a"


@pytest.mark.parametrize("damage", ["", "{}", '{"format": 1, "current": 7, "versions": []}', "[]", "\xff"])
def test_a_damaged_list_is_a_typed_error(versions: Versions, tmp_path: Path, damage: str) -> None:
    (tmp_path / "versions.json").write_text(damage, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"versions\.json cannot be read"):
        versions.all()


def test_a_list_whose_versions_do_not_follow_each_other_is_refused(versions: Versions, tmp_path: Path) -> None:
    path = tmp_path / "versions.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    fields["versions"][0]["parent"] = 3
    path.write_text(json.dumps(fields), encoding="utf-8")
    with pytest.raises(CheckpointError, match="do not follow"):
        versions.lineage()
