"""The protocols between rooms. Each is tiny, and has a second implementation or a shipped fake."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection
from typing import Protocol

from .errors import UnauthenticatedError
from .identity import Principal
from .requests import Chunk, EngineState, EngineStats, ModelFacts, Request


class Engine(Protocol):
    """Something that continues token sequences: `engine.client.WorkerEngine`, or `engine.fake.FakeEngine`.

    Used from one asyncio event loop. The server knows engines only through this.
    """

    def state(self) -> EngineState:
        """Return where the engine is in its life. While "restarting", requests wait; else they need "ready"."""
        ...

    async def start(self) -> ModelFacts:
        """Start, and return when ready to serve.

        Raises:
            SeamountError: the model cannot be loaded; the engine is then "failed".
        """
        ...

    def generate(self, request: Request) -> AsyncGenerator[Chunk, None]:
        """Yield chunks of all sequences of the request until each has a finish reason.

        Closing the generator early (`aclose`, or cancelling the task that iterates) aborts the request and frees its
        blocks. The first item is awaited lazily, so errors come at the first `anext`.

        Raises:
            RequestError: the request cannot be served by this model (its context, its token ids).
            CapacityError: not now.
            EngineError: the worker failed while the request ran.
        """
        ...

    async def stats(self) -> EngineStats:
        """Return the latest counters, at most a second old."""
        ...

    async def close(self) -> None:
        """End every request with "abort", stop the worker, release everything. Idempotent."""
        ...


class Authenticator(Protocol):
    """Something that says who a caller is: `security.authenticators.KeyAuthenticator`, or `OpenOnLoopback`.

    Used from the server's event loop: once per request, so that a revocation holds from the next request on, and every
    few seconds for all the keys that have requests running.
    """

    async def authenticate(self, credential: str | None, peer: str | None) -> Principal:
        """Return the caller.

        Args:
            credential: what the caller sent as proof; None when nothing. Any text, hostile text included.
            peer: address that the connection comes from; None where there is none.

        Raises:
            UnauthenticatedError: nobody, as far as can be proven.
            StateUnavailableError: the keys cannot be read now.
        """
        ...

    async def ended(self, key_ids: Collection[str]) -> dict[str, UnauthenticatedError]:
        """Return what is told to the bearers of those keys that open nothing any more, by the key's id.

        Raises:
            StateUnavailableError: the keys cannot be read now.
        """
        ...
