"""One request at the door: who calls, what its key may still use, and how much time it has.

`Gate` stands between the middleware that says who calls and the routes; the gRPC side opens its calls itself. Routes
and `service` find the call through `current_call`: a route that forgot to hand it on would be one without limits.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from contextvars import ContextVar
from typing import TypeVar

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from seamount.core.errors import DeadlineError, InvalidRequestError, SeamountError
from seamount.core.identity import Principal
from seamount.server.door.access import current_principal
from seamount.server.errors import error_response

from .limits import Meter, Meters
from .queue import Clock

T = TypeVar("T")

NOBODY = Principal(key_id=None, tenant="")
"""The caller where nobody was asked who calls: without limits."""

# A client that has not taken anything for so long, with its buffers full, holds what others wait for.
STALL_S = 60.0
_MAX_TIMEOUT_S = 86_400.0


class ClientStalledError(ConnectionError):
    """The client stopped reading; the connection is given up."""


class Call:
    """One request of a client, from the door to its end. `close` gives back what it holds.

    It may have to end before: because its time is over, or because of `end`.

    Attributes:
        caller: who calls.
        begin_by_s: the clock's time at which the engine must have begun; None is never.
        end_by_s: the clock's time at which the answer must be complete; None is never.
    """

    def __init__(
        self,
        caller: Principal,
        meter: Meter | None,
        clock: Clock,
        *,
        begin_by_s: float | None = None,
        end_by_s: float | None = None,
    ) -> None:
        self.caller = caller
        self.begin_by_s = begin_by_s
        self.end_by_s = end_by_s
        self._meter = meter
        self._clock = clock
        self._asked = self._begun = False
        self._over: SeamountError | None = None
        # What waits for the engine now; and all that is done for the call, where `run` does it.
        self._waits: set[asyncio.Timeout] = set()
        self._whole: asyncio.Timeout | None = None

    def begin(self) -> None:
        """Count the request against its key's limits, once, however often it is called.

        Raises:
            QuotaError: the key may not now.
        """
        self._asked = True
        if not self._begun and self._meter is not None:
            self._meter.begin(self._clock())
        self._begun = True

    def reserve(self, num_tokens: int) -> None:
        """Take the tokens that will probably be needed from the key's.

        Raises:
            QuotaError: there are not that many left.
        """
        if self._meter is not None:
            self._meter.reserve(num_tokens, self._clock())

    def settle(self, reserved: int, used: int) -> None:
        """Correct a reservation by what was used in the end."""
        if self._meter is not None:
            self._meter.settle(reserved, used, self._clock())

    def until_its_end(self, chunks: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
        """Return these chunks, which come for as long as the call goes on; they are closed with what is returned.

        Raises (the generator):
            DeadlineError: its time is over.
            SeamountError: what `end` was given.
        """
        may_end = self.end_by_s is not None or self.caller.key_id is not None
        return self._while_it_goes_on(chunks) if may_end else chunks

    async def wait_for(self, work: Callable[[], Awaitable[T]], *, by_s: float | None = None) -> T:
        """Return what `work`, which waits for the engine or for a turn there, returns.

        Args:
            by_s: the clock's time at which the wait is over; None is never.

        Raises:
            DeadlineError: the time is over.
            SeamountError: what `end` was given, before or meanwhile.
        """
        if self._over is not None:
            raise self._over.with_traceback(None)
        scope = asyncio.timeout(None if by_s is None else max(by_s - self._clock(), 0.0))
        try:
            async with scope:
                self._waits.add(scope)
                try:
                    return await work()
                finally:
                    self._waits.discard(scope)
        except TimeoutError as cause:
            if not scope.expired():
                raise
            if self._over is not None:
                raise self._over.with_traceback(None) from cause
            raise DeadlineError("The time that the request allows was over before its answer was complete.") from cause

    async def run(self, work: Awaitable[T]) -> T:
        """Return what `work`, all that is done for this call, returns.

        Raises:
            SeamountError: what `end` was given: it was said twice, and the work cut off.
        """
        self._whole = scope = asyncio.timeout(None)
        try:
            async with scope:
                return await work
        except TimeoutError as cause:
            if self._over is None or not scope.expired():
                raise
            raise self._over.with_traceback(None) from cause
        finally:
            self._whole = None

    def end(self, error: SeamountError) -> None:
        """Let all that waits for the engine, or comes to, fail with this error: so it is told as any other failure.

        Said again, it cuts off what is left: what does not wait for the engine, or for a client who does not read.
        """
        scopes = list(self._waits)
        if self._over is not None:
            scopes = [] if self._whole is None else [self._whole]
        self._over = error
        for scope in scopes:
            if not scope.expired():
                scope.reschedule(asyncio.get_running_loop().time())

    def headers(self) -> dict[str, str]:
        """Return the rate headers, for an answer to a request that counts."""
        return self._meter.headers(self._clock()) if self._asked and self._meter is not None else {}

    def close(self) -> None:
        """The request is over. Idempotent."""
        if self._begun and self._meter is not None:
            self._meter.end()
        self._begun = False

    async def _while_it_goes_on(self, chunks: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
        async with aclosing(chunks):
            # Each wait has its own limit: a generator may be asked by one task after another.
            while (chunk := await self.wait_for(lambda: anext(chunks, None), by_s=self.end_by_s)) is not None:
                yield chunk


_current: ContextVar[Call] = ContextVar("seamount_call")


def current_call() -> Call:
    """Return the call that this task works for; an open one, without limits, where nobody called."""
    found = _current.get(None)
    return Call(NOBODY, None, time.monotonic) if found is None else found


class Calls:
    """Opens calls: keeps the meters of all keys, and knows which calls are open in a key's name."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._meters = Meters()
        self._open: dict[str, set[Call]] = {}

    def keys(self) -> tuple[str, ...]:
        """Return the ids of the keys in whose names calls are open."""
        return tuple(self._open)

    def end(self, key_id: str, error: SeamountError) -> int:
        """End the calls of a key, see `Call.end`; return how many there are."""
        calls = list(self._open.get(key_id, ()))
        for call in calls:
            call.end(error)
        return len(calls)

    @contextmanager
    def open(
        self, caller: Principal, *, begin_in_s: float | None = None, end_in_s: float | None = None
    ) -> Iterator[Call]:
        """Make a call the current one, and close it at the end.

        Args:
            begin_in_s, end_in_s: seconds within which the engine must begin and the answer be complete; None is any.
        """
        now_s = self._clock()
        given = [seconds for seconds in (begin_in_s, end_in_s) if seconds is not None]
        call = Call(
            caller,
            self._meters.of(caller, now_s),
            self._clock,
            begin_by_s=now_s + min(given) if given else None,
            end_by_s=None if end_in_s is None else now_s + end_in_s,
        )
        token = _current.set(call)
        key_id = caller.key_id
        if key_id is not None:
            self._open.setdefault(key_id, set()).add(call)
        try:
            yield call
        finally:
            _current.reset(token)
            if key_id is not None:
                calls = self._open[key_id]
                calls.discard(call)
                if not calls:
                    del self._open[key_id]
            call.close()


