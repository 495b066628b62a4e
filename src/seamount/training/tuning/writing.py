"""A run's files on a disk that may be full: `writing` around whatever writes them. Called by `pipeline` and `network`.

Files are written beside their place, under a name that ends in `.tmp`, and then renamed into it. It must not know what
is in them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from seamount.core.errors import CapacityError


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """While files of a folder are written; one at a time writes there.

    Raises:
        CapacityError: in place of the system's error, with nothing half written left to take room.
    """
    try:
        yield
    except (OSError, SafetensorError) as cause:
        for partial in folder.glob("*.tmp"):
            with suppress(OSError):
                partial.unlink()
        raise not_written(folder, cause) from cause


def not_written(path: Path, cause: OSError | SafetensorError) -> CapacityError:
    """The error that says so."""
    reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(cause)
    return CapacityError(
        f"{path} cannot be written: {reason}.",
        hint="What was written before is whole: make room, or mend that, and give the same command again.",
        code="disk_full",
    )
