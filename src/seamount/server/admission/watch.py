"""Ends the requests of keys that were revoked, or expired, while they run.

Made by `app.create_app`, whose lifespan keeps it running. The door asks for a key once, at a request's beginning; an
answer may take minutes after it. So all keys that have calls open are looked up again every few seconds, together, in
each server on the database by itself. What has ended is told as an error where the engine is waited for; whoever has
not taken that by the next look is cut off.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from seamount.core.errors import SeamountError
from seamount.server.door.access import Access
from seamount.server.errors import log_failure

from .call import Calls

_log = logging.getLogger(__name__)

# Two looks, the second of which cuts off, and the time that the database takes, keep within the five seconds that are
# promised.
LOOK_S = 2.0


class KeyWatch:
    """Looks up the keys of running calls.

    Args:
        calls: those of the server.
        access: says which keys have ended.
    """

    def __init__(self, calls: Calls, access: Access) -> None:
        self._calls = calls
        self._access = access
        self._failing = ""

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Look again and again while inside."""
        task = asyncio.create_task(self._run())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def look(self) -> None:
        """Look once. Keys that cannot be looked up now end nothing."""
        keys = self._calls.keys()
        if not keys:
            return
        try:
            ended = await self._access.ended(keys)
        except SeamountError as error:
            if self._failing != error.code:
                _log.warning("Keys of running requests cannot be looked up now; the requests go on: %s", error)
            self._failing = error.code
            return
        self._failing = ""
        for key_id, reason in ended.items():
            num_calls = self._calls.end(key_id, reason)
            _log.info("%s: %d requests of the key %s end", reason.code, num_calls, key_id)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                await self.look()
            except Exception as error:  # noqa: BLE001 - a process edge: the next look may go well
                log_failure(error)
