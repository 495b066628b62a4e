"""Text or token ids continued as they stand, whatever carries the request: HTTP, gRPC, a batch.

Used by `completions` (HTTP) and the others. Several prompts become several requests to the engine, side by side.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from uuid import uuid4

from seamount.core.requests import Chunk, FinishReason, Request
from seamount.core.sampling import SamplingParams
from seamount.server.answers import finish_reason, floor_logprob
from seamount.server.service import Service
from seamount.server.streaming import merge
from seamount.server.usage import UsageCounter
from seamount.server.wire.completions import CompletionChoice, CompletionLogprobs, CompletionRequest, CompletionResponse


async def prepare_completion(service: Service, body: CompletionRequest) -> CompletionAnswer:
    """Admit and encode a request; the engine begins when its answer is read, by `chunks` or by `whole`, once.

    Raises:
        SeamountError: the request cannot be served, or not now.
    """
    service.admit(body.model)
    service.check_generates()
    sampling = body.sampling(service.encoder.default_sampling)
    service.check_count(len(body.prompt), sampling.n)
    return CompletionAnswer(service, body, sampling, await _encode(service, body))


async def _encode(service: Service, body: CompletionRequest) -> list[tuple[int, ...]]:
    """Return the prompts' token ids, checked. One at a time, so that a client who leaves stops the rest."""
    context = service.facts().max_model_len
    limit = None if body.max_tokens is None else ("max_tokens", body.max_tokens)
    prompts: list[tuple[int, ...]] = []
    for item in body.prompt:
        if isinstance(item, str):
            token_ids = await service.encode(partial(service.encoder.encode_text, item, limit=context))
        else:
            token_ids = item
        service.check_prompt(token_ids, limit, param="prompt")
        prompts.append(token_ids)
    return prompts


@dataclass
class _Text:
    """One continuation, as far as it has come."""

    text: str = ""
    num_logprob_chars: int = 0
    logprobs: CompletionLogprobs = field(
        default_factory=lambda: CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
    )
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


class CompletionAnswer:
    """Turns the chunks of all prompts into the wire's answer; choice `prompt * n + index`.

    Attributes:
        envelope: fields that are the same in every chunk.
    """

    def __init__(
        self,
        service: Service,
        body: CompletionRequest,
        sampling: SamplingParams,
        prompts: list[tuple[int, ...]],
    ) -> None:
        self._service = service
        self._body = body
        self._n = sampling.n
        self._wants_logprobs = sampling.logprobs is not None
        name = f"cmpl-{uuid4().hex}"
        self.envelope: dict[str, Any] = {
            "id": name,
            "object": "text_completion",
            "created": service.now_s(),
            "model": body.model,
        }
        self._usage = UsageCounter(sum(len(token_ids) for token_ids in prompts))
        self._texts = [_Text() for _ in range(len(prompts) * sampling.n)]
        context = service.facts().max_model_len
        self._requests = [
            Request(
                id=f"{name}-{number}",
                prompt_token_ids=token_ids,
                # An explicit limit was checked against the context; only the API's default is ever lowered.
                sampling=replace(sampling, max_tokens=min(body.token_limit[1], context - len(token_ids))),
                skip_special_tokens=body.skip_special_tokens is not False,
            )
            for number, token_ids in enumerate(prompts)
        ]

    async def chunks(self) -> AsyncGenerator[CompletionResponse, None]:
        """Yield the answer as it comes; where the request asks for usage, that is the last chunk."""
        async with aclosing(merge(self._generated())) as chunks:
            async for prompt, chunk in chunks:
                self._usage.add(chunk, prompt)
                number = prompt * self._n + chunk.index
                logprobs = self._take_logprobs(self._texts[number], chunk)
                if chunk.text or logprobs or chunk.finish_reason:
                    yield self._chunk(number, chunk, logprobs)
        if self._body.wants_usage:
            yield CompletionResponse(**self.envelope, choices=[], usage=self._usage.usage())

    def _generated(self) -> list[AsyncGenerator[Chunk, None]]:
        shape_param = "response_format" if self._body.response_format is not None else None
        return [self._service.generate(request, shape_param=shape_param) for request in self._requests]

    async def whole(self) -> CompletionResponse:
        """Return the whole answer."""
        async with aclosing(merge(self._generated())) as chunks:
            async for prompt, chunk in chunks:
                self._usage.add(chunk, prompt)
                text = self._texts[prompt * self._n + chunk.index]
                text.text += chunk.text
                text.finish_reason, text.stop_reason = chunk.finish_reason, chunk.stop_reason
                _join(text.logprobs, self._take_logprobs(text, chunk))
        choices = [
            _choice(
                number,
                text.text,
                text.logprobs if self._wants_logprobs else None,
                text.finish_reason,
                text.stop_reason,
            )
            for number, text in enumerate(self._texts)
        ]
        return CompletionResponse(**self.envelope, choices=choices, usage=self._usage.usage())

    def _take_logprobs(self, text: _Text, chunk: Chunk) -> CompletionLogprobs | None:
        if not self._wants_logprobs or not chunk.logprobs:
            return None
        taken = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for position in chunk.logprobs:
            taken.tokens.append(position.chosen.text)
            taken.token_logprobs.append(floor_logprob(position.chosen.logprob))
            taken.top_logprobs.append({top.text: floor_logprob(top.logprob) for top in reversed(position.top)})
            taken.text_offset.append(text.num_logprob_chars)
            text.num_logprob_chars += len(position.chosen.text)
        return taken

    def _chunk(self, number: int, chunk: Chunk, logprobs: CompletionLogprobs | None) -> CompletionResponse:
        choice = _choice(number, chunk.text, logprobs, chunk.finish_reason, chunk.stop_reason)
        whole = CompletionResponse(**self.envelope, choices=[choice])
        if self._body.wants_usage:
            whole.usage = None  # set, so that it is written: null until the last chunk
        return whole


def _join(whole: CompletionLogprobs, part: CompletionLogprobs | None) -> None:
    if part is not None:
        whole.tokens += part.tokens
        whole.token_logprobs += part.token_logprobs
        whole.top_logprobs += part.top_logprobs
        whole.text_offset += part.text_offset


def _choice(
    number: int,
    text: str,
    logprobs: CompletionLogprobs | None,
    reason: FinishReason | None,
    stop_reason: str | int | None,
) -> CompletionChoice:
    choice = CompletionChoice(index=number, text=text, logprobs=logprobs, finish_reason=finish_reason(reason))
    if stop_reason is not None:
        choice.stop_reason = stop_reason
    return choice
