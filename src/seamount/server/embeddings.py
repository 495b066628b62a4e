"""/v1/embeddings: one vector for each text, by a model that is made for it.

Called by `app` for HTTP; `embed` is the same for whatever else carries the request. Each text is a request to the
engine of its own, and passes admission by itself, so that a long list takes no more than its tenant's share.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from functools import partial
from typing import Any
from uuid import uuid4

from fastapi import FastAPI, Response
from fastapi import Request as HttpRequest

from seamount.core.embedding import EmbeddingFacts, EmbeddingParams, check_embedding, check_length, floats_of
from seamount.core.errors import ContextTooLongError, EngineError, InvalidRequestError, QuotaError
from seamount.core.requests import Chunk, Request

from .admission.call import current_call
from .answers import to_json
from .service import Service
from .streaming import merge, while_connected
from .wire.embeddings import EmbeddingItem, EmbeddingRequest, EmbeddingResponse, EmbeddingUsage

# Texts of one request that are worked on, or wait, at once: enough to fill steps with short ones.
_SIDE_BY_SIDE = 32

_Numbered = tuple[int, Chunk]


def add_embeddings(app: FastAPI, service: Service, responses: dict[int | str, dict[str, Any]]) -> None:
    """Add the route.

    Args:
        responses: errors, as the OpenAPI document describes them.
    """

    answers = {**responses, 200: {"model": EmbeddingResponse}}

    @app.post("/v1/embeddings", tags=["openai"], responses=answers, response_model=None)
    async def create_embeddings(body: EmbeddingRequest, request: HttpRequest) -> Response:
        """Turn texts into vectors whose distances say how near their meanings are."""
        text = await while_connected(request.receive, _embed_to_json(service, body))
        ignored = body.ignored()
        headers = {"x-seamount-ignored": ", ".join(ignored)} if ignored else {}
        return Response(text, media_type="application/json", headers=headers)


async def embed(service: Service, body: EmbeddingRequest) -> EmbeddingResponse:
    """Return the embeddings of all inputs.

    Raises:
        InvalidRequestError: the model is not made for embeddings, or not for such ones.
        ContextTooLongError: an input is too long; the error names it.
        SeamountError: the request cannot be served now.
    """
    service.admit(body.model)
    params = EmbeddingParams(dimensions=body.dimensions)
    prompts = await _encode(service, body, check_embedding(service.facts().embedding, params))
    name = f"embd-{uuid4().hex}"
    requests = [
        Request(id=f"{name}-{number}", prompt_token_ids=token_ids, embedding=params)
        for number, token_ids in enumerate(prompts)
    ]
    items = await _run(service, requests, _base64 if body.encoding_format == "base64" else floats_of)
    num_tokens = sum(map(len, prompts))
    usage = EmbeddingUsage(prompt_tokens=num_tokens, total_tokens=num_tokens)
    return EmbeddingResponse(object="list", data=items, model=body.model, usage=usage)


async def _embed_to_json(service: Service, body: EmbeddingRequest) -> str:
    """Return the answer's JSON, written item by item: at once, thousands of them would hold up everybody's streams."""
    answer = await embed(service, body)
    items = []
    for item in answer.data:
        items.append(to_json(item))
        await asyncio.sleep(0)
    frame = to_json(answer.model_copy(update={"data": []}))
    return frame.replace('"data":[]', f'"data":[{",".join(items)}]', 1)


async def _encode(service: Service, body: EmbeddingRequest, facts: EmbeddingFacts) -> list[tuple[int, ...]]:
    """Return the inputs' token ids, checked. One at a time, so that a client who leaves stops the rest."""
    vocab_size = service.facts().vocab_size
    prompts: list[tuple[int, ...]] = []
    for index, item in enumerate(body.input):
        param = f"input[{index}]"
        if isinstance(item, str):
            token_ids = await _encode_text(service, item, facts.max_tokens, param)
        else:
            token_ids = item
        if not token_ids:
            raise InvalidRequestError(f"{param} has no tokens.", param=param)
        if max(token_ids) >= vocab_size:
            raise InvalidRequestError(
                f"A token id in {param} is {max(token_ids)}; the model's vocabulary ends at {vocab_size - 1}.",
                param=param,
            )
        check_length(facts, len(token_ids), param=param)
        prompts.append(token_ids)
    return prompts


async def _encode_text(service: Service, text: str, limit: int, param: str) -> tuple[int, ...]:
    try:
        return await service.encode(partial(service.encoder.encode_text, text, limit=limit))
    except ContextTooLongError as cause:  # found before all of it was encoded, by an encoder that knows no index
        raise ContextTooLongError(f"{param}: {cause.message}", hint=cause.hint, param=param) from cause


async def _run(
    service: Service, requests: list[Request], written: Callable[[bytes], list[float] | str]
) -> list[EmbeddingItem]:
    """Return the embeddings. All tokens are taken from the key's limits at once, or nothing is begun."""
    call, num_tokens, num_done = current_call(), sum(len(request.prompt_token_ids) for request in requests), 0
    try:
        call.reserve(num_tokens)
    except QuotaError as error:
        service.metrics.reject(service.model_name(), error.code)
        raise
    items: dict[int, EmbeddingItem] = {}
    waiting = iter(enumerate(requests))
    most = min(_SIDE_BY_SIDE, service.admission.most_at_once(1, call.caller.priority))
    lanes = [_lane(service, waiting) for _ in range(min(most, len(requests)))]
    try:
        async with aclosing(merge(lanes)) as found:
            async for _, (number, chunk) in found:
                if chunk.embedding is None:
                    raise EngineError("The engine ended a text without its embedding.")
                items[number] = EmbeddingItem(object="embedding", index=number, embedding=written(chunk.embedding))
                num_done += len(requests[number].prompt_token_ids)
    finally:
        call.settle(num_tokens, num_done)
    return [items[number] for number in range(len(requests))]


async def _lane(service: Service, waiting: Iterator[tuple[int, Request]]) -> AsyncGenerator[_Numbered, None]:
    """Work on one waiting request after the other, until none is left."""
    for number, request in waiting:
        async with aclosing(service.generate(request)) as chunks:
            async for chunk in chunks:
                yield number, chunk


def _base64(vector: bytes) -> str:
    return base64.b64encode(vector).decode("ascii")
