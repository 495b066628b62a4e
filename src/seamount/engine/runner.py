"""Runs the network on a step's work: lays out the flat batch, keeps the cache, returns logits of finished rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from seamount.models.batch import Batch, Piece
from seamount.models.network import CausalLM

from .graphs import DecodeGraphs
from .replay import DecodeReplay
from .scheduler import Work


@dataclass(frozen=True, slots=True)
class Pass:
    """What one pass through the network gave; tensors are valid until the next one.

    Attributes:
        logits: fp32 `[N, V]`: for each piece of work after which a token is sampled a row for its last pending token
            and one for each of its guesses, in order; of no width where there is no such piece.
        hidden: `[T, C]`, normalised hidden states of all tokens.
        batch: the tokens; None where a CUDA graph was replayed.
        first_positions: of each piece of work, as it was when the pass began.
    """

    logits: Tensor
    hidden: Tensor
    batch: Batch | None
    first_positions: tuple[int, ...]


class Runner:
    """A model and its cache on one device.

    Args:
        model: weights loaded, in evaluation mode.
        num_blocks, block_size: size of the paged cache.
        dtype: precision of the cache.

    Attributes:
        cache: the paged cache; `Speculation` works on its last layer.
        replay: what replays decode steps of a packed model, once `record` was called.
    """

    def __init__(
        self, model: CausalLM, *, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._model = model
        self._block_size = block_size
        self._device = device
        self.cache = model.cache_spec.allocate(num_blocks * block_size, dtype, device)
        self._graphs: DecodeGraphs | None = None
        self.replay: DecodeReplay | None = None

    def record(self, *, max_blocks: int) -> None:
        """Replay decode steps of sequences of up to so many blocks from now on; the model is packed."""
        self.replay = DecodeReplay(self._model, self.cache, block_size=self._block_size, max_blocks=max_blocks)

    def capture(self, *, max_num_seqs: int, max_blocks: int) -> None:
        """Replay decode steps of up to so many sequences and blocks each from now on, without speculation."""
        self._graphs = DecodeGraphs(
            self._model,
            self.cache,
            block_size=self._block_size,
            max_blocks=max_blocks,
            max_num_seqs=max_num_seqs,
            device=self._device,
        )

    @torch.inference_mode()
    def run(self, work: list[Work]) -> Pass:
        """Compute the pending and the guessed tokens of `work` and write their cache entries."""
        pieces: list[Piece] = []
        rows: list[int] = []
        end = 0
        for item in work:
            sequence, first = item.sequence, item.sequence.num_computed
            tokens = sequence.token_ids[first : first + item.num_new] + sequence.draft_token_ids[: item.num_drafts]
            pieces.append((tokens, first, sequence.blocks))
            end += len(tokens)
            if item.samples:
                rows += range(end - 1 - item.num_drafts, end)
        firsts = tuple(first for _, first, _ in pieces)
        if self.replay is not None and len(rows) == end and self.replay.take(pieces, end):
            hidden, logits, replayed = self.replay.run(pieces)
            return Pass(logits, hidden, replayed, firsts)
        batch = None
        if self._graphs is not None and self._graphs.take(pieces):
            hidden = self._graphs.run(pieces)
        else:
            batch = Batch.over_cache(pieces, self._block_size, self._device)
            hidden = self._model(batch, self.cache)
        if not rows:  # within prompts, or for embeddings, which a model without a head can make
            return Pass(hidden.new_empty(0, 0), hidden, batch, firsts)
        chosen = hidden if len(rows) == end else hidden[rows]
        return Pass(self._model.logits(chosen), hidden, batch, firsts)
