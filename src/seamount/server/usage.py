"""Counts what one request took, for `usage`.

Used by both completion routes; fed with the engine's chunks.
"""

from __future__ import annotations

from seamount.core.requests import Chunk

from .wire.common import CompletionTokensDetails, PromptTokensDetails, Usage


class UsageCounter:
    """Sums tokens over prompts and sequences.

    Args:
        num_prompt_tokens: of all prompts; a prompt with `n` answers counts once.
        counts_reasoning: report how many generated tokens were reasoning.
    """

    def __init__(self, num_prompt_tokens: int, *, counts_reasoning: bool = False) -> None:
        self._num_prompt_tokens = num_prompt_tokens
        self._num_generated = 0
        self._num_cached: dict[int, int] = {}
        self._counts_reasoning = counts_reasoning
        self.num_reasoning = 0

    def add(self, chunk: Chunk, prompt: int = 0) -> None:
        """Count one chunk of the prompt with this number."""
        self._num_generated += len(chunk.token_ids)
        if chunk.num_cached_tokens is not None:
            # Later answers to one prompt find what the first one computed; what the caller saved is the first's share.
            self._num_cached.setdefault(prompt, chunk.num_cached_tokens)

    def usage(self) -> Usage:
        """Return the sums so far."""
        usage = Usage(
            prompt_tokens=self._num_prompt_tokens,
            completion_tokens=self._num_generated,
            total_tokens=self._num_prompt_tokens + self._num_generated,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(self._num_cached.values())),
        )
        if self._counts_reasoning:
            usage.completion_tokens_details = CompletionTokensDetails(reasoning_tokens=self.num_reasoning)
        return usage


class ReasoningCount:
    """Says which of one answer's tokens are reasoning, by the text that they made certain.

    A token whose text is held back waits for the decision. The closing mark counts as reasoning. Exact where the engine
    sends chunks of one token; where a chunk holds the border, all its tokens count as reasoning.
    """

    def __init__(self) -> None:
        self._num_waiting = 0
        self._state = ""  # "", "reasoning" or "content"

    def add(self, num_tokens: int, *, reasoning: bool, content: bool) -> int:
        """Return how many tokens turn out to be reasoning, now that a chunk gave text of these kinds."""
        if self._state == "content":
            return 0
        self._num_waiting += num_tokens
        if reasoning:
            self._state = "reasoning"
        if content:
            # The chunk's own tokens are content, unless it brought the last of the reasoning along.
            decided = self._num_waiting - (0 if reasoning else num_tokens)
            was_reasoning, self._state = self._state == "reasoning", "content"
            return decided if was_reasoning else 0
        if not reasoning:
            return 0
        decided, self._num_waiting = self._num_waiting, 0
        return decided

    def end(self) -> int:
        """Return how many waiting tokens are reasoning, at the answer's end."""
        return self._num_waiting if self._state == "reasoning" else 0
