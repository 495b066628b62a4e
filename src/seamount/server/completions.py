"""/v1/completions: continued text over HTTP, whole or streamed. Called by `app`; made by `completion_answer`."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import Request as HttpRequest
from fastapi import Response

from .answers import error_event, ignored_header, json_response, to_json
from .completion_answer import CompletionAnswer, prepare_completion
from .service import Service
from .streaming import DONE, EventStream, event, while_connected
from .wire.completions import CompletionRequest


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
