"""What stands before every route: request ids, the guard against foreign web pages, the body limit,
HEAD, the last catch.

Pure ASGI functions round the app, because the framework's own middleware base class runs the app in a task of its own
and thereby hides a client's disconnect from it.

Why a guard, when the server listens on loopback only: any web page that the user visits can send requests to
127.0.0.1. Two headers that a page cannot forge stop it. `Origin` names the page a request comes from; it must be
ours. And `Host` names the server as the browser knows it: a page that points its own domain at 127.0.0.1 (DNS
rebinding) has an Origin that fits, but a Host that is not this machine. Programs send no Origin and are not affected.
"""

from __future__ import annotations

import ipaddress
import logging
import re
import socket
import time
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import framework_response, log_failure
from .service import Service

_log = logging.getLogger("seamount.server.requests")
_PROBES = ("/healthz", "/readyz", "/metrics")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class Edge:
    """The outermost layer: request ids, safety headers, the log, and a 500 for the unforeseen."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid4().hex
        status = 0

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers["x-content-type-options"] = "nosniff"
                headers["referrer-policy"] = "no-referrer"
            await send(message)

        start_s = time.perf_counter()
        counted = scope["method"] == "POST"
        if counted:
            self._service.enter()
        try:
            await self._app(scope, receive, send_on)
        except Exception as error:  # noqa: BLE001 - the process edge
            log_failure(error)
            if not status:
                await framework_response(500)(scope, receive, send_on)
        finally:
            if counted:
                self._service.leave()
            took_ms = (time.perf_counter() - start_s) * 1000
            # Probes, and pages that went well, would drown the rest.
            tells = counted or (status >= 400 and scope["path"] not in _PROBES)
            level = logging.INFO if tells else logging.DEBUG
            path = _printable(scope["path"])
            _log.log(level, "%s %s %d %.0f ms %s", scope["method"], path, status, took_ms, request_id)


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
        self._loopback_only = _is_loopback(bound_host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        problem = self._problem(Headers(scope=scope)) if scope["type"] == "http" else None
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
        return name in self._names or _is_loopback(name.strip("[]"))


class BodyLimit:
    """Refuses bodies over the limit: by their announced length, else as soon as too much has arrived."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "0")
        if not announced.isdigit() or int(announced[:20]) > self._max_body_bytes:
            await self._refuse()(scope, receive, send)
            return
        received = 0

        async def receive_on() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_body_bytes:
                raise HTTPException(413, headers={"connection": "close"})
            return message

        await self._app(scope, receive_on, send)

    def _refuse(self) -> ASGIApp:
        text = f"The body is larger than {self._max_body_bytes} bytes."
        return framework_response(413, message=text, headers={"connection": "close"})


def _is_loopback(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _printable(path: str) -> str:
    """Return a path that cannot break a log line."""
    return path[:200].encode("unicode_escape").decode("ascii")
