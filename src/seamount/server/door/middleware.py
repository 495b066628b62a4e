"""What stands before every route: request ids, the guard against foreign web pages, the door, the body limit,
HEAD, the last catch.

Pure ASGI functions round the app, because the framework's own middleware base class runs the app in a task of its own
and thereby hides a client's disconnect from it.

Why a guard, when the server listens on loopback only: any web page that the user visits can send requests to
127.0.0.1. Two headers that a page cannot forge stop it. `Origin` names the page a request comes from; it must be
ours. And `Host` names the server as the browser knows it: a page that points its own domain at 127.0.0.1 (DNS
rebinding) has an Origin that fits, but a Host that is not this machine. Programs send no Origin and are not affected.
"""

from __future__ import annotations

import asyncio
import logging
import re
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from seamount.core.errors import SeamountError, UnauthenticatedError
from seamount.core.identity import is_loopback
from seamount.server.errors import error_response, framework_response, log_failure
from seamount.server.service import Service
from seamount.server.telemetry.record import Record, current_record, known_method, recording

from .access import Access, Visit, acting_as, route_of

_log = logging.getLogger("seamount.server.requests")
_PROBES = ("/healthz", "/readyz", "/metrics")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
# A body has this long to come, and longer the more of it has come.
BODY_S = 30.0
BODY_BYTES_PER_S = 8192
_LOOK_S = 1.0  # how often it is seen that the server stops


class Edge:
    """The outermost layer: the request's record, safety headers, counts, the log, and a 500 for the unforeseen.

    Args:
        on_end: given each request's record when it is over; None where nobody asks for it.
    """

    def __init__(self, app: ASGIApp, service: Service, on_end: Callable[[Record], None] | None = None) -> None:
        self._app = app
        self._service = service
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope = origin_form(scope)
        record = new_record(scope["method"], Headers(scope=scope))

        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = record.request_id
                headers["x-content-type-options"] = "nosniff"
                headers["referrer-policy"] = "no-referrer"
            await send(message)

        with recording(record):
            start_s = time.perf_counter()
            counted = scope["method"] == "POST"
            if counted:
                self._service.enter()
            try:
                await self._app(scope, receive, send_on)
            except Exception as error:  # noqa: BLE001 - the process edge
                log_failure(error)
                if not record.status:
                    await framework_response(500)(scope, receive, send_on)
            finally:
                if counted:
                    self._service.leave()
                self._end(record, time.perf_counter() - start_s)

    def _end(self, record: Record, took_s: float) -> None:
        # By the clock that never goes back, so that no span ends before it began.
        record.end_ns = record.begin_ns + round(took_s * 1e9)
        record.status = record.status or 500  # cancelled, and so not answered
        self._service.metrics.refuse(self._service.model_name(), record)
        self._service.metrics.answered(record.route or "none", record.method, record.status, took_s)
        # Probes, and pages that went well, would drown the rest.
        tells = record.method == "POST" or (record.status >= 400 and record.route not in _PROBES)
        _log.log(logging.INFO if tells else logging.DEBUG, "request", extra={"fields": record.fields()})
        if self._on_end is not None:
            self._on_end(record)


