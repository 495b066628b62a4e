"""Compiled attention equals the reference on every instruction set; a row's bits depend on its own context alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from seamount.kernels import Pages, cpu_attention, packed, reference
from seamount.kernels.library import ISA_NAMES, library

LIBRARY = library()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="no compiler: there are no compiled kernels")
PRECISIONS = {"amx": torch.bfloat16, "avx512": torch.bfloat16, "avx2": torch.float16, "plain": torch.float32}


@pytest.fixture(params=ISA_NAMES)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The kernels of one instruction set, where the chip has it."""
    wanted = ISA_NAMES.index(request.param)
    if LIBRARY.seamount_choose_isa(wanted) != wanted:
        LIBRARY.seamount_choose_isa(len(ISA_NAMES) - 1)
        pytest.skip(f"this chip has no {request.param}")
    yield request.param
    LIBRARY.seamount_choose_isa(len(ISA_NAMES) - 1)
    packed.set_threads(1)


@dataclass
class Traffic:
    """Sequences in shuffled blocks of a cache whose other slots hold NaN."""

    q: Tensor
    keys: Tensor
    values: Tensor
    blocks: list[list[int]]
    starts: list[int]
    lengths: list[int]
    block_size: int

    @classmethod
    def make(
        cls,
        seed: int,
        lengths: list[int],
        new: list[int],
        heads: tuple[int, int],
        widths: tuple[int, int],
        block_size: int,
        dtype: torch.dtype,
        *,
        latent: bool = False,
    ) -> Traffic:
        generator = torch.Generator().manual_seed(seed)
        counts = [-(-length // block_size) for length in lengths]
        numbers = iter(torch.randperm(sum(counts) + 2, generator=generator).tolist())
        blocks = [[next(numbers) for _ in range(count)] for count in counts]
        slots = (sum(counts) + 2) * block_size
        keys = torch.full((slots, heads[1], widths[0]), float("nan"), dtype=dtype)
        values = (
            keys[..., : widths[1]] if latent else torch.full((slots, heads[1], widths[1]), float("nan"), dtype=dtype)
        )
        traffic = cls(
            torch.randn(sum(new), heads[0], widths[0], generator=generator),
            keys,
            values,
            blocks,
            [sum(new[:i]) for i in range(len(new) + 1)],
            lengths,
            block_size,
        )
        for s, length in enumerate(lengths):
            places = traffic.slots(s, length)
            keys[places] = torch.randn(length, *keys.shape[1:], generator=generator).to(dtype)
            if not latent:
                values[places] = torch.randn(length, *values.shape[1:], generator=generator).to(dtype)
        return traffic

    def slots(self, sequence: int, length: int) -> Tensor:
        places = torch.arange(length)
        return (
            torch.tensor(self.blocks[sequence])[places // self.block_size] * self.block_size + places % self.block_size
        )

    def run(self, scale: float) -> Tensor:
        pages = Pages.of(self.blocks, self.starts, self.lengths, self.block_size)
        return cpu_attention.paged_attention(self.q, self.keys, self.values, pages, scale)

    def piece(self, sequence: int, first: int, count: int) -> Traffic:
        """Tokens `first` to `first + count` of a sequence's new ones, alone."""
        start, end = self.starts[sequence], self.starts[sequence + 1]
        length = self.lengths[sequence] - (end - start) + first + count
        q = self.q[start + first : start + first + count]
        return Traffic(q, self.keys, self.values, [self.blocks[sequence]], [0, count], [length], self.block_size)

    def expected(self, scale: float, *, rounded: bool) -> Tensor:
        q = self.q.bfloat16().float() if rounded else self.q
        pages = Pages.of(self.blocks, self.starts, self.lengths, self.block_size)
        keys, values = self.keys.float(), self.values.float().contiguous()
        return reference.paged_attention(q, keys.nan_to_num(0), values.nan_to_num(0), pages, scale)


def random_traffic(seed: int, dtype: torch.dtype) -> Traffic:
    choose = random.Random(seed)
    latent = choose.random() < 0.3
    num_kv_heads = 1 if latent else choose.choice([1, 2, 4])
    num_heads = num_kv_heads * choose.choice([1, 2, 6, 7, 16])
    width = choose.choice([24, 96, 576] if latent else [16, 24, 48, 128, 130])
    value_width = choose.choice([width - 8, width // 2] if latent else [16, 24, 48, 100, 128])
    lengths = [choose.choice([choose.randint(1, 40), choose.randint(200, 1100)]) for _ in range(choose.randint(1, 4))]
    new = [choose.choice([1, min(length, choose.randint(1, 70))]) for length in lengths]
    heads, widths = (num_heads, num_kv_heads), (width, value_width)
    return Traffic.make(seed, lengths, new, heads, widths, choose.choice([1, 7, 16, 64]), dtype, latent=latent)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_attention_equals_the_reference(isa: str, dtype: torch.dtype, seed: int) -> None:
    traffic = random_traffic(100 * seed, dtype)
    packed.set_threads(seed % 2 + 1)
    scale = traffic.q.shape[2] ** -0.5
    tiles = isa == "amx" and dtype == torch.bfloat16
    wanted = traffic.expected(scale, rounded=tiles)
    # With tiles, weights are rounded to bf16: to 2^-9 of the values, which are normal numbers.
    assert (traffic.run(scale) - wanted).abs().max() < (1e-2 if tiles else 5e-6)


def test_outliers_choose_one_key(isa: str) -> None:
    """Scores of a million differ by thousands: the softmax is one key's value, and nothing overflows."""
    traffic = Traffic.make(1, [300], [3], (4, 2), (32, 32), 16, PRECISIONS[isa])
    traffic.q *= 1e3
    traffic.keys *= 1e3
    out = traffic.run(1.0)
    assert torch.isfinite(out).all()
    assert (out - traffic.expected(1.0, rounded=isa == "amx")).abs().max() < 1e-2


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("latent", [False, True])
def test_a_row_has_the_same_bits_alone_in_chunks_and_among_others(isa: str, latent: bool, seed: int) -> None:
    choose = random.Random(seed)
    lengths = [choose.choice([choose.randint(1, 30), choose.randint(250, 700)]) for _ in range(12)]
    new = [min(length, choose.choice([1, 1, choose.randint(2, 50)])) for length in lengths]
    heads, widths = ((16, 1), (96, 64)) if latent else ((6, 2), (48, 48))
    traffic = Traffic.make(seed, lengths, new, heads, widths, 16, PRECISIONS[isa], latent=latent)
    packed.set_threads(2)
    together = traffic.run(0.2)
    for sequence in range(len(lengths)):
        first, end = traffic.starts[sequence], traffic.starts[sequence + 1]
        packed.set_threads(1 + sequence % 2)
        cut = choose.randint(0, end - first - 1)
        chunks = [(0, cut), (cut, end - first - cut)] if cut else [(0, end - first)]
        parts = [traffic.piece(sequence, at, count).run(0.2) for at, count in chunks]
        assert torch.equal(together[first:end], torch.cat(parts))
        token = choose.randint(0, end - first - 1)
        assert torch.equal(together[first + token], traffic.piece(sequence, token, 1).run(0.2)[0])


def test_bits_do_not_depend_on_blocks(isa: str) -> None:
    lengths, new = [530, 77], [40, 1]
    by_size = []
    for block_size in (16, 32, 7, 256):
        traffic = Traffic.make(5, lengths, new, (4, 2), (32, 24), block_size, PRECISIONS[isa])
        content = torch.Generator().manual_seed(9)
        for s, length in enumerate(lengths):
            for cache in (traffic.keys, traffic.values):
                cache[traffic.slots(s, length)] = torch.randn(length, *cache.shape[1:], generator=content).to(
                    cache.dtype
                )
        traffic.q = torch.randn(traffic.q.shape, generator=content)
        by_size.append(traffic.run(0.3))
    assert all(torch.equal(by_size[0], other) for other in by_size[1:])


def test_what_is_not_finite_reaches_only_those_that_see_it(isa: str) -> None:
    """Token 300 has a value of infinity and a key of NaN: tokens before it are as if they were not there."""
    traffic = Traffic.make(2, [330], [40], (6, 2), (32, 48), 16, PRECISIONS[isa])
    wanted = traffic.run(0.2)
    slot = traffic.slots(0, 301)[-1]
    traffic.values[slot, 1, 3] = float("inf")
    out = traffic.run(0.2)
    assert torch.equal(out[:10], wanted[:10])
    assert torch.equal(out[:, :3], wanted[:, :3])
    assert not torch.isfinite(out[10:, 3:, 3]).any()
    traffic.keys[slot, 0] = float("nan")
    out = traffic.run(0.2)
    assert torch.equal(out[:10], wanted[:10])
    assert out[10:, :3].isnan().all()


def test_long_contexts_merge_in_waves_to_the_same_bits(isa: str) -> None:
    """Few threads, many splits: one thread goes through them in order, two share them out."""
    traffic = Traffic.make(3, [20_000], [1], (2, 1), (16, 16), 64, PRECISIONS[isa])
    results = []
    for threads in (1, 2, 3):
        packed.set_threads(threads)
        results.append(traffic.run(0.5))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert (results[0] - traffic.expected(0.5, rounded=isa == "amx")).abs().max() < 1e-3


def test_absorbed_attention_reads_one_head_as_key_and_value() -> None:
    traffic = Traffic.make(4, [50, 9], [5, 1], (4, 1), (40, 32), 16, torch.float32, latent=True)
    pages = Pages.of(traffic.blocks, traffic.starts, traffic.lengths, 16)
    out = torch.empty(6, 4, 32)
    cpu_attention.absorbed_attention(traffic.q, traffic.keys.squeeze(1), 32, pages, 0.2, out)
    assert torch.allclose(out, traffic.expected(0.2, rounded=False), atol=1e-5)


@pytest.mark.parametrize("spoil", ["dtype", "mixed caches", "width", "heads", "strides", "tokens"])
def test_misuse_is_refused(spoil: str) -> None:
    traffic = Traffic.make(4, [50], [5], (4, 2), (32, 32), 16, torch.float32)
    if spoil == "dtype":
        traffic.q = traffic.q.double()
    elif spoil == "mixed caches":
        traffic.values = traffic.values.half()
    elif spoil == "width":
        traffic.q = traffic.q[..., :16]
    elif spoil == "heads":
        traffic.q = traffic.q[:, :3]
    elif spoil == "strides":
        traffic.q = traffic.q.transpose(1, 2).contiguous().transpose(1, 2)
    else:
        traffic.q = traffic.q[:4]
    with pytest.raises(ValueError):
        traffic.run(0.1)
