"""A real Prometheus scrapes a real server after a known load, and its answers are that load, to the token.

Needs Debian's package `prometheus`, which holds `promtool` too; skipped, with the reason, where it is not installed.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from seamount.cli.wire import make_access
from seamount.core.database import Database
from seamount.core.identity import Limits, Principal
from seamount.core.state import open_state
from seamount.engine.fake import FakeEngine, say
from seamount.engine.fake_encoder import ByteEncoder
from seamount.security.keys import ApiKeys

PROMETHEUS, PROMTOOL = shutil.which("prometheus"), shutil.which("promtool")
needs_prometheus = pytest.mark.skipif(
    not (PROMETHEUS and PROMTOOL), reason="needs Debian's package `prometheus`, which is not installed"
)
CONFIG = """
global: {{scrape_interval: 1s, scrape_timeout: 1s}}
scrape_configs:
  - job_name: seamount
    authorization: {{credentials: "{key}"}}
    static_configs: [{{targets: ["{target}"]}}]
"""
MESSAGES = [{"role": "user", "content": "2+2?"}]
NUM_CHAT = len(ByteEncoder().encode_chat(MESSAGES).token_ids)
NUM_TEXT = len("abc") + 1  # and the token that begins every text
NUM_ANSWER = len("Vier.") + 1  # and the token that ends it
TEXT = {"model": "fake", "prompt": "abc"}


class Pause:
    """Lets answers run, or holds them for ever after some tokens."""

    def __init__(self) -> None:
        self.left: int | None = None

    async def __call__(self) -> None:
        if self.left is None:
            await asyncio.sleep(0)
        elif self.left == 0:
            await asyncio.Event().wait()
        else:
            self.left -= 1


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Database]:
    database = open_state(str(tmp_path / "state.db"))
    yield database
    database.close()


@pytest.fixture
def keys(state: Database) -> ApiKeys:
    return ApiKeys(state)


@pytest.fixture
def admin(keys: ApiKeys) -> str:
    return keys.add_first_administrator(tenant="the-operators", label="")[0]


Ask = Callable[[str], Awaitable[dict[str, float]]]


@pytest.fixture
async def prometheus(tmp_path: Path) -> AsyncIterator[Callable[[str, str], Awaitable[Ask]]]:
    """`prometheus(url, key)` starts one, waits for its first scrape, and returns `ask(query)`: values by labels."""
    processes: list[asyncio.subprocess.Process] = []
    async with httpx.AsyncClient() as client:

        async def start(url: str, key: str) -> Ask:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                where = f"127.0.0.1:{probe.getsockname()[1]}"
            config = tmp_path / "prometheus.yml"
            config.write_text(CONFIG.format(key=key, target=url.removeprefix("http://")))
            log = (tmp_path / "prometheus.log").open("wb")
            words = [f"--config.file={config}", f"--storage.tsdb.path={tmp_path / 'tsdb'}"]
            words.append(f"--web.listen-address={where}")
            process = await asyncio.create_subprocess_exec(PROMETHEUS, *words, stdout=log, stderr=log)
            log.close()
            processes.append(process)

            async def ask(query: str) -> dict[str, float]:
                answer = await client.get(f"http://{where}/api/v1/query", params={"query": query})
                found = answer.raise_for_status().json()["data"]["result"]
                return {",".join(each["metric"].values()): float(each["value"][1]) for each in found}

            async with asyncio.timeout(60):
                while process.returncode is None:
                    try:
                        if (await ask('up{job="seamount"} == 1')) != {}:
                            return ask
                    except httpx.HTTPError:
                        pass  # it is starting
                    await asyncio.sleep(0.1)
            raise AssertionError((tmp_path / "prometheus.log").read_text())

        yield start
        for process in processes:
            process.terminate()
            await process.wait()


async def load(url: str, engine: FakeEngine, pause: Pause, clerk: str, limited: str) -> None:
    """Send the known load."""

    def as_key(key: str) -> dict[str, str]:
        return {"authorization": f"Bearer {key}"}

    async with httpx.AsyncClient(base_url=url, timeout=30) as http:

        async def post(path: str, body: object, key: str | None = clerk) -> int:
            answer = await http.post(path, json=body, headers=as_key(key) if key else {})
            return answer.status_code

        chat = {"model": "fake", "messages": MESSAGES}
        answered = [post("/v1/completions", TEXT) for _ in range(5)]
        answered += [post("/v1/chat/completions", {**chat, "stream": True}) for _ in range(2)]
        answered += [post("/v1/completions", {**TEXT, "prompt": ["abc", "abd"], "n": 2})]
        answered += [post("/v1/completions", {**TEXT, "max_tokens": 3})]
        assert await asyncio.gather(*answered) == [200] * 9
        for number in range(2):  # two clients who leave after two tokens
            pause.left = 2
            async with http.stream(
                "POST", "/v1/completions", json={**TEXT, "stream": True}, headers=as_key(clerk)
            ) as answer:
                lines = answer.aiter_lines()
                seen = 0
                async for line in lines:
                    seen += line.startswith("data: ")
                    if seen == 2:
                        break
            async with asyncio.timeout(20):
                while len(engine.aborted) <= number:
                    await asyncio.sleep(0.005)
        pause.left = None
        for body, key, status in (
            (TEXT, None, 401),
            (TEXT, "sm-aaaaaaaaaa-" + "b" * 43, 401),
            ({**TEXT, "model": "other"}, clerk, 404),
            ({**TEXT, "n": -1}, clerk, 400),
            ({**TEXT, "max_tokens": 2**31}, clerk, 400),
            (TEXT, limited, 200),
            (TEXT, limited, 429),
        ):
            assert await post("/v1/completions", body, key) == status
        assert await post("/v1/nowhere", TEXT) == 404


NUM_WHOLE = 5 + 2 + 2 + 1 + 1  # requests to the engine that came to their end: each of two prompts is one
KNOWN = {
    "sum(vllm:prompt_tokens_total)": (5 + 2 + 1 + 1 + 2) * NUM_TEXT + 2 * NUM_CHAT,
    "sum(vllm:generation_tokens_total)": (5 + 2 + 4 + 1) * NUM_ANSWER + 3 + 2 * 2,
    'sum(vllm:request_success_total{finished_reason="stop"})': 5 + 2 + 4 + 1,
    'sum(vllm:request_success_total{finished_reason="length"})': 1,
    "vllm:time_to_first_token_seconds_count": NUM_WHOLE + 2,
    "vllm:request_queue_time_seconds_count": NUM_WHOLE + 2,
    "vllm:request_prefill_time_seconds_count": NUM_WHOLE + 2,
    "vllm:e2e_request_latency_seconds_count": NUM_WHOLE,
    "vllm:request_decode_time_seconds_count": NUM_WHOLE,
    "vllm:request_inference_time_seconds_count": NUM_WHOLE,
    "vllm:request_time_per_output_token_seconds_count": NUM_WHOLE,
    "vllm:inter_token_latency_seconds_count": (5 + 2 + 4 + 1) * (NUM_ANSWER - 1) + 2 + 2,
    "vllm:request_prompt_tokens_sum": (5 + 2 + 1 + 1) * NUM_TEXT + 2 * NUM_CHAT,
    "vllm:request_generation_tokens_sum": (5 + 2 + 4 + 1) * NUM_ANSWER + 3,
    'vllm:request_generation_tokens_bucket{le="4.0"}': 1,
    "vllm:request_params_n_sum": 5 + 2 + 4 + 1 + 1,
    'sum(seamount:request_failures_total{code="client_gone"})': 2,
    'sum(seamount:request_failures_total{code="invalid_value"})': 2,
    'sum(seamount:request_failures_total{code="model_not_found"})': 1,
    "sum(seamount:request_failures_total)": 2 + 2 + 1 + 2 + 1,  # and two without a good key, and one to nowhere
    'sum(seamount:requests_rejected_total{reason="requests_per_minute_exceeded"})': 1,
    "sum(seamount:requests_rejected_total)": 1,
    'sum(http_requests_total{handler="/v1/completions",status="200"})': 5 + 1 + 1 + 2 + 1,
    'sum(http_requests_total{handler="/v1/chat/completions",status="200"})': 2,
    'sum(http_requests_total{method="POST",status="400"})': 2,
    'sum(http_requests_total{method="POST",status="401"})': 2,
    'sum(http_requests_total{handler="/v1/completions",status="404"})': 1,
    'sum(http_requests_total{handler="none",status="404"})': 1,
    'sum(http_requests_total{method="POST",status="429"})': 1,
    'sum(http_request_duration_seconds_count{method="POST"})': 10 + 2 + 2 + 2 + 2 + 1,
    "vllm:num_requests_running": 0,
    "vllm:num_requests_waiting": 0,
    "vllm:kv_cache_usage_perc": 0,
    "seamount:requests_active": 0,
    "seamount:requests_admitted": 0,
    "seamount:tokens_admitted": 0,
    "sum(seamount:trace_spans_total)": 0,
}


@needs_prometheus
async def test_promql_over_a_known_load_gives_the_load(state, keys, admin, serve, prometheus):
    pause = Pause()
    engine = FakeEngine(say("Vier."), pause=pause)
    running = await serve(engine, access=make_access(state))
    clerk, _ = keys.add(Principal(key_id=None, tenant="bank"))
    limited, _ = keys.add(Principal(key_id=None, tenant="bank", limits=Limits(requests_per_minute=1)))
    scraper, _ = keys.add(Principal(key_id=None, tenant="monitoring", routes=("/metrics",)))
    await load(running.url, engine, pause, clerk, limited)
    ask = await prometheus(running.url, scraper)
    found = {query: sum((await ask(query)).values()) for query in KNOWN}
    assert found == KNOWN
    names = await ask('count by (__name__) ({job="seamount", __name__=~"(vllm|seamount|http|process).*"})')
    assert len({name.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count") for name in names}) >= 40
    labels = await ask('group by (tenant, key_id, key, user) ({job="seamount"})')
    assert list(labels) == [""], "no label tells who asked"
    assert (await ask("process_resident_memory_bytes > 1e6")) != {}
    assert (await ask("histogram_quantile(0.95, sum by (le) (vllm:time_to_first_token_seconds_bucket))"))[""] > 0


@needs_prometheus
async def test_promtool_finds_no_fault_but_the_fields_colons(serve):
    """The field's names begin with `vllm:`, and colons are for recording rules: of this alone promtool complains."""
    running = await serve(FakeEngine(say("ok")))
    async with httpx.AsyncClient(base_url=running.url) as http:
        await http.post("/v1/completions", json=TEXT)
        text = (await http.get("/metrics")).text
    done = subprocess.run(
        [PROMTOOL, "check", "metrics"], input=text, capture_output=True, text=True, check=False, env=dict(os.environ)
    )
    complaints = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    others = [line for line in complaints if not line.endswith("metric names should not contain ':'")]
    assert others == []
    assert {line.partition(" ")[0].partition(":")[0] for line in complaints} <= {"vllm", "seamount"}


