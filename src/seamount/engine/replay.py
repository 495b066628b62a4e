"""Decode steps on a CPU, recorded once for each shape and then replayed: a few copies and one call, not hundreds.

`runner` asks `take` whether a step is one for this (few tokens, and a token is chosen after each of them) and runs
every other step itself; `speculative` lets the MTP block follow a step that was replayed. A shape is a number of
sequences and of new tokens. What a step needs of the host lies in tensors that all shapes share, as do the results in
one arena; so what a step gave is valid until the next one. Knows nothing of scheduling or sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from seamount.kernels import Arena, Pages, Recording, record
from seamount.models.batch import Batch, Cache, Cached, Piece
from seamount.models.footprint import REPLAYED_TOKENS, replayed_bytes
from seamount.models.network import CausalLM

# A recording holds no results, but 170 bytes for each of its calls. Guesses make many shapes: the one that was not used
# for longest is forgotten.
_MOST_SHAPES = 128

Step = Callable[[Batch], tuple[Tensor, ...]]


class _Shape:
    """What one number of sequences and tokens needs: its part of the inputs, and what was recorded by name.

    Attributes:
        steps: recordings with what they return; None where a step cannot be recorded.
        batch: the inputs as the network takes them. Host's numbers are left out, since they change from step to step
            and nothing that is recorded may ask for them.
    """

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.steps: dict[str, tuple[Recording, tuple[Tensor, ...]] | None] = {}


class DecodeReplay:
    """The decode steps of one model over one cache.

    Args:
        model: packed for a CPU's kernels, in evaluation mode; its weights and `cache` must stay where they are.
        block_size: tokens per block.
        max_blocks: blocks of the longest context.
    """

    @torch.inference_mode()
    def __init__(self, model: CausalLM, cache: Cache, *, block_size: int, max_blocks: int) -> None:
        most, width = REPLAYED_TOKENS, model.config.hidden_size
        self._model, self._cache = model, cache
        self._block_size, self._max_blocks = block_size, max_blocks
        self._arena = Arena(replayed_bytes(model.config))
        self._shapes: dict[tuple[int, int], _Shape] = {}
        # Rows are token ids, positions and slots.
        self._numbers = torch.zeros(3, most, dtype=torch.int64)
        self._starts = torch.zeros(most + 1, dtype=torch.int32)
        self._lengths = torch.zeros(most, dtype=torch.int32)
        self._table = torch.zeros(most, max_blocks, dtype=torch.int32)
        self._rows: list[list[int]] = [[] for _ in range(most)]
        self._x, self._hidden = torch.empty(most, width), torch.empty(most, width)
        cos, sin = model.rotary.angles(self._numbers[1])
        self._cos, self._sin = cos.clone(), sin.clone()

    @property
    def num_recordings(self) -> int:
        """Steps that can be replayed now."""
        return sum(step is not None for shape in self._shapes.values() for step in shape.steps.values())

    @property
    def refused(self) -> set[str]:
        """Which steps, of those of `run`, `fill` and `guess`, hold something that cannot be recorded."""
        return {name for shape in self._shapes.values() for name, step in shape.steps.items() if step is None}

    def take(self, pieces: Sequence[Piece], num_tokens: int) -> bool:
        """Whether `run` can do a step of so many tokens in all."""
        return num_tokens <= REPLAYED_TOKENS and all(len(blocks) <= self._max_blocks for _, _, blocks in pieces)

    def run(self, pieces: Sequence[Piece]) -> tuple[Tensor, Tensor, Batch]:
        """Compute a step that `take` accepted, and write its cache entries.

        Returns:
            Normalised hidden states `[T, C]`, logits `[T, V]` and the batch; all valid until the next `run`.
        """
        shape, batch = self._lay_out(pieces)
        count = len(batch.token_ids)
        self._x[:count] = self._model.embed(batch.token_ids)
        cos, sin = self._model.rotary.angles(batch.positions)
        self._cos[:count], self._sin[:count] = cos, sin
        hidden, logits = self._replay(shape, "step", self._step)
        return hidden, logits, batch

    def holds(self, batch: Batch) -> bool:
        """Whether the batch is that of the latest `run`, so that `fill` and `guess` can follow it."""
        return batch.token_ids.data_ptr() == self._numbers.data_ptr()

    def fill(self, hidden: Tensor, next_token_ids: Tensor, batch: Batch) -> None:
        """Let the MTP block write its entries of a step: `CausalLM.mtp_join` and `mtp_fill`."""
        self._replay(self._followed(hidden, next_token_ids, batch), "fill", self._fill)

    def guess(self, hidden: Tensor, next_token_ids: Tensor, batch: Batch) -> Tensor:
        """`CausalLM.mtp_join` and `mtp_guess`: hidden states `[T, C]`, valid until the next step."""
        return self._replay(self._followed(hidden, next_token_ids, batch), "guess", self._guess)[0]

    def _replay(self, shape: _Shape, name: str, step: Step) -> tuple[Tensor, ...]:
        if name not in shape.steps:
            result, recording = record(lambda: step(shape.batch), self._arena)
            shape.steps[name] = None if recording is None else (recording, result)
            return result
        known = shape.steps[name]
        if known is None:
            return step(shape.batch)
        known[0].replay()
        return known[1]

    def _step(self, batch: Batch) -> tuple[Tensor, ...]:
        count = len(batch.token_ids)
        hidden = self._model.forward_embedded(self._x[:count], self._angles(count), batch, self._cache)
        return hidden, self._model.logits(hidden)

    def _fill(self, batch: Batch) -> tuple[Tensor, ...]:
        count = len(batch.token_ids)
        joined = self._model.mtp_join(self._hidden[:count], self._x[:count])
        self._model.mtp_fill(joined, self._angles(count), batch, self._cache)
        return ()

    def _guess(self, batch: Batch) -> tuple[Tensor, ...]:
        count = len(batch.token_ids)
        joined = self._model.mtp_join(self._hidden[:count], self._x[:count])
        return (self._model.mtp_guess(joined, self._angles(count), batch, self._cache),)

    def _angles(self, count: int) -> tuple[Tensor, Tensor]:
        return self._cos[:count], self._sin[:count]

    def _followed(self, hidden: Tensor, next_token_ids: Tensor, batch: Batch) -> _Shape:
        """Put in place what the MTP block needs beside the step's own inputs."""
        count = len(next_token_ids)
        # The block's results will lie where this step's are.
        self._hidden[:count] = hidden
        self._x[:count] = self._model.embed(next_token_ids)
        return self._shapes[len(batch.query_starts) - 1, count]

    def _lay_out(self, pieces: Sequence[Piece]) -> tuple[_Shape, Batch]:
        """As `Batch.over_cache`, into the tensors that recordings read."""
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        starts, lengths, size = [0], [], self._block_size
        for row, (new, first, blocks) in enumerate(pieces):
            end = first + len(new)
            token_ids += new
            positions += range(first, end)
            slots += [blocks[p // size] * size + p % size for p in range(first, end)]
            starts.append(len(token_ids))
            lengths.append(end)
            if blocks != self._rows[row]:
                self._rows[row] = list(blocks)
                self._table[row, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        num_sequences, num_tokens = len(pieces), len(token_ids)
        self._numbers[:, :num_tokens] = torch.tensor([token_ids, positions, slots])
        self._starts[: num_sequences + 1] = torch.tensor(starts, dtype=torch.int32)
        self._lengths[:num_sequences] = torch.tensor(lengths, dtype=torch.int32)
        shape = self._shape(num_sequences, num_tokens)
        fixed = shape.batch.cached
        if fixed is None:
            raise RuntimeError("a step's inputs lie in a cache")
        places = fixed.pages
        pages = Pages(places.block_table, places.query_starts, places.context_lens, tuple(starts), tuple(lengths), size)
        batch = Batch(shape.batch.token_ids, shape.batch.positions, tuple(starts), Cached(fixed.slots, pages))
        return shape, batch

    def _shape(self, num_sequences: int, num_tokens: int) -> _Shape:
        """The shape's inputs and recordings; now the one that was used last."""
        key = (num_sequences, num_tokens)
        found = self._shapes.pop(key, None)
        if found is None:
            token_ids, positions, slots = self._numbers[:, :num_tokens]
            table, starts = self._table[:num_sequences], self._starts[: num_sequences + 1]
            pages = Pages(table, starts, self._lengths[:num_sequences], (), (), self._block_size)
            found = _Shape(Batch(token_ids, positions, (), Cached(slots, pages)))
            if len(self._shapes) == _MOST_SHAPES:
                del self._shapes[next(iter(self._shapes))]
        self._shapes[key] = found
        return found