class Gate:
    """ASGI layer: opens a call for each request, tells rates in its answer, gives up on who stalls, cuts off whose key
    ended.
    """

    def __init__(self, app: ASGIApp, calls: Calls) -> None:
        self._app = app
        self._calls = calls

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_on(message: Message) -> None:
            try:
                async with asyncio.timeout(STALL_S):
                    await send(message)
            except TimeoutError as cause:
                raise ClientStalledError("The client stopped reading.") from cause

        await self._within_call(scope, receive, send_on)

    async def _within_call(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        try:
            asked_s = asked_timeout_s(headers)
        except InvalidRequestError as error:
            await error_response(error)(scope, receive, send)
            return
        caller = current_principal() or NOBODY
        has_begun = False
        with self._calls.open(caller, begin_in_s=client_timeout_s(headers), end_in_s=asked_s) as call:

            async def send_with_rates(message: Message) -> None:
                nonlocal has_begun
                if message["type"] == "http.response.start":
                    has_begun = True
                    MutableHeaders(scope=message).update(call.headers())
                await send(message)

            try:
                await call.run(self._app(scope, receive, send_with_rates))
            except SeamountError as error:  # the call was cut off
                if not has_begun:  # else the connection closes: an answer without its end
                    await error_response(error)(scope, receive, send_with_rates)


def asked_timeout_s(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that `x-request-timeout` allows for the whole answer; None without it.

    Raises:
        InvalidRequestError: it is no number of seconds.
    """
    text = headers.get("x-request-timeout")
    if text is None:
        return None
    seconds = _seconds(text)
    if seconds is None:
        raise InvalidRequestError(
            "The header x-request-timeout must be a number of seconds above 0.", param="x-request-timeout"
        )
    return seconds


def client_timeout_s(headers: Mapping[str, str]) -> float | None:
    """Return the seconds after which one of OpenAI's clients gives up waiting for anything to come, if it says so.

    Streams are kept alive by comments, so this bounds the wait for the answer's beginning, not the answer.
    """
    return _seconds(headers.get("x-stainless-read-timeout", ""))


def _seconds(text: str) -> float | None:
    try:
        seconds = float(text)
    except ValueError:
        return None
    return min(seconds, _MAX_TIMEOUT_S) if math.isfinite(seconds) and seconds > 0 else None
