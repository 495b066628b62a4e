"""Requests and results, as they cross every room and the process boundary.

Frozen and made of plain values only, so that `core.codec` can carry them. A request becomes `sampling.n` sequences,
numbered by `index`; a chunk belongs to one of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .embedding import EmbeddingFacts, EmbeddingParams
from .sampling import SamplingParams

FinishReason = Literal["stop", "length", "abort", "error"]

IDLE_PRIORITY = -2
"""Of requests that nobody waits for, as a batch's: they fill the time that others leave."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a caller asked for, already encoded.

    Attributes:
        id: unique among the requests in flight.
        prompt_token_ids: the whole prompt, special tokens included; never empty.
        sampling: how to continue it.
        skip_special_tokens: leave special tokens (not the text markers such as `</think>`) out of `text`.
        priority: of waiting requests the one with the higher number begins first, and loses its blocks last; those of
            `IDLE_PRIORITY` or less are worked on in idle time, and hold up others little.
        cache_salt: prompts share cached prefixes only with prompts of the same salt: nobody can find out by timing
            what was sent under another one.
        embedding: set where the answer shall be the prompt's embedding; `sampling` then decides nothing.
    """

    id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    skip_special_tokens: bool = True
    priority: int = 0
    cache_salt: str = ""
    embedding: EmbeddingParams | None = None


@dataclass(frozen=True)
class TokenLogprob:
    """One token's log-probability (natural logarithm, of the raw logits before penalties and temperature)."""

    token_id: int
    logprob: float
    text: str


@dataclass(frozen=True)
class PositionLogprobs:
    """What is known of one generated position: the chosen token, and the most probable ones, best first."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """What one engine step added to one sequence.

    Attributes:
        request_id, index: which sequence.
        token_ids: tokens generated since the last chunk (a stop token included).
        text: text that has become certain since the last chunk; valid Unicode, stop strings cut off, held back while
            it may still turn into a stop string or a longer UTF-8 character.
        logprobs: one entry per token in `token_ids` when asked for, else empty.
        finish_reason: set on the last chunk of the sequence only.
        stop_reason: the stop string or stop token id that ended it, None for end-of-sequence and the rest.
        num_cached_tokens: prompt tokens that were found in the prefix cache; set on the first chunk.
        error: fields of a SeamountError (`core.errors.error_to_fields`) when finish_reason is "error".
        queue_s, prefill_s: seconds spent waiting and in prefill; set on the first chunk.
        embedding: the vector of a request for one, on its only chunk; `core.embedding.floats_of` reads it.
    """

    request_id: str
    index: int = 0
    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[PositionLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    num_cached_tokens: int | None = None
    error: dict[str, str | float | None] | None = None
    queue_s: float | None = None
    prefill_s: float | None = None
    embedding: bytes | None = None


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A finished continuation of a prompt, as `LLM.generate` returns it (`n` of them per prompt, in order).

    `text` has special tokens left out; `reasoning` and `content` are `text` split by the model's reasoning parser
    (`reasoning` is None where the model gave none).
    """

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    logprobs: tuple[PositionLogprobs, ...] | None = None
    index: int = 0
    num_cached_tokens: int = 0
    reasoning: str | None = None
    content: str = ""


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What a ready engine says of itself.

    Attributes:
        name: the name that clients use.
        family: architecture family, for instance `deepseek_v3`.
        num_parameters, num_active_parameters: total, and used per token.
        dtype: `bfloat16`, `float16` or `float32`.
        device: `cpu` or `cuda:0`.
        vocab_size: rows of the output head.
        max_model_len: prompt plus output, in tokens.
        num_blocks, block_size: the cache: blocks, and tokens per block.
        cache_bytes_per_token, weight_bytes: memory.
        load_s: seconds from start to ready.
        worker_pid: process id of the engine's worker; 0 where it runs in the caller's process.
        max_num_seqs: sequences that run side by side.
        embedding: how it makes embeddings; None where it is not made for that.
        generates: it has a head, and so can continue text.
    """

    name: str
    family: str
    num_parameters: int
    num_active_parameters: int
    dtype: str
    device: str
    vocab_size: int
    max_model_len: int
    num_blocks: int
    block_size: int
    cache_bytes_per_token: int
    weight_bytes: int
    load_s: float
    worker_pid: int = 0
    max_num_seqs: int = 64
    embedding: EmbeddingFacts | None = None
    generates: bool = True


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """Counters and gauges of a running engine; counters grow from the worker's start.

    `num_draft_tokens` guesses were verified by speculative decoding, and `num_accepted_tokens` of them were right.
    `worker_pid` is the process that runs now; 0 where the engine has none of its own.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    num_free_blocks: int = 0
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_prefix_queried_tokens: int = 0
    num_prefix_hit_tokens: int = 0
    num_preemptions: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_steps: int = 0
    num_worker_restarts: int = 0
    worker_pid: int = 0


EngineState = Literal["starting", "ready", "restarting", "draining", "failed", "closed"]
