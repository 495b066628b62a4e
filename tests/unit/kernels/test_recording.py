"""Recorded steps: a replay gives the bits that the step itself would give, or there is no recording."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from seamount import kernels
from seamount.kernels import Arena, PackedMatrix, Pages, choice, packed_feed_forward, record
from seamount.kernels.library import ISA_NAMES
from seamount.kernels.packed import set_threads

pytestmark = pytest.mark.skipif(kernels.library() is None, reason="steps are recorded as calls of compiled kernels")

WIDTH, INNER = 96, 160


def matrix(num_outputs: int, num_inputs: int, seed: int, *, gated: bool = False) -> PackedMatrix:
    weight = torch.randn(num_outputs, num_inputs, generator=torch.Generator().manual_seed(seed)) * num_inputs**-0.5
    packed = PackedMatrix("int8", num_outputs, num_inputs, gated=gated)
    packed.pack_rows(0, weight)
    return packed


def dense(x: Tensor, depth: int = 3) -> Callable[[], Tensor]:
    """Layers of what a step does, with results in memory of their own; x is changed."""
    norm = torch.ones(WIDTH)
    gate_up, down, square = matrix(2 * INNER, WIDTH, 1, gated=True), matrix(WIDTH, INNER, 2), matrix(WIDTH, WIDTH, 3)

    def step() -> Tensor:
        for _ in range(depth):
            square.multiply(square.multiply(x, norm=norm, eps=1e-6), add_to=x)
            packed_feed_forward(x, gate_up, down, norm, 1e-6, x)
        return kernels.rms_norm(x, norm, 1e-6)

    return step


def rows(count: int, seed: int) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("count", [1, 5, 33])
def test_a_replay_computes_with_what_then_lies_in_the_inputs(count: int) -> None:
    x, arena = torch.empty(count, WIDTH), Arena(2**20)
    step = dense(x)
    x.copy_(rows(count, 0))
    result, recording = record(step, arena)
    first = result.clone()
    assert recording is not None and recording.num_calls == 3 * 3 + 1
    for seed in (1, 2, 0):
        x.copy_(rows(count, seed))
        expected = step()
        x.copy_(rows(count, seed))
        recording.replay()
        assert torch.equal(result, expected)
    assert torch.equal(result, first)


def test_memory_is_used_again_within_a_step_and_by_the_next_recording() -> None:
    x, arena = torch.empty(64, WIDTH), Arena(100_000)
    x.copy_(rows(64, 0))
    deep, recording = record(dense(x, depth=100), arena)
    assert recording is not None and torch.isfinite(deep).all()
    # Hundreds of results of 24 KB, of which two at a time are needed.
    assert arena.num_bytes == 100_000
    few = torch.empty(4, WIDTH)
    few.copy_(rows(4, 0))
    result, second = record(dense(few), arena)
    assert arena.num_bytes == 100_000
    assert second is not None
    for seed in (3, 4):
        # By turns: what one of them leaves behind does not matter to the other.
        x.copy_(rows(64, seed))
        recording.replay()
        few.copy_(rows(4, seed))
        expected = dense(few)()
        few.copy_(rows(4, seed))
        second.replay()
        assert torch.equal(result, expected)


def test_an_arena_that_is_too_small_grows_to_twice_its_size() -> None:
    x, arena = rows(64, 0), Arena(30_000)
    step = dense(x)
    held, recording = record(lambda: [step(), step(), step()], arena)
    assert recording is not None
    assert arena.num_bytes == 120_000
    x.copy_(rows(64, 5))
    expected = [step() for _ in range(3)]
    x.copy_(rows(64, 5))
    recording.replay()
    assert all(torch.equal(a, b) for a, b in zip(held, expected, strict=True))


def test_results_that_are_alive_do_not_share_memory() -> None:
    x, square = rows(8, 0), matrix(WIDTH, WIDTH, 3)

    def step() -> list[Tensor]:
        kept = [square.multiply(x)]
        for _ in range(20):
            for _ in range(3):
                square.multiply(kept[-1])
            kept.append(square.multiply(kept[-1]).unflatten(1, (2, -1)).flatten(1))
        return kept

    results, recording = record(step, Arena(2**20))
    assert recording is not None
    recording.replay()
    assert all(torch.equal(a, b) for a, b in zip(results, step(), strict=True))


@pytest.mark.parametrize("isa", ["plain", "avx2", "avx512", "amx"])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_recording_outlives_other_threads_and_instruction_sets(isa: str, threads: int) -> None:
    lib, wanted = kernels.library(), ISA_NAMES.index(isa)
    assert lib is not None
    x = torch.empty(20, WIDTH)
    step = dense(x)
    x.copy_(rows(20, 0))
    result, recording = record(step, Arena(2**20))
    assert recording is not None
    try:
        if lib.seamount_choose_isa(wanted) != wanted:
            pytest.skip(f"this chip has no {isa}")
        set_threads(threads)
        x.copy_(rows(20, 1))
        expected = step()
        x.copy_(rows(20, 1))
        recording.replay()
        assert torch.equal(result, expected)
    finally:
        lib.seamount_choose_isa(len(ISA_NAMES) - 1)
        set_threads(1)


def test_a_recording_keeps_what_it_points_to() -> None:
    x = rows(6, 0)

    def make() -> tuple[Tensor, kernels.Recording]:
        square, keys = matrix(WIDTH, WIDTH, 3), torch.randn(8, 2, 16, generator=torch.Generator().manual_seed(1))
        values = keys + 1
        table, starts, lengths = (torch.tensor(v, dtype=torch.int32) for v in ([[1, 0]], [0, 6], [6]))
        pages = Pages(table, starts, lengths, (), (), 4)

        def step() -> Tensor:
            q = square.multiply(x).unflatten(1, (6, 16))
            return choice.paged_attention(q, keys, values, pages, 0.3)

        result, recording = record(step, Arena(2**20))
        assert recording is not None
        return result, recording

    result, recording = make()
    expected = result.clone()
    gc.collect()
    others = [torch.full((size,), float("nan")) for size in (16, 32, 96, 256, 4096) for _ in range(50)]
    recording.replay()
    assert torch.equal(result, expected)
    assert len(others) == 250


COMPUTING: dict[str, Callable[[Tensor], object]] = {
    "a sum": lambda x: x + 1,
    "a sum in place": lambda x: x.add_(1),
    "a copy": lambda x: x.clone(),
    "another dtype": lambda x: x.to(torch.float64),
    "columns made contiguous": lambda x: x.T.contiguous(),
    "a shape that is no view": lambda x: x.T.reshape(-1),
    "side by side": lambda x: torch.cat((x, x)),
    "rows by number": lambda x: x[[0, 1]],
    "zeros": lambda x: torch.zeros(3),
    "a number for the host": lambda x: float(x[0, 0]),
    "a write through a view": lambda x: x[0].zero_(),
}
VIEWS: dict[str, Callable[[Tensor], object]] = {
    "nothing": lambda x: x,
    "its own dtype": lambda x: x.to(torch.float32).contiguous().float(),
    "another shape": lambda x: x.unflatten(1, (4, -1)).flatten(1).reshape(-1).view(2, -1),
    "parts": lambda x: (x.split((32, 64), dim=1), x[:1, 3:], x.unbind(), x.chunk(2)),
    "axes": lambda x: x.T.unsqueeze(1).squeeze(1).expand(-1, -1).transpose(0, 1).detach(),
    "memory": lambda x: (torch.empty(3), x.new_empty(4), torch.empty_like(x)),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", [*COMPUTING, *VIEWS])
def test_only_a_step_of_kernels_and_views_is_recorded(name: str, mode: Callable[[], torch.no_grad]) -> None:
    with mode():
        x, square = rows(2, 0), matrix(WIDTH, WIDTH, 3)
        between = (COMPUTING | VIEWS)[name]

        def step() -> Tensor:
            first = square.multiply(x)
            between(first)
            return square.multiply(first)

        result, recording = record(step, Arena(2**20))
        assert torch.equal(result, step())
        assert (recording is not None) == (name in VIEWS)


def test_a_step_that_fails_leaves_nothing_behind() -> None:
    x, square = rows(2, 0), matrix(WIDTH, WIDTH, 3)

    def failing() -> None:
        square.multiply(x)
        raise LookupError

    with pytest.raises(LookupError):
        record(failing, Arena(2**20))
    result, recording = record(lambda: square.multiply(x), Arena(2**20))
    assert recording is not None and recording.num_calls == 1
    assert torch.equal(result, square.multiply(x))


def test_a_step_within_a_recorded_step_is_refused() -> None:
    with pytest.raises(RuntimeError, match="within a recorded step"):
        record(lambda: record(lambda: None, Arena(2**20)), Arena(2**20))
