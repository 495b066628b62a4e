"""/v1/chat/completions: from messages to an answer, whole or streamed.

Called by `app`. It knows the wire's words and the service; the engine's text is split here into reasoning and content.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from uuid import uuid4

from fastapi import Request as HttpRequest
from fastapi import Response

from seamount.core.errors import InvalidRequestError
from seamount.core.requests import Chunk, PositionLogprobs, Request, TokenLogprob
from seamount.models.reasoning import Delta, ReasoningParser

from .answers import error_event, finish_reason, floor_logprob, ignored_header, json_response, to_json
from .service import Service
from .streaming import DONE, EventStream, event, while_connected
from .usage import ReasoningCount, UsageCounter
from .wire.chat import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    ChatRequest,
    ChatResponse,
    ContentLogprob,
    TopLogprob,
)


async def chat(service: Service, body: ChatRequest, http: HttpRequest) -> Response:
    """Answer a chat.

    Raises:
        SeamountError: the request cannot be served, or not now.
        ClientGoneError: the client went away before the answer began.
    """
    service.admit(body.model)
    if not service.encoder.has_chat_template:
        raise InvalidRequestError(
            "This model has no chat template, so it cannot chat.", hint="Use /v1/completions.", param="messages"
        )
    sampling = body.sampling(service.encoder.default_sampling)
    encode = partial(
        service.encoder.encode_chat,
        body.template_messages(),
        template_kwargs=body.chat_template_kwargs,
        limit=service.facts().max_model_len,
    )
    prompt = await while_connected(http.receive, service.encode(encode))
    service.check_prompt(prompt.token_ids, body.token_limit, param="messages")
    request = Request(
        id=f"chatcmpl-{uuid4().hex}",
        prompt_token_ids=prompt.token_ids,
        sampling=sampling,
        skip_special_tokens=body.skip_special_tokens is not False,
    )
    answer = _Answer(service, body, request, starts_in_reasoning=prompt.starts_in_reasoning)
    headers = ignored_header(body)
    if not body.stream:
        return json_response(await while_connected(http.receive, answer.whole()), headers)
    stream = EventStream(answer.events(), headers, error_event(answer.envelope))
    await stream.prime(http.receive)
    return stream


@dataclass
class _Choice:
    """One of `n` answers, as far as it has come."""

    parser: ReasoningParser
    counted: ReasoningCount = field(default_factory=ReasoningCount)
    has_begun: bool = False
    reasoning: str = ""
    content: str = ""
    logprobs: list[ContentLogprob] = field(default_factory=list)
    last: Chunk | None = None


class _Answer:
    """Turns one request's chunks into the wire's answer."""

    def __init__(self, service: Service, body: ChatRequest, request: Request, *, starts_in_reasoning: bool) -> None:
        self._service = service
        self._body = body
        self._request = request
        self._usage = UsageCounter(len(request.prompt_token_ids), counts_reasoning=True)
        self._choices = [
            _Choice(service.encoder.reasoning_parser(starts_in_reasoning=starts_in_reasoning))
            for _ in range(request.sampling.n)
        ]
        self._created = service.now_s()

    @property
    def envelope(self) -> dict[str, Any]:
        """Fields that are the same in every chunk."""
        return {
            "id": self._request.id,
            "object": "chat.completion.chunk",
            "created": self._created,
            "model": self._body.model,
        }

    async def events(self) -> AsyncGenerator[str, None]:
        """Yield the answer as server-sent events."""
        async with aclosing(self._service.generate(self._request)) as chunks:
            async for chunk in chunks:
                choice = self._choices[chunk.index]
                if not choice.has_begun:
                    choice.has_begun = True
                    yield self._chunk_event(chunk.index, ChatDelta(role="assistant", content=""), [], None)
                delta, logprobs = self._take(chunk)
                if delta.reasoning or delta.content or logprobs or chunk.finish_reason:
                    yield self._chunk_event(chunk.index, _wire_delta(delta), logprobs, chunk)
        if self._body.wants_usage:
            yield event(to_json(ChatChunk(**self.envelope, choices=[], usage=self._usage.usage())))
        yield DONE

    async def whole(self) -> ChatResponse:
        """Return the whole answer."""
        async with aclosing(self._service.generate(self._request)) as chunks:
            async for chunk in chunks:
                delta, logprobs = self._take(chunk)
                choice = self._choices[chunk.index]
                choice.reasoning += delta.reasoning
                choice.content += delta.content
                choice.logprobs += logprobs
                choice.last = chunk
        return ChatResponse(
            **{**self.envelope, "object": "chat.completion"},
            choices=[self._whole_choice(index, choice) for index, choice in enumerate(self._choices)],
            usage=self._usage.usage(),
        )

    def _take(self, chunk: Chunk) -> tuple[Delta, list[ContentLogprob]]:
        """Count a chunk and split its text."""
        choice = self._choices[chunk.index]
        delta = choice.parser.push(chunk.text)
        if chunk.finish_reason is not None:
            rest = choice.parser.flush()
            delta = Delta(delta.reasoning + rest.reasoning, delta.content + rest.content)
        self._usage.add(chunk)
        self._usage.num_reasoning += choice.counted.add(
            len(chunk.token_ids), reasoning=bool(delta.reasoning), content=bool(delta.content)
        )
        if chunk.finish_reason is not None:
            self._usage.num_reasoning += choice.counted.end()
        return delta, [self._logprob(position) for position in chunk.logprobs]

    def _logprob(self, position: PositionLogprobs) -> ContentLogprob:
        return ContentLogprob(
            **self._token(position.chosen), top_logprobs=[TopLogprob(**self._token(top)) for top in position.top]
        )

    def _token(self, token: TokenLogprob) -> dict[str, Any]:
        return {
            "token": token.text,
            "logprob": floor_logprob(token.logprob),
            "bytes": list(self._service.encoder.token_bytes(token.token_id)),
        }

    def _logprobs(self, entries: list[ContentLogprob]) -> ChatLogprobs | None:
        return ChatLogprobs(content=entries, refusal=None) if self._request.sampling.logprobs is not None else None

    def _chunk_event(self, index: int, delta: ChatDelta, logprobs: list[ContentLogprob], chunk: Chunk | None) -> str:
        choice = ChatChunkChoice(
            index=index,
            delta=delta,
            logprobs=self._logprobs(logprobs) if chunk is not None else None,
            finish_reason=finish_reason(chunk.finish_reason) if chunk is not None else None,
        )
        if chunk is not None and chunk.stop_reason is not None:
            choice.stop_reason = chunk.stop_reason
        whole = ChatChunk(**self.envelope, choices=[choice])
        if self._body.wants_usage:
            whole.usage = None  # set, so that it is written: null until the last chunk
        return event(to_json(whole))

    def _whole_choice(self, index: int, choice: _Choice) -> ChatChoice:
        message = ChatMessage(role="assistant", content=choice.content, refusal=None)
        if choice.reasoning:
            message.reasoning_content = message.reasoning = choice.reasoning
        last = choice.last
        whole = ChatChoice(
            index=index,
            message=message,
            logprobs=self._logprobs(choice.logprobs),
            finish_reason=finish_reason(last.finish_reason if last else None) or "stop",
        )
        if last is not None and last.stop_reason is not None:
            whole.stop_reason = last.stop_reason
        return whole


def _wire_delta(delta: Delta) -> ChatDelta:
    wire = ChatDelta()
    if delta.reasoning:
        wire.reasoning_content = wire.reasoning = delta.reasoning
    if delta.content:
        wire.content = delta.content
    return wire
