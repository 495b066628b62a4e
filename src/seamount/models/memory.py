"""How much memory a model may still take here. The engine, the loader and `ops.inspection` ask the same
question.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import psutil
import torch

# Limit and use of a container's memory, control groups version 2 and version 1.
_CGROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def available_bytes(device: torch.device) -> int:
    """Memory that this process may still take on `device`; on a CPU, its container's limit counts too."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    for limit_name, used_name in _CGROUP_FILES:
        try:
            limit, used = Path(limit_name).read_text().strip(), Path(used_name).read_text().strip()
        except OSError:
            continue
        if limit.isdecimal():
            # What the group uses holds page cache, which gives way; so this errs on the careful side by
            # little only.
            free = min(free, max(int(limit) - int(used) + _reclaimable(Path(used_name).parent), 0))
    return free


def _reclaimable(group: Path) -> int:
    try:
        lines = (group / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    counts = dict(line.split(" ", 1) for line in lines if " " in line)
    return int(counts.get("inactive_file", "0"))


def release_freed() -> None:
    """Hand memory that was freed back to the system; C libraries keep much of it for later otherwise."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):  # not glibc
        return
    trim.argtypes, trim.restype = [ctypes.c_size_t], ctypes.c_int
    trim(0)


def keep_freed() -> None:
    """Keep memory that was freed, of whatever size, for the next that asks; for this process's life.

    By default glibc maps large tensors afresh each time, and the system clears them page by page: a quarter of a
    training step on a CPU. `release_freed` still hands back what is free at the end.
    """
    try:
        tell = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not glibc
        return
    tell.argtypes, tell.restype = [ctypes.c_int, ctypes.c_int], ctypes.c_int
    for parameter, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1)):
        tell(parameter, value)


# Of malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
