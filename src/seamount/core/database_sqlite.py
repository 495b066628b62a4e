"""Connections to an SQLite file, and its errors in the house's words.

Called by `core.state`. Write-ahead logging lets a request's lookups go on while another process writes; every commit
is flushed to the disk, because a revoked key must stay revoked after a power cut.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .database import Row
from .errors import BackendError, ConfigError, IntegrityError, SeamountError, StateFullError, StateUnavailableError


def create_file(path: Path) -> None:
    """Make an empty file that only its owner can read, where there is none.

    Never opens a file that exists: closing any handle of it would take away the locks that connections in this
    process hold on it.

    Raises:
        ConfigError: it cannot be made.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except OSError as cause:
        if path.exists():  # it was there before, or another process was faster
            return
        raise ConfigError(
            f"The state database {path} cannot be made: {cause.strerror}.",
            hint="Set --database to a path in a folder that can be written.",
        ) from cause


class SqliteConnection:
    """One connection to the file, in write-ahead logging.

    Args:
        busy_timeout_s: seconds to wait for another writer before giving up.

    Raises:
        SeamountError: the file cannot be opened, or is no database.
    """

    def __init__(self, path: Path, busy_timeout_s: float) -> None:
        self._path = path
        with self._typed():
            # Transactions are begun by name; threads take turns, and the last one may close for another.
            self._raw = sqlite3.connect(path, timeout=busy_timeout_s, isolation_level=None, check_same_thread=False)
        try:
            mode = self.run("PRAGMA journal_mode = WAL")[0][0]
            if mode != "wal":
                raise ConfigError(
                    f"The folder of the state database {path} cannot hold one that several processes use.",
                    hint="Put it on a local disk, not on a network drive.",
                )
            self.run("PRAGMA synchronous = FULL")
            self.run("PRAGMA foreign_keys = ON")
            # What is deleted is overwritten, not left in pages that are free.
            self.run("PRAGMA secure_delete = ON")
        except SeamountError:
            self._raw.close()
            raise

    def run(self, sql: str, *values: str | int | None) -> list[Row]:
        """Run one statement; see `core.database.Connection`."""
        with self._typed():
            return self._raw.execute(sql, values).fetchall()

    def begin(self) -> None:
        """Begin a transaction as the only writer: one that begins as a reader can be refused halfway."""
        self.run("BEGIN IMMEDIATE")

    def begin_migration(self) -> None:
        """The same: there is one writer at a time."""
        self.begin()

    def commit(self) -> None:
        """Make the transaction last."""
        self.run("COMMIT")

    def rollback(self) -> None:
        """Undo the transaction, unless SQLite did so already, as on a full disk."""
        if self._raw.in_transaction:
            self.run("ROLLBACK")

    def close(self) -> None:
        """Close."""
        self._raw.close()

    @contextmanager
    def _typed(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as cause:
            raise _typed(cause, self._path) from cause


def _typed(error: sqlite3.Error, path: Path) -> SeamountError:
    where, private = "The state database", str(path)
    # The low byte is the kind; the rest says more about it (https://sqlite.org/rescode.html).
    kind = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if kind in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return StateUnavailableError(
            f"{where} is locked by another writer.", code="state_busy", retry_after=1, private=private
        )
    if kind == sqlite3.SQLITE_FULL:
        return StateFullError(
            f"{where} cannot grow: the disk is full.",
            hint="Free some space; nothing was half written.",
            retry_after=30,
            private=private,
        )
    if kind in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return IntegrityError(
            f"{where} is damaged, or no SQLite file.",
            hint="Restore it from a copy.",
            code="state_corrupt",
            private=private,
        )
    if kind in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_IOERR):
        return StateUnavailableError(
            f"{where} cannot be read or written: {error}.", hint="Look at the disk and at the file's owner.",
            retry_after=5, private=private,
        )  # fmt: skip
    return BackendError(f"{where} refused a statement: {error}.", code="state_failed", private=private)
