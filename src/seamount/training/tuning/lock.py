"""One process at a time in a run's folder: `alone_in`. Called where runs begin, and where one is changed.

Two of them would write each other's checkpoints and metrics. The lock is the system's, so it ends with the process.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from seamount.core.errors import ConfigError

# A distillation holds its folder, and the student's run in it asks again.
_held: set[Path] = set()


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a folder, which exists.

    Raises:
        ConfigError: another process holds it.
    """
    key = folder.resolve()
    if key in _held:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as cause:
            raise ConfigError(
                f"Another process is working in {folder}.", hint="Wait for its end, or choose another output folder."
            ) from cause
        _held.add(key)
        yield
    finally:
        _held.discard(key)
        os.close(descriptor)
