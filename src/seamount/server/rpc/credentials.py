"""TLS for the gRPC server, from the same two files as for HTTP, read again when they change.

Called by `server`. Nothing older than TLS 1.3 is spoken: see the package's `__init__`.
"""

from __future__ import annotations

import logging
from pathlib import Path

import grpc

from seamount.core.errors import ConfigError
from seamount.core.settings import ServerConfig
from seamount.server.door.tls import server_context

_log = logging.getLogger(__name__)


def server_credentials(config: ServerConfig) -> grpc.ServerCredentials | None:
    """Return credentials for the settings `tls_cert` and `tls_key`; None when neither is set.

    Raises:
        ConfigError: one is missing, cannot be read, or they do not belong together.
    """
    if server_context(config) is None or config.tls_cert is None or config.tls_key is None:
        return None
    pair = _Pair(config, config.tls_cert, config.tls_key)
    return grpc.dynamic_ssl_server_credentials(pair.read(), pair.read_if_changed)


class _Pair:
    """A certificate and its key on disk."""

    def __init__(self, config: ServerConfig, cert: Path, key: Path) -> None:
        self._config = config
        self._cert = cert
        self._key = key
        self._seen = self._stamp()

    def read(self) -> grpc.ServerCertificateConfiguration:
        """Return what is on disk."""
        return grpc.ssl_server_certificate_configuration([(self._key.read_bytes(), self._cert.read_bytes())])

    def read_if_changed(self) -> grpc.ServerCertificateConfiguration | None:
        """Return what is on disk for a connection that begins; None where it is as it was, or broken.

        Called by the library in a thread of its own, one at a time.
        """
        stamp = self._stamp()
        if stamp == self._seen:
            return None
        self._seen = stamp
        try:
            server_context(self._config)
            found = self.read()
        except (ConfigError, OSError) as error:
            # Perhaps one of the two files is still to come: the next change is looked at again.
            _log.warning("The certificate of the gRPC server stays as it was: %s", error)
            return None
        _log.info("The certificate %s was read again.", self._cert)
        return found

    def _stamp(self) -> tuple[tuple[int, int, int], ...]:
        """Return what differs once a file was changed or replaced; empty when one is missing."""
        try:
            found = [path.stat() for path in (self._cert, self._key)]
        except OSError:
            return ()
        return tuple((one.st_mtime_ns, one.st_size, one.st_ino) for one in found)
