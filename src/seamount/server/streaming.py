"""Server-sent events, and noticing that a client went away.

Used by the completion routes. Knows nothing of chunks or models: events are strings, made elsewhere.

Why not the framework's streaming response: it leaves the generator of a vanished client to the garbage collector, and
it cannot say anything while the generator is silent. Here the connection is watched all the time, before the first
event too, and the generator is closed at once, so that the engine frees the request's blocks.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .errors import ClientGoneError

T = TypeVar("T")

KEEP_ALIVE_S = 10.0
_KEEP_ALIVE = ": keep-alive\n\n"
DONE = "data: [DONE]\n\n"


def event(json_text: str) -> str:
    """Return one server-sent event; JSON text has no line breaks, so one data line holds it."""
    return f"data: {json_text}\n\n"


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Return what `work` returns, cancelling it when the client goes away.

    Raises:
        ClientGoneError: the client went away.
    """
    gone = asyncio.create_task(_until_gone(receive))
    task = asyncio.create_task(work)
    try:
        await asyncio.wait((gone, task), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        await _cancel(gone, task)


class EventStream(Response):
    """Sends events as they come, and a comment when nothing came for a while.

    Args:
        events: the events; closed in every case.
        headers: of the answer.
        on_error: makes the last event when the events fail midway; the stream then ends without its usual last event.
        keep_alive_s: seconds of silence after which `keep_alive` is sent, so that proxies keep the connection.
        keep_alive: a comment, or an event that clients pass over.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[str, None],
        headers: Mapping[str, str],
        on_error: Callable[[Exception], str],
        *,
        keep_alive_s: float = KEEP_ALIVE_S,
        keep_alive: str = _KEEP_ALIVE,
    ) -> None:
        # A proxy that buffers would hold tokens back: `x-accel-buffering` is how nginx is told not to.
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no", **headers})
        del self.headers["content-length"]
        self._events = events
        self._on_error = on_error
        self._keep_alive_s = keep_alive_s
        self._filler = keep_alive.encode()
        self._next: asyncio.Task[str] | None = None
        self._last_s = 0.0

    async def prime(self, receive: Receive) -> None:
        """Wait for the first event, so that an error before it still gets its own status instead of a 200.

        Waits no longer than the keep-alive time; after that the answer begins without it.

        Raises:
            ClientGoneError: the client went away.
            Exception: what the events raise first.
        """
        self._next = asyncio.create_task(_anext(self._events))
        gone = asyncio.create_task(_until_gone(receive))
        kept = False
        try:
            done, _ = await asyncio.wait(
                (gone, self._next), timeout=self._keep_alive_s, return_when=asyncio.FIRST_COMPLETED
            )
            if self._next in done:
                self._next.result()
            elif gone in done:
                raise ClientGoneError
            kept = True
        finally:
            await _cancel(gone)
            if not kept:
                await self._close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything; end at once when the client goes away."""
        tasks = [asyncio.create_task(_until_gone(receive))]
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            # One task sends all events: a task and a timer for each would cost more than the rest of an event's way.
            tasks += [asyncio.create_task(self._send_all(send)), asyncio.create_task(self._keep_alive(send))]
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except OSError:  # the connection broke while sending
            return
        finally:
            await _cancel(*tasks)
            await self._close()

    async def _send_all(self, send: Send) -> None:
        async with aclosing(self._all_events()) as events:
            async for text in events:
                self._last_s = asyncio.get_running_loop().time()
                await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _all_events(self) -> AsyncGenerator[str, None]:
        try:
            if self._next is not None:
                first, self._next = self._next, None
                yield await first
            async for text in self._events:
                yield text
        except StopAsyncIteration:  # there was not even a first one
            return
        except Exception as error:  # noqa: BLE001 - a process edge: the status is sent, so the stream must tell it
            yield self._on_error(error)

    async def _keep_alive(self, send: Send) -> None:
        """Send the filler whenever nothing was sent for a while."""
        loop = asyncio.get_running_loop()
        self._last_s = loop.time()
        while True:
            left_s = self._last_s + self._keep_alive_s - loop.time()
            if left_s > 0:
                await asyncio.sleep(left_s)
            else:
                self._last_s = loop.time()
                await send({"type": "http.response.body", "body": self._filler, "more_body": True})

    async def _close(self) -> None:
        if self._next is not None:
            await _cancel(self._next)
        await self._events.aclose()


async def merge(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """Yield (which, item) from all streams as items come; closes all when one fails or the caller stops."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for item in only:
                yield 0, item
        return
    queue: asyncio.Queue[tuple[int, T] | None] = asyncio.Queue(maxsize=len(streams))

    async def pump(which: int, stream: AsyncGenerator[T, None]) -> None:
        async with aclosing(stream):
            async for item in stream:
                await queue.put((which, item))
        await queue.put(None)

    tasks = [asyncio.create_task(pump(which, stream)) for which, stream in enumerate(streams)]
    failed = asyncio.create_task(_first_failure(tasks))
    try:
        num_open = len(tasks)
        while num_open:
            getter = asyncio.create_task(queue.get())
            try:
                await asyncio.wait((getter, failed), return_when=asyncio.FIRST_COMPLETED)
                if not getter.done():
                    failed.result()
                got = await getter
            finally:
                await _cancel(getter)
            if got is None:
                num_open -= 1
            else:
                yield got
    finally:
        await _cancel(failed, *tasks)
        for stream in streams:  # a task that was cancelled before its first step never opened its stream
            await stream.aclose()


async def _first_failure(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Return when all tasks are done; raise as soon as one has failed."""
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    for task in done:
        task.result()


async def _anext(events: AsyncGenerator[str, None]) -> str:
    return await anext(events)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks and wait for their ends; their results have been taken, or nobody wants them."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
