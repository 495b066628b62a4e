"""Norms, SwiGLU, rotary embedding and cache writes in Triton against the reference."""

from __future__ import annotations

import pytest
import torch
from device import DEVICE, DTYPES, close

from seamount.kernels import gpu, reference


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def angles(num_tokens: int, half: int) -> tuple[torch.Tensor, torch.Tensor]:
    turned = random(num_tokens, half, seed=9) * 3
    return turned.cos(), turned.sin()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (5, 100), (3, 4, 24), (2, 2049), (0, 16)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = random(*shape, dtype=dtype) * 30, random(shape[-1], dtype=dtype, seed=1)
    close(gpu.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6), dtype)


def test_rms_norm_reads_heads_inside_wider_rows_in_place() -> None:
    x, weight = random(5, 6 * 24).unflatten(1, (6, 24))[:, 1:4], random(24, seed=1)
    close(gpu.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6), torch.float32)
    close(gpu.rms_norm(x[:, 0], weight, 1e-6), reference.rms_norm(x[:, 0], weight, 1e-6), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm_is_the_sum_and_its_norm(dtype: torch.dtype) -> None:
    x, residual, weight = random(3, 70, dtype=dtype), random(3, 70, dtype=dtype, seed=1), random(70, dtype=dtype)
    joined, normed = gpu.add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(joined, x + residual)
    close(normed, reference.rms_norm(x + residual, weight, 1e-6), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 8), (4, 2600), (2, 3, 70), (0, 8)])
def test_swiglu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = random(*shape, dtype=dtype) * 5
    close(gpu.swiglu(x), reference.swiglu(x), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(("heads", "width"), [(1, 64), (5, 24)])
def test_apply_rotary(heads: int, width: int, interleaved: bool, dtype: torch.dtype) -> None:
    x = random(7, heads, width + 8, dtype=dtype)[..., 8:]
    cos, sin = angles(7, width // 2)
    got = gpu.apply_rotary(x, cos, sin, interleaved=interleaved)
    close(got, reference.apply_rotary(x, cos, sin, interleaved=interleaved), dtype)


SLOTS = torch.tensor([3, 11, 0, 7])


@pytest.mark.parametrize("shape", [(576,), (2, 24), (3, 700)])
def test_write_cache(shape: tuple[int, ...]) -> None:
    values, slots = random(4, *shape), SLOTS.to(DEVICE)
    cache = random(12, *shape, seed=1)
    expected = cache.clone()
    reference.write_cache(expected, slots, values)
    gpu.write_cache(cache, slots, values)
    assert torch.equal(cache, expected)


def test_a_negative_slot_is_written_nowhere() -> None:
    values, cache = random(4, 20), random(12, 20, seed=1)
    slots = torch.tensor([5, -1, 2, -1], device=DEVICE)
    expected = cache.clone()
    reference.write_cache(expected, slots[::2], values[::2])
    gpu.write_cache(cache, slots, values)
    assert torch.equal(cache, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(6, 2, 24), (3, 1, 16)])
def test_rotate_and_cache(heads: int, kv_heads: int, width: int, normed: bool, dtype: torch.dtype) -> None:
    qkv = random(4, heads + 2 * kv_heads, width, dtype=dtype)
    norms = (random(width, dtype=dtype, seed=3), random(width, dtype=dtype, seed=4)) if normed else None
    slots = torch.tensor([3, 11, -1, 7], device=DEVICE)
    cache = tuple(random(12, kv_heads, width, dtype=dtype, seed=seed) for seed in (1, 2))
    expected_cache = tuple(t.clone() for t in cache)
    got = gpu.rotate_and_cache(qkv, heads, angles(4, width // 2), norms, 1e-6, cache, slots)
    expected = [
        reference.rotate_and_cache(
            qkv[i : i + 1],
            heads,
            tuple(t[i : i + 1] for t in angles(4, width // 2)),
            norms,
            1e-6,
            expected_cache if slots[i] >= 0 else tuple(t.clone() for t in cache),
            slots[i : i + 1].clamp(min=0),
        )
        for i in range(4)
    ]
    close(got, torch.cat(expected), dtype)
    close(cache[0], expected_cache[0], dtype)
    assert torch.equal(cache[1], expected_cache[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(("heads", "rank", "rope"), [(16, 512, 64), (3, 40, 8)])
def test_latent_rotate_and_cache_is_norm_rotary_and_write(
    heads: int, rank: int, rope: int, interleaved: bool, dtype: torch.dtype
) -> None:
    q = random(4, heads, 32 + rope, dtype=dtype)[..., 32:]
    both, weight = random(4, rank + rope, dtype=dtype) * 4, random(rank, dtype=dtype, seed=3)
    turned = angles(4, rope // 2)
    slots = torch.tensor([3, -1, 0, 7], device=DEVICE)
    cache = random(12, rank + rope, dtype=dtype, seed=1)
    expected = cache.clone()
    got = gpu.latent_rotate_and_cache(q, both, weight, 1e-6, turned, cache, slots, interleaved=interleaved)
    latent, key = both.split((rank, rope), dim=1)
    key = reference.apply_rotary(key.unsqueeze(1), *turned, interleaved=interleaved).squeeze(1)
    kept = slots >= 0
    entries = torch.cat((reference.rms_norm(latent, weight, 1e-6), key), dim=1)
    reference.write_cache(expected, slots[kept], entries[kept])
    close(got, reference.apply_rotary(q, *turned, interleaved=interleaved), dtype)
    close(cache, expected, dtype)
