"""Counts each caller's tokens where they pass: at the engine, so that no route can forget to.

Put round the engine by `app.create_app`. Knows no HTTP; whose request it is, `door.access` says.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from seamount.core.ports import Engine
from seamount.core.requests import Chunk, EngineState, EngineStats, ModelFacts, Request
from seamount.security.usage import Tokens, UsageLedger

from .door.access import current_principal


class MeteredEngine:
    """An `Engine` that adds what every request used to a ledger, however it ended.

    A prompt counts once it began to be answered, once for all its answers, cached tokens included; generated tokens
    count as they come. Requests of callers who have no key are not counted.
    """

    def __init__(self, engine: Engine, ledger: UsageLedger) -> None:
        self._engine = engine
        self._ledger = ledger

    def state(self) -> EngineState:
        """Return the engine's own."""
        return self._engine.state()

    async def start(self) -> ModelFacts:
        """Start the engine."""
        return await self._engine.start()

    async def generate(self, request: Request) -> AsyncGenerator[Chunk, None]:
        """Yield the engine's chunks."""
        who = current_principal()
        num_prompt = num_generated = 0
        try:
            async with aclosing(self._engine.generate(request)) as chunks:
                async for chunk in chunks:
                    num_prompt = len(request.prompt_token_ids)
                    num_generated += len(chunk.token_ids)
                    yield chunk
        finally:
            if who is not None and who.key_id is not None and num_prompt:
                self._ledger.add(who.key_id, Tokens(num_prompt, num_generated))

    async def stats(self) -> EngineStats:
        """Return the engine's own."""
        return await self._engine.stats()

    async def close(self) -> None:
        """Close the engine."""
        await self._engine.close()
