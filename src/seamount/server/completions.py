"""/v1/completions: text or token ids continued as they stand, whole or streamed.

Called by `app`. Several prompts become several requests to the engine, answered side by side.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from uuid import uuid4

from fastapi import Request as HttpRequest
from fastapi import Response

from seamount.core.requests import Chunk, FinishReason, Request
from seamount.core.sampling import SamplingParams

from .answers import error_event, finish_reason, floor_logprob, ignored_header, json_response, to_json
from .service import Service
from .streaming import DONE, EventStream, event, merge, while_connected
from .usage import UsageCounter
from .wire.completions import (
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    CompletionResponse,
)


async def complete(service: Service, body: CompletionRequest, http: HttpRequest) -> Response:
    """Continue prompts.

    Raises:
        SeamountError: the request cannot be served, or not now.
        ClientGoneError: the client went away before the answer began.
    """
    service.admit(body.model)
    sampling = body.sampling(service.encoder.default_sampling)
    prompts = await while_connected(http.receive, _encode(service, body))
    answer = _Answer(service, body, sampling, prompts)
    headers = ignored_header(body)
    if not body.stream:
        return json_response(await while_connected(http.receive, answer.whole()), headers)
    stream = EventStream(answer.events(), headers, error_event(answer.envelope))
    await stream.prime(http.receive)
    return stream


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


class _Answer:
    """Turns the chunks of all prompts into the wire's answer; choice `prompt * n + index`."""

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
        self._id = f"cmpl-{uuid4().hex}"
        self._created = service.now_s()
        self._usage = UsageCounter(sum(len(token_ids) for token_ids in prompts))
        self._texts = [_Text() for _ in range(len(prompts) * sampling.n)]
        context = service.facts().max_model_len
        self._requests = [
            Request(
                id=f"{self._id}-{number}",
                prompt_token_ids=token_ids,
                # An explicit limit was checked against the context; only the API's default is ever lowered.
                sampling=replace(sampling, max_tokens=min(body.token_limit[1], context - len(token_ids))),
                skip_special_tokens=body.skip_special_tokens is not False,
            )
            for number, token_ids in enumerate(prompts)
        ]

    @property
    def envelope(self) -> dict[str, Any]:
        """Fields that are the same in every chunk."""
        return {"id": self._id, "object": "text_completion", "created": self._created, "model": self._body.model}

    async def events(self) -> AsyncGenerator[str, None]:
        """Yield the answer as server-sent events."""
        async with aclosing(merge([self._service.generate(request) for request in self._requests])) as chunks:
            async for prompt, chunk in chunks:
                self._usage.add(chunk, prompt)
                number = prompt * self._n + chunk.index
                logprobs = self._take_logprobs(self._texts[number], chunk)
                if chunk.text or logprobs or chunk.finish_reason:
                    yield self._chunk_event(number, chunk, logprobs)
        if self._body.wants_usage:
            yield event(to_json(CompletionResponse(**self.envelope, choices=[], usage=self._usage.usage())))
        yield DONE

    async def whole(self) -> CompletionResponse:
        """Return the whole answer."""
        async with aclosing(merge([self._service.generate(request) for request in self._requests])) as chunks:
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

    def _chunk_event(self, number: int, chunk: Chunk, logprobs: CompletionLogprobs | None) -> str:
        choice = _choice(number, chunk.text, logprobs, chunk.finish_reason, chunk.stop_reason)
        whole = CompletionResponse(**self.envelope, choices=[choice])
        if self._body.wants_usage:
            whole.usage = None  # set, so that it is written: null until the last chunk
        return event(to_json(whole))


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
