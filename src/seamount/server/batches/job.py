"""One batch, from where it stands to its end: its lines are checked, then answered, and each answer is kept at once.

Made by `runner`, which holds the batch's lease meanwhile. Lines are begun in their order, several side by side;
admission decides when each may. What is kept survives whatever ends this process: whoever goes on begins with the first
line that has no result.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, TypeVar

from seamount.core.errors import CapacityError, ForbiddenError, RequestError, SeamountError, UnauthenticatedError
from seamount.security.keys import ApiKeys
from seamount.server.errors import log_failure
from seamount.server.files.store import Lines
from seamount.server.service import Service
from seamount.server.wire.batches import BatchStatus

from .input import InputCheck, InputLine, read_line, texts
from .line import Result, answer_line, batch_caller, failure, unanswered, unforeseen
from .store import Batch, BatchStore, End, LineError, LineResult

T = TypeVar("T")

# A line during which the engine fails so often is answered with the failure: it may be what the engine dies of.
MAX_ATTEMPTS = 3
_RETRY_S = 1.0
_EXPIRED = ("batch_expired", "This request could not be executed before the completion window expired.")


class Ending(NamedTuple):
    """How a batch ends."""

    status: End
    errors: Sequence[LineError] = ()


@dataclass(frozen=True, kw_only=True)
class Tools:
    """What the jobs of one server share.

    Attributes:
        owner: names the server in leases.
        num_side_by_side: returns how many lines a job may have begun, or waiting to begin.
        encoding: see `line.answer_line`; also held while a key is read.
        pause: waits some seconds; for tests, which have their own time.
    """

    service: Service
    store: BatchStore
    keys: ApiKeys
    owner: str
    num_side_by_side: Callable[[], int]
    encoding: asyncio.Lock = field(default_factory=asyncio.Lock)
    pause: Callable[[float], Awaitable[None]] = asyncio.sleep


class Job:
    """One batch that is worked on here.

    Args:
        batch: claimed by this server.
        answers: answer its lines; False only checks them, and leaves the rest for later.
    """

    def __init__(self, tools: Tools, batch: Batch, *, answers: bool) -> None:
        self.batch = batch
        self.answers = answers
        self._tools = tools
        self._is_checked = batch.status != "validating"
        self._cancelled = asyncio.Event()
        self._keeping: set[asyncio.Task[None]] = set()

    def cancel(self) -> None:
        """Begin no more lines, give up those that run, and end the batch as cancelled."""
        self._cancelled.set()

    async def run(self) -> None:
        """Work until the batch ends, or, where only its lines are checked, until they are.

        Raises:
            LeaseLostError: another server has it now.
            SeamountError: nothing can be done for it now.
        """
        batch, store = self.batch, self._tools.store
        if batch.status == "cancelling":
            self.cancel()
        try:
            ending = await self._until_an_end(batch.expires_s - store.clock())
        finally:  # answers that there are when everything else is given up are still kept
            await asyncio.gather(*self._keeping, return_exceptions=True)
        if ending is None:
            await self._call(store.release, self._tools.owner, batch.id)
            return
        if ending.status == "expired" and self._is_checked:
            await self._keep_unanswered()
        await self._call(store.end, self._tools.owner, batch.id, ending.status, ending.errors)

    async def _until_an_end(self, left_s: float) -> Ending | None:
        work = asyncio.create_task(self._work())
        cancelled = asyncio.create_task(self._cancelled.wait())
        try:
            if not self._cancelled.is_set():
                await asyncio.wait((work, cancelled), timeout=max(left_s, 0), return_when=asyncio.FIRST_COMPLETED)
            if self._cancelled.is_set():
                return Ending("cancelled")
            return await work if work.done() else Ending("expired")
        finally:
            work.cancel()
            cancelled.cancel()
            await asyncio.gather(work, cancelled, return_exceptions=True)

    async def _work(self) -> Ending | None:
        tools, batch = self._tools, self.batch
        if not self._is_checked:
            check = await self._check()
            if check.errors:
                return Ending("failed", check.errors)
            self._follow(await self._call(tools.store.start, tools.owner, batch.id, check.num_lines))
            self._is_checked = True
        return await self._answer_all() if self.answers else None

    async def _check(self) -> InputCheck:
        check = InputCheck(endpoint=self.batch.endpoint, model=self.batch.model)
        async for lines in self._chunks():
            # In a thread: a large file takes seconds, and other people's streams go on meanwhile.
            if not await asyncio.to_thread(check.add, lines):
                break
        check.end()
        return check

    async def _answer_all(self) -> Ending:
        running: set[asyncio.Task[Ending | None]] = set()
        try:
            async for line in self._unanswered_lines():
                while len(running) >= self._tools.num_side_by_side():
                    running, ending = await _some(running)
                    if ending is not None:
                        return ending
                running.add(asyncio.create_task(self._answer(line)))
            while running:
                running, ending = await _some(running)
                if ending is not None:
                    return ending
            return Ending("completed")
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _answer(self, line: InputLine) -> Ending | None:
        """Answer a line and keep the answer; return how the batch ends, if it must end now."""
        tools, batch = self._tools, self.batch
        result: Result | None = None
        num_attempts = 0
        while result is None:
            reason = tools.service.not_ready()
            if tools.service.state() == "draining":
                await asyncio.Event().wait()  # for the end of this process; lines that run may finish before it
            if reason is not None and tools.service.state() != "restarting":
                raise reason
            try:
                async with tools.encoding:  # one after the other, and so in the lines' order
                    now_s = tools.store.clock()
                    caller = await self._call(batch_caller, tools.keys, batch.key_id, batch.endpoint, now_s)
            except (UnauthenticatedError, ForbiddenError) as error:
                return Ending("failed", [LineError(error.code, error.message)])
            try:
                result = await answer_line(tools.service, caller, batch.endpoint, line, tools.encoding)
            except UnauthenticatedError as error:  # the key ended while the line was answered
                return Ending("failed", [LineError(error.code, error.message)])
            except CapacityError as error:
                await tools.pause(error.retry_after or _RETRY_S)
            except RequestError as error:
                result = failure(line, error)
            except SeamountError as error:
                num_attempts += 1
                if num_attempts >= MAX_ATTEMPTS:
                    result = failure(line, error)
                else:
                    await tools.pause(error.retry_after or _RETRY_S)
            except Exception as error:  # noqa: BLE001 - a process edge: one line's failure is not the batch's
                log_failure(error)
                result = failure(line, unforeseen())
        kept = LineResult(line.number, result.content, result.tokens)
        keeping = asyncio.create_task(self._keep([kept], is_failed=result.is_failed))
        self._keeping.add(keeping)
        keeping.add_done_callback(self._keeping.discard)
        await asyncio.shield(keeping)
        return None

    async def _keep(self, results: Sequence[LineResult], *, is_failed: bool) -> None:
        tools = self._tools
        keep = partial(tools.store.keep, tools.owner, self.batch.id, results, is_failed=is_failed)
        self._follow(await self._call(keep))

    async def _keep_unanswered(self) -> None:
        async for lines in self._chunks():
            found = [
                LineResult(line.number, unanswered(line, *_EXPIRED).content) for line in await self._unanswered(lines)
            ]
            await self._keep(found, is_failed=True)

    async def _unanswered_lines(self) -> AsyncIterator[InputLine]:
        async for lines in self._chunks():
            for line in await self._unanswered(lines):
                yield line

    async def _unanswered(self, lines: Lines) -> list[InputLine]:
        """Return the lines of a chunk that have no result."""
        found = dict(texts(lines))
        if not found:
            return []
        done = await self._call(self._tools.store.answered, self.batch.id, min(found), max(found))
        batch = self.batch

        def read() -> list[InputLine]:
            return [
                read_line(number, text, endpoint=batch.endpoint, model=batch.model)
                for number, text in found.items()
                if number not in done
            ]

        return await asyncio.to_thread(read)

    async def _chunks(self) -> AsyncIterator[Lines]:
        number = 0
        while lines := await self._call(self._tools.store.files.lines, self.batch.input_file_id, number):
            yield lines
            number += 1

    def _follow(self, status: BatchStatus) -> None:
        """Notice that the batch is to be cancelled, whoever was asked to."""
        if status == "cancelling":
            self.cancel()

    async def _call(self, work: Callable[..., T], *values: object) -> T:
        return await self._tools.store.database.call(partial(work, *values))


async def _some(
    running: set[asyncio.Task[Ending | None]],
) -> tuple[set[asyncio.Task[Ending | None]], Ending | None]:
    """Wait until some lines are done; return those that are not, and how the batch ends if one says so."""
    done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
    endings = [task.result() for task in done]
    return running, next((ending for ending in endings if ending is not None), None)
