"""One line of a batch: in whose name it is answered, the answer, and what is written of it.

Called by `job`. It goes the way of every request, by `prepare_chat` and the like, in the name of the key that
made the batch, which is read anew for each line: what was revoked a moment ago gets nothing more.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, TypeVar
from uuid import uuid4

from pydantic import BaseModel

from seamount.core.errors import EngineError, ForbiddenError, SeamountError, UnauthenticatedError
from seamount.core.identity import Limits, Principal
from seamount.security.authenticators import LOCAL
from seamount.security.keys import ApiKeys
from seamount.server.admission.shares import BATCH
from seamount.server.answers import to_json
from seamount.server.chat.answer import prepare_chat
from seamount.server.completions.answer import prepare_completion
from seamount.server.door.access import RULES, acting_as, permitted
from seamount.server.door.body import read_aside, validated
from seamount.server.embeddings import embed
from seamount.server.errors import error_body, error_response
from seamount.server.service import Service
from seamount.server.wire.batches import BatchEndpoint
from seamount.server.wire.chat import ChatRequest, ChatResponse
from seamount.server.wire.common import Usage
from seamount.server.wire.completions import CompletionRequest, CompletionResponse
from seamount.server.wire.embeddings import EmbeddingRequest, EmbeddingResponse, EmbeddingUsage

from .input import InputLine
from .store import Tokens

T = TypeVar("T", bound=BaseModel)


class Result(NamedTuple):
    """What is written of a line: one line of JSON with its end; and what its answer took."""

    content: str
    is_failed: bool
    tokens: Tokens = Tokens()


def batch_caller(keys: ApiKeys, key_id: str | None, endpoint: str, now_s: float) -> Principal:
    """Return in whose name a batch's lines are answered. Their tokens count as used by the key, but not against its
    limits per minute, which are for those who wait for an answer; and they go behind everybody else.

    Raises:
        UnauthenticatedError: the key opens nothing any more.
        ForbiddenError: it may not use the endpoint.
        StateUnavailableError: that cannot be known now.
    """
    if key_id is None:
        if keys.has_administrator():
            raise UnauthenticatedError(
                "The batch was made when this server asked for no key; now it does.",
                hint="Make it again, with a key.",
                code="missing_api_key",
            )
        return replace(LOCAL, priority=BATCH)
    found = keys.find(key_id)
    state = found[0].state(now_s) if found else "unknown"
    if found is None or state != "active":
        raise UnauthenticatedError(f"The API key that made the batch is {state}.", code=f"{state}_api_key")
    principal = found[0].principal
    if not permitted(RULES.get(endpoint), endpoint, principal):
        raise ForbiddenError("The API key that made the batch may not use its endpoint.", code="route_not_permitted")
    return replace(principal, limits=Limits(), priority=BATCH)


async def answer_line(
    service: Service, caller: Principal, endpoint: BatchEndpoint, line: InputLine, encoding: asyncio.Lock
) -> Result:
    """Return a line's answer.

    Args:
        encoding: held while a prompt is encoded, so that batches never take every thread that encodes.

    Raises:
        SeamountError: the request is wrong, or cannot be served, or not now.
    """
    with acting_as(caller), service.calls.open(caller):
        whole = await _ANSWERS[endpoint](service, line.body, encoding)
    return Result(_text(line, 200, to_json(whole)), is_failed=False, tokens=_tokens(whole.usage))


def failure(line: InputLine, error: SeamountError) -> Result:
    """Return what is written of a line that is answered with an error."""
    body = json.dumps({"error": error_body(error)})
    return Result(_text(line, error_response(error).status_code, body), is_failed=True)


def unanswered(line: InputLine, code: str, message: str) -> Result:
    """Return what is written of a line that was never answered."""
    found = {
        "id": _new_id(),
        "custom_id": line.custom_id,
        "response": None,
        "error": {"code": code, "message": message},
    }
    return Result(json.dumps(found) + "\n", is_failed=True)


def unforeseen() -> EngineError:
    """Return what a line is told whose answer failed in a way that nobody foresaw."""
    return EngineError("The server failed on this request; its log says where.", code="internal_error")


def _tokens(usage: Usage | EmbeddingUsage | None) -> Tokens:
    if usage is None:
        return Tokens()
    if isinstance(usage, EmbeddingUsage):
        return Tokens(input=usage.prompt_tokens)
    cached, thought = usage.prompt_tokens_details, usage.completion_tokens_details
    return Tokens(
        input=usage.prompt_tokens,
        cached=cached.cached_tokens if cached else 0,
        output=usage.completion_tokens,
        reasoning=thought.reasoning_tokens if thought else 0,
    )


def _text(line: InputLine, status: int, body_json: str) -> str:
    response = f'{{"status_code": {status}, "request_id": "{uuid4().hex}", "body": {body_json}}}'
    custom_id = json.dumps(line.custom_id)
    return f'{{"id": "{_new_id()}", "custom_id": {custom_id}, "response": {response}, "error": null}}\n'


def _new_id() -> str:
    return f"batch_req_{uuid4().hex}"


async def _chat(service: Service, body: dict[str, Any], encoding: asyncio.Lock) -> ChatResponse:
    async with encoding:
        answer = await prepare_chat(service, await _checked(ChatRequest, body))
    return await answer.whole()


async def _completion(service: Service, body: dict[str, Any], encoding: asyncio.Lock) -> CompletionResponse:
    async with encoding:
        answer = await prepare_completion(service, await _checked(CompletionRequest, body))
    return await answer.whole()


async def _embedding(service: Service, body: dict[str, Any], _: asyncio.Lock) -> EmbeddingResponse:
    return await embed(service, await _checked(EmbeddingRequest, body))


async def _checked(schema: type[T], body: dict[str, Any]) -> T:
    """Return a body that was checked as that of a request to the endpoint is.

    Raises:
        InvalidRequestError: it is wrong.
    """
    return await read_aside(partial(validated, schema, body))


_Whole = ChatResponse | CompletionResponse | EmbeddingResponse
_Answer = Callable[[Service, dict[str, Any], asyncio.Lock], Awaitable[_Whole]]
_ANSWERS: dict[BatchEndpoint, _Answer] = {
    "/v1/chat/completions": _chat,
    "/v1/completions": _completion,
    "/v1/embeddings": _embedding,
}
