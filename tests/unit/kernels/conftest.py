"""Instruction sets to run under, and an independent account of how weights and activations are rounded and laid out."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from seamount.kernels import packed
from seamount.kernels.library import ISA_NAMES, library, why_missing
from seamount.kernels.packed import PackedMatrix

CHUNK = 2048  # int8 inputs that share a factor


@pytest.fixture(params=ISA_NAMES)
def each_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The kernels of one instruction set, one thread; the best of this chip again afterwards."""
    lib = library()
    if lib is None:
        pytest.skip(why_missing())
    wanted = ISA_NAMES.index(request.param)
    if lib.seamount_choose_isa(wanted) != wanted:
        lib.seamount_choose_isa(len(ISA_NAMES) - 1)
        pytest.skip(f"this chip has no {request.param}")
    packed.set_threads(1)
    yield request.param
    lib.seamount_choose_isa(len(ISA_NAMES) - 1)
    packed.set_threads(1)


@pytest.fixture(scope="session")
def rounding() -> type[Rounding]:
    """What the kernels' number formats mean."""
    return Rounding


class Rounding:
    """The number formats of `native/matrix.h`, `int4.h` and `pack.inc`, in plain torch."""

    @staticmethod
    def pack(kind: Any, weight: Tensor, **options: Any) -> PackedMatrix:
        matrix = PackedMatrix(kind, *weight.shape, **options)
        matrix.pack_rows(0, weight)
        return matrix

    @staticmethod
    def int8_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes `[n, k]` and a scale per row: the largest value is 127."""
        peak = weight.abs().amax(1)
        inverse = torch.where(peak > 0, 127.0 / peak, 0.0)
        return (weight * inverse[:, None]).round(), peak / 127.0

    @staticmethod
    def int8_rows(x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Codes `[T, <=CHUNK]` and a factor per row, for each chunk of the inputs."""
        return [Rounding.int8_weight(chunk) for chunk in x.split(CHUNK, dim=1)]

    @staticmethod
    def int4_levels(codes: Tensor, multipliers: Tensor, zeros: Tensor, group: int) -> Tensor:
        """Eight-bit levels `[n, k]` of four-bit codes; multipliers and zeros `[n, groups]`."""

        def wide(of_group: Tensor) -> Tensor:
            return of_group.long().repeat_interleave(group, 1)[:, : codes.shape[1]]

        return (codes.long() * wide(multipliers) + 8 >> 4) - wide(zeros)

    @staticmethod
    def integer_product(x: Tensor, levels: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """What rows times integer weights come to, in fp64 `[T, n]`, and the sum of the chunks' sizes, for a bound.

        Within a chunk: the exact integer sum, rounded to fp32, times the fp32 product of both factors.
        """
        total = torch.zeros(x.shape[0], levels.shape[0], dtype=torch.float64)
        size = torch.zeros_like(total)
        for (codes, factor), part in zip(Rounding.int8_rows(x), levels.split(CHUNK, dim=1), strict=True):
            sums = (codes.double() @ part.double().T).float()
            terms = sums * (scale[None, :] * factor[:, None])
            total += terms.double()
            size += terms.abs().double()
        return total, size

    @staticmethod
    def between(kind: str, gated: Tensor) -> Tensor:
        """What a SwiGLU network's second product is given of its first one's result."""
        return gated if kind in ("float32", "float16") else gated.bfloat16().float()

    @staticmethod
    def silu(gate: Tensor) -> Tensor:
        return gate / (1 + torch.exp(-gate))

    @staticmethod
    def unpacked(matrix: PackedMatrix) -> tuple[Tensor, dict[str, Tensor]]:
        """Codes or values `[n, k]` read out of a packed matrix's memory, and its scales by output.

        int4: codes 0..15, and `multiplier` and `zero`, `[n, groups]`.
        """
        k, kind = matrix.num_inputs, matrix.kind
        num_panels = -(-matrix.width // 16) * (2 if matrix.gated else 1)
        per_tile = {
            "int8": (64, 1024),
            "int4": (64, 512),
            "bfloat16": (32, 1024),
            "float32": (1, 64),
            "float16": (1, 32),
        }
        tile_k, tile_bytes = per_tile[kind]
        tiles = -(-k // tile_k)
        raw = _bytes_at(matrix.struct.data, num_panels * tiles * tile_bytes).view(num_panels, tiles, tile_bytes)
        if kind in ("float32", "float16"):
            columns = raw.view(getattr(torch, kind)).transpose(1, 2)
        elif kind == "bfloat16":
            columns = raw.view(torch.bfloat16).unflatten(2, (16, 16, 2)).permute(0, 3, 1, 2, 4).flatten(2)
        else:
            whole = raw.view(torch.int8) if kind == "int8" else _nibbles(raw)
            columns = whole.unflatten(2, (16, 16, 4)).permute(0, 3, 1, 2, 4).flatten(2)
        rows = _rows_of_columns(matrix)
        scales = {}
        if kind in ("int8", "int4"):
            scale = _bytes_at(matrix.struct.scale, num_panels * 64).view(torch.float32)
            scales["scale"] = scale[rows]
        if kind == "int4":
            groups = -(-k // matrix.group)
            raw = _bytes_at(matrix.struct.group_scale, num_panels * groups * 32).view(num_panels, groups, 2, 16)
            both = raw.permute(2, 0, 3, 1).flatten(1, 2)
            scales["multiplier"], scales["zero"] = both[0][rows], both[1][rows]
        return columns.flatten(0, 1)[rows, :k], scales

    @staticmethod
    def dequantized(matrix: PackedMatrix) -> Tensor:
        """The fp32 weight `[n, k]` that a packed matrix stands for."""
        values, scales = Rounding.unpacked(matrix)
        if matrix.kind == "int4":
            values = Rounding.int4_levels(values, scales["multiplier"], scales["zero"], matrix.group)
        return values.float() * scales["scale"][:, None] if scales else values.float()


def _rows_of_columns(matrix: PackedMatrix) -> Tensor:
    """For each output the packed column that holds it: panels of a gated matrix take turns."""
    if not matrix.gated:
        return torch.arange(matrix.num_outputs)
    at = torch.arange(matrix.width)
    gates = at // 16 * 32 + at % 16
    return torch.cat((gates, gates + 16))


def _nibbles(packed_tiles: Tensor) -> Tensor:
    """`[..., 512]` bytes to `[..., 1024]` codes, by the table at the head of int4.h."""
    tiles = packed_tiles.unflatten(-1, (8, 32, 2))  # pair of rows, word, byte
    nibbles = torch.stack((tiles & 15, tiles >> 4), dim=-1).flatten(-2)  # [..., 8, 32, 4]
    words = nibbles.unflatten(-2, (4, 8))  # four groups of 16 columns, whose halves of 8 lie in different nibbles
    even = torch.cat((words[..., 1], words[..., 2]), dim=-1).flatten(-2)
    odd = torch.cat((words[..., 3], words[..., 0]), dim=-1).flatten(-2)
    return torch.stack((even, odd), dim=-2).flatten(-3)


def _bytes_at(address: int, count: int) -> Tensor:
    return torch.frombuffer(bytearray(ctypes.string_at(address, count)), dtype=torch.uint8)


@pytest.fixture
def rows_alone_and_together() -> Callable[..., None]:
    """Returns a check: `run(indices)` gives each row the same bits in any company, and on two threads."""

    def check(run: Callable[[Tensor], Tensor], num_rows: int, counts: tuple[int, ...]) -> None:
        everything = run(torch.arange(num_rows))
        generator = torch.Generator().manual_seed(num_rows)
        for count in counts:
            some = torch.randperm(num_rows, generator=generator)[:count]
            different = (run(some) != everything[some]).any(1)
            assert not different.any(), f"{int(different.sum())} of {count} rows differ from the call of {num_rows}"
        packed.set_threads(2)
        assert torch.equal(run(torch.arange(num_rows)), everything)

    return check
