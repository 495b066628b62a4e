"""Runs the app under uvicorn: binds, says when it is ready, drains when told to stop.

Called by the CLI; tests run `HttpServer` in a thread. Order matters and is this: bind first, so that a taken port is
reported before minutes of loading; answer probes while the model loads; announce when requests are taken; on the first
signal take no new requests and let the running ones finish; on the second one leave.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from seamount.core.settings import ServerConfig

from .listener import bind
from .service import Service

_MAX_HEAD_BYTES = 64 * 1024
# Longer than the pools of the usual clients keep idle connections, so that it is the client who closes them.
_KEEP_ALIVE_S = 75
# After the drain, for connections that still hold an answer's end.
_CLOSE_S = 5
_TICK_S = 0.05


def run_server(
    app: FastAPI, config: ServerConfig, on_ready: Callable[[str], None], listener: socket.socket | None = None
) -> None:
    """Serve until a signal comes, and return when everything is closed.

    Args:
        app: from `create_app`; its lifespan starts and closes the engine.
        on_ready: called once with the base URL, for instance `http://127.0.0.1:8000`, when requests are taken.
        listener: from `bind`, closed at the end; None binds now.

    Raises:
        ConfigError: the address cannot be bound.
        SeamountError: the engine could not be started.
    """
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
        self._socket = bind(config) if listener is None else listener
        self._server = _Uvicorn(app, config, lambda: on_ready(_base_url(config.host, self._socket)))

    def run(self) -> None:
        """Serve in an event loop of its own until `stop` or a signal; see `run_server`."""
        with asyncio.Runner(loop_factory=self._server.config.get_loop_factory()) as runner:
            runner.run(self.serve())

    async def serve(self) -> None:
        """Serve in the caller's event loop until `stop` or a signal; see `run_server`."""
        try:
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

    def __init__(self, app: FastAPI, config: ServerConfig, announce: Callable[[], None]) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http="h11",
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,  # the app logs requests itself, without query text
                server_header=False,
                proxy_headers=False,
                h11_max_incomplete_event_size=_MAX_HEAD_BYTES,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=_CLOSE_S,
            )
        )
        self.failure: BaseException | None = None
        self._service: Service = app.state.service
        self._drain_timeout_s = config.drain_timeout_s
        self._announce = announce
        self._announcing: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
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

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True


def _base_url(host: str, listener: socket.socket) -> str:
    """Return where a browser on this machine finds the server."""
    port = listener.getsockname()[1]
    if host in ("0.0.0.0", "::", ""):
        host = "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
