"""An engine without a network: it answers from a script, byte for byte as it is told.

Used by tests of everything above the engine, by the export of the OpenAPI document, and by people who build clients and
want a server that answers at once. It keeps the whole contract of `core.ports.Engine` (stop strings, limits, counters,
aborts, a dying worker) and must not know torch, checkpoints or HTTP.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from seamount.core.embedding import check_embedding, check_generates, check_length
from seamount.core.errors import (
    ContextTooLongError,
    EngineError,
    InvalidRequestError,
    SeamountError,
    WorkerDiedError,
)
from seamount.core.requests import (
    Chunk,
    EngineState,
    EngineStats,
    FinishReason,
    ModelFacts,
    PositionLogprobs,
    Request,
    TokenLogprob,
)

from .fake_encoder import ByteEncoder, Text

Reply = Callable[[Request, int], Sequence[int]]
"""From a request and a sequence's index to the token ids to answer with."""
Embed = Callable[[Request], Sequence[float]]
"""From a request to the numbers of its embedding."""

FAKE_FACTS = ModelFacts(
    name="fake",
    family="fake",
    num_parameters=0,
    num_active_parameters=0,
    dtype="float32",
    device="cpu",
    vocab_size=ByteEncoder.vocab_size,
    max_model_len=4096,
    num_blocks=1024,
    block_size=16,
    cache_bytes_per_token=1,
    weight_bytes=0,
    load_s=0.0,
)


def echo(request: Request, index: int) -> Sequence[int]:
    """Answer with the prompt."""
    return request.prompt_token_ids


def say(*replies: str) -> Reply:
    """Answer with these texts, one per sequence index, in turn."""
    encoder = ByteEncoder()
    return lambda request, index: encoder.encode_text(replies[index % len(replies)], add_special_tokens=False)


def count_tokens(request: Request) -> Sequence[float]:
    """Embed a prompt as its first and its last token id, and its length."""
    ids = request.prompt_token_ids
    return [float(ids[0]), float(ids[-1]), float(len(ids))]


async def _no_pause() -> None:
    await asyncio.sleep(0)


