"""Decides which tokens of which sequences the next step computes. Pure bookkeeping, no tensors, no clock.

Continuous batching: a step is one flat batch of decodes (one pending token) and prefill chunks (many) under a budget of
tokens. Decodes come first, so that streams do not stall behind long prompts; then prompts that have begun; then waiting
ones, by priority, first come first served. What then is left of the budget verifies guessed tokens; no sequence waits
or loses its blocks for them. When blocks run out, of the sequences of the lowest priority the one that was admitted
last gives its blocks back and waits again, before others of its priority; its tokens are kept and computed again.

A step takes as long as its tokens, and every stream pauses for it. Beside decodes, prefill chunks are therefore cut to
what the machine computes in `MAX_PAUSE_S`, as far as steps were measured; without decodes nobody waits for them.

Sequences that only fill idle time sit out the steps of others but for those that `Filler` lets them join.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import deque
from dataclasses import dataclass

from seamount.core.requests import IDLE_PRIORITY

from .blocks import BlockPool, chain_hash
from .filler import Filler
from .sequence import Sequence

MAX_PAUSE_S = 0.2
# Chunks below this make poor use of wide hardware; and before anything was measured, chunks are of the second size.
_MIN_CHUNK_TOKENS = 64
_FIRST_CHUNK_TOKENS = 512
_NEWEST_WEIGHT = 0.3


@dataclass(frozen=True, slots=True)
class _Standing:
    """What a sequence's request says of it, beside its tokens."""

    priority: int
    cache_root: bytes | None


@dataclass(frozen=True, slots=True)
class Work:
    """One sequence's share of a step: its next `num_new` pending tokens, and `num_drafts` guessed ones after them."""

    sequence: Sequence
    num_new: int
    num_drafts: int = 0

    @property
    def completes(self) -> bool:
        """Whether all tokens of the sequence are computed after this step."""
        return self.num_new == self.sequence.num_pending

    @property
    def samples(self) -> bool:
        """Whether a token is to be sampled after this step."""
        return self.completes and self.sequence.pool is None


