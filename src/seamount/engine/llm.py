"""`LLM`: a model in the caller's own process, for scripts, tests, evaluation and the terminal.

It drives the same engine as the server, without the worker process and without asyncio. Not safe to use from several
threads at once.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from seamount.core.embedding import EmbeddingParams, floats_of
from seamount.core.errors import EngineError, InvalidRequestError, error_from_fields
from seamount.core.requests import Chunk, Completion, EngineStats, FinishReason, ModelFacts, PositionLogprobs, Request
from seamount.core.sampling import SamplingParams
from seamount.core.settings import EngineConfig, config_error
from seamount.models.prompt import EncodedPrompt
from seamount.models.reasoning import ReasoningParser

from .build import Progress, build_engine

Prompt = str | Sequence[int]
Message = Mapping[str, Any]

# How many sequences a long list of prompts keeps waiting, so that the engine never runs dry and its queue stays short.
_SMALL_QUEUE = 64


@dataclass(frozen=True, kw_only=True)
class Delta:
    """What one step added to a streamed continuation.

    Attributes:
        index: which of the `n` continuations.
        text: new text; `reasoning` and `content` are its parts.
        token_ids: new tokens.
        finish_reason: set on the last delta of the continuation.
    """

    index: int
    text: str
    reasoning: str
    content: str
    token_ids: tuple[int, ...]
    logprobs: tuple[PositionLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    num_cached_tokens: int | None = None


class LLM:
    """A loaded model that continues prompts.

    Args:
        model: folder of a checkpoint, or the name of an embedded model (`seamount-tiny`).
        on_progress: called while loading with the stage, bytes done and bytes in all.
        options: fields of `core.settings.EngineConfig`: dtype, max_model_len, device, ...

    Raises:
        ConfigError: an option is unknown or out of range.
        CheckpointError: the folder cannot be used.
        OutOfMemoryError: model or context do not fit; the hint says what would.
    """

    def __init__(self, model: str = "seamount-tiny", *, on_progress: Progress | None = None, **options: Any) -> None:
        try:
            config = EngineConfig(model=str(model), **options)
        except ValidationError as cause:
            names = ", ".join(name for name in EngineConfig.model_fields if name != "model")
            raise config_error(cause, hint=f"LLM takes these options: {names}.") from cause
        self._engine, self.prompt_encoder = build_engine(config, on_progress)
        self._ids = itertools.count()

    @property
    def facts(self) -> ModelFacts:
        """What the model is and how it was loaded."""
        return self._engine.facts

    def stats(self) -> EngineStats:
        """Counters since loading, and how full the cache is."""
        return self._engine.stats()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[Completion]:
        """Continue one or many prompts, batched.

        Args:
            prompts: text, token ids, or a list of either.
            sampling: for all prompts, or one for each; the default is `SamplingParams()`.
            on_progress: called with finished and total continuations.

        Returns:
            Completions in the order of the prompts, `sampling.n` for each.

        Raises:
            RequestError: a prompt cannot be served; nothing is left running.
        """
        encoded = [self._encode(prompt) for prompt in _as_list(prompts)]
        if not isinstance(sampling, Sequence):
            return self._run(encoded, [_checked(sampling)] * len(encoded), on_progress)
        if len(sampling) != len(encoded):
            raise InvalidRequestError(
                f"There are {len(encoded)} prompts and {len(sampling)} sampling parameters.", param="sampling"
            )
        return self._run(encoded, [_checked(one) for one in sampling], on_progress)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[Completion]:
        """Answer one conversation, or a list of them, through the checkpoint's chat template.

        Args:
            messages: OpenAI-style messages with `role` and `content`.
            tools: OpenAI-style tool definitions, shown to the model by the template.
            chat_template_kwargs: template switches, for instance `{"thinking": False}`.

        Returns:
            As `generate`; `reasoning` and `content` hold the two parts of each answer.
        """
        if not isinstance(messages, Sequence):
            raise InvalidRequestError("messages must be a list of messages, or a list of such lists.", param="messages")
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else list(messages)
        encoded = [
            self.prompt_encoder.encode_chat(conversation, tools=tools, template_kwargs=chat_template_kwargs)  # type: ignore[arg-type]
            for conversation in conversations
        ]
        return self._run(encoded, [_checked(sampling)] * len(encoded), on_progress)

    def embed(self, texts: Prompt | Sequence[Prompt], *, dimensions: int | None = None) -> list[list[float]]:
        """Return the embeddings of one or many texts, batched, by a model that is made for them.

        Args:
            texts: text, token ids, or a list of either.
            dimensions: keep this many leading numbers, where the model was trained for that.

        Raises:
            InvalidRequestError: the model is not made for embeddings.
            ContextTooLongError: a text is longer than the model takes; nothing is cut off.
        """
        self._require_idle()
        params = EmbeddingParams(dimensions=dimensions)
        requests = [self._request(self._encode(text), SamplingParams(), params) for text in _as_list(texts)]
        found: dict[str, list[float]] = {}
        with closing(self._chunks(requests)) as chunks:
            for chunk in chunks:
                if chunk.error is not None:
                    raise error_from_fields(chunk.error)
                found[chunk.request_id] = floats_of(chunk.embedding or b"")
        return [found[request.id] for request in requests]

    def stream(self, prompt: Prompt, sampling: SamplingParams | None = None) -> Iterator[Delta]:
        """Continue one prompt, yielding what each step adds; closing the iterator stops the work."""
        return self._stream(self._encode(prompt), _checked(sampling))

    def stream_chat(
        self,
        messages: Sequence[Message],
        sampling: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Iterator[Delta]:
        """Answer one conversation, yielding what each step adds; closing the iterator stops the work."""
        encoded = self.prompt_encoder.encode_chat(messages, tools=tools, template_kwargs=chat_template_kwargs)
        return self._stream(encoded, _checked(sampling))

    def _encode(self, prompt: Prompt) -> EncodedPrompt:
        """A bare prompt has no template, so it never starts inside the reasoning part."""
        token_ids = self.prompt_encoder.encode_text(prompt) if isinstance(prompt, str) else _token_ids(prompt)
        return EncodedPrompt(token_ids=token_ids, text="", starts_in_reasoning=False)

    def _stream(self, prompt: EncodedPrompt, sampling: SamplingParams) -> Iterator[Delta]:
        self._require_idle()
        request = self._request(prompt, sampling)
        parsers = [self._parser(prompt) for _ in range(sampling.n)]
        unfinished = sampling.n
        try:
            self._engine.add(request)
            while unfinished:
                for chunk in self._engine.step():
                    unfinished -= chunk.finish_reason is not None
                    yield _delta(chunk, parsers[chunk.index])
        finally:
            self._engine.abort(request.id)

    def _run(
        self,
        prompts: list[EncodedPrompt],
        samplings: list[SamplingParams],
        on_progress: Callable[[int, int], None] | None,
    ) -> list[Completion]:
        self._require_idle()
        requests = [self._request(prompt, sampling) for prompt, sampling in zip(prompts, samplings, strict=True)]
        gathered = {
            request.id: [_Gathering(prompt, self._parser(prompt), index) for index in range(request.sampling.n)]
            for request, prompt in zip(requests, prompts, strict=True)
        }
        finished, total = 0, sum(sampling.n for sampling in samplings)
        with closing(self._chunks(requests)) as chunks:
            for chunk in chunks:
                gathered[chunk.request_id][chunk.index].add(chunk)
                if chunk.finish_reason is not None:
                    finished += 1
                    if on_progress is not None:
                        on_progress(finished, total)
        return [gathering.completion() for row in gathered.values() for gathering in row]

    def _chunks(self, requests: list[Request]) -> Generator[Chunk, None, None]:
        """Yield what is added to requests until each has ended; closed before, nothing is left running."""
        waiting, unfinished = iter(requests), sum(request.sampling.n for request in requests)
        try:
            while unfinished:
                while self._engine.num_waiting < _SMALL_QUEUE and (request := next(waiting, None)) is not None:
                    self._engine.add(request)
                for chunk in self._engine.step():
                    unfinished -= chunk.finish_reason is not None
                    yield chunk
        finally:
            for request in requests:
                self._engine.abort(request.id)

    def _require_idle(self) -> None:
        """Steps go to whoever asks for them, so two askers would take each other's tokens."""
        if not self._engine.idle:
            raise EngineError("A stream of this LLM is still open.", hint="Read it to its end, or close it, first.")

    def _request(
        self, prompt: EncodedPrompt, sampling: SamplingParams, embedding: EmbeddingParams | None = None
    ) -> Request:
        name = f"llm-{next(self._ids)}"
        request = Request(id=name, prompt_token_ids=prompt.token_ids, sampling=sampling, embedding=embedding)
        self._engine.check(request)
        return request

    def _parser(self, prompt: EncodedPrompt) -> ReasoningParser:
        return self.prompt_encoder.reasoning_parser(starts_in_reasoning=prompt.starts_in_reasoning)


