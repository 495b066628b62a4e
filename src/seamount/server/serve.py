"""Runs the app under uvicorn, and gRPC beside it: binds, says when it is ready, drains when told to stop.

Called by the CLI; tests run `HttpServer` in a thread. Order matters and is this: bind first, so that a taken port is
reported before minutes of loading; answer probes while the model loads; announce when requests are taken; on the first
signal take no new requests and let the running ones finish; on the second one leave.
"""

from __future__ import annotations

import asyncio
import gc
import socket
import ssl
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn
from fastapi import FastAPI

from seamount.core.settings import ServerConfig

from .door.connections import BoundedProtocol, allow_many_files, notice_dead_peers
from .door.listener import bind
from .door.tls import server_context
from .service import Service

if TYPE_CHECKING:
    from .rpc.server import GrpcServer

# Longer than the pools of the usual clients keep idle connections, so that it is the client who closes them.
_KEEP_ALIVE_S = 75
# After the drain, for connections that still hold an answer's end.
_CLOSE_S = 5
_TICK_S = 0.05
_MAX_DIGITS = 640  # the least that Python takes


def run_server(
    app: FastAPI, config: ServerConfig, on_ready: Callable[[str], None], listener: socket.socket | None = None
) -> None:
    """Serve until a signal comes, and return when everything is closed.

    Args:
        app: from `create_app`; its lifespan starts and closes the engine.
        on_ready: called once with the base URL, for instance `http://127.0.0.1:8000`, when requests are taken.
        listener: from `bind`, closed at the end; None binds now.

    Raises:
        ConfigError: the address cannot be bound, or the TLS files cannot be used.
        SeamountError: the engine could not be started.
    """
    # What there is now stays: looking through it again and again would make large bodies several times as slow.
    gc.collect()
    gc.freeze()
    # Reading an integer takes a time that grows with the square of its length, and nobody else has a turn meanwhile.
    sys.set_int_max_str_digits(_MAX_DIGITS)
    HttpServer(app, config, on_ready, listener).run()


class HttpServer:
    """One server. `stop` may be called from any thread."""

    def __init__(
        self,
        app: FastAPI,
        config: ServerConfig,
        on_ready: Callable[[str], None],
        listener: socket.socket | None = None,
    ) -> None:
        context = server_context(config)
        self._socket = bind(config) if listener is None else listener
        notice_dead_peers(self._socket)
        allow_many_files()
        scheme = "http" if context is None else "https"
        self._app = app
        self._grpc = _grpc_server(app, config)

        def announce() -> None:
            on_ready(_base_url(scheme, config.host, self._socket))

        self._server = _Uvicorn(app, config, context, announce, self._grpc)

    def run(self) -> None:
        """Serve in an event loop of its own until `stop` or a signal; see `run_server`."""
        with asyncio.Runner(loop_factory=self._server.config.get_loop_factory()) as runner:
            runner.run(self.serve())

    async def serve(self) -> None:
        """Serve in the caller's event loop until `stop` or a signal; see `run_server`."""
        try:
            if self._grpc is not None:
                self._app.state.grpc_address = self._grpc.bind()
            await self._server.serve(sockets=[self._socket])
        finally:
            self._socket.close()
        if self._server.failure is not None:
            raise self._server.failure

    def stop(self) -> None:
        """Begin to drain, then stop."""
        self._server.should_exit = True


class _Uvicorn(uvicorn.Server):
    """Uvicorn with an announcement at its start and a drain at its end.

    Uvicorn alone closes its listener first, so that a client sees a refused connection and a probe sees nothing; here
    both get an honest 503 until the last answer is out.
    """

    def __init__(
        self,
        app: FastAPI,
        config: ServerConfig,
        tls: ssl.SSLContext | None,
        announce: Callable[[], None],
        grpc: GrpcServer | None,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=BoundedProtocol,
                # A task must not begin with what an earlier one on its connection knew: who called, for instance.
                reset_contextvars=True,
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,  # the app logs requests itself, without query text
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=_CLOSE_S,
                ssl_context_factory=None if tls is None else lambda config, default: tls,
            )
        )
        self.failure: BaseException | None = None
        self._service: Service = app.state.service
        self._drain_timeout_s = config.drain_timeout_s
        self._announce = announce
        self._grpc = grpc
        self._announcing: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._grpc is not None:
            await self._grpc.start()
        self._announcing = asyncio.create_task(self._announce_when_ready())

    async def _announce_when_ready(self) -> None:
        started = self._service.started
        if started is None:
            return
        await asyncio.wait((started,))
        if started.cancelled():
            return
        try:
            started.result()
            self._announce()
        except Exception as error:  # noqa: BLE001 - handed to the caller of `run`
            self.failure = error
            self.should_exit = True

    async def main_loop(self) -> None:
        await super().main_loop()
        self._service.begin_drain()
        deadline_s = time.monotonic() + self._drain_timeout_s
        while self._service.num_active and not self.force_exit and time.monotonic() < deadline_s:
            await asyncio.sleep(_TICK_S)
        # Ends what still runs: its clients get an error chunk, not a broken connection.
        await self._service.close()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # Before the app's own end: what calls used is still counted then.
        if self._grpc is not None:
            await self._grpc.stop(0 if self.force_exit else _CLOSE_S)
        await super().shutdown(sockets)
        if self.force_exit:  # uvicorn leaves the app's own end out then, and with it what is yet to be written
            await self.lifespan.shutdown()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True
        self._service.begin_drain()  # at once, not at the loop's next look


def _grpc_server(app: FastAPI, config: ServerConfig) -> GrpcServer | None:
    """Return the gRPC server where the settings ask for one; only then is its library imported."""
    if config.grpc_port is None:
        return None
    from .rpc.server import GrpcServer

    return GrpcServer(app.state.service, app.state.access, config, app.state.on_end)


def _base_url(scheme: str, host: str, listener: socket.socket) -> str:
    """Return where a browser on this machine finds the server."""
    port = listener.getsockname()[1]
    if host in ("0.0.0.0", "::", ""):
        host = "127.0.0.1"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
