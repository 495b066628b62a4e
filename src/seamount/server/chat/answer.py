"""One chat, from its messages to the chunks of its answer, whatever carries it: HTTP, gRPC, a batch.

Used by `chat` (HTTP) and by all that is put into a chat's words first. Knows the wire's words and the service, nothing
of connections; `choice` takes the engine's text apart, `tools` says what tools ask of prompt and answers.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any
from uuid import uuid4

from seamount.core.errors import InvalidRequestError
from seamount.core.requests import Chunk, PositionLogprobs, Request, TokenLogprob
from seamount.core.sampling import Grammar
from seamount.server.answers import floor_logprob
from seamount.server.encoder import Prompt
from seamount.server.service import Service
from seamount.server.usage import UsageCounter
from seamount.server.wire.chat import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    ChatLogprobs,
    ChatRequest,
    ChatResponse,
    ContentLogprob,
    TopLogprob,
)
from seamount.server.wire.common import Usage

from .choice import Choice
from .tools import ToolPlan, begun_grammar, encoding, plan_tools


async def prepare_chat(service: Service, body: ChatRequest, *, lowers_limit: bool = False) -> ChatAnswer:
    """Admit and encode a chat; the engine begins when its answer is read, by `chunks` or by `whole`, once.

    Args:
        lowers_limit: lower the limit on output to what the context leaves, rather than refuse one beyond it.

    Raises:
        SeamountError: the request cannot be served, or not now.
    """
    service.admit(body.model)
    service.check_generates()
    sampling = body.sampling(service.encoder.default_sampling)
    context = service.facts().max_model_len
    prompt, plan = await encode_chat(service, body, sampling.grammar, limit=context)
    service.check_prompt(prompt.token_ids, None if lowers_limit else body.token_limit, param="messages")
    if lowers_limit and sampling.max_tokens is not None:
        sampling = replace(sampling, max_tokens=min(sampling.max_tokens, context - len(prompt.token_ids)))
    grammar = begun_grammar(body, prompt, plan.grammar)
    request = Request(
        id=f"chatcmpl-{uuid4().hex}",
        prompt_token_ids=prompt.token_ids,
        sampling=sampling if grammar is sampling.grammar else replace(sampling, grammar=grammar),
        skip_special_tokens=body.skip_special_tokens is not False,
    )
    choices = [
        Choice(
            service.encoder.reasoning_parser(starts_in_reasoning=prompt.starts_in_reasoning),
            plan.parser(),
            plan.several_calls,
        )
        for _ in range(sampling.n)
    ]
    return ChatAnswer(service, body, request, choices)


async def encode_chat(
    service: Service, body: ChatRequest, grammar: Grammar | None, *, limit: int
) -> tuple[Prompt, ToolPlan]:
    """Return a chat's prompt, and what its tools ask of the answer.

    Args:
        grammar: of the answer, where the request gives its shape.
        limit: tokens; a prompt far beyond them is refused without encoding all of it.

    Raises:
        SeamountError: the model cannot be asked so, or the prompt is certainly longer than `limit`.
    """
    if not service.encoder.has_chat_template:
        raise InvalidRequestError(
            "This model has no chat template, so it cannot chat.", hint="Use /v1/completions.", param="messages"
        )
    use = body.tool_use()
    plan = plan_tools(use, service.encoder, grammar)
    return await service.encode(encoding(body, use, service.encoder, limit=limit)), plan


class ChatAnswer:
    """Turns one request's chunks into the wire's answer.

    Attributes:
        envelope: fields that are the same in every chunk.
    """

    def __init__(self, service: Service, body: ChatRequest, request: Request, choices: list[Choice]) -> None:
        self._service = service
        self._body = body
        self._request = request
        self._shape_param = "response_format" if body.response_format is not None else None
        self._usage = UsageCounter(len(request.prompt_token_ids), counts_reasoning=True)
        self._choices = choices
        self.envelope: dict[str, Any] = {
            "id": request.id,
            "object": "chat.completion.chunk",
            "created": service.now_s(),
            "model": body.model,
        }

    async def chunks(self) -> AsyncGenerator[ChatChunk, None]:
        """Yield the answer as it comes; where the request asks for usage, that is the last chunk."""
        async with aclosing(self._service.generate(self._request, shape_param=self._shape_param)) as chunks:
            async for chunk in chunks:
                choice = self._choices[chunk.index]
                deltas = self._take(choice, chunk)
                if not choice.has_begun:
                    choice.has_begun = True
                    yield self._chunk(chunk.index, ChatDelta(role="assistant", content=""))
                logprobs = self._logprobs_of(chunk)
                if chunk.finish_reason is not None and deltas and deltas[-1].tool_calls:
                    deltas.append(ChatDelta())  # some clients read no call in the chunk that ends the answer
                if not deltas and (logprobs or chunk.finish_reason is not None):
                    deltas.append(ChatDelta())
                for delta in deltas[:-1]:
                    yield self._chunk(chunk.index, delta)
                for delta in deltas[-1:]:
                    yield self._chunk(chunk.index, delta, chunk, logprobs)
        if self._body.wants_usage:
            yield ChatChunk(**self.envelope, choices=[], usage=self._usage.usage())

    async def whole(self) -> ChatResponse:
        """Return the whole answer."""
        async with aclosing(self._service.generate(self._request, shape_param=self._shape_param)) as chunks:
            async for chunk in chunks:
                choice = self._choices[chunk.index]
                self._take(choice, chunk)
                choice.logprobs += self._logprobs_of(chunk)
        return ChatResponse(
            **{**self.envelope, "object": "chat.completion"},
            choices=[self._whole_choice(index, choice) for index, choice in enumerate(self._choices)],
            usage=self._usage.usage(),
        )

    def usage(self) -> Usage:
        """Return the tokens that the request has taken so far."""
        return self._usage.usage()

    def _take(self, choice: Choice, chunk: Chunk) -> list[ChatDelta]:
        """Count a chunk and return what it adds."""
        self._usage.add(chunk)
        before = choice.num_reasoning_tokens
        deltas = choice.take(chunk)
        self._usage.num_reasoning += choice.num_reasoning_tokens - before
        return deltas

    def _logprobs_of(self, chunk: Chunk) -> list[ContentLogprob]:
        return [self._logprob(position) for position in chunk.logprobs]

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

    def _chunk(
        self, index: int, delta: ChatDelta, chunk: Chunk | None = None, logprobs: list[ContentLogprob] | None = None
    ) -> ChatChunk:
        """Return one chunk; the last one of an engine's chunk carries what that says beside its text."""
        choice = ChatChunkChoice(
            index=index,
            delta=delta,
            logprobs=self._logprobs(logprobs or []) if chunk is not None else None,
            finish_reason=self._choices[index].finish_reason() if chunk is not None else None,
        )
        if chunk is not None and chunk.stop_reason is not None:
            choice.stop_reason = chunk.stop_reason
        whole = ChatChunk(**self.envelope, choices=[choice])
        if self._body.wants_usage:
            whole.usage = None  # set, so that it is written: null until the last chunk
        return whole

    def _whole_choice(self, index: int, choice: Choice) -> ChatChoice:
        last = choice.last
        whole = ChatChoice(
            index=index,
            message=choice.message(),
            logprobs=self._logprobs(choice.logprobs),
            finish_reason=choice.finish_reason() or "stop",
        )
        if last is not None and last.stop_reason is not None:
            whole.stop_reason = last.stop_reason
        return whole