class _Gathering:
    """Collects the chunks of one sequence into a Completion."""

    def __init__(self, prompt: EncodedPrompt, parser: ReasoningParser, index: int) -> None:
        self._prompt, self._parser, self._index = prompt, parser, index
        self._deltas: list[Delta] = []

    def add(self, chunk: Chunk) -> None:
        self._deltas.append(_delta(chunk, self._parser))

    def completion(self) -> Completion:
        last = self._deltas[-1]
        reasoning = "".join(d.reasoning for d in self._deltas)
        logprobs = tuple(entry for d in self._deltas for entry in d.logprobs)
        return Completion(
            prompt_token_ids=self._prompt.token_ids,
            token_ids=tuple(token_id for d in self._deltas for token_id in d.token_ids),
            text="".join(d.text for d in self._deltas),
            finish_reason=last.finish_reason or "error",
            stop_reason=last.stop_reason,
            logprobs=logprobs or None,
            index=self._index,
            num_cached_tokens=self._deltas[0].num_cached_tokens or 0,
            reasoning=reasoning or None,
            content="".join(d.content for d in self._deltas),
        )


def _delta(chunk: Chunk, parser: ReasoningParser) -> Delta:
    if chunk.error is not None:
        raise error_from_fields(chunk.error)
    parts = [parser.push(chunk.text)]
    if chunk.finish_reason is not None:
        parts.append(parser.flush())
    return Delta(
        index=chunk.index,
        text=chunk.text,
        reasoning="".join(part.reasoning for part in parts),
        content="".join(part.content for part in parts),
        token_ids=chunk.token_ids,
        logprobs=chunk.logprobs,
        finish_reason=chunk.finish_reason,
        stop_reason=chunk.stop_reason,
        num_cached_tokens=chunk.num_cached_tokens,
    )


def _checked(sampling: SamplingParams | None) -> SamplingParams:
    if sampling is not None and not isinstance(sampling, SamplingParams):
        raise InvalidRequestError(
            f"sampling is {type(sampling).__name__}; it must be SamplingParams.", param="sampling"
        )
    return sampling or SamplingParams()


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A single prompt, text or token ids, becomes a list of one."""
    if isinstance(prompts, bytes) or not isinstance(prompts, Sequence):
        raise InvalidRequestError(
            f"prompts is {type(prompts).__name__}; it must be text, token ids, or a list of either."
        )
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _token_ids(prompt: Sequence[int]) -> tuple[int, ...]:
    """Check a prompt of token ids; whole numbers of other libraries are welcome, fractions and booleans are not."""
    try:
        if isinstance(prompt, bytes) or any(isinstance(token_id, bool) for token_id in prompt):
            raise TypeError
        return tuple(operator.index(token_id) for token_id in prompt)
    except TypeError as cause:
        raise InvalidRequestError("A prompt must be text or a list of whole token ids.", param="prompt") from cause
