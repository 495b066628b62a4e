"""The database's tables, as a list of steps that only ever grows.

Called by `core.state` when the database is opened. A step that was released is never changed, for databases that
took it would not know: each records the digest of the steps it took, and one that differs is refused. A step says
both kinds of database the same.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from seamount.core.database import Database, Run
from seamount.core.errors import StateMismatchError

from . import v0001_keys, v0002_responses, v0003_batches, v0004_bounds


@dataclass(frozen=True)
class Migration:
    """One step; its number is its place in the list, from 1."""

    name: str
    statements: tuple[str, ...]

    @property
    def digest(self) -> str:
        """SHA-256 of the statements, in hexadecimal; white space does not count."""
        words = [" ".join(statement.split()) for statement in self.statements]
        return hashlib.sha256("\n".join(words).encode()).hexdigest()


MIGRATIONS: tuple[Migration, ...] = (
    Migration("keys", v0001_keys.STATEMENTS),
    Migration("responses", v0002_responses.STATEMENTS),
    Migration("batches", v0003_batches.STATEMENTS),
    Migration("bounds", v0004_bounds.STATEMENTS),
)

_TABLE = """CREATE TABLE IF NOT EXISTS seamount_migrations (
    version BIGINT PRIMARY KEY, name TEXT NOT NULL, digest TEXT NOT NULL, applied_s BIGINT NOT NULL)"""


def migrate(
    database: Database, migrations: Sequence[Migration] = MIGRATIONS, *, clock: Callable[[], float] = time.time
) -> None:
    """Bring a database to the last of these steps: all that it lacks, or, on any failure, nothing.

    Raises:
        StateMismatchError: it has taken steps that this program does not know, or took other ones.
        SeamountError: the database cannot be used.
    """

    def work(run: Run) -> None:
        run(_TABLE)
        taken = run("SELECT version, digest FROM seamount_migrations ORDER BY version")
        _check(database.name, taken, migrations)
        for version, migration in enumerate(migrations[len(taken) :], len(taken) + 1):
            for statement in migration.statements:
                run(statement)
            run(
                "INSERT INTO seamount_migrations (version, name, digest, applied_s) VALUES (?, ?, ?, ?)",
                version,
                migration.name,
                migration.digest,
                int(clock()),
            )

    database.write(work, migrates=True)


def _check(name: str, taken: Sequence[tuple[int, str]], migrations: Sequence[Migration]) -> None:
    if len(taken) > len(migrations):
        raise StateMismatchError(
            f"The state database {name} is of version {len(taken)}; this program knows versions up to "
            f"{len(migrations)}.",
            hint="Use the program that wrote it, or a newer one; or set --database to another place.",
        )
    for version, digest in taken:
        if migrations[version - 1].digest != digest:
            raise StateMismatchError(
                f"The state database {name} was made by another program: its step {version} differs.",
                hint="Set --database to another place.",
            )
