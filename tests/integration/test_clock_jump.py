"""The machine's clock is set, forward and back, while a server runs: answers go on, limits and keys stay what they are.

The server runs in a process of its own whose `time.time` is moved by a file; the monotonic clock does not jump.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest
import pytest_asyncio

from seamount.core.database import Database
from seamount.core.identity import Limits, Principal
from seamount.core.state import open_state
from seamount.security.keys import ApiKeys

PROGRAM = """
import asyncio, sys, time
from pathlib import Path

moved, hold, state = (Path(name) for name in sys.argv[1:])
real = time.time
time.time = lambda: real() + float(moved.read_text())

from seamount.cli.wire import make_access
from seamount.core.settings import ServerConfig
from seamount.core.state import open_state
from seamount.engine.fake import FakeEngine, say
from seamount.engine.fake_encoder import ByteEncoder
from seamount.server.app import create_app
from seamount.server.serve import run_server

async def pause():
    while hold.exists():
        await asyncio.sleep(0.01)

config = ServerConfig(port=0, drain_timeout_s=1)
database = open_state(str(state))
app = create_app(FakeEngine(say("x" * 20), pause=pause), ByteEncoder(), config, make_access(database), database)
run_server(app, config, lambda url: print(url, flush=True))
database.close()
"""
DAY_S = 86_400
CHAT = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}


@dataclass
class Site:
    """A running server, the clock that it reads, and the file that holds its answers."""

    url: str
    moved: Path
    hold: Path

    def client(self, key: str) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)

    def jump(self, seconds: float) -> None:
        new = self.moved.with_suffix(".new")
        new.write_text(str(seconds))
        new.replace(self.moved)


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Database]:
    database = open_state(str(tmp_path / "state.db"))
    yield database
    database.close()


@pytest_asyncio.fixture
async def site(tmp_path: Path, state: Database) -> AsyncIterator[Site]:
    ApiKeys(state).add_first_administrator(tenant="admin", label="")
    moved, hold = tmp_path / "moved", tmp_path / "hold"
    moved.write_text("0")
    words = [str(path) for path in (moved, hold, tmp_path / "state.db")]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PROGRAM, *words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    yield Site((await process.stdout.readline()).decode().strip(), moved, hold)
    process.terminate()
    assert await process.wait() == 0


def key(state: Database, lifetime_s: int | None = None, **limits: int) -> str:
    principal = Principal(key_id=None, tenant="bank", limits=Limits(**limits))
    return ApiKeys(state).add(principal, lifetime_s=lifetime_s)[0]


@pytest.mark.parametrize("seconds", [30 * DAY_S, -30 * DAY_S])
async def test_a_stream_goes_on_and_new_requests_are_answered(site: Site, state: Database, seconds: float):
    site.hold.touch()
    async with site.client(key(state)) as api:
        stream = await api.chat.completions.create(**CHAT, stream=True)
        site.jump(seconds)
        site.hold.unlink()
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == "x" * 20
        whole = await api.chat.completions.create(**CHAT)
        assert whole.choices[0].message.content == "x" * 20
    async with httpx.AsyncClient(base_url=site.url) as client:
        assert (await client.get("/readyz")).status_code == 200


async def test_a_limit_per_minute_neither_opens_nor_closes(site: Site, state: Database):
    async with site.client(key(state, requests_per_minute=2)) as api:
        await api.chat.completions.create(**CHAT)
        await api.chat.completions.create(**CHAT)
        for seconds in (30 * DAY_S, -30 * DAY_S, 0):
            site.jump(seconds)
            with pytest.raises(openai.RateLimitError) as refused:
                await api.chat.completions.create(**CHAT)
            assert 1 <= int(refused.value.response.headers["retry-after"]) <= 60


async def test_a_key_ends_by_the_clock_and_only_by_it(site: Site, state: Database):
    async with site.client(key(state, lifetime_s=DAY_S)) as short, site.client(key(state)) as long:
        site.jump(2 * DAY_S)
        with pytest.raises(openai.AuthenticationError):
            await short.models.list()
        await long.models.list()
        site.jump(-2 * DAY_S)
        await short.models.list()


async def test_a_kept_response_is_found_after_the_clock_went_back(site: Site, state: Database):
    async with site.client(key(state)) as api:
        kept = await api.responses.create(model="fake", input="hi")
        site.jump(-2 * DAY_S)
        assert (await api.responses.retrieve(kept.id)).output_text == "x" * 20
        again = await api.responses.create(model="fake", input="and?", previous_response_id=kept.id)
        assert again.previous_response_id == kept.id
