"""What a run was computed on and with, for its facts and its report. Called by `pipeline` when a run begins.

Names and versions only: nothing that tells who or where somebody is.
"""

from __future__ import annotations

import platform
from typing import Any

import psutil
import torch

from seamount.kernels import hardware
from seamount.version import __version__


def surroundings(device: torch.device) -> dict[str, dict[str, Any]]:
    """`machine` and `software`, as JSON has it.

    Args:
        device: that the run computes on.
    """
    machine: dict[str, Any] = {
        "processor": hardware.processor_name(),
        "cores": hardware.default_threads(),
        "memory_bytes": psutil.virtual_memory().total,
    }
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        machine |= {"gpu": gpu.name, "gpu_memory_bytes": gpu.total_memory}
    software = {
        "seamount": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    return {"machine": machine, "software": software}
