"""Paged and latent attention in Triton against the reference. Collected by `test_in_interpreter` and `tests/gpu`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from device import DEVICE, close, with_dtypes

from seamount.kernels import gpu, reference
from seamount.kernels.pages import Pages


@dataclass
class Traffic:
    """Sequences in shuffled blocks: per sequence its new tokens and its context, new ones included."""

    num_new: tuple[int, ...]
    lengths: tuple[int, ...]
    block_size: int
    seed: int = 0

    def __post_init__(self) -> None:
        counts = [-(-length // self.block_size) for length in self.lengths]
        self.num_blocks = sum(counts) + 3
        self.generator = torch.Generator().manual_seed(self.seed)
        shuffled = torch.randperm(self.num_blocks, generator=self.generator)
        self.tables = tuple(t.to(DEVICE) for t in shuffled[: sum(counts)].split(counts))
        self.starts = tuple(sum(self.num_new[:i]) for i in range(len(self.num_new) + 1))

    def random(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator).to(dtype).to(DEVICE)

    def cache(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Random where a context lies, NaN elsewhere: what must not be read, or must not count."""
        cache = torch.full((self.num_blocks * self.block_size, *shape), float("nan"), dtype=dtype, device=DEVICE)
        for table, length in zip(self.tables, self.lengths, strict=True):
            positions = torch.arange(length, device=DEVICE)
            slots = table[positions // self.block_size] * self.block_size + positions % self.block_size
            cache[slots] = self.random(length, *shape, dtype=dtype)
        return cache

    def pages(self, *chosen: int) -> Pages:
        """The batch, or the one that holds only these sequences."""
        chosen = chosen or tuple(range(len(self.lengths)))
        starts = [sum(self.num_new[s] for s in chosen[:i]) for i in range(len(chosen) + 1)]
        tables = [self.tables[s].tolist() for s in chosen]
        return Pages.of(tables, starts, [self.lengths[s] for s in chosen], self.block_size, DEVICE)


DECODE = Traffic((1, 1, 1, 1), (1, 70, 17, 333), 16)
MIXED = Traffic((1, 9, 1, 21, 4), (40, 9, 1, 50, 37), 8, seed=1)
PREFILL = Traffic((66, 3), (66, 131), 16, seed=2)
ALL = pytest.mark.parametrize("traffic", [DECODE, MIXED, PREFILL], ids=["decode", "mixed", "prefill"])


def grouped(
    traffic: Traffic, heads: int, kv_heads: int, width: int, value_width: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q = traffic.random(traffic.starts[-1], heads, width, dtype=dtype)
    keys, values = traffic.cache(kv_heads, width, dtype=dtype), traffic.cache(kv_heads, value_width, dtype=dtype)
    return q, keys, values


@ALL
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "value_width", "dtype"),
    with_dtypes((12, 2, 40, 40), (4, 4, 16, 24), (40, 1, 32, 32)),
)
def test_paged_attention(
    traffic: Traffic, heads: int, kv_heads: int, width: int, value_width: int, dtype: torch.dtype
) -> None:
    q, keys, values = grouped(traffic, heads, kv_heads, width, value_width, dtype)
    scale = width**-0.5
    got = gpu.paged_attention(q, keys, values, traffic.pages(), scale)
    # The reference multiplies unseen values by zero, which NaN survives.
    expected = reference.paged_attention(
        q.float(), keys.float().nan_to_num(), values.float().nan_to_num(), traffic.pages(), scale
    )
    close(got, expected, dtype)


def test_a_query_that_is_a_view_of_wider_rows_is_read_in_place() -> None:
    wide = DECODE.random(4, 8 * 32, dtype=torch.float32).unflatten(1, (8, 32))
    _, keys, values = grouped(DECODE, 4, 2, 32, 32, torch.float32)
    for q in (wide[:, :4], wide[:, 4:]):
        got = gpu.paged_attention(q, keys, values, DECODE.pages(), 0.2)
        close(got, gpu.paged_attention(q.contiguous(), keys, values, DECODE.pages(), 0.2), torch.float32)