class FakeEngine:
    """Implements `core.ports.Engine` over a script.

    Args:
        reply: what to answer; an end-of-sequence token is added.
        text: makes the text of tokens; the bytes of `ByteEncoder` when not given.
        pause: awaited before each token: a test holds a stream with it, at the very token it wants.
        fail_after_tokens: after this many tokens of a sequence the request fails with `failure`.
        failure: the error to fail with.
        start_failure: `start` raises it, and the engine is then "failed".
        num_cached_tokens: prompt tokens that every first chunk says were found in the prefix cache.
        facts: what `start` returns; embeddings are made where it says that they are.
        embed: what an embedding holds.
    """

    def __init__(
        self,
        reply: Reply = echo,
        *,
        text: Text | None = None,
        pause: Callable[[], Awaitable[None]] = _no_pause,
        fail_after_tokens: int | None = None,
        failure: SeamountError | None = None,
        start_failure: SeamountError | None = None,
        num_cached_tokens: int = 0,
        facts: ModelFacts = FAKE_FACTS,
        embed: Embed = count_tokens,
    ) -> None:
        self._reply = reply
        self._embed = embed
        self._text = text or ByteEncoder()
        self._pause = pause
        self._fail_after_tokens = fail_after_tokens
        self._failure = failure or EngineError("The scripted failure happened.")
        self._start_failure = start_failure
        self._num_cached_tokens = num_cached_tokens
        self._facts = facts
        self._state: EngineState = "starting"
        self._restarted = asyncio.Event()
        self._restarted.set()
        self._running: dict[str, _Running] = {}
        self._stats = EngineStats(num_blocks=facts.num_blocks)
        self.aborted: list[str] = []
        """Ids of requests whose generator was closed before their end, in order."""

    def state(self) -> EngineState:
        """Return where the engine is in its life."""
        return self._state

    async def start(self) -> ModelFacts:
        """Become ready, or raise the scripted start failure."""
        if self._start_failure is not None:
            self._state = "failed"
            raise self._start_failure
        self._state = "ready"
        return self._facts

    def kill_worker(self) -> None:
        """Let the imagined worker die: requests in flight fail, and new ones wait."""
        self._state = "restarting"
        self._restarted.clear()
        self._end_all(WorkerDiedError("The engine's worker ended while the request ran.", retry_after=1))

    def restart_worker(self) -> None:
        """Bring the imagined worker back."""
        self._state = "ready"
        self._restarted.set()
        self._count(num_worker_restarts=1)

    async def generate(self, request: Request) -> AsyncGenerator[Chunk, None]:
        """Yield the scripted chunks: one token each, the sequences in turn."""
        await self._restarted.wait()
        self._check(request)
        run = _Running(num_blocks=-(-len(request.prompt_token_ids) // self._facts.block_size))
        self._running[request.id] = run
        self._count(num_prompt_tokens=len(request.prompt_token_ids))
        finished = False
        try:
            made = self._chunks(request, run) if request.embedding is None else self._embedding(request, run)
            async with aclosing(made) as chunks:
                async for chunk in chunks:
                    yield chunk
            finished = True
        except SeamountError:
            finished = True
            raise
        finally:
            del self._running[request.id]
            if not finished:
                self.aborted.append(request.id)

    async def _chunks(self, request: Request, run: _Running) -> AsyncGenerator[Chunk, None]:
        sequences = [
            _Sequence(request, index, self._reply(request, index), self._text) for index in range(request.sampling.n)
        ]
        live = list(sequences)
        while live:
            for sequence in list(live):
                await _first_of(self._pause(), run.ended)
                if run.ended.is_set():
                    if run.error is not None:
                        raise run.error
                    yield Chunk(request_id=request.id, index=sequence.index, finish_reason="abort")
                    live.remove(sequence)
                    continue
                if sequence.num_tokens == self._fail_after_tokens:
                    raise self._failure
                chunk = sequence.step()
                self._count(num_generated_tokens=1, num_steps=1)
                if sequence.num_tokens == 1:
                    chunk = replace(chunk, num_cached_tokens=self._num_cached_tokens, queue_s=0.0, prefill_s=0.0)
                if chunk.finish_reason is not None:
                    live.remove(sequence)
                yield chunk

    async def _embedding(self, request: Request, run: _Running) -> AsyncGenerator[Chunk, None]:
        await _first_of(self._pause(), run.ended)
        if run.error is not None:
            raise run.error
        if run.ended.is_set():
            yield Chunk(request_id=request.id, finish_reason="abort")
            return
        if self._fail_after_tokens == 0:
            raise self._failure
        self._count(num_steps=1)
        numbers = self._embed(request)[: request.embedding.dimensions if request.embedding else None]
        yield Chunk(
            request_id=request.id,
            finish_reason="stop",
            num_cached_tokens=self._num_cached_tokens,
            queue_s=0.0,
            prefill_s=0.0,
            embedding=struct.pack(f"<{len(numbers)}f", *numbers),
        )

    async def stats(self) -> EngineStats:
        """Return exact counters."""
        used = sum(run.num_blocks for run in self._running.values())
        return replace(self._stats, num_running=len(self._running), num_free_blocks=self._facts.num_blocks - used)

    async def close(self) -> None:
        """End every request with "abort"."""
        self._state = "closed"
        self._restarted.set()
        self._end_all(None)

    def _end_all(self, error: SeamountError | None) -> None:
        for run in self._running.values():
            run.error = error
            run.ended.set()

    def _check(self, request: Request) -> None:
        if self._state != "ready":
            raise EngineError(f"The engine is {self._state}.", retry_after=1)
        length = len(request.prompt_token_ids)
        if not length:
            raise InvalidRequestError("The prompt is empty.", param="prompt")
        if not all(0 <= token_id < self._facts.vocab_size for token_id in request.prompt_token_ids):
            raise InvalidRequestError("A token id lies outside the vocabulary.", param="prompt")
        if request.embedding is not None:
            check_length(check_embedding(self._facts.embedding, request.embedding), length, param="prompt")
            return
        check_generates(self._facts.generates)
        if length >= self._facts.max_model_len:
            raise ContextTooLongError(f"The prompt has {length} tokens; the context has {self._facts.max_model_len}.")

    def _count(self, **more: int) -> None:
        self._stats = replace(self._stats, **{name: getattr(self._stats, name) + n for name, n in more.items()})


@dataclass
class _Running:
    num_blocks: int
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    error: SeamountError | None = None


class _Sequence:
    """One scripted continuation and its text state."""

    def __init__(self, request: Request, index: int, reply: Sequence[int], text: Text) -> None:
        self.index = index
        self.num_tokens = 0
        self._request = request
        self._tokens = [*reply, text.eos_token_ids[0]]
        self._text = text
        self._detokenizer = text.detokenizer(skip_special_tokens=request.skip_special_tokens)
        self._held = ""

    def step(self) -> Chunk:
        token_id = self._tokens[self.num_tokens]
        self.num_tokens += 1
        sampling = self._request.sampling
        room = sampling.max_tokens
        reason: FinishReason | None = None
        stop: str | int | None = None
        self._held += self._detokenizer.push([token_id])
        if token_id in sampling.stop_token_ids:
            reason, stop = "stop", token_id
        elif self.num_tokens == len(self._tokens):
            reason = "stop"
        elif room is not None and self.num_tokens >= room:
            reason = "length"
        if reason is not None:
            self._held += self._detokenizer.flush()
        found = [(self._held.find(word), word) for word in sampling.stop if word in self._held]
        if found:
            at, stop = min(found)
            reason, self._held = "stop", self._held[:at]
        keep = 0 if reason else max((_overlap(self._held, word) for word in sampling.stop), default=0)
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return Chunk(
            request_id=self._request.id,
            index=self.index,
            token_ids=(token_id,),
            text=text,
            logprobs=self._logprobs(token_id),
            finish_reason=reason,
            stop_reason=stop,
        )

    def _logprobs(self, token_id: int) -> tuple[PositionLogprobs, ...]:
        count = self._request.sampling.logprobs
        if count is None:
            return ()
        near = [(token_id + offset) % self._text.vocab_size for offset in range(max(count, 1))]
        entries = tuple(TokenLogprob(i, -0.5 - rank, self._text.token_text(i)) for rank, i in enumerate(near))
        return (PositionLogprobs(entries[0], entries[:count]),)


def _overlap(text: str, word: str) -> int:
    """Return how many last characters of `text` could be the beginning of `word`."""
    return next((n for n in range(min(len(word) - 1, len(text)), 0, -1) if text.endswith(word[:n])), 0)


async def _first_of(pause: Awaitable[None], ended: asyncio.Event) -> None:
    """Wait for the pause, or until the request is ended from outside."""
    waiting = [asyncio.ensure_future(pause), asyncio.ensure_future(ended.wait())]
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
