"""What the others do when a rank fails: they say which and of what, and keep what is whole. Called by the pipelines.

A rank that fails leaves a note in the run's folder before it ends. One that was killed leaves none, and its process is
gone. Without torchrun there are no others, and an error stays what it is.
"""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil

from seamount.core.errors import EngineError, SeamountError

from .distributed import World
from .lock import alone_in
from .writing import not_written

_NOTE_WAIT_S = 5.0
# What gloo's and NCCL's errors say when a peer is gone or does not answer.
_COLLECTIVE = re.compile(r"(?i)gloo|nccl|closed by peer|reset by peer|broken pipe|timed out|process ?group")
_GO_ON = "Go on with --resume auto, from the newest checkpoint."


class RankFailedError(EngineError):
    """Another rank failed, and with it the run."""

    code = "rank_failed"


@contextmanager
def together(folder: Path, world: World, rescue: Callable[[], None] = lambda: None) -> Iterator[None]:
    """While ranks work together in a run's folder, which is made, and nobody else does; parts from them at the end.

    torchrun asks the others to end (SIGTERM) when a rank does. They do, and say why; to that end a process whose run
    failed ignores SIGTERM from then on.

    Args:
        rescue: keeps what is whole of this rank, when another has failed.

    Raises:
        ConfigError: another process works in the folder.
        RankFailedError: in place of whatever ended this rank because of another one.
        CapacityError: a file of the run cannot be written, in place of the system's error.
    """
    lock = ExitStack()
    try:
        if world.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            lock.enter_context(alone_in(folder))
            forget_failures(folder)
        world.wait()
        yield
    except BaseException as error:
        if world.size > 1:
            _ignore_sigterm()
        if isinstance(error, RuntimeError | KeyboardInterrupt):
            failure = failure_of_others(folder, world, error)
            if failure is not None:
                with suppress(SeamountError):
                    rescue()
                raise failure from error
        told: BaseException = error
        if isinstance(error, OSError) and error.filename is not None:
            told = not_written(Path(os.fsdecode(error.filename)), error)
        note_failure(folder, world, told)
        if told is error:
            raise
        raise told from error
    finally:
        lock.close()
        world.leave()


def note_failure(folder: Path, world: World, error: BaseException) -> None:
    """Leave word of why this rank failed, for the others; as far as the folder can be written."""
    if world.size == 1 or isinstance(error, RankFailedError):
        return
    text = str(error) if isinstance(error, SeamountError) else f"{type(error).__name__}: {error}"
    if isinstance(error, KeyboardInterrupt):
        text = "it was asked to end."
    partial = folder / f".failed-rank-{world.rank}.tmp"
    with suppress(OSError):
        partial.write_text(json.dumps({"rank": world.rank, "cause": text}), encoding="utf-8")
        partial.replace(folder / f"failed-rank-{world.rank}.json")


def failure_of_others(folder: Path, world: World, error: BaseException) -> RankFailedError | None:
    """Say which rank failed and of what, where this one was ended for it; else None.

    Args:
        error: of a collective operation, or KeyboardInterrupt, which is torchrun's way to end the other ranks.
    """
    was_asked = isinstance(error, KeyboardInterrupt)
    if world.size == 1 or not (was_asked or _COLLECTIVE.search(str(error))):
        return None
    until = time.monotonic() + (0.0 if was_asked else _NOTE_WAIT_S)
    while True:
        gone = _gone(world)
        if (note := _note(folder, world)) is not None:
            return RankFailedError(f"Rank {note[0]} failed: {note[1]}", hint=_GO_ON)
        if gone is not None:
            return RankFailedError(
                f"Rank {gone} (process {world.processes[gone]}) ended without a word: it was killed, as the "
                "system does when memory runs out.",
                hint=_GO_ON,
            )
        if time.monotonic() > until:
            break
        time.sleep(0.05)
    if was_asked:
        return None
    if "timed out" in str(error).lower():
        return RankFailedError("Another rank does not answer: it hangs, or the network is gone.", hint=_GO_ON)
    return RankFailedError("Another rank ended without a word: it was killed, or its machine is gone.", hint=_GO_ON)


def forget_failures(folder: Path) -> None:
    """Remove the notes of an earlier start."""
    for path in folder.glob("failed-rank-*.json"):
        path.unlink(missing_ok=True)


def _note(folder: Path, world: World) -> tuple[int, str] | None:
    notes = [path for path in folder.glob("failed-rank-*.json") if path.name != f"failed-rank-{world.rank}.json"]
    if not notes:
        return None
    told = json.loads(min(notes, key=lambda path: path.stat().st_mtime).read_text(encoding="utf-8"))
    return told["rank"], told["cause"]


def _gone(world: World) -> int | None:
    """A rank whose process has ended, as far as processes can be seen from here."""
    for rank, number in world.processes.items():
        try:
            if psutil.Process(number).status() == psutil.STATUS_ZOMBIE:
                return rank
        except psutil.NoSuchProcess:
            return rank
    return None


def _ignore_sigterm() -> None:
    """torchrun sends SIGTERM to those that are left. They end by themselves, once they have said why."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
