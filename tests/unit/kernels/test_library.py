"""The kernels are built where they are first used; where that fails, a reason is given and plain torch computes.

Each case runs in a process of its own, with a cache folder of its own and a `PATH` that holds the compiler of the case.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from seamount import kernels
from seamount.kernels.library import Commands

REPORT = """
import torch
from seamount import kernels
print("isa", kernels.isa_name())
print("why", kernels.why_missing())
if kernels.library() is not None:
    matrix = kernels.PackedMatrix("float32", 3, 5)
    weight = torch.arange(15.0).view(3, 5)
    matrix.pack_rows(0, weight)
    assert torch.equal(matrix.multiply(torch.eye(5)), weight.T)
"""
GENERATE = """
import sys
from seamount import LLM, SamplingParams, kernels
from seamount.core.errors import ConfigError
assert kernels.library() is None
print("why", kernels.why_missing())
options = dict(num_threads=1, max_model_len=64)
answer = LLM(sys.argv[1], **options).generate("abc", SamplingParams(max_tokens=5, temperature=0, ignore_eos=True))
print("tokens", len(answer[0].token_ids))
try:
    LLM(sys.argv[1], quantization="int8", **options)
except ConfigError as error:
    print(error, "|", error.hint)
"""


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Returns a function: runs code with this `PATH`; a compiler may wait at the gate and has a version. No process
    outlives the test."""
    with ExitStack() as running:

        def start(
            code: str, path: Path, *arguments: object, gate: Path | None = None, version: str = "1"
        ) -> subprocess.Popen[str]:
            environment = {
                **os.environ,
                "XDG_CACHE_HOME": str(tmp_path / "cache"),
                "PATH": str(path),
                "GATE": str(gate),
                "VERSION": version,
                "OMP_NUM_THREADS": "1",
            }
            command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            process = running.enter_context(subprocess.Popen(command, env=environment, text=True, **pipes))
            running.callback(process.kill)
            return process

        yield start


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    """What it printed and what it said on the way; it must have ended well."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out, err


def compiler(folder: Path, script: str) -> Path:
    """A folder for `PATH` whose `g++` is this shell script."""
    path = folder / "bin"
    path.mkdir()
    (path / "g++").write_text(f"#!/bin/sh\n{script}\n")
    (path / "g++").chmod(0o755)
    return path


def quick_compiler(folder: Path, link: str = "") -> Path:
    """As `compiler`; what the true one makes was made for these tests already, and is only copied.

    Args:
        link: runs before linking.
    """
    return compiler(
        folder,
        f"""
        case "$1" in
            --version) echo "$VERSION"; exit ;;
            -shared) make="{shutil.which("cp")} {getattr(kernels.library(), "_name", "")}"; {link or ":"} ;;
            *) make="{shutil.which("touch")}" ;;
        esac
        while [ "$1" != -o ]; do shift; done
        exec $make "$2"
        """,
    )


def libraries(folder: Path) -> list[Path]:
    return sorted((folder / "cache").rglob("*.so"))


@pytest.mark.skipif(kernels.library() is None, reason="there is no C++ compiler")
def test_two_processes_build_at_once_and_a_third_finds_what_they_built(tmp_path: Path, start: Start) -> None:
    path = quick_compiler(tmp_path, link=': < "$GATE"')
    gates = [tmp_path / "gate0", tmp_path / "gate1"]
    for gate in gates:
        os.mkfifo(gate)
    processes = [start(REPORT, path, gate=gate) for gate in gates]
    for process in processes:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("Compiling")
    for process, gate in zip(processes, gates, strict=True):
        gate.open("w").close()  # returns once its compiler stands there
        assert process.stderr is not None
        assert " of " in process.stderr.read()
        assert finish(process)[0].splitlines()[1].strip() == "why"
    (built,) = libraries(tmp_path)
    assert {entry.name for entry in built.parent.iterdir()} == {built.name, f"{built.stem}.sha256"}
    out, err = finish(start(REPORT, path))
    assert err == ""
    assert out.splitlines()[1].strip() == "why"


@pytest.mark.skipif(kernels.library() is None, reason="there is no C++ compiler")
def test_a_build_leaves_the_libraries_used_last_and_nothing_of_interrupted_builds(tmp_path: Path, start: Start) -> None:
    path = quick_compiler(tmp_path)
    finish(start(REPORT, path, version="1"))
    (first,) = libraries(tmp_path)
    for age, name in ((1, "new"), (2, "older"), (3, "oldest")):
        other = first.with_name(f"seamount-{name}.so")
        other.touch()
        os.utime(other, (10**9 - age, 10**9 - age))
    os.utime(first, (0, 0))
    (first.parent / "build-killed").mkdir()
    (first.parent / "build-killed" / "linear.o").touch()
    assert finish(start(REPORT, path, version="1"))[1] == ""  # used again: no longer the one that was used least
    finish(start(REPORT, path, version="2"))
    (second,) = {built for built in libraries(tmp_path) if len(built.stem) == len(first.stem)} - {first}
    left = {entry.name for entry in first.parent.iterdir() if entry.suffix != ".sha256"}
    assert left == {first.name, second.name, "seamount-new.so", "seamount-older.so"}


@pytest.mark.skipif(kernels.library() is None, reason="there is no C++ compiler")
def test_a_library_that_vanishes_before_it_is_loaded_is_built_again(tmp_path: Path, start: Start) -> None:
    path = quick_compiler(tmp_path)
    vanish = """
