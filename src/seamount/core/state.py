"""Opens the state database that a setting names, brought to this program's version.

Called by the composition root and by tests. A path is an SQLite file; a postgresql:// URL is PostgreSQL.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from .database import Database
from .errors import ConfigError
from .migrations import migrate
from .settings import data_folder

_BUSY_TIMEOUT_S = 5.0


def open_state(location: str | None, *, busy_timeout_s: float = _BUSY_TIMEOUT_S, must_exist: bool = False) -> Database:
    """Open, make where there is none, and migrate. The caller closes it.

    Args:
        location: the setting `server.database`; None takes the file in the data folder.
        busy_timeout_s: seconds that a call waits for another writer.
        must_exist: refuse where there is no file, and make none. A PostgreSQL database is always there before.

    Raises:
        ConfigError: the location is wrong, or the database is of a newer program (`StateMismatchError`).
        SeamountError: it cannot be reached or read.
    """
    database = connect_state(location, busy_timeout_s=busy_timeout_s, must_exist=must_exist)
    try:
        migrate(database)
    except BaseException:
        database.close()
        raise
    return database


def connect_state(
    location: str | None, *, busy_timeout_s: float = _BUSY_TIMEOUT_S, must_exist: bool = False
) -> Database:
    """Return the database as it is, not migrated; see `open_state`."""
    scheme, is_url, _ = (location or "").partition("://")
    if not is_url:
        from .database_sqlite import SqliteConnection, create_file

        path = Path(location).expanduser().absolute() if location else data_folder() / "state.db"
        if must_exist and not os.path.exists(path):
            raise ConfigError(
                f"There is no state database {path}.",
                hint="`seamount init` makes it, with the administrator's key; --database names another.",
            )
        # Only the data folder is ours to make: elsewhere a folder that is missing is a wrong path.
        if location and not os.path.isdir(path.parent):
            raise ConfigError(
                f"The state database {path} cannot be made: {path.parent} is no folder.",
                hint="Make the folder first, or set --database to a path in another one.",
            )
        create_file(path)
        return Database(partial(SqliteConnection, path, busy_timeout_s), str(path))
    from .database_postgres import SCHEMES, PostgresConnection, postgres_options, shown

    if scheme not in SCHEMES:
        raise ConfigError(
            "The state database cannot be of that kind.",
            hint="It is a path of an SQLite file, or a URL that begins with postgresql://.",
        )
    options = postgres_options(location or "")
    return Database(partial(PostgresConnection, options, busy_timeout_s), shown(options))
