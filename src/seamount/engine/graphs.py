"""CUDA graphs of the decode step: one per batch bucket, replayed instead of launching every kernel from Python.

`runner` asks `take` whether a step is one that was captured (one new token per sequence, not too many sequences) and
runs every other step, prefill and mixed, eagerly. A step of n sequences is filled up to the next bucket with copies of
its first sequence that write nothing: they read what is read anyway, choose the same experts, and so cost next to
nothing. Knows nothing of scheduling or sampling. Never run on a GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from seamount.kernels.pages import Pages
from seamount.models.batch import Batch, Cache, Cached, Piece
from seamount.models.network import CausalLM

_FIRST_BUCKETS = (1, 2, 4, 8)
_BUCKET_STEP = 8

# Records what a function does to tensors; returns a function that does it again and the tensor that then holds the
# result.
Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]


def buckets(max_num_seqs: int) -> tuple[int, ...]:
    """Batch sizes that are captured: 1, 2, 4, 8, 16, 24, 32, ... until `max_num_seqs` fit."""
    sizes = []
    for size in itertools.chain(_FIRST_BUCKETS, itertools.count(2 * _BUCKET_STEP, _BUCKET_STEP)):
        sizes.append(size)
        if size >= max_num_seqs:
            break
    return tuple(sizes)


class DecodeGraphs:
    """The decode step of one model over one cache, captured when this is made.

    Args:
        model: on the GPU, in evaluation mode; its weights must stay where they are.
        cache: likewise.
        block_size: tokens per block.
        max_blocks: blocks of the longest context.
        max_num_seqs: the largest batch that is captured.
        capture: how a step is recorded; tests without a GPU put a stand-in here.
    """

    @torch.inference_mode()
    def __init__(
        self,
        model: CausalLM,
        cache: Cache,
        *,
        block_size: int,
        max_blocks: int,
        max_num_seqs: int,
        device: torch.device,
        capture: Capture | None = None,
    ) -> None:
        self._buckets = buckets(max_num_seqs)
        self._max_blocks = max_blocks
        capture = capture or cuda_capture(device)
        # The largest first: the smaller ones then find room in its memory.
        self._steps = {
            size: _Step(model, cache, size, block_size, max_blocks, device, capture) for size in reversed(self._buckets)
        }

    def take(self, pieces: Sequence[Piece]) -> bool:
        """Whether `run` can do this step: one new token per sequence, and room for all of them."""
        return (
            0 < len(pieces) <= self._buckets[-1]
            and all(len(new) == 1 for new, _, _ in pieces)
            and all(len(blocks) <= self._max_blocks for _, _, blocks in pieces)
        )

    @torch.inference_mode()
    def run(self, pieces: Sequence[Piece]) -> Tensor:
        """Compute a step that `take` accepted, and write its cache entries.

        Returns:
            The model's normalised hidden states `[S, C]`. The next call must wait until something computed from them
            has been read on the host: only then are this step's numbers known to have left the host.
        """
        size = next(size for size in self._buckets if size >= len(pieces))
        return self._steps[size].run(pieces)


class _Step:
    """One captured batch size and the buffers that it reads: `_numbers` are tokens, positions, slots, lengths."""

    def __init__(
        self,
        model: CausalLM,
        cache: Cache,
        size: int,
        block_size: int,
        max_blocks: int,
        device: torch.device,
        capture: Capture,
    ) -> None:
        self._size, self._block_size = size, block_size
        self._tables: list[list[int]] = []
        pinned = device.type == "cuda"
        self._host = torch.tensor([[0], [0], [-1], [1]], dtype=torch.int64).repeat(1, size)
        self._host = self._host.pin_memory() if pinned else self._host
        self._numbers = self._host.to(device, copy=True)
        self._table = torch.zeros(size, max_blocks, dtype=torch.int32, device=device)
        starts = torch.arange(size + 1, dtype=torch.int32, device=device)

        def step() -> Tensor:
            token_ids, positions, slots, lengths = self._numbers
            # The host's numbers of the batch change from step to step, so nothing that is captured may ask for them.
            pages = Pages(self._table, starts, lengths.to(torch.int32), (), (), block_size)
            return model(Batch(token_ids, positions, (), Cached(slots, pages)), cache)

        self._replay, self._out = capture(step)

    def run(self, pieces: Sequence[Piece]) -> Tensor:
        rows = [self._row(*piece) for piece in pieces]
        token_id, position, _, length = rows[0]
        rows += [(token_id, position, -1, length)] * (self._size - len(pieces))
        self._host.copy_(torch.tensor(rows, dtype=torch.int64).T)
        self._numbers.copy_(self._host, non_blocking=True)
        tables = [list(blocks) for _, _, blocks in pieces]
        if tables != self._tables:
            self._write_tables(tables)
        self._replay()
        return self._out[: len(pieces)].clone()

    def _row(self, new: Sequence[int], position: int, blocks: Sequence[int]) -> tuple[int, int, int, int]:
        block, offset = divmod(position, self._block_size)
        return new[0], position, blocks[block] * self._block_size + offset, position + 1

    def _write_tables(self, tables: list[list[int]]) -> None:
        self._tables = tables
        filled = tables + [tables[0]] * (self._size - len(tables))
        width = max(map(len, filled))
        padded = torch.tensor([row + [0] * (width - len(row)) for row in filled], dtype=torch.int32)
        self._table[:, :width] = padded.to(self._table.device)


def cuda_capture(device: torch.device) -> Capture:
    """Return what records steps as CUDA graphs that share one pool of memory."""
    pool = torch.cuda.graph_pool_handle()

    def capture(step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        # Compiling kernels and making the libraries' workspaces cannot be captured, so the step runs before.
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            step()
            step()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            out = step()
        return graph.replay, out

    return capture
