"""One run of one shape through the engine: what was measured, token by token, and what follows from it.

Called by `ops.benchmark`. `record` steps the engine and notes times; `timing` is pure, so that the definitions of the
numbers are tested without a clock.
"""

from __future__ import annotations

import itertools
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from seamount.core.errors import error_from_fields
from seamount.core.requests import Chunk, Request
from seamount.core.sampling import SamplingParams

Tick = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One combination: so many equal requests that arrive at once.

    Attributes:
        prompt_tokens, output_tokens: of each request.
        concurrency: requests side by side.
        shared_prefix_tokens: with which all prompts begin, and which the cache already holds.
    """

    prompt_tokens: int
    output_tokens: int
    concurrency: int
    shared_prefix_tokens: int = 0

    def __str__(self) -> str:
        shared = f" ({self.shared_prefix_tokens} shared)" if self.shared_prefix_tokens else ""
        return f"prompt {self.prompt_tokens}{shared}, output {self.output_tokens}, concurrency {self.concurrency}"


class Stepping(Protocol):
    """The part of the engine that is driven here."""

    def add(self, request: Request) -> None: ...
    def step(self) -> list[Chunk]: ...
    def abort(self, request_id: str) -> list[Chunk]: ...

    @property
    def idle(self) -> bool: ...


@dataclass(kw_only=True)
class Recording:
    """Raw times of one run, in seconds of one monotonic clock.

    Attributes:
        added_s: when each request was handed over.
        steps: end of each step, and the chunks that it gave.
    """

    added_s: dict[str, float] = field(default_factory=dict)
    steps: list[tuple[float, list[Chunk]]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What one run of a shape measured.

    Attributes:
        prefill_s: from the first request's arrival until all have their first token.
        first_token_s: per request, from its arrival to its first token.
        gaps_s: between the tokens of a request, over all requests and the whole run.
        decode_s, decode_steps, decode_tokens: the steady state: after the last request's first token, until the first
            request ends. All zero when the first ends before the last begins.
        decode_context_tokens: cached tokens that a steady step attends to, all requests together, on average.
        cached_tokens: per request, prompt tokens that were found in the cache.
    """

    prefill_s: float
    first_token_s: tuple[float, ...]
    gaps_s: tuple[float, ...]
    decode_s: float
    decode_steps: int
    decode_tokens: int
    decode_context_tokens: float
    cached_tokens: tuple[int, ...]


def make_requests(shape: Shape, vocab_size: int, source: random.Random) -> list[Request]:
    """Return the requests of one run: random token ids, greedy, of exactly the shape's lengths."""
    prefix = _random_tokens(shape.shared_prefix_tokens, vocab_size, source)
    return [
        _request(f"bench-{i}", (*prefix, *_random_tokens(own, vocab_size, source)), shape.output_tokens)
        for i, own in enumerate([shape.prompt_tokens - shape.shared_prefix_tokens] * shape.concurrency)
    ]


def fill_prefix(engine: Stepping, shape: Shape, requests: Sequence[Request]) -> None:
    """Compute the prefix that the requests share, so that the cache holds it; nothing is measured."""
    if shape.shared_prefix_tokens:
        prefix = requests[0].prompt_token_ids[: shape.shared_prefix_tokens]
        record(engine, [_request("bench-prefix", prefix, 1)])


def record(engine: Stepping, requests: Sequence[Request], tick: Tick | None = None) -> Recording:
    """Run the requests to their end, noting when each token came.

    Args:
        tick: called with the tokens made so far, about once a second.

    Raises:
        SeamountError: a request was refused or broke off; nothing is left running.
    """
    found = Recording()
    num_tokens, told_s = 0, time.perf_counter()
    try:
        for request in requests:
            found.added_s[request.id] = time.perf_counter()
            engine.add(request)
        while not engine.idle:
            chunks = engine.step()
            now = time.perf_counter()
            found.steps.append((now, chunks))
            num_tokens += sum(len(chunk.token_ids) for chunk in chunks)
            for chunk in chunks:
                if chunk.error is not None:
                    raise error_from_fields(chunk.error)
            if tick is not None and now - told_s > 1.0:
                told_s = now
                tick(num_tokens)
    finally:
        for request in requests:
            engine.abort(request.id)
    return found


def timing(shape: Shape, recording: Recording) -> Timing:
    """Return what a recording of the shape's requests means; see `Timing` for the definitions."""
    came_s: dict[str, list[float]] = {request_id: [] for request_id in recording.added_s}
    cached: dict[str, int] = {}
    first_end_s = None
    for end_s, chunks in recording.steps:
        for name, count in Counter(chunk.request_id for chunk in chunks for _ in chunk.token_ids).items():
            times = came_s[name]
            # Tokens that speculative decoding gave together share the time since the last.
            before_s = times[-1] if times else end_s
            times += [before_s + (end_s - before_s) * number / count for number in range(1, count + 1)]
        for chunk in chunks:
            if chunk.num_cached_tokens is not None:
                cached[chunk.request_id] = chunk.num_cached_tokens
            if chunk.finish_reason is not None and first_end_s is None:
                first_end_s = end_s
    last_first_s = max(times[0] for times in came_s.values())
    begin_s, stop_s = last_first_s, max(first_end_s or 0.0, last_first_s)
    steps = [(end_s, chunks) for end_s, chunks in recording.steps if begin_s < end_s <= stop_s]
    tokens = sum(len(chunk.token_ids) for _, chunks in steps for chunk in chunks)
    return Timing(
        prefill_s=last_first_s - min(recording.added_s.values()),
        first_token_s=tuple(times[0] - recording.added_s[name] for name, times in came_s.items()),
        gaps_s=tuple(b - a for times in came_s.values() for a, b in itertools.pairwise(times)),
        decode_s=stop_s - begin_s,
        decode_steps=len(steps),
        decode_tokens=tokens,
        decode_context_tokens=_mean_context(shape, recording, begin_s, len(steps), tokens),
        cached_tokens=tuple(cached.get(name, 0) for name in came_s),
    )


def _mean_context(shape: Shape, recording: Recording, begin_s: float, num_steps: int, num_tokens: int) -> float:
    """A step attends to the prompts and to all that was put out before it; that grows evenly over the steady state."""
    if not num_steps:
        return 0.0
    before = sum(len(chunk.token_ids) for end_s, chunks in recording.steps if end_s <= begin_s for chunk in chunks)
    return shape.concurrency * shape.prompt_tokens + before + num_tokens * (num_steps - 1) / (2 * num_steps)


def _request(name: str, tokens: tuple[int, ...], output_tokens: int) -> Request:
    sampling = SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True)
    return Request(id=name, prompt_token_ids=tokens, sampling=sampling)


def _random_tokens(number: int, vocab_size: int, source: random.Random) -> tuple[int, ...]:
    return tuple(source.randrange(vocab_size) for _ in range(number))
