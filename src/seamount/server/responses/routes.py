"""/v1/responses over HTTP: responses, whole or streamed, and those that are kept: read, listed, deleted.

Called by `app`. The answer is made by `answer`, and lives in `store` where it is kept. Whatever is
kept belongs to a tenant: another one's is answered as what does not exist.
"""

from __future__ import annotations

import json
import logging
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query, Request, Response

from seamount.core.errors import InvalidRequestError, SeamountError
from seamount.server.admission.call import current_call
from seamount.server.answers import json_response
from seamount.server.service import Service
from seamount.server.streaming import EventStream, while_connected
from seamount.server.wire.responses import LOGPROBS, DeletedResponse, ItemList, ResponseObject, ResponsesRequest

from .answer import ResponseAnswer, find, not_found, prepare_response
from .store import ResponseStore

_log = logging.getLogger(__name__)
_MAX_PAGE = 100
_MAX_ID = 128
_STREAM_SCHEMA: dict[str, Any] = {
    "text/event-stream": {"schema": {"type": "string", "description": "`event: {type}` and `data: {event}` each."}}
}
_Errors = dict[int | str, dict[str, Any]]


def add_responses(app: FastAPI, service: Service, store: ResponseStore | None, errors: _Errors) -> None:
    """Give the app these routes.

    Args:
        store: where responses are kept; None: none are.
        errors: what the document says of errors.
    """
    answers: _Errors = {**errors, 200: {"model": ResponseObject, "content": _STREAM_SCHEMA}}

    @app.post("/v1/responses", tags=["openai"], responses=answers, response_model=None)
    async def create_response(body: ResponsesRequest, request: Request) -> Response:
        """Answer items. With `stream`, the response comes as server-sent events."""
        return await _create(service, store, body, request)

    @app.get("/v1/responses/{response_id}", tags=["openai"], responses=errors, response_model=ResponseObject)
    async def get_response(response_id: str, request: Request, stream: bool | None = None) -> Response:
        """Return a response that was kept; as a whole, without log-probabilities."""
        if stream:
            raise InvalidRequestError("A response that is kept is sent as a whole, not as a stream.", param="stream")
        # OpenAI's clients spell a list in a query with brackets, others without.
        asked = request.query_params
        if LOGPROBS in [*asked.getlist("include"), *asked.getlist("include[]")]:
            raise InvalidRequestError("Log-probabilities are not kept.", param="include")
        found = await find(store, current_call().caller, response_id)
        return Response(found.response, media_type="application/json")

    @app.delete("/v1/responses/{response_id}", tags=["openai"], responses=errors, response_model=DeletedResponse)
    async def delete_response(response_id: str) -> Response:
        """Delete a response that was kept. Conversations that went on from it keep what they hold of it."""
        if store is None or not await store.delete(current_call().caller.tenant, response_id):
            raise not_found()
        return json_response(DeletedResponse(id=response_id, object="response", deleted=True), {})

    @app.get("/v1/responses/{response_id}/input_items", tags=["openai"], responses=errors, response_model=ItemList)
    async def list_input_items(
        response_id: str,
        limit: Annotated[int, Query(ge=1, le=_MAX_PAGE)] = 20,
        after: Annotated[str | None, Query(max_length=_MAX_ID)] = None,
        order: Literal["asc", "desc"] = "desc",
    ) -> Response:
        """List the items that a kept response answers, those of earlier responses included; the last ones first."""
        found = await find(store, current_call().caller, response_id)
        page = _page(json.loads(found.items), limit=limit, after=after, is_rising=order == "asc")
        return Response(json.dumps(page, ensure_ascii=False), media_type="application/json")

    @app.post("/v1/responses/{response_id}/cancel", tags=["openai"], responses=errors, response_model=ResponseObject)
    async def cancel_response(response_id: str) -> Response:
        """Refuse: a response is made while its client waits, and given up when the client goes away."""
        await find(store, current_call().caller, response_id)
        raise InvalidRequestError(
            "This response cannot be cancelled: it is complete, and none is made in the background.",
            hint="Close the connection to give up a response that is being made.",
            code="not_in_background",
            param="response_id",
        )


async def clean_at_start(store: ResponseStore | None) -> None:
    """Delete what was kept long enough. A database that fails now does not keep the server from starting."""
    if store is None:
        return
    try:
        await store.clean()
    except SeamountError as error:
        _log.warning("responses whose time is over were not deleted: %s", error.code)


async def _create(service: Service, store: ResponseStore | None, body: ResponsesRequest, request: Request) -> Response:
    answer: ResponseAnswer = await while_connected(request.receive, prepare_response(service, store, body))
    names = body.ignored()
    headers = {"x-seamount-ignored": ", ".join(names)} if names else {}
    if not body.stream:
        return json_response(await while_connected(request.receive, answer.whole()), headers)
    stream = EventStream(answer.events(), headers, answer.on_error)
    await stream.prime(request.receive)
    return stream


def _page(items: list[dict[str, Any]], *, limit: int, after: str | None, is_rising: bool) -> dict[str, Any]:
    """Return one page of a conversation's items.

    Raises:
        InvalidRequestError: `after` names none of them.
    """
    listed = items if is_rising else items[::-1]
    begin = 0
    if after is not None:
        begin = 1 + next((number for number, item in enumerate(listed) if item["id"] == after), -1)
        if not begin:
            raise InvalidRequestError("after names none of this response's items.", param="after")
    data = listed[begin : begin + limit]
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": begin + limit < len(listed),
    }
