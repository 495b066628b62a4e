"""Batches beside people's requests, for tests: an engine that is held, a clock, a server's parts. No HTTP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from seamount.core.database import Database
from seamount.core.requests import Chunk, Request
from seamount.core.settings import ServerConfig
from seamount.core.state import open_state
from seamount.engine.fake import FAKE_FACTS, FakeEngine
from seamount.engine.fake_encoder import ByteEncoder
from seamount.security.keys import ApiKeys
from seamount.security.usage import UsageLedger
from seamount.server.batches.runner import BatchRunner
from seamount.server.batches.store import Batch, BatchStore
from seamount.server.completions.answer import prepare_completion
from seamount.server.files.store import FileStore, Lines
from seamount.server.metering import MeteredEngine
from seamount.server.service import Service
from seamount.server.wire.completions import CompletionRequest

TWO = replace(FAKE_FACTS, max_num_seqs=2)
FOUR = replace(FAKE_FACTS, max_num_seqs=4)
ENDED = ("completed", "failed", "expired", "cancelled")


class Held(FakeEngine):
    """Answers with the prompt, once the test lets it: by the prompt's text, or all."""

    def __init__(self, facts=TWO) -> None:
        super().__init__(facts=facts)
        self.begun: list[str] = []
        self.given_up: list[str] = []
        self.priorities: dict[str, int] = {}
        self.failing: dict[str, list[Exception]] = {}
        self._gates: dict[str, asyncio.Event] = {}
        self._is_open = False

    async def generate(self, request: Request) -> AsyncIterator[Chunk]:
        name = bytes(token for token in request.prompt_token_ids if token < 256).decode()
        self.begun.append(name)
        self.priorities[name] = request.priority
        if self.failing.get(name):
            raise self.failing[name].pop()
        try:
            if not self._is_open:
                await self._gates.setdefault(name, asyncio.Event()).wait()
        except BaseException:
            self.given_up.append(name)
            raise
        async with aclosing(super().generate(request)) as chunks:
            async for chunk in chunks:
                yield chunk

    def pass_on(self, *names: str) -> None:
        for name in names:
            self._gates.setdefault(name, asyncio.Event()).set()

    def open(self) -> None:
        self._is_open = True
        self.pass_on(*self._gates)


class Clock:
    def __init__(self) -> None:
        self.now_s = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Site:
    """One server without its HTTP."""

    engine: Held
    service: Service
    store: BatchStore
    keys: ApiKeys
    runner: BatchRunner
    pauses: list[float] = field(default_factory=list)

    def add(self, *lines: str | dict[str, Any], tenant: str = "local", key_id: str | None = None) -> Batch:
        """Make a batch of prompts, or of whole lines."""
        texts = [json.dumps(line if isinstance(line, dict) else as_line(line)) + "\n" for line in lines]
        files = self.store.files
        self.store.clock.now_s += 0.002  # ids sort by the millisecond
        file_id = files.new_file_id()
        files.begin(file_id, tenant, "batch")
        half = len(texts) // 2  # two chunks, where there are two lines
        files.append(file_id, 0, [Lines(1, "".join(texts[:half])), Lines(half + 1, "".join(texts[half:]))])
        files.complete(file_id, "f", 90 * 86_400)
        made = self.store.add(
            tenant=tenant, key_id=key_id, endpoint="/v1/completions", model="fake", input_file_id=file_id,
            metadata=None, output_lifetime_s=86_400,
        )  # fmt: skip
        self.runner.wake()
        return made

    def get(self, batch: Batch) -> Batch:
        return self.store.get(batch.tenant, batch.id)

    async def ended(self, batch: Batch) -> Batch:
        await until(lambda: self.get(batch).status in ENDED)
        return self.get(batch)

    def lines(self, batch: Batch, *, failed: bool = False) -> list[dict[str, Any]]:
        batch = self.get(batch)
        file_id = batch.error_file_id if failed else batch.output_file_id
        if file_id is None:
            return []
        file, text, place = self.store.files.get(batch.tenant, file_id), "", 0
        while part := self.store.files.content(file, place):
            text, place = text + part[0], part[1]
        assert file.num_bytes == len(text.encode())
        return [json.loads(line) for line in text.splitlines()]

    async def ask(self, prompt: str) -> str:
        answer = await prepare_completion(self.service, CompletionRequest(model="fake", prompt=prompt, max_tokens=50))
        return (await answer.whole()).choices[0].text

    async def begins(self, *names: str) -> None:
        await until(lambda: self.engine.begun == list(names))

    async def settles(self) -> None:
        """Let everything go on until nothing more happens."""
        for _ in range(5):
            await self.store.database.call(lambda: None)
            for _ in range(50):
                await asyncio.sleep(0)


def as_line(name: str, **body: object) -> dict[str, Any]:
    return {
        "custom_id": name,
        "method": "POST",
        "url": "/v1/completions",
        "body": {"model": "fake", "prompt": name, "max_tokens": 50, **body},
    }


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.002)


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Database]:
    database = open_state(str(tmp_path / "state.db"), busy_timeout_s=60)
    yield database
    database.close()


@pytest.fixture
def clock() -> Clock:
    return Clock()


Start = Callable[..., Awaitable[Site]]


@pytest_asyncio.fixture
async def start(state, clock) -> AsyncIterator[Start]:
    """Return `start(engine)`: one more server over the same database."""
    async with AsyncExitStack() as stack:

        async def one(engine: Held, ledger: UsageLedger | None = None) -> Site:
            service = Service(MeteredEngine(engine, ledger) if ledger else engine, ByteEncoder(), ServerConfig())
            service.start()
            await service.started
            store = BatchStore(state, FileStore(state, 10**6, clock), clock)
            pauses: list[float] = []

            async def pause(seconds: float) -> None:
                pauses.append(seconds)
                await asyncio.sleep(0)

            runner = BatchRunner(service, store, ApiKeys(state, clock), pause)
            runner.start()
            stack.push_async_callback(service.close)
            stack.push_async_callback(runner.close)
            return Site(engine, service, store, ApiKeys(state, clock), runner, pauses)

        yield one
