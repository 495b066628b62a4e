"""Decides which tokens of which sequences the next step computes. Pure bookkeeping, no tensors, no clock.

Continuous batching: a step is one flat batch of decodes (one pending token) and prefill chunks (many) under a budget of
tokens. Decodes come first, so that streams do not stall behind long prompts; then prompts that have begun; then waiting
ones, first come first served. What then is left of the budget verifies guessed tokens; no sequence waits or loses its
blocks for them. When blocks run out, the sequence that was admitted last gives its blocks back and waits
at the head of the queue; its tokens are kept and computed again.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from seamount.core.errors import QueueFullError

from .blocks import BlockPool, chain_hash
from .sequence import Sequence


@dataclass(frozen=True, slots=True)
class Work:
    """One sequence's share of a step: its next `num_new` pending tokens, and `num_drafts` guessed ones after them."""

    sequence: Sequence
    num_new: int
    num_drafts: int = 0

    @property
    def completes(self) -> bool:
        """Whether a token is to be sampled after this step."""
        return self.num_new == self.sequence.num_pending


class Scheduler:
    """Holds the waiting and the running sequences and the pool of blocks.

    Args:
        pool: the cache's blocks; a sequence must never be able to need more than all of them.
        max_num_seqs: most sequences that run side by side.
        max_step_tokens: token budget of a step.
        max_waiting: most sequences that may wait.
        enable_prefix_cache: look for and publish shared prefixes.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_num_seqs: int,
        max_step_tokens: int,
        max_waiting: int,
        enable_prefix_cache: bool = True,
    ) -> None:
        self.pool = pool
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self.num_queried_tokens = 0
        self.num_hit_tokens = 0
        self._max_num_seqs = max_num_seqs
        self._max_step_tokens = max_step_tokens
        self._max_waiting = max_waiting
        self._enable_prefix_cache = enable_prefix_cache

    def add(self, sequences: list[Sequence]) -> None:
        """Queue the sequences of one request.

        Raises:
            QueueFullError: not all of them fit into the queue; none is queued.
        """
        if len(self.waiting) + len(sequences) > self._max_waiting:
            raise QueueFullError(
                f"{len(self.waiting)} sequences are waiting; the limit is {self._max_waiting}.",
                hint="Try again shortly, or raise max_waiting.",
                retry_after=1.0,
            )
        self.waiting.extend(sequences)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, finished or aborted, and release its blocks. Does nothing when it is out already."""
        sequence.finished = True
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self._release(sequence)

    def schedule(self) -> list[Work]:
        """Choose the next step's work and take the blocks that it needs. Empty only when nothing is queued."""
        plan: dict[Sequence, int] = {}
        budget = self._max_step_tokens
        preempted = self.num_preemptions
        for sequence in sorted(self.running, key=lambda s: s.num_pending > 1):
            if budget == 0:
                break
            if sequence not in self.running:
                continue
            num_new = min(sequence.num_pending, budget)
            if self._reserve(sequence, num_new, plan):
                plan[sequence] = num_new
            budget = self._max_step_tokens - sum(plan.values())
        if self.num_preemptions == preempted:
            self._admit(plan, budget)
        return self._with_drafts(plan)

    def advance(self, work: list[Work]) -> None:
        """Record that a step has computed its work, without the guesses; full blocks become available for reuse."""
        for item in work:
            sequence = item.sequence
            before = sequence.num_computed // self.pool.block_size
            sequence.num_computed += item.num_new
            if self._enable_prefix_cache:
                for number in range(before, sequence.num_computed // self.pool.block_size):
                    key, tokens = self._block_identity(sequence, number)
                    self.pool.publish(sequence.blocks[number], key, tokens)

    def accept(self, sequence: Sequence) -> None:
        """Record that the newest token had been guessed, so that the step has computed its cache entry as well."""
        self.advance([Work(sequence, 1)])

    def _with_drafts(self, plan: dict[Sequence, int]) -> list[Work]:
        spare = self._max_step_tokens - sum(plan.values())
        work = []
        for sequence, num_new in plan.items():
            num_drafts = 0
            if sequence.draft_token_ids and num_new == sequence.num_pending:
                num_drafts = min(len(sequence.draft_token_ids), spare)
                if not self._grow(sequence, num_new + num_drafts):
                    num_drafts = len(sequence.blocks) * self.pool.block_size - sequence.num_tokens
                spare -= num_drafts
            work.append(Work(sequence, num_new, num_drafts))
        return work

    def _admit(self, plan: dict[Sequence, int], budget: int) -> None:
        while self.waiting and budget > 0 and len(self.running) < self._max_num_seqs:
            sequence = self.waiting[0]
            leader = sequence.leader
            if leader is not None and not leader.finished and leader.num_computed < leader.num_prompt_tokens:
                return
            self._take_cached_prefix(sequence)
            num_new = min(sequence.num_pending, budget)
            if not self._grow(sequence, num_new):
                self._release(sequence)
                return
            if sequence.num_cached is None:
                sequence.num_cached = sequence.num_computed
                self.num_queried_tokens += sequence.num_prompt_tokens
                self.num_hit_tokens += sequence.num_computed
            self.waiting.popleft()
            self.running.append(sequence)
            plan[sequence] = num_new
            budget -= num_new

    def _reserve(self, sequence: Sequence, num_new: int, plan: dict[Sequence, int]) -> bool:
        """Grow a running sequence, preempting the last admitted ones if need be; False if it was itself the last."""
        while not self._grow(sequence, num_new):
            victim = self.running.pop()
            self._release(victim)
            self.waiting.appendleft(victim)
            self.num_preemptions += 1
            plan.pop(victim, None)
            if victim is sequence:
                return False
        return True

    def _grow(self, sequence: Sequence, num_new: int) -> bool:
        """Give the sequence the blocks for `num_new` more tokens; what it got stays with it even on failure."""
        needed = -(-(sequence.num_computed + num_new) // self.pool.block_size)
        while len(sequence.blocks) < needed:
            block = self.pool.allocate()
            if block is None:
                return False
            sequence.blocks.append(block)
        return True

    def _take_cached_prefix(self, sequence: Sequence) -> None:
        if not self._enable_prefix_cache:
            return
        # The last token is always computed: its logits are what the sequence is here for.
        for number in range((sequence.num_tokens - 1) // self.pool.block_size):
            block = self.pool.find(*self._block_identity(sequence, number))
            if block is None:
                break
            self.pool.share(block)
            sequence.blocks.append(block)
        sequence.num_computed = len(sequence.blocks) * self.pool.block_size

    def _block_identity(self, sequence: Sequence, number: int) -> tuple[bytes, list[int]]:
        size = self.pool.block_size
        keys = sequence.block_keys
        while len(keys) <= number:
            start = len(keys) * size
            keys.append(chain_hash(keys[-1] if keys else None, sequence.token_ids[start : start + size]))
        return keys[number], sequence.token_ids[number * size : (number + 1) * size]

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.num_computed = 0
