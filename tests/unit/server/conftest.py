"""An app in the test's event loop, with no socket between."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack

import httpx
import pytest_asyncio
from batch_site import clock, start, state  # noqa: F401 - fixtures

from seamount.core.settings import ServerConfig
from seamount.engine.fake_encoder import ByteEncoder
from seamount.server.app import create_app

Open = Callable[..., httpx.AsyncClient]


@pytest_asyncio.fixture
async def open_app() -> AsyncIterator[Open]:
    """Return `await open_app(engine, **server settings)`, a client of a started app, by default on its own machine."""
    async with AsyncExitStack() as stack:

        async def start(engine, encoder=None, *, access=None, state=None, peer="127.0.0.1", **settings):
            app = create_app(engine, encoder or ByteEncoder(), ServerConfig(**settings), access, state)
            await stack.enter_async_context(app.router.lifespan_context(app))
            await app.state.service.started
            transport = httpx.ASGITransport(app, client=(peer, 123))
            return await stack.enter_async_context(httpx.AsyncClient(transport=transport, base_url="http://localhost"))

        yield start
