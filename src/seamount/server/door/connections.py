"""Bounds what idle connections can hold: each waits for a limited time, and all together leave files for the work.

Used by `serve`. uvicorn bounds the pause between two requests, but neither the time until the first one, nor that of a
request whose head comes byte by byte, nor the number of connections; when no file is left, a listener answers nobody.
"""

from __future__ import annotations

import asyncio
import resource
import socket
from typing import cast

from uvicorn.protocols.http.h11_impl import H11Protocol

# A client connects because it has something to ask. Some connect ahead of time, and few of those by a minute.
HEAD_S = 60.0
# Files for everything that is no connection: the worker, the database, logs, static files.
_OTHER_FILES = 256
_MAX_FILES = 65_536
# Of the idle connections, this share is closed together when there are too many.
_CLOSED_SHARE = 64
# A peer that vanished without a word (a lost network, a proxy that forgot the connection) is noticed by these: probes
# after half a minute of silence, and a minute without any acknowledgement of what was sent.
_DEAD_PEER_OPTIONS = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 60_000}


class BoundedProtocol(H11Protocol):
    """uvicorn's connection, closed when no whole request's head comes, and as the longest idle one of too many."""

    idle_since_s = 0.0
    _head_timer: asyncio.TimerHandle | None = None

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
