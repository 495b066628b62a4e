"""The gRPC server: its port, its services, its limits, and its end.

Run by `serve` beside the HTTP server, in the same event loop. Binds before anything is loaded; answers the health
service while the model loads; drains with HTTP, since both count their requests in the same place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import grpc
from google.protobuf.descriptor import ServiceDescriptor

from seamount.core.errors import ConfigError
from seamount.core.settings import ServerConfig
from seamount.server.door.access import RULES, Access
from seamount.server.service import Service
from seamount.server.telemetry.record import Record

from .credentials import server_credentials
from .door import Door, Method
from .methods import HEALTH, REFLECTION, SEAMOUNT, Health, Reflection, Seamount

# A client has one connection for all its calls; a proxy has a few for all of its clients.
_MAX_CONNECTIONS = 1024
_MAX_STREAMS = 1024
# The library's own default. A message is read in one go, nobody's turn between, into up to fifty times as much memory.
_MAX_MESSAGE_BYTES = 4 * 2**20
_OPTIONS = (
    # Two servers on one port would share its connections without anybody noticing.
    ("grpc.so_reuseport", 0),
    ("grpc.max_allowed_incoming_connections", _MAX_CONNECTIONS),
    ("grpc.max_concurrent_streams", _MAX_STREAMS),
    # As for HTTP: who connects has something to ask, and a peer that is gone is noticed within a minute.
    ("grpc.server_handshake_timeout_ms", 60_000),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 30_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.max_connection_idle_ms", 600_000),
    # Clients that keep their connection alive more often than that are told to calm down.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    # The limit on a message's size is the library's on its compressed size: so there are no compressed ones.
    ("grpc.compression_enabled_algorithms_bitset", 1),
    ("grpc.per_message_decompression", 0),
)


class GrpcServer:
    """One server. `bind`, `start` and `stop` are called from its event loop, in this order."""

    def __init__(
        self,
        service: Service,
        access: Access,
        config: ServerConfig,
        on_end: Callable[[Record], None] | None = None,
    ) -> None:
        self._service = service
        self._door = Door(service, access, on_end)
        self._config = config
        self._server: grpc.aio.Server | None = None
        self._health: Health | None = None

    def bind(self) -> str:
        """Take the port, and return the address: host and port, as clients write it.

        Raises:
            ConfigError: it cannot be taken, the TLS files cannot be used, or a method has no rule.
        """
        host = f"[{self._config.host}]" if ":" in self._config.host else self._config.host
        where = f"{host}:{self._config.grpc_port}"
        credentials = server_credentials(self._config)
        self._health = Health(self._service)
        handlers = self._handlers(self._health)
        max_bytes = min(self._config.max_body_bytes, _MAX_MESSAGE_BYTES)
        options = (*_OPTIONS, ("grpc.max_receive_message_length", max_bytes))
        self._server = server = grpc.aio.server(handlers=(_Routes(handlers),), options=options)
        try:
            port = (
                server.add_insecure_port(where) if credentials is None else server.add_secure_port(where, credentials)
            )
        except RuntimeError as cause:
            raise ConfigError(
                f"The gRPC server cannot listen on {where}.",
                hint="Perhaps something else does: choose another port with --grpc-port (0 takes any free one).",
            ) from cause
        return f"{'127.0.0.1' if host in ('0.0.0.0', '[::]') else host}:{port}"

    async def start(self) -> None:
        """Answer calls."""
        if self._server is not None:
            await self._server.start()

    async def stop(self, within_s: float) -> None:
        """Take no more calls, and return when those that are left are over, at the latest after `within_s` seconds."""
        if self._health is not None:
            self._health.close()
        if self._server is not None:
            await self._server.stop(within_s)

    def _handlers(self, health: Health) -> dict[str, grpc.RpcMethodHandler]:
        return {
            **self._of(SEAMOUNT, Seamount(self._service).methods),
            **self._of(HEALTH, health.methods),
            **self._of(REFLECTION, Reflection().methods),
        }

    def _of(self, service: ServiceDescriptor, methods: Mapping[str, Method]) -> dict[str, grpc.RpcMethodHandler]:
        return {
            route: self._door.handler(route, service.methods_by_name[name], methods[name])
            for name, route in routes(service, methods).items()
        }


def routes(service: ServiceDescriptor, methods: Mapping[str, Method]) -> dict[str, str]:
    """Return the route of each of a service's methods, by name.

    Raises:
        ConfigError: one has no rule that says who may call it; a programmer's mistake, as for HTTP.
    """
    found = {name: f"/{service.full_name}/{name}" for name in methods}
    if without := [route for route in found.values() if route not in RULES]:
        raise ConfigError(
            f"These methods have no rule: {', '.join(without)}.", hint="Add them to server.door.access.RULES."
        )
    return found


class _Routes(grpc.GenericRpcHandler):
    """Finds the handler of a method. The library tells callers of others that there is none."""

    def __init__(self, handlers: Mapping[str, grpc.RpcMethodHandler]) -> None:
        self._handlers = handlers

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        """Return it."""
        return self._handlers.get(handler_call_details.method)
