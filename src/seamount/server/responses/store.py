"""Responses that are kept: written once, read by their tenant, gone when their time is over.

Used by `responses` and `answer`, over the state database. A row holds its whole conversation, so reading it
takes one look-up however long the chain was, and a chain outlives the deletion or the expiry of what it began with.
The price: what is deleted here stays in the conversations that went on from it, until those are deleted or expire.
Knows no protocol: items and responses are JSON text here.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from seamount.core.database import Database, Run

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


class ResponseStore:
    """The kept responses of one database.

    Args:
        retention_days: how long a response is kept. Holds from `clean` on for those that were kept before, too.
    """

    def __init__(self, database: Database, retention_days: int, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._kept_s = retention_days * _DAY_S
        self._clock = clock

    async def clean(self) -> None:
        """Delete all whose time is over, and let none be kept longer than this store keeps them. For a start.

        Raises:
            SeamountError: the database cannot be written.
        """
        await self._database.call(self._clean)

    async def ready(self) -> None:
        """Find out whether a response could be kept now, by deleting a few whose time is over.

        Raises:
            SeamountError: it could not.
        """
        await self._database.call(partial(self._database.write, self._expire))

    async def put(self, stored: StoredResponse) -> None:
        """Keep a response.

        Raises:
            SeamountError: the database cannot be written; nothing was kept.
        """
        expires_s = stored.created_s + self._kept_s

        def work(run: Run) -> None:
            run(
                """INSERT INTO responses (id, tenant, key_id, model, created_s, expires_s, items, response)
                VALUES (?, ?, ?, ?, ?, ?, ?, ?)""",
                stored.id,
                stored.tenant,
                stored.key_id,
                stored.model,
                stored.created_s,
                expires_s,
                stored.items,
                stored.response,
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
            where = "WHERE id = ? AND tenant = ?"
            found = run(f"SELECT 1 FROM responses {where} AND expires_s > ?", response_id, tenant, self._now_s())
            run(f"DELETE FROM responses {where}", response_id, tenant)
            return bool(found)

        return await self._database.call(partial(self._database.write, work))

    def _now_s(self) -> int:
        return int(self._clock())

    def _expire(self, run: Run) -> None:
        """Delete some of those whose time is over: few enough that nobody waits for it."""
        run(
            "DELETE FROM responses WHERE id IN (SELECT id FROM responses WHERE expires_s <= ? LIMIT ?)",
            self._now_s(),
            _CLEAN_ROWS,
        )

    def _clean(self) -> None:
        def shorten(run: Run) -> None:
            kept = self._kept_s
            run("UPDATE responses SET expires_s = created_s + ? WHERE expires_s > created_s + ?", kept, kept)

        def left(run: Run) -> bool:
            return bool(run("SELECT 1 FROM responses WHERE expires_s <= ? LIMIT 1", self._now_s()))

        self._database.write(shorten)
        while self._database.read(left):
            self._database.write(self._expire)
