"""Speculative decoding with the multi-token-prediction (MTP) block of DeepSeek-V3 (arXiv 2412.19437, section 2.2).

Called by `engine` at the end of every step. The block guesses the token after the one that was just chosen; the next
step computes guess and pending token in one pass, and the sampler then chooses position by position, as ever: a guess
is right when it is what the sampler chooses. A pass's rows do not depend on each other's company, so the output has the
same bits with and without guesses; only how many steps it takes depends on them.

The block attends, so it has a layer of its own in the cache, in the same blocks as the others. Its entry at a position
is made of the model's hidden state there and of the token that follows, which is known once the step has sampled (or,
inside a prompt, from the start). Therefore every step writes the entries of exactly the positions that it computed:
prompts however cut, cached prefixes and sequences computed again after preemption need no care. The one entry that may
differ from what a sequence would have written itself is the last one of a shared prefix, since it knows the token that
came next where the prefix was computed first: a guess may be worse for it. Entries of rejected guesses are written over
when their positions are computed, before anything attends to them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seamount.models.batch import Batch, Cache, Piece
from seamount.models.network import CausalLM

from .payoff import Payoff
from .replay import DecodeReplay
from .runner import Pass
from .sampler import choose
from .scheduler import Work
from .sequence import Sequence


class Speculation:
    """Keeps the MTP block's cache and leaves a guess in `Sequence.draft_token_ids`.

    Args:
        model: one with an MTP block.
        cache: the runner's, whose last layer is the block's.
        eos_token_ids: see `sampler.sample`.
        payoff: decides when to guess; None guesses always.
        replay: the runner's.
    """

    def __init__(
        self,
        model: CausalLM,
        cache: Cache,
        *,
        block_size: int,
        device: torch.device,
        eos_token_ids: tuple[int, ...],
        payoff: Payoff | None,
        replay: DecodeReplay | None,
    ) -> None:
        self._model = model
        self._cache = cache
        self._block_size = block_size
        self._device = device
        self._eos_token_ids = eos_token_ids
        self._payoff = payoff
        self._replay = replay

    @torch.inference_mode()
    def follow(self, work: list[Work], ran: Pass) -> None:
        """Write the block's entries of a step that has been sampled, and guess what comes next.

        Args:
            work, ran: the step's; its sequences hold what was chosen, and know how far they are computed.
        """
        if ran.batch is None:
            raise ValueError("a replayed step cannot be followed: its tokens were not kept")
        following: list[int] = []
        last_rows: dict[Sequence, int] = {}
        for row, item, first in zip(ran.batch.query_starts, work, ran.first_positions, strict=False):
            sequence, count = item.sequence, item.num_new + item.num_drafts
            # A rejected guess, and logits that are not numbers, have no token after them.
            known = sequence.token_ids[first + 1 : first + 1 + count]
            following += known + [0] * (count - len(known))
            if _can_guess(sequence):
                last_rows[sequence] = row + sequence.num_computed - 1 - first
        guesses = bool(last_rows) and (self._payoff is None or self._payoff.pays(len(last_rows)))
        self._follow(ran.hidden, self._tensor(following), ran.batch, last_rows if guesses else {})

    def measured(self, work: list[Work], num_accepted: int, step_s: float) -> None:
        """Tell how long a whole step took, `follow` included, and how many of its guesses were right."""
        if self._payoff is None:
            return
        num_drafts = sum(item.num_drafts for item in work)
        self._payoff.count(num_drafts, num_accepted)
        if all(item.num_new == 1 for item in work):
            self._payoff.time(len(work), num_drafts, step_s)

    def _follow(self, hidden: Tensor, following: Tensor, batch: Batch, last_rows: dict[Sequence, int]) -> None:
        """Write the block's entries; guess from the last rows that are given, if any."""
        sequences, rows = list(last_rows), self._tensor(list(last_rows.values()))
        # In a step of decodes: one pass over a few rows too many is less than two passes.
        at_once = 0 < len(following) <= 2 * len(rows)
        if self._replay is not None and self._replay.holds(batch) and (at_once or not last_rows):
            if not last_rows:
                self._replay.fill(hidden, following, batch)
                return
            hidden = self._replay.guess(hidden, following, batch)[rows]
        else:
            angles = self._model.rotary.angles(batch.positions)
            joined = self._model.mtp_join(hidden, self._model.embed(following))
            if at_once:
                hidden = self._model.mtp_guess(joined, angles, batch, self._cache)[rows]
            else:
                self._model.mtp_fill(joined, angles, batch, self._cache)
                if not last_rows:
                    return
                pieces: list[Piece] = [([0], s.num_computed - 1, s.blocks) for s in sequences]
                last = Batch.over_cache(pieces, self._block_size, self._device)
                angles = self._model.rotary.angles(last.positions)
                hidden = self._model.mtp_guess(joined[rows], angles, last, self._cache)
        # The sampler itself, so that guesses meet its penalties and the random number that it will draw.
        guesses = choose(self._model.logits(hidden), sequences, self._eos_token_ids)
        for sequence, token_id in zip(sequences, guesses, strict=True):
            if token_id is not None:
                sequence.draft_token_ids = [token_id]

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)


def _can_guess(sequence: Sequence) -> bool:
    """Whether all but the newest token is computed, and more than one token is still to come."""
    return (
        not sequence.finished
        and sequence.num_pending == 1
        and not sequence.draft_token_ids
        and sequence.num_output_tokens + 1 < sequence.max_tokens
    )
