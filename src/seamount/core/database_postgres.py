"""Connections to PostgreSQL, and its errors in the house's words.

Called by `core.state`. The driver is `pg8000`: pure Python, BSD licence, no C library to bring along; statements here
are few and short, so its speed is not what a request waits for. Messages carry PostgreSQL's code and never its text,
which may quote values.
"""

from __future__ import annotations

import ssl
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal
from urllib.parse import parse_qsl, unquote, urlsplit

from .database import ConnectionLostError, Row
from .errors import BackendError, ConfigError, IntegrityError, SeamountError, StateFullError, StateUnavailableError
from .identity import is_loopback

SCHEMES = ("postgresql", "postgres")
_FORM = "It is written postgresql://user:password@host:port/name."
_PARAMETERS = {"host", "sslmode", "sslrootcert"}
# Any number, the same in every version of the program: what migrations of one database wait for each other by.
_MIGRATION_LOCK = 7_326_866_811
_SOCKET_SLACK_S = 5.0


def postgres_options(url: str) -> dict[str, Any]:
    """Return the driver's arguments for a URL, in the form that PostgreSQL's own clients take.

    `host` in the query names a folder of Unix sockets. `sslmode` is disable, require (encrypted, not verified) or
    verify-full; without it connections on this machine are plain and all others verified. `sslrootcert` is a file.

    Raises:
        ConfigError: the URL is wrong; the message never quotes it, for it may hold a password.
    """
    try:
        parts = urlsplit(url)
        port = parts.port or 5432
        query = dict(parse_qsl(parts.query, strict_parsing=bool(parts.query)))
    except ValueError as cause:
        raise ConfigError("The URL of the state database cannot be read.", hint=_FORM) from cause
    if unknown := sorted(set(query) - _PARAMETERS):
        raise ConfigError(f"The URL of the state database has the unknown parameter {unknown[0]!r}.", hint=_FORM)
    if not parts.username:
        raise ConfigError("The URL of the state database names no user.", hint=_FORM)
    user, folder = unquote(parts.username), query.get("host")
    return {
        "user": user,
        "password": unquote(parts.password) if parts.password else None,
        "database": unquote(parts.path.strip("/")) or user,
        "host": parts.hostname or "localhost",
        "port": port,
        "unix_sock": f"{folder}/.s.PGSQL.{port}" if folder else None,
        "ssl_context": False if folder else _ssl_context(parts.hostname or "localhost", query),
    }


def shown(options: dict[str, Any]) -> str:
    """Return the database's name for messages: without the password."""
    where = options["unix_sock"] or f"{options['host']}:{options['port']}"
    return f"{options['database']} at {where}"


class PostgresConnection:
    """One connection.

    Args:
        options: from `postgres_options`.
        busy_timeout_s: seconds to wait for a lock or a statement before giving up.

    Raises:
        SeamountError: the database cannot be reached, or refuses.
    """

    def __init__(self, options: dict[str, Any], busy_timeout_s: float) -> None:
        import pg8000.dbapi

        self._where = shown(options)
        self._failures = (pg8000.dbapi.Error, OSError, struct.error)
        with self._typed():
            self._raw = pg8000.dbapi.connect(
                **options, timeout=busy_timeout_s + _SOCKET_SLACK_S, application_name="seamount"
            )
        self._raw.autocommit = True  # transactions are begun by name
        limit_ms = max(int(busy_timeout_s * 1000), 1)
        try:
            self.run(f"SET statement_timeout = {limit_ms}")
            self.run(f"SET lock_timeout = {limit_ms}")
        except SeamountError:
            self.close()
            raise

    def run(self, sql: str, *values: str | int | None) -> list[Row]:
        """Run one statement; see `core.database.Connection`."""
        with self._typed():
            cursor = self._raw.cursor()
            cursor.execute(sql.replace("?", "%s"), values)
            return [tuple(row) for row in cursor.fetchall()] if cursor.description else []

    def begin(self) -> None:
        """Begin a transaction."""
        self.run("BEGIN")

    def begin_migration(self) -> None:
        """Begin a transaction that other migrations wait for."""
        self.begin()
        self.run(f"SELECT pg_advisory_xact_lock({_MIGRATION_LOCK})")

    def commit(self) -> None:
        """Make the transaction last."""
        self.run("COMMIT")

    def rollback(self) -> None:
        """Undo the transaction."""
        self.run("ROLLBACK")

    def close(self) -> None:
        """Close; a connection that is broken already is closed all the same."""
        try:
            self._raw.close()
        except self._failures:
            return

    @contextmanager
    def _typed(self) -> Iterator[None]:
        try:
            yield
        except self._failures as cause:
            raise _typed(cause, self._where) from cause


def _typed(error: BaseException, name: str) -> SeamountError:
    where = "The state database"
    code = _sqlstate(error)
    if any(isinstance(one, ssl.SSLCertVerificationError) for one in _chain(error)):
        return ConfigError(
            f"{where} shows a certificate that is not to be trusted.",
            hint="Name the authority that signed it with ?sslrootcert=FILE, and the host as it is called there.",
            private=name,
        )
    if code in ("55P03", "57014", "40001", "40P01"):
        return StateUnavailableError(
            f"{where} is locked by another writer.", code="state_busy", retry_after=1, private=name
        )
    if code == "53100":
        return StateFullError(
            f"{where} cannot grow: its disk is full.",
            hint="Free some space; nothing was half written.",
            retry_after=30,
            private=name,
        )
    if code in ("28000", "28P01", "3D000"):
        return ConfigError(
            f"{where} refused the sign-in ({code}).", hint="Look at user, password and database name.", private=name
        )
    if code in ("XX001", "XX002"):
        return IntegrityError(
            f"{where} is damaged ({code}).", hint="Restore it from a copy.", code="state_corrupt", private=name
        )
    if not code or code.startswith(("08", "53", "57P")):
        return ConnectionLostError(
            f"{where} cannot be reached{f' ({code})' if code else ''}.",
            hint="See that PostgreSQL runs and is reachable from here.",
            retry_after=2,
            private=name,
        )
    return BackendError(f"{where} refused a statement ({code}).", code="state_failed", private=name)


def _sqlstate(error: BaseException) -> str:
    """Return PostgreSQL's code (www.postgresql.org/docs/current/errcodes-appendix.html); empty without one."""
    details = (one.args[0] for one in _chain(error) if one.args)
    return next((str(detail.get("C", "")) for detail in details if isinstance(detail, dict)), "")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and those behind it: when a connection fails, the driver fails once more saying goodbye."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _ssl_context(host: str, query: dict[str, str]) -> ssl.SSLContext | Literal[False]:
    """Return the context; False for none at all, where the driver's own None would try one that verifies nothing."""
    mode = query.get("sslmode", "disable" if is_loopback(host) else "verify-full")
    if mode == "disable":
        return False
    if mode not in ("require", "verify-full"):
        raise ConfigError(
            f"The state database's sslmode cannot be {mode!r}.", hint="It is disable, require or verify-full."
        )
    try:
        context = ssl.create_default_context(cafile=query.get("sslrootcert"))
    except OSError as cause:
        raise ConfigError(
            f"The state database's sslrootcert {query.get('sslrootcert')} cannot be read: {cause.strerror}."
        ) from cause
    if mode == "require":
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
