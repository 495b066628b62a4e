"""GPUs in the metrics, as the driver of this machine tells them."""

from __future__ import annotations

import pytest
import torch

from seamount.server.telemetry.gpu import GpuCollector


def test_the_driver_tells_what_torch_knows() -> None:
    gauges = {gauge.name: gauge.samples for gauge in GpuCollector(lambda: "cuda:0").collect()}
    if not gauges:
        pytest.skip("this machine's GPU came without the driver's library libnvidia-ml.so.1")
    free, total = torch.cuda.mem_get_info()
    used, unused = (gauges[f"DCGM_FI_DEV_FB_{word}"] for word in ("USED", "FREE"))
    assert len(used) == len(unused) >= torch.cuda.device_count()
    sums = [(one.value + other.value) * 2**20 for one, other in zip(used, unused, strict=True)]
    assert any(abs(each - total) < total * 0.05 for each in sums)
    assert 0 < gauges["DCGM_FI_DEV_GPU_TEMP"][0].value < 120
    assert free <= total
