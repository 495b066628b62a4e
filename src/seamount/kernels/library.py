"""The compiled kernels: built from `native/` at first use, kept in the user's cache, loaded once per process.

There is no prebuilt binary: the sources are part of the package, and the compiler of this machine makes the library
within seconds. Its file name is a digest of the sources, flags and compiler, so an update builds anew and nothing
stale is ever loaded; its digest lies beside it, so nothing damaged is either. The libraries used last are kept, since
several versions may share the folder. Where there is no compiler, `library()` is None, `why_missing()` says why, and
callers use plain torch. Knows nothing of tensors.
"""

from __future__ import annotations

import atexit
import ctypes
import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Self

import torch

from seamount.core.settings import cache_folder

_SOURCES = Path(__file__).parent / "native"
# Without contraction: whether the compiler fuses a product and a sum depends on what surrounds them, and a row's bits
# must not depend on which of several copies of a loop computed it. Where fusing pays, `mul_add` asks for it.
_COMMON = ("-O3", "-std=c++17", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-pthread", "-Wno-psabi")
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mavx512vbmi"),
    *("-mf16c", "-mfma"),
)
_AMX = (*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-int8", "-mamx-bf16")
# By the end of a file's name: it is compiled for chips that have these, and runs on those only.
_FLAGS = {"_avx2": _AVX2, "_avx512": _AVX512, "_amx": _AMX}
ISA_NAMES = ("plain", "avx2", "avx512", "amx")
_WORK_PREFIX = "build-"
# Libraries that stay after a build, its own included.
_NUM_KEPT = 4


@cache
def library() -> ctypes.CDLL | None:
    """The library, built if need be; None where it cannot be built (`why_missing` says why)."""
    outcome = _open()
    return outcome if isinstance(outcome, ctypes.CDLL) else None


def why_missing() -> str:
    """Why `library()` is None; empty when it is not."""
    outcome = _open()
    return outcome if isinstance(outcome, str) else ""


@cache
def isa_name() -> str:
    """The instruction set that the library uses on this chip; empty where there is no library."""
    found = library()
    return "" if found is None else ISA_NAMES[found.seamount_choose_isa(len(ISA_NAMES) - 1)]


def describe(device: torch.device) -> str:
    """Which implementation computes on `device`, in words for people."""
    if device.type != "cpu":
        return "torch"
    return f"compiled ({isa_name()})" if library() is not None else f"plain torch: {why_missing()}"


@cache
def _open() -> ctypes.CDLL | str:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        return "no C++ compiler was found (Debian: apt install g++)"
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
        found = _load(compiler, _place(f"seamount-{_digest(version)}.so"))
    except (OSError, subprocess.CalledProcessError) as cause:
        detail = getattr(cause, "stderr", "") or str(cause)
        return f"the kernels could not be built or loaded: {detail.strip().splitlines()[0][:300] if detail else cause}"
    found.seamount_choose_isa(len(ISA_NAMES) - 1)
    return found


def _place(name: str) -> Path:
    """Where the library is or will be: in the user's cache, or in a folder for this run if that takes no files."""
    folder = cache_folder() / "kernels"
    if _is_whole(folder / name):
        return folder / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder / name
    except OSError as cause:
        _say(f"{folder} cannot be written ({cause.strerror}): the kernels are compiled for this run only.")
        own = Path(tempfile.mkdtemp(prefix="seamount-kernels-"))
        atexit.register(shutil.rmtree, own, ignore_errors=True)
        return own / name


def _is_whole(path: Path) -> bool:
    """Whether the file is the one that was built: loading a damaged one would end the process without a word."""
    try:
        return _sum_of(path).read_text("ascii") == hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return False


def _sum_of(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _load(compiler: str, path: Path) -> ctypes.CDLL:
    if not _is_whole(path):
        _build(compiler, path)
    with suppress(OSError):  # the folder may be read-only, or another process has just removed the file
        os.utime(path)  # `_tidy` goes by the time of last use
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        if path.exists():
            raise
        _build(compiler, path)
        return ctypes.CDLL(str(path))


def _digest(compiler_version: str) -> str:
    digest = hashlib.sha256(repr((_COMMON, _FLAGS, compiler_version, os.uname().machine)).encode())
    for source in sorted(_SOURCES.iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:24]


def _build(compiler: str, path: Path) -> None:
    """Compile every source and link; the finished library appears under its name at once or not at all."""
    is_x86 = os.uname().machine in ("x86_64", "amd64")
    # Baseline objects first: of an inline function compiled several times the linker keeps the first, and that one
    # must run on every chip.
    sources = sorted(_SOURCES.glob("*.cpp"), key=lambda s: (bool(_flags(s)), s.name))
    if not is_x86:
        sources = [s for s in sources if not _flags(s)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with _tidied(path.parent), tempfile.TemporaryDirectory(prefix=_WORK_PREFIX, dir=path.parent) as work:
        objects = [Path(work) / f"{source.stem}.o" for source in sources]
        done = 0
        _say(f"Compiling {len(sources)} kernel files for this machine (once) ...")
        with Commands() as commands:
            jobs = [
                commands.begin([compiler, *_COMMON, *_flags(source), "-c", str(source), "-o", str(target)])
                for source, target in zip(sources, objects, strict=True)
            ]
            for job in jobs:
                job.result()
                done += 1
                _say(f"\r  {done} of {len(sources)}", end="")
            _say("")
            linked = Path(work) / "linked.so"
            commands.begin([compiler, "-shared", "-pthread", *map(str, objects), "-o", str(linked)]).result()
        digest = hashlib.sha256(linked.read_bytes()).hexdigest()
        os.replace(linked, path)
        linked.write_text(digest, "ascii")
        os.replace(linked, _sum_of(path))


@contextmanager
def _tidied(folder: Path) -> Iterator[None]:
    """Mark a build as under way; when the last one of all processes has succeeded, remove what is of no more use.

    A library that is loaded somewhere may go: its memory stays until it is unloaded. The work of a build may not, so
    every build holds a shared lock on the folder, and only who can have it alone removes. A file system without locks
    is left as it is.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _tidy(folder)
    finally:
        os.close(descriptor)


def _tidy(folder: Path) -> None:
    """Remove all but the libraries used last, and what interrupted builds left; nobody may be building."""
    libraries = sorted(folder.glob("seamount-*.so"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in libraries[_NUM_KEPT:]:
        path.unlink(missing_ok=True)
        _sum_of(path).unlink(missing_ok=True)
    for work in folder.glob(f"{_WORK_PREFIX}*"):
        shutil.rmtree(work, ignore_errors=True)


def _flags(source: Path) -> tuple[str, ...]:
    return next((flags for ending, flags in _FLAGS.items() if source.stem.endswith(ending)), ())


class Commands:
    """Commands that run beside each other, as many as there are processors. Left by an error, Ctrl-C included, it ends
    those that run, their children too, and begins no more.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[str]] = set()
        self._ended = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            with self._lock:
                self._ended = True
                for process in self._running:
                    with suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
        self._pool.shutdown(cancel_futures=kind is not None)

    def begin(self, command: list[str]) -> Future[None]:
        """Run a command when there is room.

        Raises (the future):
            CalledProcessError: it failed; holds what it said.
        """
        return self._pool.submit(self._run, command)

    def _run(self, command: list[str]) -> None:
        with self._lock:
            if self._ended:
                return
            # In a group of its own: the compiler is a driver whose children do the work.
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
            )
            self._running.add(process)
        out, err = process.communicate()
        with self._lock:
            self._running.discard(process)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command, out, err)


def _say(text: str, end: str = "\n") -> None:
    sys.stderr.write(text + end)
    sys.stderr.flush()
