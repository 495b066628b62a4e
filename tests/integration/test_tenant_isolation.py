"""What one tenant sent, another cannot find out: the prefix cache of a real engine, counted in blocks.

How long a first token takes follows from how much of a prompt is computed, so what is counted here is what could be
timed. `bench/tenant_timing.py` measures the times themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from seamount.cli.wire import make_access
from seamount.core.database import Database
from seamount.core.identity import Principal
from seamount.core.settings import EngineConfig
from seamount.core.state import open_state
from seamount.engine.client import WorkerEngine
from seamount.models.locate import locate_model
from seamount.models.prompt import PromptEncoder
from seamount.security.keys import ApiKeys

MODEL = "seamount-tiny"
BLOCK = 16
PROMPT = [40 + number % 200 for number in range(12 * BLOCK + 5)]
SENTENCE = "The gearbox of unit X29 was replaced after a downtime of 194 minutes on May 14. "


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Database]:
    database = open_state(str(tmp_path / "state.db"))
    yield database
    database.close()


class Site:
    """A server over the embedded model, and one client per key."""

    def __init__(self, url: str, keys: ApiKeys) -> None:
        self.url = url
        self.keys = keys
        self.admin = keys.add_first_administrator(tenant="operators", label="")[0]

    def key(self, tenant: str) -> str:
        return self.keys.add(Principal(key_id=None, tenant=tenant))[0]

    async def cached(self, key: str, **body: object) -> int:
        """Return how many of a request's prompt tokens came from the cache, by its own answer."""
        path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        async with httpx.AsyncClient(
            base_url=self.url, headers={"authorization": f"Bearer {key}"}, timeout=120
        ) as http:
            answer = await http.post(path, json={"model": MODEL, "max_tokens": 2, "temperature": 0, **body})
            return answer.raise_for_status().json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    async def metrics(self) -> str:
        async with httpx.AsyncClient(base_url=self.url, headers={"authorization": f"Bearer {self.admin}"}) as http:
            return (await http.get("/metrics")).text

    async def hits(self) -> float:
        families = text_string_to_metric_families(await self.metrics())
        samples = [one for family in families for one in family.samples]
        return next(one.value for one in samples if one.name == "vllm:prefix_cache_hits_total")


@pytest.fixture
async def site(state, serve) -> Site:
    keys = ApiKeys(state)
    made = Site("", keys)
    engine = WorkerEngine(EngineConfig(model=MODEL, num_threads=1, block_size=BLOCK))
    running = await serve(engine, PromptEncoder.from_folder(locate_model(MODEL)), access=make_access(state))
    made.url = running.url
    return made


async def test_a_prompt_that_another_tenant_sent_is_computed_as_if_nobody_had(site):
    clinic, bank = site.key("clinic"), site.key("bank")
    for body in ({"prompt": PROMPT}, {"messages": [{"role": "user", "content": SENTENCE * 4}]}):
        assert await site.cached(clinic, **body) == 0
        before = await site.hits()
        assert await site.cached(bank, **body) == 0, "the bank must not see that the clinic sent this"
        assert await site.hits() == before
        assert await site.cached(clinic, **body) >= 3 * BLOCK
        assert await site.cached(bank, **body) >= 3 * BLOCK, "its own prompts are its own to reuse"
        assert await site.hits() > before


async def test_the_beginning_alone_tells_nothing_either(site):
    """Guessing a secret block by block is how such a cache would be read out."""
    clinic = site.key("clinic")
    await site.cached(clinic, prompt=PROMPT)
    for num_blocks in range(1, 12, 5):
        other = site.key(f"bank-{num_blocks}")  # one each, for a tenant does find what it sent itself
        assert await site.cached(other, prompt=[*PROMPT[: num_blocks * BLOCK], 7, 8, 9]) == 0
    assert await site.cached(clinic, prompt=[*PROMPT[: 6 * BLOCK], 7, 8, 9]) == 6 * BLOCK


async def test_keys_of_one_tenant_share_and_the_administrator_shares_with_nobody_else(site):
    first, second = site.key("clinic"), site.key("clinic")
    await site.cached(first, prompt=PROMPT)
    assert await site.cached(second, prompt=PROMPT) == 12 * BLOCK
    assert await site.cached(site.admin, prompt=PROMPT) == 0


async def test_names_that_look_alike_are_different_tenants(site):
    await site.cached(site.key("clinic"), prompt=PROMPT)
    for name in ("Clinic", "clinic.", "clinic-", "clini"):
        assert await site.cached(site.key(name), prompt=PROMPT) == 0


async def test_a_salt_that_the_client_sends_is_refused(site):
    """Else whoever knows or guesses a salt would share its cache."""
    key = site.key("bank")
    async with httpx.AsyncClient(base_url=site.url, headers={"authorization": f"Bearer {key}"}) as http:
        body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 1, "cache_salt": "clinic"}
        answer = await http.post("/v1/completions", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "cache_salt")


async def test_the_metrics_name_no_tenant_and_no_key(site):
    clinic = site.key("clinic")
    await site.cached(clinic, prompt=PROMPT)
    text = await site.metrics()
    for key in site.keys.all():
        assert key.id not in text and key.principal.tenant not in text
    async with httpx.AsyncClient(base_url=site.url, headers={"authorization": f"Bearer {clinic}"}) as http:
        assert (await http.get("/metrics")).status_code == 403, "sums over all tenants are the operator's to know"
