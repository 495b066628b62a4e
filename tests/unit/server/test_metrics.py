"""Times and tokens of one request, exact to the clock's tick; and what a scrape says of now."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from seamount.core.requests import Chunk, EngineStats, Request
from seamount.core.sampling import SamplingParams
from seamount.engine.fake import FAKE_FACTS
from seamount.server.admission.queue import Load
from seamount.server.telemetry import gpu as metrics_gpu
from seamount.server.telemetry.metrics import Metrics
from seamount.server.telemetry.record import Record, recording


class Clock:
    """Time that moves when told to."""

    now_s = 50.0

    def __call__(self) -> float:
        return self.now_s


def request(**sampling: int) -> Request:
    return Request(id="r", prompt_token_ids=(1, 2, 3), sampling=SamplingParams(**sampling))


def samples(text: bytes) -> dict[str, float]:
    families = text_string_to_metric_families(text.decode())
    return {sample.name: sample.value for family in families for sample in family.samples if "le" not in sample.labels}


def test_the_times_of_a_request_add_up() -> None:
    clock = Clock()
    metrics = Metrics(clock)
    timer = metrics.timer("m", request(n=2, max_tokens=5))
    clock.now_s += 3  # waits to be let in
    timer.admitted()
    clock.now_s += 4  # 1 s in the engine's queue, 3 s of prefill
    timer.observe(Chunk(request_id="r", token_ids=(7,), num_cached_tokens=2, queue_s=1.0, prefill_s=3.0))
    clock.now_s += 2
    timer.observe(Chunk(request_id="r", token_ids=(8, 9), finish_reason="stop"))
    timer.observe(Chunk(request_id="r", index=1, token_ids=(8,), finish_reason="length"))
    timer.finish()
    found = samples(metrics.render("m", EngineStats()))
    expected = {
        "seamount:admission_wait_seconds_sum": 3,
        "vllm:request_queue_time_seconds_sum": 4,
        "vllm:time_to_first_token_seconds_sum": 7,
        "vllm:request_prefill_time_seconds_sum": 3,
        "vllm:request_decode_time_seconds_sum": 2,
        "vllm:request_inference_time_seconds_sum": 5,
        "vllm:e2e_request_latency_seconds_sum": 9,
        "vllm:inter_token_latency_seconds_sum": 2,
        "vllm:inter_token_latency_seconds_count": 2,
        "vllm:request_time_per_output_token_seconds_sum": 1,
        "vllm:prompt_tokens_total": 3,
        "vllm:prompt_tokens_cached_total": 2,
        "vllm:generation_tokens_total": 4,
        "vllm:request_params_n_sum": 2,
        "vllm:request_params_max_tokens_sum": 5,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_a_scrape_says_what_waits_and_where() -> None:
    load = Load(num_waiting={-1: 1, 0: 2, 1: 0}, num_waiting_tokens={-1: 10, 0: 20, 1: 0}, tokens_per_s=7.5)
    text = Metrics().render("m", EngineStats(num_waiting=4), None, load, 9).decode()
    assert 'seamount:admission_queue_requests{engine="0",model_name="m",priority="low"} 1.0' in text
    assert 'seamount:admission_queue_tokens{engine="0",model_name="m",priority="normal"} 20.0' in text
    found = samples(text.encode())
    assert found["vllm:num_requests_waiting"] == 4 + 3
    assert found["seamount:saturated_tokens_per_second"] == 7.5
    assert found["seamount:requests_active"] == 9


def test_what_callers_make_up_is_no_label() -> None:
    metrics = Metrics()
    for number in range(50):
        metrics.answered("none", f"METHOD{number}", 405, 0.1)
    text = metrics.render("m", EngineStats()).decode()
    assert 'http_requests_total{handler="none",method="other",status="405"} 50.0' in text
    assert "METHOD" not in text


def test_the_record_of_the_http_request_is_told_what_the_engine_did() -> None:
    metrics = Metrics(Clock())
    record = Record(request_id="r", method="POST")
    with recording(record):
        for _ in range(2):  # two prompts in one body
            timer = metrics.timer("m", request())
            timer.admitted()
            timer.observe(Chunk(request_id="r", token_ids=(7,), num_cached_tokens=2))
            timer.observe(Chunk(request_id="r", token_ids=(8, 9), finish_reason="stop"))
            timer.finish()
        metrics.timer("m", request()).fail("worker_died")
    assert (record.num_requests, record.model, record.error) == (3, "m", "worker_died")
    assert (record.num_prompt_tokens, record.num_cached_tokens, record.num_generated_tokens) == (6, 4, 6)
    assert record.finish_reasons == ["stop", "stop"]
    assert list(record.events) == ["queued", "admitted", "first_token"]
    other = Record(request_id="s", method="POST")
    with recording(other):
        metrics.reject("m", "queue_full")
    assert (other.error, other.num_requests) == ("queue_full", 0)


class StandInNvml:
    """Stands in for NVIDIA's library, which is on machines with a GPU only: two GPUs, of which one tells less."""

    def nvmlInit_v2(self) -> int:
        return 0

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:
        count._obj.value = 2
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: int, handle: Any) -> int:
        handle._obj.value = index + 1
        return 0

    def nvmlDeviceGetUUID(self, handle: Any, text: Any, length: int) -> int:
        text.value = f"GPU-{handle.value}".encode()
        return 0

    def nvmlDeviceGetMemoryInfo(self, handle: Any, memory: Any) -> int:
        memory._obj.total, memory._obj.free, memory._obj.used = 8 * 2**30, 6 * 2**30, 2 * 2**30
        return 0

    def nvmlDeviceGetUtilizationRates(self, handle: Any, rates: Any) -> int:
        rates._obj.gpu = 37
        return 0

    def nvmlDeviceGetTemperature(self, handle: Any, _: int, number: Any) -> int:
        number._obj.value = 61
        return 0

    def nvmlDeviceGetPowerUsage(self, handle: Any, number: Any) -> int:
        number._obj.value = 123_400
        return 0 if handle.value == 1 else 3  # not supported


