"""Load, as clients see it: quotas, rate headers, a full queue, deadlines, fair turns, and exact counters."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest_asyncio
from prometheus_client.parser import text_string_to_metric_families

from seamount.core.errors import UnauthenticatedError
from seamount.core.identity import Limits, Principal
from seamount.core.settings import ServerConfig
from seamount.engine.fake import FAKE_FACTS, FakeEngine, say
from seamount.engine.fake_encoder import ByteEncoder
from seamount.server.app import create_app
from seamount.server.door.access import Access
from seamount.server.serve import HttpServer
from seamount.server.service import Service

ONE_AT_A_TIME = replace(FAKE_FACTS, max_num_seqs=1)
TEXT = {"model": "fake", "prompt": "hi", "max_tokens": 3}
CHAT = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}


class Gate:
    """Holds every token until opened; `reached` counts the requests that began."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.num_reached = 0

    async def __call__(self) -> None:
        self.num_reached += 1
        await self.open.wait()


class Names:
    """An authenticator for whom a name is proof enough."""

    def __init__(self, **callers: Principal) -> None:
        self.callers = callers

    async def authenticate(self, credential: str | None, peer: str | None) -> Principal:
        if credential not in self.callers:
            raise UnauthenticatedError("unknown")
        return self.callers[credential]

    async def ended(self, key_ids: Collection[str]) -> dict[str, UnauthenticatedError]:
        return {}


def principal(name: str, priority: int = 0, **limits: int) -> Principal:
    return Principal(key_id=name, tenant=name, limits=Limits(**limits), priority=priority, is_admin=True)


class Site:
    """A running server and clients of it."""

    def __init__(self, url: str, service: Service, stack: AsyncExitStack) -> None:
        self.url = url
        self.service = service
        self._stack = stack

    async def client(self, name: str) -> httpx.AsyncClient:
        headers = {"authorization": f"Bearer {name}"}
        return await self._stack.enter_async_context(httpx.AsyncClient(base_url=self.url, headers=headers, timeout=20))

    async def metrics(self) -> dict[tuple[str, str], float]:
        """Return every sample but buckets: by name, and the labels' values that tell it from others."""
        text = (await (await self.client("admin")).get("/metrics")).text
        return {
            (
                sample.name,
                "".join(v for k, v in sample.labels.items() if k not in ("engine", "model_name")),
            ): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if "le" not in sample.labels
        }


Open = Callable[..., Awaitable[Site]]


@pytest_asyncio.fixture
async def site() -> AsyncIterator[Open]:
    """Return `site(engine, server settings, name=principal, ...)`."""
    async with AsyncExitStack() as stack:

        async def start(engine: FakeEngine, settings: Mapping[str, Any] | None = None, **callers: Principal) -> Site:
            config = ServerConfig(port=0, drain_timeout_s=1, **(settings or {}))
            access = Access(Names(admin=principal("admin"), **callers))
            app = create_app(engine, ByteEncoder(), config, access)
            ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
            server = HttpServer(app, config, ready.set_result)
            task = asyncio.create_task(server.serve())

            async def stop() -> None:
                server.stop()
                await task

            stack.push_async_callback(stop)
            return Site(await ready, app.state.service, stack)

        yield start


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


async def test_a_keys_requests_run_out_and_the_answer_says_until_when(site):
    here = await site(FakeEngine(say("ok")), a=principal("a", requests_per_minute=2, tokens_per_minute=10_000))
    client = await here.client("a")
    first = await client.post("/v1/completions", json=TEXT)
    assert first.status_code == 200
    assert first.headers["x-ratelimit-limit-requests"] == "2"
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    assert first.headers["x-ratelimit-limit-tokens"] == "10000"
    assert int(first.headers["x-ratelimit-remaining-tokens"]) < 10_000
    assert first.headers["x-ratelimit-reset-requests"].endswith("s")
    await client.post("/v1/completions", json=TEXT)
    refused = await client.post("/v1/completions", json=TEXT)
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "requests_per_minute_exceeded"
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert 1 <= int(refused.headers["retry-after"]) <= 30
    assert 0 < int(refused.headers["retry-after-ms"]) <= 30_000
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    # Other keys, and what is no model's work, are not touched.
    assert (await client.get("/v1/models")).status_code == 200
    assert (await (await here.client("admin")).post("/v1/completions", json=TEXT)).status_code == 200
    assert (await here.metrics())["seamount:requests_rejected_total", "requests_per_minute_exceeded"] == 1


async def test_a_keys_tokens_are_counted_as_used_and_not_as_feared(site):
    here = await site(FakeEngine(say("ok")), a=principal("a", tokens_per_minute=100))
    client = await here.client("a")
    answer = await client.post("/v1/completions", json={**TEXT, "max_tokens": 80})
    used = answer.json()["usage"]["total_tokens"]
    again = await client.post("/v1/completions", json={**TEXT, "max_tokens": 3000})
    assert again.status_code == 429
    assert again.json()["error"]["code"] == "tokens_per_minute_exceeded"
    assert 100 - used <= int(again.headers["x-ratelimit-remaining-tokens"]) <= 100


