"""TLS from a certificate and a key in two files, read again when they change.

Called by `serve`, and by the CLI before anything is loaded. Nothing older than TLS 1.3 is spoken. A certificate is
renewed by putting other files in their place: the next connection gets it, and running ones go on.
"""

from __future__ import annotations

import logging
import ssl
from pathlib import Path

from seamount.core.errors import ConfigError
from seamount.core.settings import ServerConfig

_log = logging.getLogger(__name__)

_Stamp = tuple[tuple[int, int, int], ...]


def server_context(config: ServerConfig) -> ssl.SSLContext | None:
    """Return the context for the settings `tls_cert` and `tls_key`; None when neither is set.

    Raises:
        ConfigError: one is missing, cannot be read, or they do not belong together.
    """
    if config.tls_cert is None and config.tls_key is None:
        return None
    if config.tls_cert is None or config.tls_key is None:
        raise ConfigError(
            "TLS needs both a certificate and its key.",
            hint="Set --tls-cert and --tls-key; `seamount cert` makes both.",
        )
    pair = _Pair(config.tls_cert, config.tls_key)
    context = pair.context
    # OpenSSL calls this in every handshake, with or without a name from the client.
    context.sni_callback = pair.choose
    return context


class _Pair:
    """A certificate and its key on disk, and the context made of them."""

    def __init__(self, cert: Path, key: Path) -> None:
        self._cert = cert
        self._key = key
        self._seen = self._stamp()
        self.context = _load(cert, key)

    def choose(self, connection: ssl.SSLSocket | ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        """Give a connection that begins the certificate as it is now on disk; the last good one if it is broken."""
        stamp = self._stamp()
        if stamp != self._seen:
            self._seen = stamp
            try:
                self.context = _load(self._cert, self._key)
                _log.info("The certificate %s was read again.", self._cert)
            except ConfigError as error:
                # Perhaps one of the two files is still to come: the next change is looked at again.
                _log.warning("The certificate stays as it was: %s", error)
        connection.context = self.context

    def _stamp(self) -> _Stamp:
        """Return what differs once a file was changed or replaced; empty when one is missing."""
        try:
            found = [path.stat() for path in (self._cert, self._key)]
        except OSError:
            return ()
        return tuple((one.st_mtime_ns, one.st_size, one.st_ino) for one in found)


def _load(cert: Path, key: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    for path in (cert, key):
        try:
            path.open("rb").close()
        except OSError as cause:
            raise ConfigError(
                f"The TLS file {path} cannot be read: {cause.strerror}.", hint="Look at its path and its owner."
            ) from cause
    try:
        context.load_cert_chain(cert, key, password=_no_passphrase)
    except ssl.SSLError as cause:
        if cause.reason == "KEY_VALUES_MISMATCH":
            raise ConfigError(f"The key {key} is not that of the certificate {cert}.") from cause
        raise ConfigError(
            f"{cert} and {key} are no certificate and key in PEM.", hint="`seamount cert` makes a pair that works."
        ) from cause
    return context


def _no_passphrase() -> str:
    raise ConfigError(
        "The TLS key is locked with a passphrase, which nobody is there to type.",
        hint="Take it off with: openssl pkey -in KEY -out KEY-WITHOUT",
    )
