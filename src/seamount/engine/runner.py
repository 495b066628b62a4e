"""Runs the network on a step's work: lays out the flat batch, keeps the cache, returns logits of finished rows."""

from __future__ import annotations

import torch
from torch import Tensor

from seamount.models.batch import Batch, Piece
from seamount.models.network import CausalLM

from .scheduler import Work


class Runner:
    """A model and its cache on one device.

    Args:
        model: weights loaded, in evaluation mode.
        num_blocks, block_size: size of the paged cache.
        dtype: precision of the cache.
    """

    def __init__(
        self, model: CausalLM, *, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._model = model
        self._block_size = block_size
        self._device = device
        self._cache = model.cache_spec.allocate(num_blocks * block_size, dtype, device)

    @torch.inference_mode()
    def run(self, work: list[Work]) -> Tensor:
        """Compute the pending tokens of `work` and write their cache entries.

        Returns:
            fp32 logits `[N, V]`, one row per piece of work that completes its sequence, in order.
        """
        hidden = self._model(self._batch(work), self._cache)
        rows, end = [], 0
        for item in work:
            end += item.num_new
            if item.completes:
                rows.append(end - 1)
        return self._model.logits(hidden[rows])

    def _batch(self, work: list[Work]) -> Batch:
        pieces: list[Piece] = []
        for item in work:
            sequence, first = item.sequence, item.sequence.num_computed
            pieces.append((sequence.token_ids[first : first + item.num_new], first, sequence.blocks))
        return Batch.over_cache(pieces, self._block_size, self._device)
