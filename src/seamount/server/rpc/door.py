"""What stands before every gRPC method, as `door.middleware` and `admission.call.Gate` stand before every route.

Used by `server`, which has it wrap the methods of all services. Opens the record and the call, asks `door.access` who
may, reads the message only then, turns errors into statuses, and counts and logs how it ended. A client that cancels,
or whose deadline is over, has the method's task cancelled by the library: what it holds is given back on the way out.

No guard against foreign web pages as for HTTP: gRPC wants a header (`te`) that no page can send. Should a proxy in
between add it, `origin` still tells that a page asks, and it is refused.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any, Protocol
from urllib.parse import unquote

import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from starlette.datastructures import Headers

from seamount.core.errors import ForbiddenError, InvalidRequestError, SeamountError
from seamount.server.admission import call as admission_call
from seamount.server.admission.call import ClientStalledError
from seamount.server.door.access import RULES, Access, Rule, Visit, acting_as
from seamount.server.door.middleware import credential_of, new_record
from seamount.server.errors import log_failure, log_private, status_of
from seamount.server.service import Service
from seamount.server.telemetry.record import Record, recording

from .status import code_of, metadata, sentence
from .translate import parse

_log = logging.getLogger("seamount.server.requests")
_METHOD = "POST"  # of every gRPC call, in HTTP's words
_MAX_DEADLINE_S = 86_400.0
# nginx's numbers, which only logs and metrics see: the client left, or took too long.
_GONE, _LATE = 499, 504
_UNFORESEEN = "The server failed on this request; its log says where."


class Exchange:
    """One call, as a method sees it.

    Attributes:
        metadata: what the client is told at the end, beside the answer.
    """

    def __init__(self, context: Any) -> None:
        self.metadata: dict[str, str] = {}
        self._context = context

    async def write(self, message: Message) -> None:
        """Send one message of a stream, when the client takes it.

        Raises:
            ClientStalledError: it has not taken any for long.
        """
        try:
            async with asyncio.timeout(admission_call.STALL_S):
                await self._context.write(message)
        except TimeoutError as cause:
            raise ClientStalledError("The client stopped reading.") from cause


class Method(Protocol):
    """What answers a method: given its message, or those of its stream, it returns the answer or writes several."""

    def __call__(self, request: Any, exchange: Exchange, /) -> Awaitable[Message | None]: ...


class Door:
    """Lets calls in to methods.

    Args:
        on_end: given each call's record when it is over.
    """

    def __init__(self, service: Service, access: Access, on_end: Callable[[Record], None] | None = None) -> None:
        self._service = service
        self._access = access
        self._on_end = on_end

    def handler(self, route: str, method: MethodDescriptor, behave: Method) -> grpc.RpcMethodHandler:
        """Return what the library calls for a method.

        Args:
            route: as in `door.access.RULES`.
        """
        kind, serialize = GetMessageClass(method.input_type), GetMessageClass(method.output_type).SerializeToString

        # Given no way to read messages, the library hands on bytes: nothing is read for whom the door lets not in.
        async def answer(data: bytes, context: Any) -> Message | None:
            return await self._visit(route, context, lambda exchange: behave(parse(kind, data), exchange))

        async def converse(requests: AsyncIterator[bytes], context: Any) -> None:
            parsed = (parse(kind, data) async for data in requests)
            await self._visit(route, context, lambda exchange: behave(parsed, exchange))

        if method.client_streaming:
            return grpc.stream_stream_rpc_method_handler(converse, None, serialize)
        make = grpc.unary_stream_rpc_method_handler if method.server_streaming else grpc.unary_unary_rpc_method_handler
        return make(answer, None, serialize)

    async def _visit(
        self, route: str, context: Any, work: Callable[[Exchange], Awaitable[Message | None]]
    ) -> Message | None:
        """Return the answer, or end the call with a status."""
        headers = Headers(raw=[(name.encode(), _bytes(value)) for name, value in context.invocation_metadata()])
        record = new_record(_METHOD, headers)
        record.route = route
        exchange = Exchange(context)
        exchange.metadata["x-request-id"] = record.request_id
        start_s = time.perf_counter()
        counted = RULES[route] is not Rule.PUBLIC
        if counted:
            self._service.enter()
        with recording(record):
            try:
                answer = await self._let_in(record, headers, exchange, context, work)
                context.set_trailing_metadata(tuple(exchange.metadata.items()))
                record.status = 200
                return answer
            except SeamountError as error:
                log_private(error)
                record.refuse(error.code)
                code, text, more = code_of(error), sentence(error), metadata(error)
                record.status = _LATE if code is grpc.StatusCode.DEADLINE_EXCEEDED else status_of(error)
            except ClientStalledError as error:
                code, text, more = grpc.StatusCode.ABORTED, str(error), {}
                record.status = _GONE
            except (asyncio.CancelledError, grpc.aio.BaseError):
                record.status = _LATE if context.time_remaining() == 0 else _GONE
                raise
            except Exception as error:  # noqa: BLE001 - the process edge
                log_failure(error)
                code, text, more = grpc.StatusCode.INTERNAL, _UNFORESEEN, {"seamount-code": "internal_error"}
                record.status = 500
            finally:
                if counted:
                    self._service.leave()
                self._end(record, time.perf_counter() - start_s, tells=counted)
        # Nothing is held any more: a client that does not read may never take the status either. One that has gone
        # makes this fail; the library then ends the call by itself.
        with suppress(grpc.aio.InternalError):
            await context.abort(code, text, tuple({**exchange.metadata, **more}.items()))
        return None

    async def _let_in(
        self,
        record: Record,
        headers: Headers,
        exchange: Exchange,
        context: Any,
        work: Callable[[Exchange], Awaitable[Message | None]],
    ) -> Message | None:
        if "origin" in headers:
            raise ForbiddenError("Web pages may not use this server over gRPC.")
        visit = Visit(
            route=record.route,
            method=_METHOD,
            credential=credential_of(headers),
            peer=_address(context.peer()),
            request_id=record.request_id,
        )
        record.principal = principal = await self._access.admit(visit)
        if principal is None:
            return await work(exchange)
        left_s = context.time_remaining()
        end_in_s = None if left_s is None else min(left_s, _MAX_DEADLINE_S)
        with acting_as(principal), self._service.calls.open(principal, end_in_s=end_in_s) as call:
            try:
                return await call.run(work(exchange))
            except InvalidRequestError:
                call.begin()  # what is refused counts too
                raise
            finally:
                exchange.metadata.update(call.headers())

    def _end(self, record: Record, took_s: float, *, tells: bool) -> None:
        record.end_ns = record.begin_ns + round(took_s * 1e9)
        self._service.metrics.refuse(self._service.model_name(), record)
        self._service.metrics.answered(record.route or "none", record.method, record.status, took_s)
        # Probes would drown the rest.
        _log.log(logging.INFO if tells else logging.DEBUG, "request", extra={"fields": record.fields()})
        if self._on_end is not None:
            self._on_end(record)


def _bytes(value: str | bytes) -> bytes:
    return value if isinstance(value, bytes) else value.encode("latin-1", "replace")


def _address(peer: str) -> str | None:
    """Return the address in what gRPC says of the other end: `ipv4:10.0.0.1:5`, `ipv6:%5B::1%5D:5`, `unix:...`."""
    kind, _, rest = unquote(peer).partition(":")
    return rest.rpartition(":")[0].strip("[]") if kind in ("ipv4", "ipv6") else None
