"""The runners' processes: start, ask, hold still, stop. Called by the driver; knows nothing of rows or rates.

Only the runner that is being asked may run: all others are held with SIGSTOP, so that no thread pool spins beside the
measurement. As many stay loaded as memory allows; when one needs room, the one used last goes first, because a round
visits everybody in turn and will come back to it last.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

Key = tuple[str, ...]
RESERVE_BYTES = 3 * 10**9
_STOP_S = 15.0


class RunnerError(Exception):
    """A runner could not load, answered with an error, ended, or took too long; the message says which."""


@dataclass
class Runner:
    """One peer's process, its children with it (they share a process group)."""

    key: Key
    process: subprocess.Popen[str]
    log: Path
    load_s: float = 0.0
    used_at: float = 0.0
    warm: set[str] = field(default_factory=set)

    def ask(self, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """Send one request and wait for its answer."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError as cause:
            raise RunnerError(self._ended()) from cause
        return self.read(timeout_s)

    def read(self, timeout_s: float) -> dict[str, Any]:
        """Wait for one answer line."""
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], timeout_s)
        if not ready:
            raise RunnerError(f"no answer within {timeout_s:.0f} s")
        line = self.process.stdout.readline()
        if not line:
            raise RunnerError(self._ended())
        answer = json.loads(line)
        if "error" in answer:
            raise RunnerError(answer["error"])
        return answer

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the whole group, if it is still there."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def memory(self) -> tuple[int, int]:
        """Resident bytes of all its processes now, and the sum of their peaks."""
        now = peak = 0
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self.process.pid)
            for process in (parent, *parent.children(recursive=True)):
                now += process.memory_info().rss
                status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
                peaks = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")]
                peak += 1024 * int(peaks[0]) if peaks else 0
        return now, peak

    def cpu_s(self) -> float:
        """Processor seconds that all its processes have used."""
        used = 0.0
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self.process.pid)
            for process in (parent, *parent.children(recursive=True)):
                times = process.cpu_times()
                used += times.user + times.system
        return used

    def _ended(self) -> str:
        lines = [line for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        try:
            status: int | None = self.process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            status = None
        return f"ended with status {status}: {' / '.join(lines[-2:])[-600:]}"


class Fleet:
    """All runners that are loaded; a context manager that leaves none behind."""

    def __init__(self, logs: Path, timeout_s: float) -> None:
        self._logs, self._timeout_s = logs, timeout_s
        self._runners: dict[Key, Runner] = {}
        self._peaks: dict[Key, int] = {}
        logs.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        for runner in list(self._runners.values()):
            self.stop(runner)

    def get(self, key: Key, command: list[str], environ: dict[str, str], expected_bytes: int) -> Runner:
        """Return the runner of this key, awake, every other one held still; start it if need be.

        Args:
            environ: set for the process; an empty value takes the variable away.
            expected_bytes: what it is thought to need at its peak; once it has been seen, what it did need.

        Raises:
            RunnerError: it could not load.
        """
        for other in self._runners.values():
            if other.key != key:
                other.signal(signal.SIGSTOP)
        runner = self._runners.get(key)
        resident = runner.memory()[0] if runner else 0
        self._make_room(key, max(0, self._peaks.get(key, expected_bytes) - resident))
        if runner is None:
            runner = self._start(key, command, environ)
        runner.signal(signal.SIGCONT)
        runner.used_at = time.monotonic()
        return runner

    def note_peak(self, runner: Runner) -> int:
        """Remember and return the most memory that this runner has held."""
        self._peaks[runner.key] = max(self._peaks.get(runner.key, 0), runner.memory()[1])
        return self._peaks[runner.key]

    def stop(self, runner: Runner) -> None:
        """Ask it to end, then end it."""
        self._runners.pop(runner.key, None)
        runner.signal(signal.SIGCONT)
        assert runner.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            runner.process.stdin.close()
        try:
            runner.process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            pass
        finally:
            runner.signal(signal.SIGKILL)
            runner.process.wait()

    def _make_room(self, key: Key, wanted: int) -> None:
        others = [runner for runner in self._runners.values() if runner.key != key]
        for runner in sorted(others, key=lambda runner: runner.used_at, reverse=True):
            if psutil.virtual_memory().available >= wanted + RESERVE_BYTES:
                return
            self.stop(runner)

    def _start(self, key: Key, command: list[str], environ: dict[str, str]) -> Runner:
        log = self._logs / ("-".join(key) + ".log")
        with log.open("w", encoding="utf-8") as errors:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={name: value for name, value in (os.environ | environ).items() if value},
                start_new_session=True,
            )
        runner = self._runners[key] = Runner(key, process, log)
        try:
            runner.load_s = runner.read(self._timeout_s)["load_s"]
        except RunnerError:
            self.stop(runner)
            raise
        return runner