async def test_a_keys_requests_at_once_are_released_however_they_end(site):
    gate = Gate()
    here = await site(FakeEngine(say("ok"), pause=gate), a=principal("a", max_concurrent=1))
    client = await here.client("a")
    leaving = asyncio.create_task(client.post("/v1/chat/completions", json={**CHAT, "stream": True}))
    await until(lambda: gate.num_reached > 0)
    refused = await client.post("/v1/chat/completions", json=CHAT)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "concurrency_limit_exceeded")
    leaving.cancel()
    await until(lambda: not here.service.num_active)
    gate.open.set()
    assert (await client.post("/v1/completions", json={**TEXT, "prompt": []})).status_code == 400
    assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200


async def test_openais_client_waits_as_told_and_succeeds(site):
    here = await site(FakeEngine(say("ok")), a=principal("a", requests_per_minute=600))
    client = await here.client("a")
    while (await client.post("/v1/completions", json=TEXT)).status_code == 200:
        pass
    async with openai.AsyncOpenAI(base_url=f"{here.url}/v1", api_key="a", max_retries=5) as sdk:
        answers = await asyncio.gather(*(sdk.chat.completions.create(**CHAT) for _ in range(3)))
    assert [answer.choices[0].message.content for answer in answers] == ["ok"] * 3


async def test_a_full_queue_is_a_503_that_says_when_to_come_again(site):
    gate = Gate()
    here = await site(FakeEngine(say("ok"), pause=gate, facts=ONE_AT_A_TIME), {"max_waiting": 2})
    client = await here.client("admin")
    tasks = [asyncio.create_task(client.post("/v1/completions", json=TEXT)) for _ in range(3)]
    await until(lambda: gate.num_reached == 1 and here.service.admission.load().num_waiting[0] == 2)
    refused = await client.post("/v1/chat/completions", json=CHAT)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "queue_full")
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.headers["x-should-retry"] == "true"
    found = await here.metrics()
    assert found["seamount:admission_queue_requests", "normal"] == 2
    assert found["vllm:num_requests_waiting", ""] == 2
    assert found["seamount:requests_admitted", ""] == 1
    assert found["seamount:requests_rejected_total", "queue_full"] == 1
    gate.open.set()
    assert [answer.status_code for answer in await asyncio.gather(*tasks)] == [200] * 3


async def test_what_could_never_be_taken_is_refused_for_good_and_the_rest_is_not(site):
    here = await site(FakeEngine(say("ok"), facts=ONE_AT_A_TIME), {"max_waiting": 2})
    client = await here.client("admin")
    refused = await client.post("/v1/completions", json={**TEXT, "prompt": ["a", "b", "c", "d"], "n": 2})
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["param"]) == (400, "invalid_value", "prompt")
    assert "4 prompts with 2 answers each; this server takes at most 3 such prompts at once" in error["message"]
    # More answers than run side by side are worked on by themselves.
    for body in ({**TEXT, "prompt": ["a", "b", "c"], "n": 2}, {**TEXT, "n": 128}):
        assert (await client.post("/v1/completions", json=body)).status_code == 200
    assert (await client.post("/v1/chat/completions", json={**CHAT, "n": 128})).status_code == 200


async def test_tenants_take_turns_however_many_requests_one_of_them_has(site):
    gate = Gate()
    order: list[str] = []

    def reply(request, index):
        order.append(bytes(request.prompt_token_ids[1:]).decode())
        return (65,)

    here = await site(
        FakeEngine(reply, pause=gate, facts=ONE_AT_A_TIME),
        busy=principal("busy"),
        quiet=principal("quiet"),
        batch=principal("batch", priority=-1),
    )

    def num_known() -> int:
        return len(order) + sum(here.service.admission.load().num_waiting.values())

    async with asyncio.TaskGroup() as group:
        for name, count in (("busy", 6), ("batch", 1), ("quiet", 2)):
            client = await here.client(name)
            for _ in range(count):
                seen = num_known()
                group.create_task(client.post("/v1/completions", json={**TEXT, "prompt": name}))
                await until(lambda seen=seen: num_known() > seen)
        gate.open.set()
    assert sorted(order) == ["batch", *["busy"] * 6, *["quiet"] * 2]
    assert max(place for place, name in enumerate(order) if name == "quiet") <= 5
    assert order.index("batch") < 8


async def test_a_request_that_ran_out_of_time_ends_and_frees_its_place(site):
    gate = Gate()
    engine = FakeEngine(say("ok"), pause=gate, facts=ONE_AT_A_TIME)
    here = await site(engine)
    client = await here.client("admin")
    held = asyncio.create_task(client.post("/v1/completions", json=TEXT))
    await until(lambda: gate.num_reached == 1)
    queued = await client.post("/v1/completions", json=TEXT, headers={"x-request-timeout": "0.05"})
    assert (queued.status_code, queued.json()["error"]["code"]) == (504, "deadline_exceeded")
    unheard = await client.post("/v1/completions", json=TEXT, headers={"x-stainless-read-timeout": "0.05"})
    assert unheard.json()["error"]["code"] == "deadline_exceeded"
    wrong = await client.post("/v1/completions", json=TEXT, headers={"x-request-timeout": "soon"})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "x-request-timeout")
    held.cancel()
    await until(lambda: not here.service.num_active)
    running = await client.post("/v1/completions", json=TEXT, headers={"x-request-timeout": "0.05"})
    assert (running.status_code, running.json()["error"]["code"]) == (504, "deadline_exceeded")
    await until(lambda: len(engine.aborted) == 2)
    stats = await engine.stats()
    assert (stats.num_running, stats.num_free_blocks) == (0, stats.num_blocks)
    assert here.service.admission.load().num_admitted == 0


