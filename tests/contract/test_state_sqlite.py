"""What only an SQLite file can do wrong: a full disk, a damaged file, a folder that is none."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from seamount.core.database import Run
from seamount.core.errors import ConfigError, IntegrityError, StateUnavailableError
from seamount.core.state import open_state

ADD_TENANT = "INSERT INTO tenants (name, created_s) VALUES (?, ?)"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "folder").mkdir()
    return tmp_path / "folder" / "state.db"


def test_the_file_is_its_owners_alone(path: Path):
    database = open_state(str(path))
    database.write(lambda run: run(ADD_TENANT, "a", 0))
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
    database.close()
    assert modes == {"state.db": 0o600, "state.db-wal": 0o600, "state.db-shm": 0o600}


def test_readers_go_on_beside_a_writer_and_commits_are_flushed(path: Path):
    database = open_state(str(path))
    assert database.read(lambda run: run("PRAGMA journal_mode")) == [("wal",)]
    assert database.read(lambda run: run("PRAGMA synchronous")) == [(2,)]
    database.close()


def test_a_full_disk_is_told_and_nothing_is_half_written(path: Path):
    database = open_state(str(path))
    [(pages,)] = database.read(lambda run: run("PRAGMA page_count"))
    database.read(lambda run: run(f"PRAGMA max_page_count = {pages + 4}"))

    def much(run: Run) -> None:
        for number in range(100):
            run(ADD_TENANT, f"{number}" + "x" * 4000, 0)

    with pytest.raises(StateUnavailableError) as caught:
        database.write(much)
    assert caught.value.code == "state_full"
    assert caught.value.retry_after
    assert database.read(lambda run: run("SELECT name FROM tenants")) == []
    database.write(lambda run: run(ADD_TENANT, "small", 0))
    assert database.read(lambda run: run("SELECT name FROM tenants")) == [("small",)]
    database.close()


@pytest.mark.parametrize(
    "content", [b"this is no database, but long enough to be taken for one" * 20, b"SQLite format 3\0"]
)
def test_a_file_that_is_no_database_is_told(path: Path, content: bytes):
    path.write_bytes(content)
    with pytest.raises(IntegrityError) as caught:
        open_state(str(path))
    assert caught.value.code == "state_corrupt"
    assert path.read_bytes() == content


def test_a_damaged_page_is_told(path: Path):
    database = open_state(str(path))
    for number in range(200):
        database.write(lambda run, number=number: run(ADD_TENANT, f"{number:04}" + "x" * 200, 0))
    database.close()
    data = bytearray(path.read_bytes())
    data[4096 * 2 :] = b"\xff" * (len(data) - 4096 * 2)
    path.write_bytes(data)
    with pytest.raises(IntegrityError):
        open_state(str(path)).read(lambda run: run("SELECT name, created_s FROM tenants"))


def test_a_place_where_no_file_can_be_made_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file/state.db") as caught:
        open_state(str(tmp_path / "file" / "state.db"))
    assert "--database" in caught.value.hint


def test_a_folder_in_the_files_place_is_told(tmp_path: Path):
    with pytest.raises(StateUnavailableError) as caught:
        open_state(str(tmp_path))
    assert caught.value.private == str(tmp_path)
    assert str(tmp_path) not in str(caught.value)  # which whoever asks the server is told


def test_without_a_setting_the_file_is_in_the_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    open_state(None).close()
    assert (tmp_path / "data" / "seamount" / "state.db").is_file()
    assert stat.S_IMODE((tmp_path / "data" / "seamount").stat().st_mode) == 0o700


def test_no_folder_is_made_elsewhere(tmp_path: Path):
    with pytest.raises(ConfigError, match="wrong is no folder"):
        open_state(str(tmp_path / "wrong" / "state.db"))
    assert list(tmp_path.iterdir()) == []


def test_one_that_must_be_there_is_not_made(path: Path):
    with pytest.raises(ConfigError, match="There is no state database .*state.db"):
        open_state(str(path), must_exist=True)
    assert list(path.parent.iterdir()) == []
    open_state(str(path)).close()
    open_state(str(path), must_exist=True).close()