class Head:
    """Answers HEAD as GET without the body, on every route that has GET: health checkers ask so."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def send_on(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        await self._app({**scope, "method": "GET"}, receive, send_on)


class Guard:
    """Refuses what a foreign web page sent (see above).

    Args:
        bound_host: the address that the server listens on.
    """

    def __init__(self, app: ASGIApp, bound_host: str) -> None:
        self._app = app
        self._names = {bound_host.lower(), "localhost", socket.gethostname().lower()}
        self._loopback_only = is_loopback(bound_host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope) if scope["type"] == "http" else Headers()
        if "content-length" in headers and "transfer-encoding" in headers:
            # Whoever stands in between may have gone by the other one, and then what follows is not what it let pass
            # (https://www.rfc-editor.org/rfc/rfc9112#section-6.1).
            twice = "The request gives the length of its body twice, by content-length and by transfer-encoding."
            refusal = framework_response(400, message=twice, headers={"connection": "close"})
            await refusal(scope, receive, send)
            return
        problem = self._problem(headers) if scope["type"] == "http" else None
        if problem is None:
            await self._app(scope, receive, send)
        else:
            await framework_response(403, message=problem)(scope, receive, send)

    def _problem(self, headers: Headers) -> str | None:
        hosts = headers.getlist("host")
        # Bound to a wider address, the server is known by names that it cannot know itself.
        if self._loopback_only and not all(self._is_ours(host) for host in hosts):
            return (
                "The Host header names another machine. Use http://127.0.0.1 or http://localhost with the server's "
                "port, or start the server with --host to be reached by other names."
            )
        for origin in headers.getlist("origin"):
            scheme, _, authority = origin.lower().partition("://")
            if scheme not in ("http", "https") or authority not in [host.lower() for host in hosts]:
                return "Web pages of another origin may not use this server."
        return None

    def _is_ours(self, host: str) -> bool:
        name = re.sub(r":\d*$", "", host.lower())
        return name in self._names or is_loopback(name.strip("[]"))


class Door:
    """Lets in those whom `access` admits; what they do further in is done in their name.

    Args:
        access: the one place that decides.
        routes: the app's, to find where a request goes.
    """

    def __init__(self, app: ASGIApp, access: Access, routes: Sequence[BaseRoute]) -> None:
        self._app = app
        self._access = access
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            raise RuntimeError(f"no rule says who may send {scope['type']}")
        headers = Headers(scope=scope)
        peer = scope.get("client")
        record = current_record()
        visit = Visit(
            route=route_of(scope, self._routes),
            method=known_method(scope["method"]),
            credential=credential_of(headers),
            peer=peer[0] if peer else None,
            request_id=record.request_id if record else "",
        )
        if record is not None:
            record.route = visit.route
        try:
            principal = await self._access.admit(visit)
        except SeamountError as error:
            await _refusal(error, visit.credential)(scope, receive, send)
            return
        if record is not None:
            record.principal = principal
        with acting_as(principal):
            await self._app(scope, receive, send)


def credential_of(headers: Headers) -> str | None:
    """Return what was sent as proof, in OpenAI's header or in Anthropic's.

    Who sends two that differ gets neither: some proxy in between may have checked the other one.
    """
    given = {value for value in headers.getlist("x-api-key") if value}
    for value in headers.getlist("authorization"):
        scheme, _, rest = value.partition(" ")
        credential = rest.strip() if scheme.lower() == "bearer" else value
        if credential:
            given.add(credential)
    return ", ".join(sorted(given)) if given else None


def _refusal(error: SeamountError, credential: str | None) -> Response:
    answer = error_response(error)
    if isinstance(error, UnauthenticatedError) and not credential:
        # https://www.rfc-editor.org/rfc/rfc6750#section-3: no error code for those who sent nothing.
        answer.headers["www-authenticate"] = 'Bearer realm="seamount"'
    return answer


class BodyLimit:
    """Refuses compressed bodies, and those over the limit, by their announced length, else as soon as too much has
    arrived; and those that do not come: a place that is held for them is one that others wait for.

    Args:
        is_draining: says whether the server stops; then nobody waits for the rest of a body.
        max_body_bytes: of every body, but for
        larger: those that are sent to these paths.
    """

    def __init__(
        self,
        app: ASGIApp,
        is_draining: Callable[[], bool],
        max_body_bytes: int,
        larger: Mapping[str, int] | None = None,
    ) -> None:
        self._app = app
        self._is_draining = is_draining
        self._max_body_bytes = max_body_bytes
        self._larger = larger or {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        most = self._larger.get(scope["path"], self._max_body_bytes)
        headers = Headers(scope=scope)
        announced = headers.get("content-length", "0")
        if not announced.isdigit() or int(announced[:20]) > most:
            await self._refuse(most)(scope, receive, send)
            return
        coding = ", ".join(headers.getlist("content-encoding")).lower()
        if coding.strip() not in ("", "identity"):
            text = f"The body's content-encoding is {coding[:40]!r}; this server reads none. Send it uncompressed."
            refusal = framework_response(415, message=text, headers={"connection": "close"})
            await refusal(scope, receive, send)
            return
        received, is_whole = 0, False
        start_s = time.monotonic()

        async def receive_on() -> Message:
            nonlocal received, is_whole
            if is_whole:  # what comes now is the client's leaving
                return await receive()
            message = await self._in_time(receive, start_s + BODY_S + received / BODY_BYTES_PER_S)
            received += len(message.get("body", b""))
            is_whole = not message.get("more_body", False)
            if received > most:
                raise HTTPException(413, headers={"connection": "close"})
            return message

        await self._app(scope, receive_on, send)

    async def _in_time(self, receive: Receive, end_s: float) -> Message:
        while True:
            left_s = end_s - time.monotonic()
            try:
                async with asyncio.timeout(min(max(left_s, 0.0), _LOOK_S)):
                    return await receive()
            except TimeoutError:
                if self._is_draining():
                    raise HTTPException(503, headers={"connection": "close", "x-should-retry": "true"}) from None
                if left_s <= _LOOK_S:
                    raise HTTPException(408, headers={"connection": "close"}) from None

    def _refuse(self, most: int) -> ASGIApp:
        text = f"The body is larger than {most} bytes."
        return framework_response(413, message=text, headers={"connection": "close"})


def origin_form(scope: Scope) -> Scope:
    """Return a request whose target is a whole URL, as proxies are sent, as one for that URL's host and path.

    The target then outdoes the Host header (https://www.rfc-editor.org/rfc/rfc9112#section-3.2.2).
    """
    scheme, _, rest = scope["path"].partition("://")
    if scheme.lower() not in ("http", "https"):
        return scope
    authority, _, path = rest.partition("/")
    raw_path = scope["raw_path"].partition(b"://")[2].partition(b"/")[2]
    headers = [(name, value) for name, value in scope["headers"] if name != b"host"]
    headers.append((b"host", authority.encode("latin-1", "replace")))
    return {**scope, "path": f"/{path}", "raw_path": b"/" + raw_path, "headers": headers}


def new_record(method: str, headers: Headers) -> Record:
    """Return the record of a request that has just come; its id is the client's where that is one."""
    given, parents = headers.get("x-request-id", ""), headers.getlist("traceparent")
    return Record(
        request_id=given if _REQUEST_ID.fullmatch(given) else uuid4().hex,
        method=known_method(method),
        traceparent=parents[0] if len(parents) == 1 else "",
    )
