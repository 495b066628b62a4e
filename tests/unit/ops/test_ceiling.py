"""The machine's ceiling: that it is measured and combined; how high it is, is no test's business."""

from __future__ import annotations

import mmap

import pytest
import torch

from seamount.ops import ceiling
from seamount.ops.ceiling import Ceiling, measure_ceiling
from seamount.ops.machine import describe_machine, peak_memory_bytes, reset_peak_memory


def test_every_precision_is_measured_and_torch_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceiling, "_READ_BYTES", 2**16)
    monkeypatch.setattr(ceiling, "_SIDES", (32, 64))
    before = torch.get_num_threads()
    found = measure_ceiling(before + 1, ("bfloat16", "float16", "float32", "int8"))
    assert torch.get_num_threads() == before
    assert found.read_bytes_per_s > 0
    assert sorted(found.matrix_ops_per_s) == ["bfloat16", "float16", "float32", "int8"]
    assert min(found.matrix_ops_per_s.values()) > 0


def test_of_two_measurements_the_better_counts_in_each_number() -> None:
    one = Ceiling(read_bytes_per_s=5.0, matrix_ops_per_s={"bfloat16": 1.0, "int8": 7.0})
    two = Ceiling(read_bytes_per_s=4.0, matrix_ops_per_s={"bfloat16": 2.0, "float32": 1.0})
    best = Ceiling(read_bytes_per_s=5.0, matrix_ops_per_s={"bfloat16": 2.0, "int8": 7.0, "float32": 1.0})
    assert one.best_of(two) == best


def test_the_peak_of_memory_counts_what_was_freed_again_until_it_is_reset() -> None:
    cpu = torch.device("cpu")
    reset_peak_memory(cpu)
    before = peak_memory_bytes(cpu)
    num_bytes = 2**26
    with mmap.mmap(-1, num_bytes) as block:  # new pages, which memory that was freed before cannot serve
        for page in range(0, num_bytes, mmap.PAGESIZE):
            block[page] = 1
    assert peak_memory_bytes(cpu) >= before + num_bytes // 2
    reset_peak_memory(cpu)
    assert peak_memory_bytes(cpu) < before + num_bytes // 2


def test_a_machine_is_described() -> None:
    found = describe_machine(torch.device("cpu"))
    assert found.device == "cpu"
    assert found.num_threads == torch.get_num_threads()
    assert found.processor and found.kernels
