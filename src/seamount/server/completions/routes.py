"""/v1/completions: continued text over HTTP, whole or streamed. Called by `app`; made by `answer`."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import Request as HttpRequest
from fastapi import Response

from seamount.server.answers import error_event, ignored_header, json_response, to_json
from seamount.server.service import Service
from seamount.server.streaming import DONE, EventStream, event, while_connected
from seamount.server.wire.completions import CompletionRequest

from .answer import CompletionAnswer, prepare_completion


async def complete(service: Service, body: CompletionRequest, http: HttpRequest) -> Response:
    """Continue prompts.

    Raises:
        SeamountError: the request cannot be served, or not now.
        ClientGoneError: the client went away before the answer began.
    """
    answer = await while_connected(http.receive, prepare_completion(service, body))
    headers = ignored_header(body)
    if not body.stream:
        return json_response(await while_connected(http.receive, answer.whole()), headers)
    stream = EventStream(_events(answer), headers, error_event(answer.envelope))
    await stream.prime(http.receive)
    return stream


async def _events(answer: CompletionAnswer) -> AsyncGenerator[str, None]:
    async with aclosing(answer.chunks()) as chunks:
        async for chunk in chunks:
            yield event(to_json(chunk))
    yield DONE
