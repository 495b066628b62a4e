"""Bounds what connections can hold, and what they can make of few bytes.

Used by `serve`. uvicorn bounds the pause between two requests, but neither the time until the first one, nor that of a
request whose head comes byte by byte, nor the number of connections; when no file is left, a listener answers nobody.
And a body that comes in chunks of one byte each takes a thousand times the work of one that comes whole, before anybody
asks who sent it.
"""

from __future__ import annotations

import asyncio
import resource
import socket
from typing import Any, cast
from uuid import uuid4

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from seamount.server.errors import framework_response

# A client connects because it has something to ask. Some connect ahead of time, and few of those by a minute.
HEAD_S = 60.0
_MAX_HEAD_BYTES = 64 * 1024
# A body may come in so many pieces, and in one more for each so many bytes.
_MAX_PIECES, _PIECE_BYTES = 4096, 16
# Files for everything that is no connection: the worker, the database, logs, static files.
_OTHER_FILES = 256
_MAX_FILES = 65_536
# Of the idle connections, this share is closed together when there are too many.
_CLOSED_SHARE = 64
# A peer that vanished without a word (a lost network, a proxy that forgot the connection) is noticed by these: probes
# after half a minute of silence, and a minute without any acknowledgement of what was sent.
_DEAD_PEER_OPTIONS = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 60_000}


class _Framing(h11.Connection):
    """The parser of a connection; takes a body that comes in very many pieces for no request."""

    refusal = "The request is no valid HTTP."
    _num_pieces = _num_bytes = 0

    def next_event(self) -> Any:
        """Return what came next; see h11."""
        event = super().next_event()
        if type(event) is h11.Data:
            self._num_pieces += 1
            self._num_bytes += len(event.data)
            if self._num_pieces > _MAX_PIECES + self._num_bytes // _PIECE_BYTES:
                self.refusal = "The body comes in too many small pieces. Send larger chunks."
                raise h11.RemoteProtocolError(self.refusal)
        elif type(event) is h11.Request:
            self._num_pieces = self._num_bytes = 0
        return event


class BoundedProtocol(H11Protocol):
    """uvicorn's connection, closed when no whole request's head comes, as the longest idle one of too many, and with a
    body in too many pieces.
    """

    idle_since_s = 0.0
    _head_timer: asyncio.TimerHandle | None = None

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.conn: _Framing = _Framing(h11.SERVER, _MAX_HEAD_BYTES)

    @property
    def is_idle(self) -> bool:
        """Say whether no request is being answered on it."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection; see asyncio."""
        super().connection_made(transport)
        self._wait_for_head()
        if len(self.connections) > _max_connections():
            self._close_idle()

    def data_received(self, data: bytes) -> None:
        """Take bytes; see asyncio."""
        super().data_received(data)
        if not self.is_idle:
            self._stop_waiting()
        elif self._head_timer is None:  # part of a head
            self._wait_for_head()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP, as far as there is still something to be said, and close; see uvicorn."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        headers = {"connection": "close", "x-request-id": uuid4().hex}
        refusal = framework_response(400, message=self.conn.refusal, headers=headers)
        head = h11.Response(status_code=400, headers=refusal.raw_headers, reason="Bad Request")
        for event in (head, h11.Data(data=bytes(refusal.body)), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Let go; see asyncio."""
        self._stop_waiting()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """A response is out; see uvicorn."""
        self.idle_since_s = self.loop.time()
        super().on_response_complete()

    def _wait_for_head(self) -> None:
        self.idle_since_s = self.loop.time()
        self._head_timer = self.loop.call_later(HEAD_S, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _close_idle(self) -> None:
        others = [cast(BoundedProtocol, one) for one in self.connections if one is not self]
        idle = sorted((one for one in others if one.is_idle), key=lambda one: one.idle_since_s)
        for one in idle[: len(idle) // _CLOSED_SHARE + 1]:
            one.transport.close()


def notice_dead_peers(listener: socket.socket) -> None:
    """Let the system close connections whose peer is gone; what is accepted from `listener` inherits it."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _DEAD_PEER_OPTIONS.items():
        if hasattr(socket, name):  # macOS has no TCP_USER_TIMEOUT
            listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def allow_many_files() -> None:
    """Raise this process's limit on open files as far as it may: the usual one is for programs of one user."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _max_connections() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = _MAX_FILES if soft == resource.RLIM_INFINITY else soft
    return max(files - _OTHER_FILES, files // 2)