@ALL
def test_paged_attention_does_not_depend_on_the_batch(traffic: Traffic) -> None:
    q, keys, values = grouped(traffic, 6, 2, 32, 32, torch.float32)
    together = gpu.paged_attention(q, keys, values, traffic.pages(), 0.2)
    for s in range(len(traffic.lengths)):
        rows = slice(traffic.starts[s], traffic.starts[s + 1])
        assert torch.equal(gpu.paged_attention(q[rows], keys, values, traffic.pages(s), 0.2), together[rows])


def test_outliers_neither_overflow_nor_vanish() -> None:
    q, keys, values = grouped(DECODE, 4, 2, 32, 32, torch.float32)
    q[1] *= 1e4
    q[2] *= 1e-6
    got = gpu.paged_attention(q, keys, values, DECODE.pages(), 0.2)
    expected = reference.paged_attention(q, keys.nan_to_num(), values.nan_to_num(), DECODE.pages(), 0.2)
    close(got, expected, torch.float32)


def latents(
    traffic: Traffic, heads: int, nope: int, rope: int, rank: int, width: int, dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    total = traffic.starts[-1]
    q = traffic.random(total, heads, nope + rope, dtype=dtype)
    cache = traffic.cache(rank + rope, dtype=dtype)
    up = traffic.random(heads, nope + width, rank, dtype=dtype) * rank**-0.5
    return (*q.split((nope, rope), dim=2), cache, *up.split((nope, width), dim=1))


@ALL
@pytest.mark.parametrize(
    ("heads", "nope", "rope", "rank", "width", "dtype"),
    with_dtypes((16, 16, 8, 48, 16), (3, 32, 16, 20, 8), (20, 128, 64, 512, 128)),
)
def test_latent_attention(
    traffic: Traffic, heads: int, nope: int, rope: int, rank: int, width: int, dtype: torch.dtype
) -> None:
    """In the first two shapes long chunks form keys and values; in the true one that takes more than 170 new tokens."""
    q_nope, q_rope, cache, up_key, up_value = latents(traffic, heads, nope, rope, rank, width, dtype)
    scale = (nope + rope) ** -0.5
    got = gpu.latent_attention(q_nope, q_rope, cache, up_key, up_value, traffic.pages(), scale)
    wide = (t.float().nan_to_num() for t in (q_nope, q_rope, cache, up_key, up_value))
    close(got, reference.latent_attention(*wide, traffic.pages(), scale), dtype, 2.0)


def test_a_decode_step_reads_no_numbers_of_the_host() -> None:
    tensors = latents(DECODE, 4, 16, 8, 32, 16, torch.float32)
    device_only = replace(DECODE.pages(), starts=(), lengths=())
    got = gpu.latent_attention(*tensors, device_only, 0.2)
    expected = reference.latent_attention(*(t.nan_to_num() for t in tensors), DECODE.pages(), 0.2)
    close(got, expected, torch.float32)


def test_the_context_of_a_latent_does_not_depend_on_the_batch() -> None:
    """Of the kernel; the products around it are the library's, whose order of sums may follow the batch."""
    q1 = MIXED.random(MIXED.starts[-1], 4, 32, dtype=torch.float32)
    q2 = MIXED.random(MIXED.starts[-1], 4, 8, dtype=torch.float32)
    k1, k2 = MIXED.cache(32 + 8, dtype=torch.float32).split((32, 8), dim=1)

    def run(rows: slice, pages: Pages) -> torch.Tensor:
        return gpu.attend(q1[rows], k1.unsqueeze(1), None, pages, 0.2, q2=q2[rows], k2=k2)

    together = run(slice(None), MIXED.pages())
    for s in range(len(MIXED.lengths)):
        rows = slice(MIXED.starts[s], MIXED.starts[s + 1])
        assert torch.equal(run(rows, MIXED.pages(s)), together[rows])
