"""What the methods of the services do: Seamount's own, gRPC's health service, and reflection.

Used by `server`. Each class has one table, `methods`, by the names of the .proto; who may call them is the door's.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing, suppress

from google.protobuf.message import Message
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from seamount.core.errors import NotFoundError
from seamount.server.chat.answer import ChatAnswer, prepare_chat
from seamount.server.completions.answer import CompletionAnswer, prepare_completion
from seamount.server.door.access import may_use_model, permit_model
from seamount.server.embeddings import embed
from seamount.server.service import Service
from seamount.server.tokens import detokenize, tokenize
from seamount.server.wire.common import SamplingFields

from . import seamount_pb2 as pb
from .answers import (
    chat_chunk,
    chat_response,
    completion_response,
    detokenize_response,
    embed_response,
    embedding,
    tokenize_response,
)
from .door import Exchange, Method
from .translate import chat_request, completion_request, detokenize_request, embed_request, tokenize_request

SEAMOUNT = pb.DESCRIPTOR.services_by_name["Seamount"]
HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"]
REFLECTION = reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"]
# How often who watches the health is told of a change.
_LOOK_S = 0.2
_Told = health_pb2.HealthCheckResponse


class Seamount:
    """The service itself: what the HTTP API's routes of the same requests do."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.methods: Mapping[str, Method] = {
            "Chat": self._chat,
            "StreamChat": self._stream_chat,
            "Complete": self._complete,
            "StreamComplete": self._stream_complete,
            "Embed": self._embed,
            "Tokenize": self._tokenize,
            "Detokenize": self._detokenize,
            "ListModels": self._list_models,
            "GetModel": self._get_model,
        }

    async def _chat(self, request: pb.ChatRequest, exchange: Exchange) -> pb.ChatResponse:
        answer = await self._prepare_chat(request, exchange, stream=False)
        return chat_response(await answer.whole())

    async def _stream_chat(self, request: pb.ChatRequest, exchange: Exchange) -> None:
        answer = await self._prepare_chat(request, exchange, stream=True)
        async with aclosing(answer.chunks()) as chunks:
            async for chunk in chunks:
                await exchange.write(chat_chunk(chunk))

    async def _prepare_chat(self, request: pb.ChatRequest, exchange: Exchange, *, stream: bool) -> ChatAnswer:
        body = chat_request(request, stream=stream)
        _tell_ignored(body, exchange)
        return await prepare_chat(self._service, body)

    async def _complete(self, request: pb.CompletionRequest, exchange: Exchange) -> pb.CompletionResponse:
        answer = await self._prepare_completion(request, exchange, stream=False)
        return completion_response(await answer.whole())

    async def _stream_complete(self, request: pb.CompletionRequest, exchange: Exchange) -> None:
        answer = await self._prepare_completion(request, exchange, stream=True)
        async with aclosing(answer.chunks()) as chunks:
            async for chunk in chunks:
                await exchange.write(completion_response(chunk))

    async def _prepare_completion(
        self, request: pb.CompletionRequest, exchange: Exchange, *, stream: bool
    ) -> CompletionAnswer:
        body = completion_request(request, stream=stream)
        _tell_ignored(body, exchange)
        return await prepare_completion(self._service, body)

    async def _embed(self, request: pb.EmbedRequest, exchange: Exchange) -> pb.EmbedResponse:
        answer = await embed(self._service, embed_request(request))
        data = []
        for item in answer.data:  # one at a time: at once, thousands of them would hold up everybody's streams
            data.append(embedding(item))
            await asyncio.sleep(0)
        return embed_response(answer, data)

    async def _tokenize(self, request: pb.TokenizeRequest, exchange: Exchange) -> pb.TokenizeResponse:
        return await tokenize(self._service, tokenize_request(request), tokenize_response)

    async def _detokenize(self, request: pb.DetokenizeRequest, exchange: Exchange) -> pb.DetokenizeResponse:
        return await detokenize(self._service, detokenize_request(request), detokenize_response)

    async def _list_models(self, request: pb.ListModelsRequest, exchange: Exchange) -> pb.ListModelsResponse:
        found = self._model()
        return pb.ListModelsResponse(models=[found] if may_use_model(found.id) else [])

    async def _get_model(self, request: pb.GetModelRequest, exchange: Exchange) -> pb.Model:
        permit_model(request.model)
        found = self._model()
        self._service.check_model(request.model)
        return found

    def _model(self) -> pb.Model:
        facts = self._service.facts()
        return pb.Model(
            id=self._service.model_name(),
            created=self._service.created_s,
            root=facts.name,
            max_model_len=facts.max_model_len,
        )


def _tell_ignored(body: SamplingFields, exchange: Exchange) -> None:
    if names := body.ignored():
        exchange.metadata["x-seamount-ignored"] = ", ".join(names)


class Health:
    """gRPC's health service, as /readyz: https://github.com/grpc/grpc/blob/master/doc/health-checking.md.

    The library's own keeps a table that somebody must keep true; this one asks.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._closing = asyncio.Event()
        self.methods: Mapping[str, Method] = {"Check": self._check, "Watch": self._watch}

    def close(self) -> None:
        """Let those who watch go."""
        self._closing.set()

    async def _check(self, request: health_pb2.HealthCheckRequest, exchange: Exchange) -> Message:
        status = self._status(request.service)
        if status == _Told.SERVICE_UNKNOWN:
            raise NotFoundError("There is no such service.", param="service")
        return _Told(status=status)

    async def _watch(self, request: health_pb2.HealthCheckRequest, exchange: Exchange) -> None:
        told: int | None = None
        while not self._closing.is_set():
            status = self._status(request.service)
            if status != told:
                await exchange.write(_Told(status=status))
                told = status
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_S):
                    await self._closing.wait()

    def _status(self, name: str) -> int:
        if name not in ("", SEAMOUNT.full_name):
            return _Told.SERVICE_UNKNOWN
        return _Told.SERVING if self._service.not_ready() is None else _Told.NOT_SERVING


class Reflection:
    """Tells clients what the services and their messages are, as /openapi.json does."""

    def __init__(self) -> None:
        names = [SEAMOUNT.full_name, HEALTH.full_name, REFLECTION.full_name]
        self._servicer = reflection.aio.ReflectionServicer(names)
        self.methods: Mapping[str, Method] = {"ServerReflectionInfo": self._converse}

    async def _converse(
        self, requests: AsyncIterator[reflection_pb2.ServerReflectionRequest], exchange: Exchange
    ) -> None:
        async for response in self._servicer.ServerReflectionInfo(requests, None):
            await exchange.write(response)
