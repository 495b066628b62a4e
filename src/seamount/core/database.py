"""The state database: connections, transactions, threads. What is kept in it is its callers' affair.

Called by the rooms that keep state and by `core.state`, which opens it. Statements are written once for both kinds:
`?` for a parameter, columns of TEXT and BIGINT, times in whole Unix seconds, upserts by ON CONFLICT. That is also why
no query builder stands here: SQLite and PostgreSQL agree on all that is asked of them, so one would be 20 MB that
translates nothing. No driver's error leaves this module's connections: they raise the tree of `core.errors`.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from .errors import SeamountError, StateUnavailableError

T = TypeVar("T")
Row = tuple[Any, ...]

# As many requests can wait for the database at once; each thread holds one connection.
_NUM_THREADS = 4
# Beside them, for what every request begins with: a few that write, to a disk that is slow or a row that another server
# holds, take all of the others for seconds.
_NUM_LOOKUP_THREADS = 2


class Run(Protocol):
    """Runs one statement: its text, then a value for each `?`. Returns its rows, none for most writes."""

    def __call__(self, sql: str, *values: str | int | None) -> list[Row]: ...


class ConnectionLostError(StateUnavailableError):
    """The database closed the connection, or it broke; another one may work."""


class Connection(Protocol):
    """One connection, of `core.database_sqlite` or `core.database_postgres`. Used by one thread at a time.

    Every method raises SeamountError, and `ConnectionLostError` where a new connection may succeed.
    """

    def run(self, sql: str, *values: str | int | None) -> list[Row]:
        """Run one statement; outside a transaction it is one by itself."""
        ...

    def begin(self) -> None:
        """Begin a transaction that writes."""
        ...

    def begin_migration(self) -> None:
        """Begin a transaction that no other migration, in any process, runs beside."""
        ...

    def commit(self) -> None:
        """Make the transaction last, whole."""
        ...

    def rollback(self) -> None:
        """Undo the transaction, whole."""
        ...

    def close(self) -> None:
        """Close, undoing what is not committed."""
        ...


class Database:
    """One database, used from any thread. Each thread gets a connection of its own at its first call.

    Args:
        connect: makes a connection, or raises SeamountError.
        name: what messages call the database; holds no password.
    """

    def __init__(self, connect: Callable[[], Connection], name: str) -> None:
        self.name = name
        self._connect = connect
        self._local = threading.local()
        self._lock = threading.Lock()
        self._connections: set[Connection] = set()
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="state")
        self._lookup_threads = ThreadPoolExecutor(_NUM_LOOKUP_THREADS, thread_name_prefix="state-look-up")

    def read(self, work: Callable[[Run], T]) -> T:
        """Return what `work` returns; it only reads, and may be run a second time when the connection was lost.

        Raises:
            SeamountError: the database cannot be read.
        """
        try:
            return work(self._connection().run)
        except ConnectionLostError:
            if not self._drop():
                raise
        return work(self._connection().run)

    def write(self, work: Callable[[Run], T], *, migrates: bool = False) -> T:
        """Return what `work` returns, with all that it wrote committed; or raise, with none of it written.

        `work` lets every error of a statement through.

        Raises:
            SeamountError: the database cannot be written.
        """
        connection = self._begun(migrates)
        try:
            result = work(connection.run)
            connection.commit()
        except BaseException:
            self._undo(connection)
            raise
        return result

    async def call(self, work: Callable[[], T]) -> T:
        """Return what `work`, which uses this database, returns; it runs in one of the database's threads.

        Cancelled, it stops waiting; what has begun is done to its end.
        """
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def look_up(self, work: Callable[[], T]) -> T:
        """As `call`, for short work that only reads: it waits for nobody who writes."""
        return await asyncio.get_running_loop().run_in_executor(self._lookup_threads, work)

    def close(self) -> None:
        """Close every connection, after the calls that run. Idempotent."""
        self._threads.shutdown()
        self._lookup_threads.shutdown()
        with self._lock:
            for connection in self._connections:
                connection.close()
            self._connections.clear()

    def _connection(self) -> Connection:
        found: Connection | None = getattr(self._local, "connection", None)
        if found is None:
            found = self._connect()
            self._local.connection = found
            with self._lock:
                self._connections.add(found)
        return found

    def _drop(self) -> bool:
        """Close this thread's connection, and say whether there was one."""
        connection: Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            return False
        self._local.connection = None
        with self._lock:
            self._connections.discard(connection)
        connection.close()
        return True

    def _begun(self, migrates: bool) -> Connection:
        """Return a connection in a transaction; one lost while idle is replaced, for nothing is written yet."""
        try:
            return self._begin(migrates)
        except ConnectionLostError:
            if not self._drop():
                raise
        return self._begin(migrates)

    def _begin(self, migrates: bool) -> Connection:
        connection = self._connection()
        if migrates:
            connection.begin_migration()
        else:
            connection.begin()
        return connection

    def _undo(self, connection: Connection) -> None:
        try:
            connection.rollback()
        except SeamountError:
            self._drop()  # closing undoes it too; what went wrong is already on its way to the caller