import ctypes, os
load, removed = ctypes.CDLL.__init__, []
def remove_and_load(self, name, *arguments, **keywords):
    if "seamount-" in str(name) and not removed:
        os.unlink(name)
        removed.append(name)
    load(self, name, *arguments, **keywords)
ctypes.CDLL.__init__ = remove_and_load
"""
    assert finish(start(vanish + REPORT, path))[0].splitlines()[1].strip() == "why"
    assert len(libraries(tmp_path)) == 1


@pytest.mark.skipif(kernels.library() is None, reason="there is no C++ compiler")
def test_a_damaged_library_is_built_again(tmp_path: Path, start: Start) -> None:
    path = quick_compiler(tmp_path)
    finish(start(REPORT, path))
    (built,) = libraries(tmp_path)
    whole = built.read_bytes()
    built.write_bytes(whole[:1000])
    assert "Compiling" in finish(start(REPORT, path))[1]
    assert built.read_bytes() == whole
    assert finish(start(REPORT, path))[1] == ""


def test_without_a_compiler_plain_torch_computes(tmp_path: Path, start: Start, small_checkpoint: Path) -> None:
    (tmp_path / "bin").mkdir()
    out, err = finish(start(GENERATE, tmp_path / "bin", small_checkpoint))
    assert "tokens 5" in out
    assert "no C++ compiler was found" in out
    assert "apt install g++" in out
    assert "quantization none" in out
    assert err == ""


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ('[ "$1" = --version ] && exit 0; echo "fatal error: no space left on device" >&2; exit 1', "no space left"),
        ("exit 1", "could not be built"),
        ('[ "$1" = --version ] && exit 0; while [ "$1" != -o ]; do shift; done; echo rubbish > "$2"', "could not be"),
    ],
    ids=["cannot-compile", "cannot-even-start", "writes-rubbish"],
)
def test_a_broken_compiler_is_named_and_plain_torch_computes(
    script: str, reason: str, tmp_path: Path, start: Start, small_checkpoint: Path
) -> None:
    path = compiler(tmp_path, script)
    out, _ = finish(start(GENERATE, path, small_checkpoint))
    assert reason in out.splitlines()[0]
    assert "tokens 5" in out


@pytest.mark.skipif(kernels.library() is None, reason="there is no C++ compiler")
def test_without_a_cache_folder_the_kernels_are_built_for_the_run(tmp_path: Path, start: Start) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    out, err = finish(start(REPORT, quick_compiler(tmp_path)))
    assert out.splitlines()[1].strip() == "why"
    assert "cannot be written" in err
    assert "for this run only" in err


def test_a_compile_that_is_left_ends_its_compilers(tmp_path: Path) -> None:
    """Ctrl-C must not wait for them, and what they left running would write into a folder that is gone."""
    told = tmp_path / "pid"
    script = f"sleep 600 & echo $! > {told}.new; mv {told}.new {told}; wait"
    with pytest.raises(KeyboardInterrupt), Commands() as commands:
        for _ in range(8):
            commands.begin(["sh", "-c", script])
        while not told.exists():
            pass
        raise KeyboardInterrupt
    child = Path(f"/proc/{told.read_text().strip()}/stat")
    assert not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z"