def series(text: str) -> set[tuple[str, tuple[tuple[str, str], ...]]]:
    families = text_string_to_metric_families(text)
    return {(one.name, tuple(sorted(one.labels.items()))) for family in families for one in family.samples}


async def test_nothing_that_callers_make_up_makes_a_series(state, keys, admin, serve):
    """Else anybody could fill a Prometheus, and read there what others sent."""
    running = await serve(FakeEngine(say("ok")), access=make_access(state))
    headers = {"authorization": f"Bearer {admin}"}

    async def make_up(http: httpx.AsyncClient, word: str) -> str:
        for number in range(10):
            name = f"{word}{number}"
            clerk, _ = keys.add(Principal(key_id=None, tenant=name))
            own = {"authorization": f"Bearer {clerk}", "x-request-id": name, "user-agent": name, name: name}
            await http.post("/v1/completions", json={**TEXT, "user": name}, headers=own)
            await http.post("/v1/completions", json={**TEXT, "model": name}, headers=own)
            await http.post("/v1/completions", json={**TEXT, name: name}, headers=own)
            await http.post("/v1/chat/completions", content=name, headers=own)
            await http.request(name.upper(), "/v1/models", headers=own)
            await http.get(f"/v1/models/{name}", headers=own)
            await http.get(f"/{name}?{name}={name}", headers=own)
            await http.get("/v1/models", headers={"authorization": f"Bearer {name}"})
            await http.get("/v1/models", headers={"host": name})
        return (await http.get("/metrics", headers=headers)).text

    async with httpx.AsyncClient(base_url=running.url) as http:
        await http.get("/metrics", headers=headers)  # which is a series itself
        first = await make_up(http, "alpha")
        second = await make_up(http, "beta")
    assert series(first) == series(second)
    assert "alpha" not in second.lower() and "beta" not in second.lower()