async def test_a_client_that_leaves_the_queue_is_forgotten(site):
    gate = Gate()
    here = await site(FakeEngine(say("ok"), pause=gate, facts=ONE_AT_A_TIME))
    client = await here.client("admin")
    held = asyncio.create_task(client.post("/v1/completions", json=TEXT))
    await until(lambda: gate.num_reached == 1)
    for stream in (True, False):
        leaving = asyncio.create_task(client.post("/v1/chat/completions", json={**CHAT, "stream": stream}))
        await until(lambda: here.service.admission.load().num_waiting[0] == 1)
        leaving.cancel()
        await until(lambda: here.service.admission.load().num_waiting[0] == 0)
    assert gate.num_reached == 1, "the engine heard of none of them"
    assert (await here.metrics())["seamount:requests_rejected_total", "client_gone"] == 2
    gate.open.set()
    assert (await held).status_code == 200


async def test_each_tenants_prompts_reach_the_engine_under_a_salt_of_its_own(site):
    salts: dict[str, set[str]] = {}

    def reply(request, index):
        salts.setdefault(bytes(request.prompt_token_ids[1:]).decode(), set()).add(request.cache_salt)
        return (65,)

    here = await site(FakeEngine(reply), a=principal("a"), b=principal("b"))
    for name in ("a", "b", "a"):
        await (await here.client(name)).post("/v1/completions", json={**TEXT, "prompt": name})
    assert {name: len(found) for name, found in salts.items()} == {"a": 1, "b": 1}
    assert salts["a"] != salts["b"]
    assert all(salt != "a" and len(salt) >= 32 for salt in salts["a"])


async def test_counters_are_exact_for_a_known_load(site):
    here = await site(FakeEngine(say("abcd"), num_cached_tokens=1), limited=principal("limited", requests_per_minute=1))
    client, limited = await here.client("admin"), await here.client("limited")
    for _ in range(3):
        await client.post("/v1/completions", json={**TEXT, "prompt": [1, 2, 3], "n": 2, "max_tokens": 2})
    await client.post("/v1/completions", json={**TEXT, "prompt": ["ab", "cd"], "max_tokens": 9})
    await client.post("/v1/completions", json={**TEXT, "temperature": -1})
    for _ in range(3):
        await limited.post("/v1/completions", json={**TEXT, "prompt": [7], "max_tokens": 1})
    found = await here.metrics()
    num_requests = 3 + 2 + 1
    expected = {
        ("http_requests_total", "/v1/completionsPOST200"): 3 + 1 + 1,
        ("http_requests_total", "/v1/completionsPOST400"): 1,
        ("http_requests_total", "/v1/completionsPOST429"): 2,
        ("http_request_duration_seconds_count", "/v1/completionsPOST"): 8,
        ("vllm:request_success_total", "length"): 3 * 2 + 1,
        ("vllm:request_success_total", "stop"): 2,
        ("vllm:prompt_tokens_total", ""): 3 * 3 + 2 * 3 + 1,
        ("vllm:prompt_tokens_cached_total", ""): num_requests,
        ("vllm:generation_tokens_total", ""): 3 * 2 * 2 + 2 * 5 + 1,
        ("vllm:request_params_n_sum", ""): 3 * 2 + 2 + 1,
        ("vllm:request_params_max_tokens_sum", ""): 3 * 2 + 2 * 9 + 1,
        ("vllm:request_inference_time_seconds_count", ""): num_requests,
        ("vllm:e2e_request_latency_seconds_count", ""): num_requests,
        ("seamount:admission_wait_seconds_count", ""): num_requests,
        ("seamount:requests_rejected_total", "requests_per_minute_exceeded"): 2,
        ("seamount:requests_admitted", ""): 0,
        ("seamount:tokens_admitted", ""): 0,
        ("seamount:requests_active", ""): 0,
        ("vllm:num_requests_running", ""): 0,
        ("vllm:num_requests_waiting", ""): 0,
        ("vllm:kv_cache_usage_perc", ""): 0,
    }
    assert {name: found.get(name) for name in expected} == expected
    assert found["vllm:cache_config_info", "161024"] == 1
    names = {name for name, _ in found}
    assert {"process_resident_memory_bytes", "process_cpu_seconds_total", "process_open_fds"} <= names
    families = {name.removesuffix("_total").removesuffix("_sum").removesuffix("_count") for name in names}
    assert len(families) >= 30
    labels = {label for _, label in found}
    assert not any("limited" in label or "admin" in label for label in labels), "tenants are no labels"
