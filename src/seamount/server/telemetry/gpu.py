"""Metrics of GPUs, under the names of NVIDIA's DCGM exporter, where the engine runs on one; else none.

Used by `metrics`. Asks the driver's own library (NVML), which every machine with such a driver has, so that the
server's process needs neither torch nor a package for it. All GPUs of the machine are told, numbered as `nvidia-smi`
numbers them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client.core import GaugeMetricFamily, Metric

_LIBRARY = "libnvidia-ml.so.1"
_MIB = 2**20
_TEXT_BYTES = 96
_CORE_TEMPERATURE = 0  # NVML_TEMPERATURE_GPU
_NAMES = (
    ("DCGM_FI_DEV_FB_USED", "Memory in use, in MiB."),
    ("DCGM_FI_DEV_FB_FREE", "Memory that is free, in MiB."),
    ("DCGM_FI_DEV_GPU_UTIL", "Share of the last moment in which something ran, in percent."),
    ("DCGM_FI_DEV_GPU_TEMP", "Temperature, in degrees Celsius."),
    ("DCGM_FI_DEV_POWER_USAGE", "Power drawn, in watts."),
)


class _Memory(ctypes.Structure):
    """NVML's nvmlMemory_t."""

    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class _Utilization(ctypes.Structure):
    """NVML's nvmlUtilization_t."""

    _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))


class GpuCollector:
    """Asks at each scrape; a value that a GPU does not tell is left out.

    Args:
        device: says where the engine runs, such as `cpu` or `cuda:0`.
    """

    def __init__(self, device: Callable[[], str]) -> None:
        self._device = device
        self._library: Any = None
        self._is_missing = False

    def collect(self) -> Iterator[Metric]:
        """Yield what the driver says."""
        library = self._open() if self._device().startswith("cuda") else None
        if library is None:
            return
        gauges = {name: GaugeMetricFamily(name, text, labels=("gpu", "UUID")) for name, text in _NAMES}
        count = ctypes.c_uint()
        if library.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
            return
        for index in range(count.value):
            handle = ctypes.c_void_p()
            if library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)) != 0:
                continue
            labels = (str(index), _uuid(library, handle))
            for name, value in _values(library, handle):
                gauges[name].add_metric(labels, value)
        yield from gauges.values()

    def _open(self) -> Any:
        if self._library is None and not self._is_missing:
            try:
                library = ctypes.CDLL(_LIBRARY)
            except OSError:  # a container that was given the GPU without its management
                self._is_missing = True
                return None
            self._is_missing = library.nvmlInit_v2() != 0
            self._library = None if self._is_missing else library
        return self._library


def _uuid(library: Any, handle: ctypes.c_void_p) -> str:
    text = ctypes.create_string_buffer(_TEXT_BYTES)
    return text.value.decode("ascii", "replace") if library.nvmlDeviceGetUUID(handle, text, _TEXT_BYTES) == 0 else ""


def _values(library: Any, handle: ctypes.c_void_p) -> Iterator[tuple[str, float]]:
    memory, utilization, number = _Memory(), _Utilization(), ctypes.c_uint()
    if library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) == 0:
        yield "DCGM_FI_DEV_FB_USED", memory.used / _MIB
        yield "DCGM_FI_DEV_FB_FREE", memory.free / _MIB
    if library.nvmlDeviceGetUtilizationRates(handle, ctypes.byref(utilization)) == 0:
        yield "DCGM_FI_DEV_GPU_UTIL", float(utilization.gpu)
    if library.nvmlDeviceGetTemperature(handle, _CORE_TEMPERATURE, ctypes.byref(number)) == 0:
        yield "DCGM_FI_DEV_GPU_TEMP", float(number.value)
    if library.nvmlDeviceGetPowerUsage(handle, ctypes.byref(number)) == 0:  # in milliwatts
        yield "DCGM_FI_DEV_POWER_USAGE", number.value / 1000
