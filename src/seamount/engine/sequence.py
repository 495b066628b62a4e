"""The state of one sequence: its tokens, how far they are computed, and the blocks that hold their cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from seamount.core.sampling import SamplingParams

if TYPE_CHECKING:  # these hold tensors, and the scheduler, which works on sequences, does without
    from .grammar import Constraint
    from .pooling import Pool


class Sequence:
    """One continuation of one request's prompt. The scheduler and the engine change it; nobody else does.

    Attributes:
        token_ids: the prompt, then what has been generated.
        num_computed: leading tokens whose cache entries are written.
        blocks: numbers of the blocks that hold them, in order.
        block_keys: chain hashes of the leading full blocks, as far as they have been needed.
        num_cached: prompt tokens that came from the prefix cache at first admission.
        leader: sibling whose prompt is computed first, so that this one finds it in the prefix cache.
        draft_token_ids: guesses of what follows `token_ids`, which the next step may verify.
        constraint: what its grammar says of the next token; None without one. It has followed all output tokens.
        pool: gathers the prompt's hidden states, of which an embedding is made; None where tokens are sampled.
    """

    def __init__(
        self,
        request_id: str,
        index: int,
        prompt_token_ids: tuple[int, ...],
        sampling: SamplingParams,
        seed: int,
        max_tokens: int,
        leader: Sequence | None = None,
        constraint: Constraint | None = None,
        pool: Pool | None = None,
    ) -> None:
        self.request_id = request_id
        self.index = index
        self.sampling = sampling
        self.seed = seed
        self.max_tokens = max_tokens
        self.leader = leader
        self.constraint = constraint
        self.pool = pool
        self.token_ids = list(prompt_token_ids)
        self.num_prompt_tokens = len(prompt_token_ids)
        self.num_computed = 0
        self.num_cached: int | None = None
        self.blocks: list[int] = []
        self.block_keys: list[bytes] = []
        self.draft_token_ids: list[int] = []
        self.finished = False

    @property
    def num_tokens(self) -> int:
        """Tokens known so far."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        """The generated tokens."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_pending(self) -> int:
        """Tokens whose cache entries are still to be computed; one in ordinary decoding."""
        return self.num_tokens - self.num_computed
