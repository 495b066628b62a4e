"""A real server on a real socket, over a scripted engine, in the test's own event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import pytest_asyncio

from seamount.core.ports import Engine
from seamount.core.settings import ServerConfig
from seamount.engine.fake_encoder import ByteEncoder
from seamount.server.app import create_app
from seamount.server.serve import HttpServer
from seamount.server.service import Service


@dataclass
class Running:
    """A server that answers at `url`."""

    url: str
    server: HttpServer
    service: Service
    task: asyncio.Task[None]

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])


Serve = Callable[..., Awaitable[Running]]


@pytest_asyncio.fixture
async def serve() -> AsyncIterator[Serve]:
    """Return `serve(engine, encoder, **server settings)`; everything is stopped afterwards."""
    started: list[Running] = []

    async def start(engine: Engine, encoder: ByteEncoder | None = None, **settings: object) -> Running:
        config = ServerConfig(**{"port": 0, "drain_timeout_s": 1, **settings})
        app = create_app(engine, encoder or ByteEncoder(), config)
        ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        server = HttpServer(app, config, ready.set_result)
        task = asyncio.create_task(server.serve())
        await asyncio.wait((ready, task), return_when=asyncio.FIRST_COMPLETED)
        if not ready.done():
            await task
        running = Running(ready.result(), server, app.state.service, task)
        started.append(running)
        return running

    yield start
    for running in started:
        running.server.stop()
        await running.task
