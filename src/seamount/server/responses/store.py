"""Responses that are kept: written once, read by their tenant, gone when their time is over.

Used by `responses` and `answer`, over the state database. A row holds its whole conversation, so reading it
takes one look-up however long the chain was, and a chain outlives the deletion or the expiry of what it began with.
The price: what is deleted here stays in the conversations that went on from it, until those are deleted or expire.
What a tenant's rows take is counted with each of them, in `response_totals`: whoever adds or deletes rows writes their
tenant's total first and no other one's, so that servers which share a database wait for each other in line.
Knows no protocol: items and responses are JSON text here.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from seamount.core.database import Database, Run
from seamount.core.errors import ForbiddenError

# Items and response of one row together, in UTF-8.
MAX_STORED_BYTES = 8 * 2**20
_DAY_S = 86_400
_CLEAN_ROWS = 500
# What is no id of ours is not asked for: PostgreSQL refuses texts that JSON can spell.
_ID = re.compile(r"resp_[0-9a-f]{32}")


@dataclass(frozen=True, kw_only=True)
class StoredResponse:
    """One kept response.

    Attributes:
        tenant: whose it is; nobody else can read or delete it.
        key_id: public id of the key that asked for it; None where none was needed.
        created_s: Unix time.
        items: JSON list of the conversation that it answers.
        response: its own JSON.
    """

    id: str
    tenant: str
    key_id: str | None
    model: str
    created_s: int
    items: str
    response: str

    @property
    def num_bytes(self) -> int:
        """What it takes of its tenant's room: items and response, in UTF-8."""
        return len(self.items.encode()) + len(self.response.encode())


class ResponseStore:
    """The kept responses of one database.

    Args:
        retention_days: how long a response is kept. Holds from `clean` on for those that were kept before, too.
        max_tenant_bytes: that one tenant's responses may take.
    """

    def __init__(
        self,
        database: Database,
        retention_days: int,
        max_tenant_bytes: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._database = database
        self._kept_s = retention_days * _DAY_S
        self._max_tenant_bytes = max_tenant_bytes
        self._clock = clock

    async def clean(self) -> None:
        """Delete all whose time is over, and let none be kept longer than this store keeps them. For a start.

        Raises:
            SeamountError: the database cannot be written.
        """
        await self._database.call(self._clean)

    async def ready(self, tenant: str, num_bytes: int) -> None:
        """Find out whether a response of so many bytes could be kept now, by deleting a few whose time is over.

        Raises:
            ForbiddenError: the tenant's responses take as much as they may, and the time of none of them is over.
            SeamountError: it could not.
        """

        def has_room(run: Run) -> bool:
            rows = run("SELECT num_bytes FROM response_totals WHERE tenant = ?", tenant)
            return (rows[0][0] if rows else 0) + num_bytes <= self._max_tenant_bytes

        def work() -> None:
            self._database.write(self._tidy)
            while not self._database.read(has_room):
                if not self._database.write(partial(self._expire, tenant)):
                    raise self._no_room()

        await self._database.call(work)

    async def put(self, stored: StoredResponse) -> None:
        """Keep a response.

        Raises:
            ForbiddenError: the tenant's responses would take more than they may; nothing was kept.
            SeamountError: the database cannot be written; nothing was kept.
        """
        expires_s = stored.created_s + self._kept_s

        def work(run: Run) -> None:
            total = _count(run, stored.tenant, stored.num_bytes)
            while total > self._max_tenant_bytes:
                freed = self._expire(stored.tenant, run)
                if not freed:
                    raise self._no_room()
                total -= freed
            run(
                """INSERT INTO responses (id, tenant, key_id, model, created_s, expires_s, items, response, num_bytes)
                VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)""",
                stored.id,
                stored.tenant,
                stored.key_id,
                stored.model,
                stored.created_s,
                expires_s,
                stored.items,
                stored.response,
                stored.num_bytes,
            )

        await self._database.call(partial(self._database.write, work))

    async def get(self, tenant: str, response_id: str) -> StoredResponse | None:
        """Return a tenant's response; None where there is none of that id, or none any more.

        Raises:
            SeamountError: the database cannot be read.
        """
        if not _ID.fullmatch(response_id):
            return None

        def work(run: Run) -> StoredResponse | None:
            rows = run(
                """SELECT id, tenant, key_id, model, created_s, items, response FROM responses
                WHERE id = ? AND tenant = ? AND expires_s > ?""",
                response_id,
                tenant,
                self._now_s(),
            )
            names = ("id", "tenant", "key_id", "model", "created_s", "items", "response")
            return StoredResponse(**dict(zip(names, rows[0], strict=True))) if rows else None

        return await self._database.call(partial(self._database.read, work))

    async def delete(self, tenant: str, response_id: str) -> bool:
        """Delete a tenant's response, and say whether there was one.

        Raises:
            SeamountError: the database cannot be written.
        """
        if not _ID.fullmatch(response_id):
            return False

        def work(run: Run) -> bool:
            where, values = "WHERE id = ? AND tenant = ? AND expires_s > ?", (response_id, tenant, self._now_s())
            if not run(f"SELECT 1 FROM responses {where}", *values):
                return False
            _count(run, tenant, 0)
            gone = run(f"DELETE FROM responses {where} RETURNING num_bytes", *values)
            _count(run, tenant, -sum(num_bytes for (num_bytes,) in gone))
            return bool(gone)

        return await self._database.call(partial(self._database.write, work))

    def _now_s(self) -> int:
        return int(self._clock())

    def _tidy(self, run: Run) -> bool:
        """Delete some rows whose time is over, in a transaction; return whether there were any."""
        # Deletes nothing, and fails where the rest would, be there something to delete or not.
        run("DELETE FROM responses WHERE id = ''")
        found = run("SELECT tenant FROM responses WHERE expires_s <= ? ORDER BY expires_s LIMIT 1", self._now_s())
        if found:
            self._expire(found[0][0], run)
        return bool(found)

    def _expire(self, tenant: str, run: Run) -> int:
        """Delete some of a tenant's rows whose time is over, the oldest first: few enough that nobody waits for it.

        Returns the bytes that they took.
        """
        _count(run, tenant, 0)
        gone = run(
            """DELETE FROM responses WHERE id IN (
                SELECT id FROM responses WHERE tenant = ? AND expires_s <= ? ORDER BY expires_s LIMIT ?)
            RETURNING num_bytes""",
            tenant,
            self._now_s(),
            _CLEAN_ROWS,
        )
        freed = sum(num_bytes for (num_bytes,) in gone)
        _count(run, tenant, -freed)
        return freed

    def _no_room(self) -> ForbiddenError:
        return ForbiddenError(
            f"This tenant's kept responses take as much as they may: {self._max_tenant_bytes} bytes.",
            hint="Delete responses that are no longer needed, or set store to false.",
            code="storage_limit_exceeded",
            param="store",
        )

    def _clean(self) -> None:
        def shorten(run: Run) -> None:
            kept = self._kept_s
            run("UPDATE responses SET expires_s = created_s + ? WHERE expires_s > created_s + ?", kept, kept)

        self._database.write(shorten)
        while self._database.write(self._tidy):
            pass


def _count(run: Run, tenant: str, num_bytes: int) -> int:
    """Add to a tenant's total, in a transaction that others wait for from here on; return it."""
    rows = run(
        """INSERT INTO response_totals (tenant, num_bytes) VALUES (?, ?)
        ON CONFLICT (tenant) DO UPDATE SET num_bytes = response_totals.num_bytes + excluded.num_bytes
        RETURNING num_bytes""",
        tenant,
        num_bytes,
    )
    return int(rows[0][0])
