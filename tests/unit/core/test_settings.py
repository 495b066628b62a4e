"""Settings: flags over environment over file, and no key is ignored."""

from __future__ import annotations

from pathlib import Path

import pytest

from seamount.core.errors import ConfigError
from seamount.core.settings import load_settings


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "seamount.toml"
    monkeypatch.setenv("SEAMOUNT_CONFIG", str(path))
    return path


def test_flags_win_over_environment_over_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text('[engine]\ndtype = "float32"\nblock_size = 8\nmax_num_seqs = 3\n[server]\nport = 1000\n')
    monkeypatch.setenv("SEAMOUNT_ENGINE__BLOCK_SIZE", "4")
    monkeypatch.setenv("SEAMOUNT_SERVER__PORT", "2000")
    settings = load_settings({"model": None, "max_num_seqs": 9}, {"port": 3000, "host": None})
    assert settings.engine.dtype == "float32"
    assert settings.engine.block_size == 4
    assert settings.engine.max_num_seqs == 9
    assert settings.server.port == 3000
    assert settings.engine.model == "seamount-tiny"


@pytest.mark.parametrize("text", ["[engine]\ntypo = 1\n", "[sever]\nport = 1\n", "[engine]\nblock_size = 0\n", "=\n"])
def test_a_wrong_file_is_named(file: Path, text: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError):
        load_settings({}, {})


@pytest.mark.parametrize("name", ["SEAMOUNT_ENGINE__TYPO", "SEAMOUNT_PORT", "SEAMOUNT_SERVER__PORTT"])
def test_an_unknown_variable_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.raises(ConfigError):
        load_settings({}, {})


def test_settings_are_frozen() -> None:
    settings = load_settings({}, {})
    with pytest.raises(ValueError, match="frozen"):
        settings.server.port = 1
