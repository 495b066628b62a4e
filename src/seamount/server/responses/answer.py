"""One response, from its request to the end of its answer, whatever carries it; kept where that is wanted.

Used by `responses` (HTTP). The answer itself is a chat's (`chat.answer`): `translate` puts the request into a
chat's words, `events` the chunks into a response's.

Keeping a response must neither cost anybody the answer nor fail unsaid. So the database is asked before the engine
begins, and an answer that could not be kept is refused then: with a 503, or, where its tenant keeps as much as it may,
with a 403. Should it fail later on, or the answer turn out too large, the answer is sent all the same, and says itself
that it is not kept: `store` is false, `store_error` says why.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import Any

from pydantic import TypeAdapter, ValidationError

from seamount.core.errors import (
    IntegrityError,
    InvalidRequestError,
    NotFoundError,
    RequestError,
    SeamountError,
)
from seamount.core.identity import Principal
from seamount.server.admission.call import current_call
from seamount.server.answers import typed
from seamount.server.chat.answer import ChatAnswer, prepare_chat
from seamount.server.errors import error_body
from seamount.server.service import Service
from seamount.server.streaming import event
from seamount.server.wire.chat import ChatChunk
from seamount.server.wire.common import ErrorObject
from seamount.server.wire.responses import ReasoningConfig, ResponseObject, ResponsesRequest, ResponseTool, TextConfig
from seamount.server.wire.responses_items import Item, plain_items

from .events import Event, ResponseWriter
from .store import MAX_STORED_BYTES, ResponseStore, StoredResponse
from .translate import chat_request, conversation, in_our_words, new_id

_log = logging.getLogger(__name__)
_ITEMS: TypeAdapter[list[Item]] = TypeAdapter(list[Item])


async def prepare_response(service: Service, store: ResponseStore | None, body: ResponsesRequest) -> ResponseAnswer:
    """Admit, find what came before, encode; the engine begins when the answer is read, by `events` or `whole`, once.

    Raises:
        SeamountError: the request cannot be served, or not now.
    """
    service.admit(body.model)  # before the database is asked for anything
    caller = current_call().caller
    before = await _before(store, caller, body.previous_response_id)
    items = conversation(body.input, before)
    kept: _Kept | None = None
    if body.store is not False and store is not None:
        kept = _Kept(store, caller, await service.encode(partial(_items_json, items)))
        await kept.check()
    elif body.store:
        raise InvalidRequestError(
            "This server keeps no responses.", hint="Leave store out, and send the whole conversation.", param="store"
        )
    try:
        answer = await prepare_chat(service, chat_request(body, items))
    except RequestError as error:
        raise in_our_words(error) from error
    return ResponseAnswer(service, ResponseWriter(_begun(service, body, kept is not None)), answer, kept)


class ResponseAnswer:
    """One response that is being made."""

    def __init__(self, service: Service, writer: ResponseWriter, answer: ChatAnswer, kept: _Kept | None) -> None:
        self._service = service
        self._writer = writer
        self._answer = answer
        self._kept = kept

    async def events(self) -> AsyncGenerator[str, None]:
        """Yield the response's server-sent events.

        The first waits for the engine to begin, so that a refusal before that keeps its status.
        """
        async with aclosing(self._chunks()) as chunks:
            async for chunk in chunks:
                for one in self._writer.take(chunk):
                    yield _spelled(one)
        for one in self._writer.end(self._service.now_s()):
            yield _spelled(one)
        await self._keep()
        yield _spelled(self._writer.last())

    async def whole(self) -> ResponseObject:
        """Return the whole response."""
        async with aclosing(self._chunks()) as chunks:
            async for chunk in chunks:
                self._writer.take(chunk)
        self._writer.end(self._service.now_s())
        await self._keep()
        return self._writer.response

    def on_error(self, error: Exception) -> str:
        """Return the events that end a stream which failed midway."""
        return "".join(_spelled(one) for one in self._writer.fail(typed(error)))

    async def _chunks(self) -> AsyncGenerator[ChatChunk, None]:
        try:
            async with aclosing(self._answer.chunks()) as chunks:
                async for chunk in chunks:
                    yield chunk
        except RequestError as error:
            raise in_our_words(error) from error

    async def _keep(self) -> None:
        response = self._writer.response
        if self._kept is None:
            return
        try:
            await self._kept.put(response)
        except SeamountError as error:
            _log.warning("response %s could not be kept: %s", response.id, error.code)
            response.store = False
            response.store_error = ErrorObject(**error_body(error))


class _Kept:
    """Where one response is to be kept.

    Args:
        items: JSON of the conversation that it answers.
    """

    def __init__(self, store: ResponseStore, caller: Principal, items: str) -> None:
        self._store = store
        self._caller = caller
        self._items = items

    async def check(self) -> None:
        """Check that the response could be kept now, as far as that is known before its answer.

        Raises:
            SeamountError: it could not.
        """
        await self._store.ready(self._caller.tenant, len(self._items.encode()))

    async def put(self, response: ResponseObject) -> None:
        """Keep the complete response.

        Raises:
            SeamountError: it could not be kept.
        """
        plain = response.model_dump(mode="json", exclude_unset=True)
        plain["output"] = plain_items(response.output)
        text = _checked(json.dumps(plain, ensure_ascii=False), len(self._items.encode()))
        stored = StoredResponse(
            id=response.id,
            tenant=self._caller.tenant,
            key_id=self._caller.key_id,
            model=response.model,
            created_s=response.created_at,
            items=self._items,
            response=text,
        )
        await self._store.put(stored)


async def find(store: ResponseStore | None, caller: Principal, response_id: str, **where: str) -> StoredResponse:
    """Return the caller's kept response.

    Args:
        where: `code` and `param` of the refusal.

    Raises:
        NotFoundError: there is none of that id; in the same words where it is another tenant's.
        SeamountError: the database cannot be read.
    """
    found = None if store is None else await store.get(caller.tenant, response_id)
    if found is None:
        raise not_found(**where)
    return found


def not_found(code: str = "response_not_found", param: str = "response_id") -> NotFoundError:
    """Return the refusal of an id that names nothing."""
    return NotFoundError(
        "No response of that id is kept here.",
        hint="Responses asked for with store false are not kept, others for a limited time.",
        code=code,
        param=param,
    )


async def _before(store: ResponseStore | None, caller: Principal, response_id: str | None) -> list[Item]:
    """Return the conversation of an earlier response, what it answered included."""
    if response_id is None:
        return []
    found = await find(store, caller, response_id, code="previous_response_not_found", param="previous_response_id")
    try:
        items = _ITEMS.validate_json(found.items)
        output = json.loads(found.response)["output"]
        return [*items, *_ITEMS.validate_python(output)]
    except (ValidationError, ValueError, KeyError, TypeError) as cause:
        raise IntegrityError(
            "The response that is kept under that id cannot be read.", hint="Begin a new conversation."
        ) from cause


def _items_json(items: list[Item]) -> str:
    """Return a conversation as it is kept.

    Raises:
        InvalidRequestError: it is too large to be kept.
    """
    return _checked(json.dumps(plain_items(items), ensure_ascii=False))


def _checked(text: str, num_bytes: int = 0) -> str:
    num_bytes += len(text.encode())
    if num_bytes > MAX_STORED_BYTES:
        raise InvalidRequestError(
            f"The response's conversation has {num_bytes} bytes; at most {MAX_STORED_BYTES} can be kept.",
            hint="Set store to false, or begin a new conversation.",
            param="store",
            code="response_too_large",
        )
    return text


def _begun(service: Service, body: ResponsesRequest, is_kept: bool) -> ResponseObject:
    """Return the response before its answer: what was asked for, with what holds where nothing was."""
    advice = service.encoder.default_sampling
    text = body.text or TextConfig()
    effort = body.reasoning.effort if body.reasoning is not None else None
    return ResponseObject(
        id=new_id("resp"),
        object="response",
        created_at=service.now_s(),
        status="in_progress",
        completed_at=None,
        background=False,
        error=None,
        incomplete_details=None,
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        metadata=body.metadata or {},
        model=body.model,
        output=[],
        parallel_tool_calls=body.parallel_tool_calls is not False,
        previous_response_id=body.previous_response_id,
        reasoning=ReasoningConfig(effort=effort, summary=None),
        store=is_kept,
        temperature=_or(body.temperature, advice.get("temperature", 1.0)),
        text=TextConfig(format=text.format or {"type": "text"}),
        tool_choice=body.tool_choice or "auto",
        tools=[_whole(tool) for tool in body.tools or ()],
        top_logprobs=body.top_logprobs or 0,
        top_p=_or(body.top_p, advice.get("top_p", 1.0)),
        truncation="disabled",
        usage=None,
    )


def _whole(tool: ResponseTool) -> ResponseTool:
    """Return a tool whose every field counts as given, so that all are sent."""
    return tool.model_copy(update={name: getattr(tool, name) for name in ResponseTool.model_fields})


def _or(given: float | None, advice: Any) -> float:
    return float(advice if given is None else given)


def _spelled(one: Event) -> str:
    return f"event: {one['type']}\n{event(json.dumps(one, ensure_ascii=False))}"
