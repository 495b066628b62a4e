"""A real server on a real socket, over a scripted engine, in the test's own event loop."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import pytest_asyncio

from seamount.core.database import Database
from seamount.core.identity import is_loopback
from seamount.core.ports import Engine
from seamount.core.settings import ServerConfig
from seamount.engine.fake_encoder import ByteEncoder
from seamount.server import rpc
from seamount.server.app import create_app
from seamount.server.door.access import Access
from seamount.server.serve import HttpServer
from seamount.server.service import Service


@dataclass
class Running:
    """A server that answers at `url`."""

    url: str
    server: HttpServer
    service: Service
    task: asyncio.Task[None]
    grpc_address: str | None = None

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])


Serve = Callable[..., Awaitable[Running]]


@dataclass(frozen=True)
class Stubs:
    """What protoc makes of the service's .proto for somebody who writes a client: messages, and the service's stub."""

    pb: ModuleType
    grpc: ModuleType


@pytest.fixture(scope="session")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Stubs:
    """A client's own modules, made of nothing but the .proto."""
    from grpc_tools import protoc

    folder, proto = tmp_path_factory.mktemp("stubs"), Path(rpc.__file__).with_name("seamount.proto")
    assert not protoc.main(
        ["protoc", f"-I{proto.parent}", f"--python_out={folder}", f"--grpc_python_out={folder}", proto.name]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        made = import_module("seamount_pb2"), import_module("seamount_pb2_grpc")
    return Stubs(*made)


@pytest_asyncio.fixture
async def serve() -> AsyncIterator[Serve]:
    """Return `serve(engine, encoder, **server settings)`; everything is stopped afterwards."""
    started: list[Running] = []

    async def start(
        engine: Engine,
        encoder: ByteEncoder | None = None,
        *,
        access: Access | None = None,
        state: Database | None = None,
        **settings: object,
    ) -> Running:
        config = ServerConfig(**{"port": 0, "drain_timeout_s": 1, **settings})
        app = create_app(engine, encoder or ByteEncoder(), config, access, state)
        ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        server = HttpServer(app, config, ready.set_result)
        task = asyncio.create_task(server.serve())
        await asyncio.wait((ready, task), return_when=asyncio.FIRST_COMPLETED)
        if not ready.done():
            await task
        running = Running(ready.result(), server, app.state.service, task, app.state.grpc_address)
        started.append(running)
        return running

    yield start
    for running in started:
        running.server.stop()
        await running.task


@pytest.fixture
def only_this_machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Refuse every connection and every look-up that leaves this machine, and fail the test that tried."""
    tried: list[Any] = []

    def watch(owner: Any, name: str, host_of: Callable[..., Any]) -> None:
        real = getattr(owner, name)

        def watched(*given: Any, **more: Any) -> Any:
            host = host_of(*given, **more)
            if host not in (None, b"localhost", "") and not is_loopback(str(host)):
                tried.append(host)
                raise ConnectionRefusedError(f"a test asked for {host}")
            return real(*given, **more)

        monkeypatch.setattr(owner, name, watched)

    def peer(sock: socket.socket, address: Any) -> Any:
        return address[0] if sock.family in (socket.AF_INET, socket.AF_INET6) else None

    watch(socket.socket, "connect", peer)
    watch(socket.socket, "connect_ex", peer)
    watch(socket, "getaddrinfo", lambda host, *given, **more: host)
    yield
    assert tried == []
