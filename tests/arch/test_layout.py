"""Rules of the house that no linter knows: sizes, names, what the repository may hold."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import seamount
from seamount.core.settings import ClientConfig, EngineConfig, ServerConfig

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "seamount"
MODULES = sorted(SOURCE.rglob("*.py"))
ROOMS = sorted(path for path in SOURCE.iterdir() if path.is_dir() and path.name != "__pycache__")
MAX_LINES = 500
TEXT = {".py", ".js", ".css", ".html", ".md", ".toml", ".txt", ".json", ".jinja", ".yaml", ".yml", ".svg", ".sh", ""}


def project_files() -> list[Path]:
    """Every file that git keeps, or would keep; without git, every file outside hidden and built folders."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode == 0:
        return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    skipped = {"build", "dist", "runs", "__pycache__"}
    folders = [path for path in ROOT.iterdir() if path.name not in skipped and not path.name.startswith(".")]
    return [
        file for folder in folders for file in ([folder] if folder.is_file() else folder.rglob("*")) if file.is_file()
    ]


def test_no_module_is_longer_than_a_reader_can_hold() -> None:
    code = [*MODULES, *SOURCE.rglob("*.js"), *(ROOT / "tests").rglob("*.py"), *(ROOT / "bench").rglob("*.py")]
    long = {str(p.relative_to(ROOT)): n for p in code if (n := len(p.read_text("utf-8").splitlines())) > MAX_LINES}
    assert long == {}


def test_every_module_says_its_job() -> None:
    without = [str(p.relative_to(ROOT)) for p in MODULES if not ast.get_docstring(ast.parse(p.read_text("utf-8")))]
    assert without == []


def test_no_room_is_empty() -> None:
    code = [room.name for room in ROOMS if (room / "__init__.py").is_file() or not any(room.rglob("*.py"))]
    assert code == [room.name for room in ROOMS]
    assert [room.name for room in ROOMS if not any(room.iterdir())] == []


def test_the_public_names_are_these() -> None:
    assert seamount.__all__ == ["LLM", "ContinualLearning", "FineTuningPipeline", "SamplingParams", "__version__"]
    assert all(getattr(seamount, name) for name in seamount.__all__)
    assert set(seamount.__all__) <= set(dir(seamount))
    with pytest.raises(AttributeError, match="nonsense"):
        seamount.nonsense  # noqa: B018


def test_importing_the_package_or_its_language_loads_no_torch() -> None:
    light = (
        "seamount",
        "seamount.core.settings",
        "seamount.models.prompt",
        "seamount.server.app",
        "seamount.engine.client",
    )
    for name in light:
        program = f"import sys, {name}; sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0, name


@pytest.mark.parametrize("config", [EngineConfig, ServerConfig, ClientConfig])
def test_every_setting_is_documented(config: type[EngineConfig | ServerConfig | ClientConfig]) -> None:
    assert [name for name, setting in config.model_fields.items() if len(setting.description or "") < 20] == []


def test_only_the_settings_read_the_environment() -> None:
    readers = [
        str(path.relative_to(SOURCE))
        for path in MODULES
        if re.search(r"\bos\.(environ|getenv)\b", path.read_text("utf-8"))
    ]
    assert readers == ["core/settings.py"]


def test_the_packages_data_files_are_in_the_wheel() -> None:
    """The globs of pyproject, read as setuptools reads them, cover every file that is no Python module."""
    globs = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["package-data"][
        "seamount"
    ]
    covered = {file for pattern in globs for file in SOURCE.glob(pattern) if file.is_file()}
    kept = {path for path in project_files() if path.is_relative_to(SOURCE) and path.suffix != ".py"}
    assert kept - covered == set()
    assert SOURCE / "py.typed" in covered
    assert SOURCE / "server" / "console" / "index.html" in covered


def test_the_licence_is_there_in_full() -> None:
    text = (ROOT / "LICENSE").read_text("utf-8")
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    names = {re.split(r"[\[;=<>! ]", name)[0] for name in wanted} - {"seamount"}
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = {_normal(line.split("==")[0]): line for line in lines if line and not line.startswith("#")}
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in pins.values())
    assert {name for name in names if _normal(name) not in pins} == set()


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


# Spelt in pieces, so that this file does not hold what it forbids.
FOREIGN = {
    "a package registry or model hub as an address": r"(?:files\.|www\.)?(?:py" + r"pi\.org|python" + r"hosted\.org)"
    r"|download\.py" + r"torch\.org|https?://(?:www\.)?hugging" + r"face\.co|https?://(?:www\.)?model" + r"scope\.cn",
    "a folder of one machine": r"(?<![\w.~/-])/(?:wo" + r"rk|ro" + r"ot|op" + r"t/(?:wheels|py" + r"pi)|Us" + r"ers)/",
    "the place where it was written": r"\bwork" + r"place\b|\bthe le" + r"ad (?:engineer|writes|commits)\b",
    "something left undone": r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X)\b",
}


@pytest.mark.parametrize("what", sorted(FOREIGN))
def test_no_file_holds(what: str) -> None:
    pattern = re.compile(FOREIGN[what])
    found = []
    for path in project_files():
        if path.suffix not in TEXT or path.stat().st_size > 2**20:
            continue
        for number, line in enumerate(path.read_text("utf-8", errors="replace").splitlines(), 1):
            if pattern.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert found == []


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("a package registry or model hub as an address", "see https://py" + "pi.org/simple"),
        ("a folder of one machine", "cd /wo" + "rk/main"),
        ("the place where it was written", "in this work" + "place"),
        ("something left undone", "# TO" + "DO: later"),
    ],
)
def test_what_is_forbidden_would_be_found(what: str, line: str) -> None:
    assert re.search(FOREIGN[what], line)
    assert Path(__file__) in project_files()
