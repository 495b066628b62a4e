"""The engine's loop: schedule, run, sample, emit. Synchronous and single-threaded; one per device.

Driven by `worker` (a process of its own) or by `LLM` (in the caller's process). Knows no protocol and no socket.
"""

from __future__ import annotations

import dataclasses
import itertools
import secrets
import time
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass

from torch import Tensor

from seamount.core.embedding import check_embedding, check_generates, check_length
from seamount.core.errors import (
    ContextTooLongError,
    EngineError,
    InvalidRequestError,
    SeamountError,
    error_to_fields,
)
from seamount.core.requests import Chunk, EngineStats, FinishReason, ModelFacts, PositionLogprobs, Request, TokenLogprob
from seamount.core.sampling import MAX_SEED
from seamount.models.prompt import PromptEncoder

from .grammar import Compiled, Constraint, Grammars
from .output import OutputText
from .pooling import Pool
from .runner import Pass, Runner
from .sampler import Sample, likeliest, sample_row
from .scheduler import Scheduler, Work
from .sequence import Sequence
from .speculative import Speculation

# How long a step waits for a grammar that is being compiled, where there is nothing else to do.
_PATIENCE_S = 0.02


@dataclass(slots=True)
class _Stream:
    """What the engine keeps for a sequence beside its scheduling state."""

    request: Request
    sequence: Sequence
    text: OutputText
    added_s: float
    admitted_s: float | None = None
    started: bool = False


@dataclass(frozen=True, slots=True)
class _Compiling:
    """A request that waits for its grammar."""

    request: Request
    max_tokens: int
    added_s: float
    grammar: Future[Compiled]


