"""A child process for work on strangers' input, which can be ended from outside as no thread can.

Used by `template` (chat templates) and by the engine's `grammar`. Both ways a message is its length in four bytes (big
endian), then JSON. The child limits its own processor time and memory (`_template_sandbox`, and the engine's
`_grammar_sandbox`); this end adds a wall clock, for a child that waits instead of working.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

from seamount.core.errors import BackendError

WALL_LIMIT_S = 20.0  # generous, since a busy machine must not trip it


class SandboxProcess:
    """A running child and its pipes. Not for several threads at once.

    Args:
        program: the Python file that it runs, by itself: without environment, without this package.
    """

    def __init__(self, program: Path) -> None:
        if not sys.executable:
            raise BackendError(f"The Python interpreter's path is unknown, so {program.name} cannot be started.")
        self._pid = os.getpid()
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={},
            start_new_session=True,  # a terminal's Ctrl-C is for the parent alone
        )
        self._close = weakref.finalize(self, _end, self._process, self._pid)

    def is_usable(self) -> bool:
        """False after its end, and in a fork of the process that started it: two cannot share pipes."""
        return self._pid == os.getpid() and self._process.poll() is None

    def ask(self, message: bytes) -> dict[str, Any] | None:
        """Send one message (JSON) and return the answer; None when the child ended instead."""
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            return None
        watchdog = threading.Timer(WALL_LIMIT_S, self._process.kill)
        watchdog.daemon = True
        watchdog.start()
        try:
            stdin.write(struct.pack(">I", len(message)) + message)
            stdin.flush()
            header = stdout.read(4)
            if len(header) < 4:
                return None
            body = stdout.read(struct.unpack(">I", header)[0])
        except OSError:  # the pipe broke: the child was ended while it read
            return None
        finally:
            watchdog.cancel()
        try:
            answer = json.loads(body)
        except ValueError:  # cut off in the middle
            return None
        return answer if isinstance(answer, dict) else None

    def close(self) -> None:
        """End the process. Idempotent."""
        self._close()


def _end(process: subprocess.Popen[bytes], pid: int) -> None:
    if pid != os.getpid():
        return  # a fork's copy: the process belongs to the parent
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            try:
                pipe.close()
            except OSError:
                continue  # unsent bytes for a process that is gone
