"""Compiled norms, rotation and cache writes equal the reference, and are the same for a token alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from seamount.kernels import cpu_attention, packed, reference
from seamount.kernels.library import library

pytestmark = pytest.mark.skipif(library() is None, reason="no compiler: there are no compiled kernels")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def angles(num_tokens: int, width: int) -> tuple[Tensor, Tensor]:
    turns = torch.rand(num_tokens, width // 2) * 6
    return turns.cos(), turns.sin()


def close(found: Tensor, wanted: Tensor) -> bool:
    """Equal to fp32 rounding, or to one unit of a 16-bit cache's last place."""
    step = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[found.dtype]
    return torch.allclose(found.float(), wanted.float(), rtol=step, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("num_tokens", "heads", "width"), [(1, (12, 2), 128), (37, (3, 1), 18), (50, (4, 4), 64)])
def test_rotate_and_cache(
    num_tokens: int, heads: tuple[int, int], width: int, normed: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(num_tokens)
    packed.set_threads(2)
    qkv = torch.randn(num_tokens, heads[0] + 2 * heads[1], width) * 3
    norms = (torch.rand(width), torch.rand(width)) if normed else None
    turns, slots = angles(num_tokens, width), torch.randperm(90)[:num_tokens]
    results = []
    for module in (reference, cpu_attention):
        cache = (torch.zeros(90, heads[1], width, dtype=dtype), torch.zeros(90, heads[1], width, dtype=dtype))
        q = module.rotate_and_cache(qkv.clone(), heads[0], turns, norms, 1e-5, cache, slots)
        results.append((q, *cache))
    for wanted, found in zip(*results, strict=True):
        assert close(found, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("num_tokens", "rank", "rope"), [(1, 512, 64), (40, 30, 10)])
def test_rotate_and_cache_latent(num_tokens: int, rank: int, rope: int, interleaved: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(rank)
    packed.set_threads(2)
    heads, nope = 5, 12
    kv, norm = torch.randn(num_tokens, rank + rope) * 4, torch.rand(rank)
    q, absorbed = torch.randn(num_tokens, heads, nope + rope), torch.full((num_tokens, heads, rank + rope), 7.0)
    turns, slots = angles(num_tokens, rope), torch.randperm(50)[:num_tokens]
    cache = torch.zeros(50, rank + rope, dtype=dtype)
    wanted = torch.zeros(50, rank + rope, dtype=dtype)
    key = reference.apply_rotary(kv[:, None, rank:], *turns, interleaved=interleaved)[:, 0]
    latent = reference.rms_norm(kv[:, :rank], norm, 1e-6)
    reference.write_cache(wanted, slots, torch.cat((latent, key), -1))
    rotated = reference.apply_rotary(q[..., nope:], *turns, interleaved=interleaved)
    cpu_attention.rotate_and_cache_latent(
        kv.clone(), norm, 1e-6, q, absorbed, turns, cache, slots, interleaved=interleaved
    )
    assert close(cache, wanted)
    assert close(absorbed[..., rank:], rotated)
    assert (absorbed[..., :rank] == 7).all()


def test_a_token_has_the_same_bits_alone_and_among_others() -> None:
    torch.manual_seed(0)
    qkv, turns, slots = torch.randn(70, 6, 20), angles(70, 20), torch.arange(70)
    norms = (torch.rand(20), torch.rand(20))
    outcomes = []
    for threads, pieces in ((2, [slice(0, 70)]), (1, [slice(i, i + 1) for i in range(70)])):
        packed.set_threads(threads)
        cache = (torch.zeros(70, 1, 20, dtype=torch.bfloat16), torch.zeros(70, 1, 20, dtype=torch.bfloat16))
        q = [
            cpu_attention.rotate_and_cache(
                qkv[piece].clone(), 4, (turns[0][piece], turns[1][piece]), norms, 1e-6, cache, slots[piece]
            )
            for piece in pieces
        ]
        outcomes.append((torch.cat(q), *cache))
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


def test_cache_values_round_to_nearest_and_keep_what_is_special() -> None:
    special = torch.tensor(
        [0.0, -0.0, 1e-8, -6e-8, 5.9e-5, 65519.0, 65520.0, -1e9, float("inf"), float("nan"), 1.00048828125, 1.00390625]
    )
    special = torch.cat((special, torch.randn(20) * 10.0 ** torch.randint(-9, 6, (20,))))
    for dtype in (torch.float16, torch.bfloat16):
        cache = (torch.zeros(1, 1, 32, dtype=dtype), torch.zeros(1, 1, 32, dtype=dtype))
        qkv = torch.cat((torch.zeros(1, 2, 32), special.reshape(1, 1, 32)), 1)
        cpu_attention.rotate_and_cache(qkv, 1, angles(1, 32), None, 1e-6, cache, torch.tensor([0]))
        assert torch.equal(cache[1].flatten().nan_to_num(7), special.to(dtype).nan_to_num(7))


def test_misuse_is_refused() -> None:
    cache = (torch.zeros(8, 1, 16), torch.zeros(8, 1, 16))
    good = {"qkv": torch.zeros(3, 4, 16), "angles": angles(3, 16), "slots": torch.arange(3)}
    bad = [
        {"qkv": torch.zeros(3, 4, 16).double()},
        {"qkv": torch.zeros(3, 5, 16)},
        {"angles": angles(2, 16)},
        {"slots": torch.arange(3).int()},
    ]
    for change in bad:
        call = {**good, **change}
        with pytest.raises(ValueError):
            cpu_attention.rotate_and_cache(call["qkv"], 2, call["angles"], None, 1e-6, cache, call["slots"])