class EngineCore:
    """Continues the sequences of all requests in flight, one step at a time.

    It takes whatever it is given: how much may wait here is for its callers to bound, the server's admission and `LLM`.

    Args:
        runner: the network and its cache.
        scheduler: queue, running set and blocks.
        encoder: turns tokens into text.
        facts: what the model is.
        speculation: guesses tokens ahead; None does not.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        encoder: PromptEncoder,
        facts: ModelFacts,
        speculation: Speculation | None = None,
    ) -> None:
        self.facts = facts
        self._runner = runner
        self._scheduler = scheduler
        self._encoder = encoder
        self._speculation = speculation
        self._grammars = Grammars(encoder, facts.vocab_size)
        self._compiling: dict[str, _Compiling] = {}
        self._streams: dict[Sequence, _Stream] = {}
        self._num_prompt_tokens = 0
        self._num_generated_tokens = 0
        self._num_draft_tokens = 0
        self._num_accepted_tokens = 0
        self._num_steps = 0

    @property
    def idle(self) -> bool:
        """True when no request is in flight."""
        return not self._streams and not self._compiling

    @property
    def num_waiting(self) -> int:
        """Sequences that no step has begun yet."""
        return len(self._scheduler.waiting) + sum(one.request.sampling.n for one in self._compiling.values())

    def check(self, request: Request) -> int:
        """Return the most tokens that each sequence of the request may generate.

        Raises:
            InvalidRequestError: a token id does not exist, the prompt is empty, or the model is not made for this.
            ContextTooLongError: prompt plus `max_tokens` exceed the context.
        """
        prompt, limit = request.prompt_token_ids, self.facts.max_model_len
        if not prompt:
            raise InvalidRequestError("The prompt is empty.", param="prompt")
        if min(prompt) < 0 or max(prompt) >= self.facts.vocab_size:
            raise InvalidRequestError(
                f"The prompt holds a token id outside 0..{self.facts.vocab_size - 1}.", param="prompt"
            )
        for name in ("logit_bias", "stop_token_ids"):
            if any(token_id >= self.facts.vocab_size for token_id in getattr(request.sampling, name)):
                raise InvalidRequestError(f"{name} names a token id beyond {self.facts.vocab_size - 1}.", param=name)
        if request.embedding is not None:
            check_length(check_embedding(self.facts.embedding, request.embedding), len(prompt), param="prompt")
            return 0
        check_generates(self.facts.generates)
        asked = request.sampling.max_tokens
        if len(prompt) + (asked or 1) > limit:
            wanted = f" and {asked} tokens of output were asked for" if asked else ""
            raise ContextTooLongError(
                f"The prompt has {len(prompt)} tokens{wanted}; the context holds {limit}.",
                hint="Shorten the prompt or lower max_tokens.",
                param="max_tokens" if asked and len(prompt) < limit else "prompt",
            )
        return asked or limit - len(prompt)

    def add(self, request: Request) -> None:
        """Queue a request; one with a grammar that is not compiled yet is queued by a later step.

        Raises:
            RequestError: see `check`; or the grammar is known to be wrong.
        """
        max_tokens, now = self.check(request), time.monotonic()
        if request.sampling.grammar is None:
            self._enqueue(request, max_tokens, now, None)
            return
        grammar = self._grammars.prepare(request.sampling.grammar, request.cache_salt)
        if grammar.done():
            self._enqueue(request, max_tokens, now, grammar.result())
        else:
            self._compiling[request.id] = _Compiling(request, max_tokens, now, grammar)

    def _enqueue(self, request: Request, max_tokens: int, added_s: float, grammar: Compiled | None) -> None:
        seed = request.sampling.seed if request.sampling.seed is not None else secrets.randbelow(MAX_SEED)
        thinks = grammar is not None and self._grammars.thinks(request.prompt_token_ids)
        facts, wanted = self.facts.embedding, request.embedding
        sequences: list[Sequence] = []
        for index in range(request.sampling.n):
            leader = sequences[0] if sequences else None
            sequences.append(
                Sequence(
                    request.id,
                    index,
                    request.prompt_token_ids,
                    request.sampling,
                    seed,
                    max_tokens,
                    leader=leader,
                    constraint=None if grammar is None else Constraint(grammar, thinks=thinks),
                    pool=None if facts is None or wanted is None else Pool(facts, wanted.dimensions),
                )
            )
        self._scheduler.add(sequences, priority=request.priority, cache_salt=request.cache_salt)
        self._num_prompt_tokens += len(request.prompt_token_ids)
        for sequence in sequences:
            detokenizer = self._encoder.detokenizer(skip_special_tokens=request.skip_special_tokens)
            text = OutputText(detokenizer, request.sampling.stop)
            self._streams[sequence] = _Stream(request, sequence, text, added_s)

    def _take_compiled(self) -> list[Chunk]:
        """Queue the requests whose grammars have been compiled; return the ends of those that cannot be."""
        chunks: list[Chunk] = []
        for one in [one for one in self._compiling.values() if one.grammar.done()]:
            del self._compiling[one.request.id]
            try:
                self._enqueue(one.request, one.max_tokens, one.added_s, one.grammar.result())
            except SeamountError as error:
                fields = error_to_fields(error)
                chunks.append(Chunk(request_id=one.request.id, finish_reason="error", error=fields))
        return chunks

    def abort(self, request_id: str) -> list[Chunk]:
        """End all sequences of a request now; an unknown id is no error, since it may just have finished."""
        compiling = self._compiling.pop(request_id, None)
        if compiling is not None:
            indices = range(compiling.request.sampling.n)
            return [Chunk(request_id=request_id, index=index, finish_reason="abort") for index in indices]
        found = [stream for stream in self._streams.values() if stream.request.id == request_id]
        return [self._finish(stream, "abort") for stream in found]

    def step(self) -> list[Chunk]:
        """Run one step; return what it added, a chunk per token."""
        ended = self._take_compiled()
        work = self._scheduler.schedule()
        if not work:
            if self._compiling and not ended:
                wait([one.grammar for one in self._compiling.values()], _PATIENCE_S, FIRST_COMPLETED)
            return ended
        now = time.monotonic()
        for item in work:
            stream = self._streams[item.sequence]
            stream.admitted_s = stream.admitted_s or now
        sampling = [item for item in work if item.samples]
        ran = self._runner.run(work)
        self._scheduler.advance(work)
        self._num_steps += 1
        self._num_draft_tokens += sum(item.num_drafts for item in work)
        chunks, num_accepted = self._sample(sampling, ran.logits)
        chunks += self._pool(work, ran)
        self._num_accepted_tokens += num_accepted
        self._scheduler.measured(work, time.monotonic() - now)
        if self._speculation is not None:
            self._speculation.follow(work, ran)
            self._speculation.measured(work, num_accepted, time.monotonic() - now)
        # A request of which one answer failed is given up whole, since its caller is told so and reads no more.
        failed = {chunk.request_id: None for chunk in chunks if chunk.error is not None}
        return ended + chunks + [chunk for request_id in failed for chunk in self.abort(request_id)]

    def stats(self) -> EngineStats:
        """Counters since the start, and the current load."""
        scheduler = self._scheduler
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=self.num_waiting,
            num_blocks=scheduler.pool.num_blocks,
            num_free_blocks=scheduler.pool.num_free,
            num_prompt_tokens=self._num_prompt_tokens,
            num_generated_tokens=self._num_generated_tokens,
            num_prefix_queried_tokens=scheduler.num_queried_tokens,
            num_prefix_hit_tokens=scheduler.num_hit_tokens,
            num_preemptions=scheduler.num_preemptions,
            num_draft_tokens=self._num_draft_tokens,
            num_accepted_tokens=self._num_accepted_tokens,
            num_steps=self._num_steps,
        )

    def _sample(self, work: list[Work], logits: Tensor) -> tuple[list[Chunk], int]:
        """Choose a token for each piece of work, and one more for as long as it was guessed.

        Args:
            logits: a row for each piece and one for each of its guesses, in order.

        Returns:
            A chunk for each token, and how many guesses were right.
        """
        chunks: list[Chunk] = []
        if not work:
            return chunks, 0
        rows, best = logits.unbind(), likeliest(logits)
        eos_token_ids = self._encoder.eos_token_ids
        first_rows = itertools.accumulate((1 + item.num_drafts for item in work), initial=0)
        going = list(zip(work, first_rows, strict=False))
        place, num_accepted = 0, 0
        while going:
            for item, first in going:
                stream, row = self._streams[item.sequence], first + place
                found = sample_row(rows[row], item.sequence, eos_token_ids, best[row])
                chunks.append(self._extend(stream, found) if found else self._fail(stream, _not_a_number()))
            going = [(item, row) for item, row in going if _guessed(item, place)]
            for item, _ in going:
                self._scheduler.accept(item.sequence)
            num_accepted += len(going)
            place += 1
        for item in work:
            item.sequence.draft_token_ids = []
        return chunks, num_accepted

    def _pool(self, work: list[Work], ran: Pass) -> list[Chunk]:
        """Hand hidden states to the prompts whose embeddings they make; return the embeddings that are complete."""
        chunks: list[Chunk] = []
        end = 0
        for item, first in zip(work, ran.first_positions, strict=True):
            start, end = end, end + item.num_new + item.num_drafts
            sequence = item.sequence
            if sequence.pool is None:
                continue
            sequence.pool.add(first, ran.hidden[start:end])
            if sequence.num_pending:
                continue
            stream, embedding = self._streams[sequence], sequence.pool.embedding()
            if embedding is None:
                chunks.append(self._fail(stream, _not_a_number()))
            else:
                chunks.append(dataclasses.replace(self._finish(stream, "stop"), embedding=embedding))
        return chunks

    def _extend(self, stream: _Stream, found: Sample) -> Chunk:
        sequence, params = stream.sequence, stream.sequence.sampling
        sequence.token_ids.append(found.token_id)
        self._num_generated_tokens += 1
        may_stop = sequence.num_output_tokens >= params.min_tokens
        logprobs = self._logprobs(found)
        constraint = sequence.constraint
        # Where a grammar let an end be chosen, it is one.
        is_eos = found.token_id in self._encoder.eos_token_ids and (constraint is not None or not params.ignore_eos)
        if (is_eos and constraint is not None) or (may_stop and (is_eos or found.token_id in params.stop_token_ids)):
            reason = None if is_eos else found.token_id
            return self._finish(stream, "stop", (found.token_id,), logprobs, stop_reason=reason)
        try:
            complete = constraint is not None and constraint.accept(found.token_id)
        except InvalidRequestError as error:
            return self._fail(stream, error)
        text, stopped = stream.text.push([found.token_id], may_stop=may_stop)
        if stopped is not None or complete:
            return self._finish(stream, "stop", (found.token_id,), logprobs, text, stopped)
        if sequence.num_output_tokens >= sequence.max_tokens:
            return self._finish(stream, "length", (found.token_id,), logprobs, text)
        return self._chunk(stream, (found.token_id,), logprobs, text)

    def _fail(self, stream: _Stream, error: SeamountError) -> Chunk:
        """End a sequence that cannot go on; the others of the batch do."""
        return dataclasses.replace(self._finish(stream, "error"), error=error_to_fields(error))

    def _finish(
        self,
        stream: _Stream,
        reason: FinishReason,
        token_ids: tuple[int, ...] = (),
        logprobs: tuple[PositionLogprobs, ...] = (),
        text: str = "",
        stop_reason: str | int | None = None,
    ) -> Chunk:
        self._scheduler.remove(stream.sequence)
        del self._streams[stream.sequence]
        if not isinstance(stop_reason, str):
            rest, stopped = stream.text.flush(may_stop=reason in ("stop", "length"))
            text += rest
            if stopped is not None:
                reason, stop_reason = "stop", stopped
        return self._chunk(stream, token_ids, logprobs, text, reason, stop_reason)

    def _chunk(
        self,
        stream: _Stream,
        token_ids: tuple[int, ...],
        logprobs: tuple[PositionLogprobs, ...],
        text: str,
        finish_reason: FinishReason | None = None,
        stop_reason: str | int | None = None,
    ) -> Chunk:
        first = not stream.started
        stream.started = True
        timed = first and stream.admitted_s is not None
        return Chunk(
            request_id=stream.request.id,
            index=stream.sequence.index,
            token_ids=token_ids,
            text=text,
            logprobs=logprobs,
            finish_reason=finish_reason,
            stop_reason=stop_reason,
            num_cached_tokens=stream.sequence.num_cached if first else None,
            queue_s=(stream.admitted_s or 0.0) - stream.added_s if timed else None,
            prefill_s=time.monotonic() - (stream.admitted_s or 0.0) if timed else None,
        )

    def _logprobs(self, found: Sample) -> tuple[PositionLogprobs, ...]:
        if found.logprob is None:
            return ()
        text = self._encoder.token_text
        chosen = TokenLogprob(found.token_id, found.logprob, text(found.token_id))
        return (PositionLogprobs(chosen, tuple(TokenLogprob(i, value, text(i)) for i, value in found.top)),)


def _not_a_number() -> EngineError:
    return EngineError(
        "The model's output is not a number (NaN or infinity).",
        hint="The checkpoint may be damaged, or overflow in float16: try dtype bfloat16 or float32.",
    )


def _guessed(item: Work, place: int) -> bool:
    """Whether the sequence goes on, and the token it was just given is its guess number `place`."""
    sequence = item.sequence
    if sequence.finished or place >= item.num_drafts:
        return False
    return sequence.token_ids[-1] == sequence.draft_token_ids[place]
