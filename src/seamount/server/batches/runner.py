"""Works on batches for as long as the server runs: claims them, renews their leases, gives them up at the end.

Made by `routes.add_batches`, started and closed by the app's lifespan. One task looks for work; each batch has a task
of its own (`job`). At most one batch of a tenant is answered here at a time, and of those of several tenants
admission lets lines begin in turn, so that nobody's large batch holds up another tenant's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import TypeVar
from uuid import uuid4

from seamount.core.errors import DrainingError, SeamountError
from seamount.security.keys import ApiKeys
from seamount.server.admission.core import LOWEST_PART
from seamount.server.errors import log_failure
from seamount.server.service import Service

from .job import Job, Tools
from .store import BatchStore, LeaseLostError

_log = logging.getLogger(__name__)

T = TypeVar("T")

# A server that is no more holds its batches so long; clocks of servers that share a database may differ by less.
LEASE_S = 20.0
# Leases are renewed, and what other servers left or were told is noticed, so often.
LOOK_S = 5.0
SWEEP_S = 600.0
MAX_JOBS = 64


class BatchRunner:
    """The batches that this server works on.

    Args:
        pause: see `job.Tools`.
    """

    def __init__(
        self,
        service: Service,
        store: BatchStore,
        keys: ApiKeys,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._service = service
        self._store = store
        self._owner = uuid4().hex
        self._tools = Tools(
            service=service,
            store=store,
            keys=keys,
            owner=self._owner,
            num_side_by_side=self._num_side_by_side,
            pause=pause,
        )
        self._jobs: dict[str, tuple[Job, asyncio.Task[None]]] = {}
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._has_claimed = False
        self._sweep_at_s = 0.0
        self._failing = ""

    def start(self) -> None:
        """Begin to look for batches."""
        self._task = asyncio.create_task(self._run())

    def wake(self) -> None:
        """Look at once: there is a new batch, or one was cancelled."""
        self._wake.set()

    def cancel(self, batch_id: str) -> None:
        """End a batch that was asked to be cancelled: now, if it is worked on here."""
        found = self._jobs.get(batch_id)
        if found is not None:
            found[0].cancel()
        self.wake()

    async def close(self) -> None:
        """Give up every batch; another server, or the next start, goes on where it stands."""
        tasks = [task for _, task in self._jobs.values()]
        if self._task is not None:
            tasks.append(self._task)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._has_claimed:
            with suppress(SeamountError):  # a lease that cannot be given up runs out
                await self._call(self._store.release, self._owner)

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            try:
                await self._look()
                self._failing = ""
            except SeamountError as error:
                if self._failing != error.code:
                    _log.warning("Batches cannot be worked on now: %s", error)
                self._failing = error.code
            except Exception as error:  # noqa: BLE001 - a process edge: the next look may go well
                log_failure(error)
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self._wake.wait()

    async def _look(self) -> None:
        await self._renew()
        now_s = self._store.clock()
        if now_s >= self._sweep_at_s or self._sweep_at_s > now_s + SWEEP_S:  # the clock may have been set back
            num_swept = await self._call(self._store.files.sweep)
            self._sweep_at_s = now_s + (0 if num_swept else SWEEP_S)
        while self._service.state() == "ready" and len(self._jobs) < MAX_JOBS and await self._claim():
            pass

    async def _renew(self) -> None:
        held = await self._call(self._store.renew, self._owner, tuple(self._jobs), self._until_s())
        for batch_id, (job, task) in self._jobs.items():
            if batch_id not in held and not task.done():
                # Lost to another server after a long silence; or it has just ended, and then this changes nothing.
                task.cancel()
            elif held.get(batch_id) == "cancelling":
                job.cancel()

    async def _claim(self) -> bool:
        busy = {job.batch.tenant for job, _ in self._jobs.values() if job.answers}
        claim = partial(
            self._store.claim, self._owner, self._until_s(), model=self._service.model_name(), busy_tenants=busy
        )
        batch = await self._call(claim)
        if batch is None or batch.id in self._jobs:  # its own, whose lease ran out while this process stood still
            return False
        self._has_claimed = True
        job = Job(self._tools, batch, answers=batch.tenant not in busy)
        task = asyncio.create_task(job.run())
        self._jobs[batch.id] = (job, task)
        task.add_done_callback(partial(self._ended, batch.id))
        return True

    def _ended(self, batch_id: str, task: asyncio.Task[None]) -> None:
        self._jobs.pop(batch_id, None)
        self.wake()
        error = None if task.cancelled() else task.exception()
        if error is None or isinstance(error, LeaseLostError | DrainingError):
            return
        # Its lease is left to run out: a batch that cannot be worked on is not tried again at once.
        if isinstance(error, SeamountError):
            _log.warning("Batch %s is put off: %s", batch_id, error)
        else:
            log_failure(error)

    def _num_side_by_side(self) -> int:
        """Return how many lines each batch may have begun: as many as find room, and one that waits for it."""
        room = int(self._service.facts().max_num_seqs * LOWEST_PART)
        return room // max(sum(job.answers for job, _ in self._jobs.values()), 1) + 1

    def _until_s(self) -> int:
        return int(self._store.clock() + LEASE_S)

    async def _call(self, work: Callable[..., T], *values: object) -> T:
        return await self._store.database.call(partial(work, *values))
