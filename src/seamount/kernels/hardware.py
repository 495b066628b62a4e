"""What this machine can compute with: the device, threads and instruction sets that would be used.

The engine asks when it starts and `ops.inspection` when it reports; both get the same answer.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path

import psutil
import torch

from seamount.core.errors import ConfigError

# Those that matrix products gain from, slowest first; the names are Linux's.
_FEATURES = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8", "asimd", "bf16", "i8mm", "sve")


def choose_device(name: str) -> torch.device:
    """The device that a setting means: "cpu", "cuda", "cuda:N", or "auto" for a GPU where there is one.

    Raises:
        ConfigError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as cause:
        raise ConfigError(f"device {name!r} is not known.", hint="Use cpu, cuda, cuda:N or auto.") from cause
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {name!r} is not supported.", hint="Use cpu, cuda, cuda:N or auto.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device is {name}, and no usable GPU was found.", hint="Use cpu, or auto.")
    return device


def default_threads() -> int:
    """CPU threads for one engine: the physical cores among those that this process may use."""
    allowed = len(os.sched_getaffinity(0))
    return min(allowed, psutil.cpu_count(logical=False) or allowed)


def processor_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The CPU's name, as it gives it; where it gives none, its architecture's."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def cpu_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, ...]:
    """Instruction sets of this CPU that matter here, by Linux's names; empty where they cannot be told."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return ()
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            found = value.split()
            return tuple(feature for feature in _FEATURES if feature in found)
    return ()
