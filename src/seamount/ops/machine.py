"""What a measurement was taken on: processor, device, threads, instruction sets, kernels, versions; and its memory.

A number without these says nothing, so the benchmark's report begins with them.
"""

from __future__ import annotations

import contextlib
import platform
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from seamount import kernels
from seamount.kernels import hardware
from seamount.version import __version__


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Facts for the head of a report.

    Attributes:
        processor: the CPU's name, as it gives it.
        device: where the model runs: `cpu`, or the GPU's number and name.
        num_cores: physical cores that this process may use.
        num_threads: that the engine computes with.
        instruction_sets: of the CPU, those that matter here.
        kernels: which implementation computes.
        memory_bytes: of the whole machine.
    """

    processor: str
    device: str
    num_cores: int
    num_threads: int
    instruction_sets: tuple[str, ...]
    kernels: str
    memory_bytes: int
    seamount_version: str
    torch_version: str
    python_version: str


def describe_machine(device: torch.device) -> Machine:
    """Describe this machine and how torch is set up in this process, after the engine was built."""
    shown = f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
    return Machine(
        processor=hardware.processor_name(),
        device=shown,
        num_cores=hardware.default_threads(),
        num_threads=torch.get_num_threads(),
        instruction_sets=hardware.cpu_features(),
        kernels=kernels.describe(device),
        memory_bytes=psutil.virtual_memory().total,
        seamount_version=__version__,
        torch_version=torch.__version__,
        python_version=platform.python_version(),
    )


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory_bytes` count from now on; where the system has no such switch it goes on counting."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak resident set size


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory that was in use at once: of this process on a CPU, of torch's tensors on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        lines = []
    peaks = (int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    return next(peaks, psutil.Process().memory_info().rss)