def test_gpus_are_told_under_dcgms_names_where_the_engine_runs_on_one(monkeypatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr(metrics_gpu.ctypes, "CDLL", lambda name: (opened.append(name), StandInNvml())[1])
    metrics = Metrics()
    assert "DCGM" not in metrics.render("m", EngineStats(), FAKE_FACTS).decode()
    assert opened == [], "on a CPU the driver is not even looked for"
    text = metrics.render("m", EngineStats(), replace(FAKE_FACTS, device="cuda:0")).decode()
    assert 'DCGM_FI_DEV_FB_USED{UUID="GPU-1",gpu="0"} 2048.0' in text
    assert 'DCGM_FI_DEV_FB_FREE{UUID="GPU-2",gpu="1"} 6144.0' in text
    assert 'DCGM_FI_DEV_GPU_UTIL{UUID="GPU-1",gpu="0"} 37.0' in text
    assert 'DCGM_FI_DEV_GPU_TEMP{UUID="GPU-1",gpu="0"} 61.0' in text
    assert text.count("DCGM_FI_DEV_POWER_USAGE{") == 1
    assert 'DCGM_FI_DEV_POWER_USAGE{UUID="GPU-1",gpu="0"} 123.4' in text
    metrics.render("m", EngineStats(), replace(FAKE_FACTS, device="cuda:0"))
    assert len(opened) == 1


def test_a_gpu_without_its_drivers_library_is_no_error(monkeypatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(metrics_gpu.ctypes, "CDLL", missing)
    metrics = Metrics()
    for _ in range(2):
        assert "DCGM" not in metrics.render("m", EngineStats(), replace(FAKE_FACTS, device="cuda:0")).decode()
