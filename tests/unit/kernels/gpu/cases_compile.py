"""Every kernel compiles for an H100 as its wrapper launches it, in bfloat16 and true shapes, and fits shared memory.

The interpreter takes programs that the compiler refuses. Compiling needs no GPU: a stand-in for the driver names the
target, and launches stop after compiling. Runs without TRITON_INTERPRET, in a process of its own.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

from seamount.kernels import gpu
from seamount.kernels.pages import Pages

BF16 = torch.bfloat16
# Bytes of shared memory that one program may use on an H100, and on the smallest GPU that is aimed at (RTX 4090).
H100_SHARED, SMALL_SHARED = 232448, 101376


class FakeDriver:
    """What compiling asks of a driver."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was compiled by the launches of this test."""
    kernels: list[Any] = []
    run = jit.JITFunction.run

    def only_compile(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        kernels.append(kernel)
        return kernel

    monkeypatch.setattr(driver, "_active", FakeDriver())
    monkeypatch.setattr(jit.JITFunction, "run", only_compile)
    return kernels


def pages(num_new: tuple[int, ...]) -> Pages:
    starts = tuple(itertools.accumulate(num_new, initial=0))
    return Pages.of([range(32)] * len(num_new), starts, [512] * len(num_new), 16)


def empty(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def names(compiled: list[Any]) -> list[str]:
    return [kernel.metadata.name for kernel in compiled]


@pytest.mark.parametrize("num_new", [(1,) * 4, (66, 1)], ids=["decode", "mixed"])
def test_attention(num_new: tuple[int, ...], compiled: list[Any]) -> None:
    total, own = sum(num_new), pages(num_new)
    cache = empty(1024, 2, 128)
    gpu.paged_attention(empty(total, 12, 128), cache, cache, own, 0.1)
    up = empty(16, 256, 512).split(128, dim=1)
    q = empty(total, 16, 192).split((128, 64), dim=2)
    gpu.latent_attention(*q, empty(1024, 576), *up, own, 0.1)
    per_call = ["_attend_kernel", "_combine_kernel"] + (["_attend_kernel"] if total > len(num_new) else [])
    assert names(compiled) == per_call * 2
    assert max(kernel.metadata.shared for kernel in compiled) <= SMALL_SHARED


def test_expanded_latent_attention(compiled: list[Any]) -> None:
    up = empty(16, 256, 512).split(128, dim=1)
    gpu.latent_attention(*empty(300, 16, 192).split((128, 64), dim=2), empty(1024, 576), *up, pages((300,)), 0.1)
    assert names(compiled)[-1] == "_attend_kernel"
    assert compiled[-1].metadata.shared <= H100_SHARED


@pytest.mark.parametrize("num_tokens", [1, 2048])
def test_experts(num_tokens: int, compiled: list[Any]) -> None:
    weights, ids = gpu.route_softmax(
        gpu.router_logits(empty(num_tokens, 2048), empty(64, 2048)),
        6,
        num_groups=1,
        num_chosen_groups=1,
        scale=1.0,
    )
    ids.zero_()
    gpu.run_experts(
        empty(num_tokens, 2048), weights, ids, empty(64, 2816, 2048), empty(64, 2048, 1408), empty(num_tokens, 2048)
    )
    gpu.route_sigmoid(
        empty(num_tokens, 256, dtype=torch.float32),
        empty(256, dtype=torch.float32),
        8,
        num_groups=8,
        num_chosen_groups=4,
        normalize=True,
        scale=2.5,
    )
    plan = ["_plan_kernel"] if num_tokens == 1 else []
    run = ["_gate_up_kernel", "_down_kernel", "_sum_kernel"]
    assert names(compiled) == ["_logits_kernel", "_route_kernel", *plan, *run, "_route_kernel"]
    assert max(kernel.metadata.shared for kernel in compiled) <= SMALL_SHARED


def test_rows(compiled: list[Any]) -> None:
    angles = (empty(4, 32, dtype=torch.float32), empty(4, 32, dtype=torch.float32))
    slots, x = torch.zeros(4, dtype=torch.int64), empty(4, 2048)
    gpu.rms_norm(x, empty(2048), 1e-6)
    gpu.add_rms_norm(x, x, empty(2048), 1e-6)
    gpu.swiglu(x)
    gpu.apply_rotary(empty(4, 16, 64), *angles, interleaved=True)
    gpu.write_cache(empty(64, 576), slots, empty(4, 576))
    caches = (empty(64, 2, 64), empty(64, 2, 64))
    gpu.rotate_and_cache(empty(4, 8, 64), 4, angles, (empty(64), empty(64)), 1e-6, caches, slots)
    gpu.latent_rotate_and_cache(
        empty(4, 16, 64), empty(4, 576), empty(512), 1e-6, angles, empty(64, 576), slots, interleaved=True
    )
    assert len(compiled) == 7
