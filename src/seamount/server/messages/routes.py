"""/v1/messages and /v1/messages/count_tokens: Anthropic's Messages API over HTTP, whole or streamed.

Called by `app`. A request is put into a chat's words (`translate`) and answered by `chat.answer`, as every chat;
the answer is put back into blocks (`blocks`). Whole answers are what the events of a stream add up to.
Refusals on these routes, by whichever layer, have Anthropic's form: see `errors`.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI, Response
from fastapi import Request as HttpRequest

from seamount.server.answers import json_response, typed
from seamount.server.chat.answer import ChatAnswer, prepare_chat
from seamount.server.errors import anthropic_body
from seamount.server.service import Service
from seamount.server.streaming import EventStream, event, while_connected
from seamount.server.telemetry.record import current_record
from seamount.server.tokens import encode_without_engine
from seamount.server.wire.chat import ChatChunkChoice
from seamount.server.wire.messages import (
    CountRequest,
    Message,
    MessageErrorBody,
    MessageRequest,
    MessageUsage,
    OutputTokensDetails,
    StopReason,
    TokenCount,
)

from .blocks import Blocks, Event
from .translate import to_chat

_STREAM_SCHEMA: dict[str, Any] = {
    "text/event-stream": {"schema": {"type": "string", "description": "`event: {type}` and `data: {event}` each."}}
}
_ERRORS: dict[int | str, dict[str, Any]] = {
    "default": {"model": MessageErrorBody, "description": "Any error, in Anthropic's form."}
}


def add_messages(app: FastAPI, service: Service) -> None:
    """Give the app these routes."""

    @app.post(
        "/v1/messages",
        tags=["anthropic"],
        responses={**_ERRORS, 200: {"model": Message, "content": _STREAM_SCHEMA}},
        response_model=None,
    )
    async def create_message(body: MessageRequest, request: HttpRequest) -> Response:
        """Continue a conversation, in Anthropic's form. With `stream`, the answer comes as server-sent events."""
        return await answer_message(service, body, request)

    @app.post(
        "/v1/messages/count_tokens",
        tags=["anthropic"],
        responses={**_ERRORS, 200: {"model": TokenCount}},
        response_model=None,
    )
    async def count_message_tokens(body: CountRequest, request: HttpRequest) -> Response:
        """Count the tokens that a conversation would have as a prompt, tools and markers included."""
        chat = to_chat(body, service.encoder)
        prompt = await while_connected(request.receive, encode_without_engine(service, chat))
        return json_response(TokenCount(input_tokens=len(prompt.token_ids)), _headers(body))


async def answer_message(service: Service, body: MessageRequest, http: HttpRequest) -> Response:
    """Answer a conversation.

    Raises:
        SeamountError: the request cannot be served, or not now.
        ClientGoneError: the client went away before the answer began.
    """
    chat = to_chat(body, service.encoder)
    answer = MessageAnswer(await while_connected(http.receive, prepare_chat(service, chat, lowers_limit=True)), body)
    headers = _headers(body)
    if not body.stream:
        return json_response(await while_connected(http.receive, answer.whole()), headers)
    events = EventStream(_spelled(answer), headers, _error_event, keep_alive=spell({"type": "ping"}))
    await events.prime(http.receive)
    return events


class MessageAnswer:
    """A chat's answer in Anthropic's words. Read once: by `events` or by `whole`."""

    def __init__(self, answer: ChatAnswer, body: MessageRequest) -> None:
        self._answer = answer
        self._max_tokens = body.max_tokens
        display = body.thinking.display if body.thinking is not None else None
        self._blocks = Blocks(shows_thinking=display != "omitted")
        self._stop_reason: StopReason | None = None
        self._stop_sequence: str | None = None

    async def events(self) -> AsyncGenerator[Event, None]:
        """Yield the answer as it comes. The first event comes with the first token, so that refusals come before it."""
        has_begun = False
        async with aclosing(self._answer.chunks()) as chunks:
            async for chunk in chunks:
                if not has_begun:
                    has_begun = True
                    yield {"type": "message_start", "message": self._message().model_dump(exclude_unset=True)}
                (choice,) = chunk.choices
                for one in self._blocks.take(choice.delta):
                    yield one
                if choice.finish_reason is not None:
                    self._end(choice)
        for one in self._blocks.end():
            yield one
        stop = {"stop_reason": self._stop_reason, "stop_sequence": self._stop_sequence}
        yield {"type": "message_delta", "delta": stop, "usage": self._usage().model_dump()}
        yield {"type": "message_stop"}

    async def whole(self) -> Message:
        """Return the whole answer."""
        async with aclosing(self.events()) as events:
            async for _ in events:
                pass
        return self._message().model_copy(update={"content": self._blocks.content()})

    def _message(self) -> Message:
        """Return the answer without its blocks."""
        return Message(
            id=f"msg_{self._answer.envelope['id'].removeprefix('chatcmpl-')}",
            type="message",
            role="assistant",
            model=self._answer.envelope["model"],
            content=[],
            stop_reason=self._stop_reason,
            stop_sequence=self._stop_sequence,
            usage=self._usage(),
        )

    def _usage(self) -> MessageUsage:
        usage = self._answer.usage()
        prompt, output = usage.prompt_tokens_details, usage.completion_tokens_details
        num_cached = prompt.cached_tokens if prompt else 0
        num_thinking = output.reasoning_tokens if output else 0
        return MessageUsage(
            input_tokens=usage.prompt_tokens - num_cached,
            cache_creation_input_tokens=0,
            cache_read_input_tokens=num_cached,
            output_tokens=usage.completion_tokens,
            output_tokens_details=OutputTokensDetails(thinking_tokens=num_thinking),
        )

    def _end(self, choice: ChatChunkChoice) -> None:
        if choice.finish_reason == "length":
            reached = self._answer.usage().completion_tokens >= self._max_tokens
            self._stop_reason = "max_tokens" if reached else "model_context_window_exceeded"
        elif isinstance(choice.stop_reason, str):
            self._stop_reason, self._stop_sequence = "stop_sequence", choice.stop_reason
        else:
            self._stop_reason = "tool_use" if choice.finish_reason == "tool_calls" else "end_turn"


def spell(one: Event) -> str:
    """Return an event as it is sent."""
    return f"event: {one['type']}\n{event(json.dumps(one, ensure_ascii=False))}"


async def _spelled(answer: MessageAnswer) -> AsyncGenerator[str, None]:
    async with aclosing(answer.events()) as events:
        async for one in events:
            yield spell(one)


def _error_event(error: Exception) -> str:
    """Return a failure midway as the stream's last event."""
    return spell(anthropic_body(typed(error)))


def _headers(body: CountRequest) -> dict[str, str]:
    record = current_record()
    headers = {"request-id": record.request_id} if record else {}
    if names := body.ignored():
        headers["x-seamount-ignored"] = ", ".join(names)
    return headers