class Scheduler:
    """Holds the waiting and the running sequences and the pool of blocks.

    Args:
        pool: the cache's blocks; a sequence must never be able to need more than all of them.
        max_num_seqs: most sequences that run side by side.
        max_step_tokens: token budget of a step.
        enable_prefix_cache: look for and publish shared prefixes.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_num_seqs: int,
        max_step_tokens: int,
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
        self._enable_prefix_cache = enable_prefix_cache
        self._standings: dict[Sequence, _Standing] = {}
        self._prefill_token_s: float | None = None
        self._filler = Filler()
        self._company: set[bool] = set()  # whether sequences of the last step fill idle time

    def add(self, sequences: list[Sequence], *, priority: int = 0, cache_salt: str = "") -> None:
        """Queue the sequences of one request.

        Args:
            priority: the higher goes first.
            cache_salt: prefixes are shared only between sequences of the same salt.
        """
        root = hashlib.blake2b(cache_salt.encode(), digest_size=16).digest() if cache_salt else None
        for sequence in sequences:
            self._standings[sequence] = _Standing(priority, root)
            self._wait(sequence, before_equals=False)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, finished or aborted, and release its blocks. Does nothing when it is out already."""
        sequence.finished = True
        self._standings.pop(sequence, None)
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self._release(sequence)

    def schedule(self) -> list[Work]:
        """Choose the next step's work and take the blocks that it needs. Empty only when nothing is queued."""
        plan: dict[Sequence, int] = {}
        if self._somebody_waits() and not self._filler.may_join():
            self._plan(plan, [sequence for sequence in self.running if not self._fills(sequence)], fillers=False)
        if not plan:
            self._plan(plan, self.running, fillers=True)
        self._company = {self._fills(sequence) for sequence in plan}
        return self._with_drafts(plan)

    def _plan(self, plan: dict[Sequence, int], running: list[Sequence], *, fillers: bool) -> None:
        """Plan the next tokens of these sequences, and of waiting ones; of those that fill idle time if `fillers`."""
        preempted = self.num_preemptions
        for sequence in sorted(running, key=lambda s: s.num_pending > 1):
            budget = self._max_step_tokens - sum(plan.values())
            if sequence.num_pending > 1:
                budget = min(budget, self._chunk_budget(plan))
            if budget == 0:
                break
            if sequence not in self.running:
                continue
            num_new = min(sequence.num_pending, budget)
            if self._reserve(sequence, num_new, plan):
                plan[sequence] = num_new
        if self.num_preemptions == preempted:
            self._admit(plan, fillers=fillers)

    def measured(self, work: list[Work], took_s: float) -> None:
        """Learn from the time of the step that was scheduled last.

        How large a chunk may be beside decodes, of which few prompt tokens teach nothing; and what those cost who fill
        idle time.
        """
        num_prefill = sum(item.num_new for item in work if item.num_new > 1)
        if False in self._company:
            self._filler.measured(took_s, joined=True in self._company, decodes_only=num_prefill == 0)
        if num_prefill < _MIN_CHUNK_TOKENS:
            return
        # The whole step counts as the prompts' time: what decodes took of it makes the chunk smaller, never larger.
        newest, known = took_s / num_prefill, self._prefill_token_s
        self._prefill_token_s = newest if known is None else known + _NEWEST_WEIGHT * (newest - known)

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

    def _chunk_budget(self, plan: dict[Sequence, int]) -> int:
        """Return how many prompt tokens may come beside what is planned already."""
        chunks = [num_new for sequence, num_new in plan.items() if sequence.num_pending > 1]
        if len(chunks) == len(plan):  # nobody decodes
            return self._max_step_tokens
        limit = _FIRST_CHUNK_TOKENS
        if self._prefill_token_s:
            limit = max(int(MAX_PAUSE_S / self._prefill_token_s), _MIN_CHUNK_TOKENS)
        return max(limit - sum(chunks), 0)

    def _admit(self, plan: dict[Sequence, int], *, fillers: bool) -> None:
        while self.waiting and len(self.running) < self._max_num_seqs:
            if not fillers and self._fills(self.waiting[0]):
                return
            budget = min(self._max_step_tokens - sum(plan.values()), self._chunk_budget(plan))
            sequence = self.waiting[0]
            leader = sequence.leader
            if leader is not None and not leader.finished and leader.num_computed < leader.num_prompt_tokens:
                return
            if budget == 0:
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

    def _wait(self, sequence: Sequence, *, before_equals: bool) -> None:
        """Queue a sequence behind those of higher priority, and before or behind those of its own."""
        priority = self._priority(sequence)
        if not before_equals and (not self.waiting or self._priority(self.waiting[-1]) >= priority):
            self.waiting.append(sequence)
            return
        reached = priority if before_equals else priority - 1
        places = (place for place, other in enumerate(self.waiting) if self._priority(other) <= reached)
        self.waiting.insert(next(places, len(self.waiting)), sequence)

    def _priority(self, sequence: Sequence) -> int:
        return self._standings[sequence].priority

    def _fills(self, sequence: Sequence) -> bool:
        """Whether the sequence only fills idle time."""
        return self._priority(sequence) <= IDLE_PRIORITY

    def _somebody_waits(self) -> bool:
        """Whether a sequence is here that somebody waits for; waiting ones stand in the order of their priority."""
        return any(not self._fills(sequence) for sequence in (*self.running, *itertools.islice(self.waiting, 1)))

    def _reserve(self, sequence: Sequence, num_new: int, plan: dict[Sequence, int]) -> bool:
        """Grow a running sequence, preempting others if need be; False if it was itself the next to be preempted."""
        while not self._grow(sequence, num_new):
            victim = min(reversed(self.running), key=self._priority)
            self.running.remove(victim)
            self._release(victim)
            self._wait(victim, before_equals=True)
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
        if not self._enable_prefix_cache or (sequence.pool is not None and sequence.pool.needs_every_token):
            return
        # The last token is always computed: its hidden state is what the sequence is here for.
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
            parent = keys[-1] if keys else self._standings[sequence].cache_root
            keys.append(chain_hash(parent, sequence.token_ids[start : start + size]))
        return keys[number], sequence.token_ids[number * size : (number + 1) * size]

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.num_computed = 0
