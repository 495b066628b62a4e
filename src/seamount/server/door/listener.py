"""Binds the server's address, and says which addresses may be bound.

Called by the CLI before everything else, so that a taken port is told at once: this imports neither the web framework
nor the model's parts.
"""

from __future__ import annotations

import errno
import socket

from seamount.core.errors import ConfigError
from seamount.core.identity import is_loopback
from seamount.core.settings import ServerConfig

_BACKLOG = 1024


def check_exposure(config: ServerConfig, *, has_administrator: bool) -> None:
    """Check that nobody beyond this machine is let in unasked.

    Raises:
        ConfigError: the address is reachable from elsewhere, and there is no administrator, so no key would be asked.
    """
    if not has_administrator and not is_loopback(config.host):
        raise ConfigError(
            f"There is no administrator yet, so the server answers its own machine only, and not on {config.host}.",
            hint="Run `seamount init` first: it makes the administrator's key, and from then on keys are asked for.",
        )


def bind(config: ServerConfig) -> socket.socket:
    """Return a listening socket, which the caller closes.

    Raises:
        ConfigError: the address is in use, forbidden, or none of this machine's.
    """
    where = f"{config.host} port {config.port}"
    try:
        found = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as cause:
        raise ConfigError(f"The address {config.host} is not known.", hint="Set --host to an IP address.") from cause
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as cause:
        listener.close()
        if cause.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"Something already listens on {where}.",
                hint="Choose another port with --port (0 takes any free one), or stop the other program.",
            ) from cause
        raise ConfigError(f"The server cannot listen on {where}: {cause.strerror}.") from cause
    return listener
