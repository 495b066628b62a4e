"""A storm over a real server: many clients at once, some of whom leave, send nonsense, or see the worker killed.

    python bench/chaos.py                                    2,000 requests from 64 clients, three kills
    python bench/chaos.py --requests 300 --clients 32 --kills 1

Starts `seamount serve` by itself, in a folder of its own. Before the storm and after it a calm load is sent, whose
counters must come out exact to the token. After the storm nothing may be left: no request, no block of the cache, no
place in a queue. Prints one JSON object; exits 1 when something is wrong, and says what.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).parents[1]
PATIENCE_S = 300.0
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
# Gauges that must be zero when nothing goes on.
AT_REST = (
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "seamount:requests_active",
    "seamount:requests_admitted",
    "seamount:tokens_admitted",
    "seamount:admission_queue_requests",
    "seamount:admission_queue_tokens",
)


@dataclass(frozen=True)
class Plan:
    """One request to come.

    Attributes:
        kind: ok, bad, or cancel.
        num_requests: requests that the engine gets for it: one per prompt.
        num_sequences: answers in all.
        events: of a stream to be left: how many are read before.
    """

    kind: str
    path: str
    content: bytes
    stream: bool = False
    num_requests: int = 1
    num_sequences: int = 1
    events: int = 0


@dataclass
class Seen:
    """What the clients saw."""

    outcomes: Counter[str] = field(default_factory=Counter)
    num_requests: Counter[str] = field(default_factory=Counter)
    num_sequences: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    problems: list[str] = field(default_factory=list)

    def end(self, plan: Plan, outcome: str) -> None:
        """Count how a request ended: ok, bad, failed or cancelled."""
        self.outcomes[outcome] += 1
        self.num_requests[outcome] += plan.num_requests
        self.num_sequences[outcome] += plan.num_sequences

    def use(self, usage: dict[str, int]) -> None:
        """Add up an answer's usage."""
        self.prompt_tokens += usage["prompt_tokens"]
        self.completion_tokens += usage["completion_tokens"]


def plan_request(chance: random.Random, model: str, *, calm: bool) -> Plan:
    """Draw one request."""
    draw = 1.0 if calm else chance.random()
    if draw < 0.15:
        return _bad(chance, model)
    stream = chance.random() < 0.5
    body: dict[str, object] = {"model": model, "max_tokens": chance.randint(1, 60), "temperature": 1, "stream": stream}
    if stream:
        body["stream_options"] = {"include_usage": True}
    num_prompts, n = 1, chance.choice([1, 1, 1, 2, 3])
    body["n"] = n
    if chance.random() < 0.6:
        path = CHAT
        words = " ".join(chance.choices(["2", "+", "what", "is", "list", "tools", "seven"], k=chance.randint(1, 60)))
        body["messages"] = [{"role": "user", "content": words}]
    else:
        path, num_prompts = TEXT, chance.choice([1, 1, 2, 4])
        body["prompt"] = [[chance.randint(5, 200) for _ in range(chance.randint(1, 300))] for _ in range(num_prompts)]
    return Plan(
        kind="cancel" if draw < 0.4 else "ok",
        path=path,
        content=json.dumps(body).encode(),
        stream=stream,
        num_requests=num_prompts,
        num_sequences=num_prompts * n,
        events=chance.randint(0, 12),
    )


def _bad(chance: random.Random, model: str) -> Plan:
    messages = [{"role": "user", "content": "hi"}]
    bodies = [
        b"{",
        b"[]",
        b"\xff\xfe",
        json.dumps({"model": model, "messages": messages, "temperature": 1e9}).encode(),
        json.dumps({"model": model, "messages": messages, "no_such_parameter": 1}).encode(),
        json.dumps({"model": model, "messages": messages, "max_tokens": 10**9}).encode(),
        json.dumps({"model": model, "messages": [{"role": "user", "content": "too long " * 50_000}]}).encode(),
        json.dumps({"model": model, "messages": []}).encode(),
    ]
    return Plan(kind="bad", path=CHAT, content=chance.choice(bodies))


async def send(client: httpx.AsyncClient, plan: Plan, seen: Seen) -> str:
    """Send one request; return how it ended: ok, bad, cancelled, or failed, if the server told so properly."""
    headers = {"content-type": "application/json"}
    async with client.stream("POST", plan.path, content=plan.content, headers=headers) as answer:
        if plan.kind == "cancel":
            if plan.stream and answer.status_code == 200:
                lines = answer.aiter_lines()
                for _ in range(plan.events):
                    if await anext(lines, None) is None:
                        break
            return "cancelled"
        text = (await answer.aread()).decode()
    if plan.kind == "bad":
        if answer.status_code != 400 or "error" not in json.loads(text):
            seen.problems.append(f"bad input was answered with {answer.status_code}")
        return "bad"
    if answer.status_code == 200 and plan.stream:
        return _end_stream(text, seen)
    if answer.status_code == 200:
        seen.use(json.loads(text)["usage"])
        return "ok"
    return _failed(json.loads(text)["error"]["code"], seen)


def _end_stream(text: str, seen: Seen) -> str:
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    if events[-1] == "[DONE]":
        seen.use(json.loads(events[-2])["usage"])
        return "ok"
    last = json.loads(events[-1])
    return _failed(last["error"]["code"] if "error" in last else "a stream without an end", seen)


def _failed(code: str, seen: Seen) -> str:
    if code not in ("worker_died", "queue_full", "restarting"):
        seen.problems.append(f"a good request failed with {code}")
    return "failed"


async def load(url: str, plans: list[Plan], num_clients: int) -> Seen:
    """Send all requests, so many at a time; none may take longer than patience lasts."""
    seen = Seen()
    left = iter(plans)

    async def client_works() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_S) as client:
            for plan in left:
                # Some leave while they wait for the first byte.
                hurries = plan.kind == "cancel" and not plan.stream
                try:
                    async with asyncio.timeout(0.005 * plan.events if hurries else PATIENCE_S):
                        outcome = await send(client, plan, seen)
                except TimeoutError:
                    outcome = "cancelled" if hurries else "stuck"
                except httpx.HTTPError as error:
                    outcome = "broken"
                    seen.problems.append(f"the connection broke: {type(error).__name__}")
                seen.end(plan, outcome)

    await asyncio.gather(*(client_works() for _ in range(num_clients)))
    return seen


async def scrape(url: str) -> Counter[str]:
    """Return the server's metrics, summed over labels; HTTP answers also by status."""
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        text = (await client.get("/metrics")).raise_for_status().text
    found: Counter[str] = Counter()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if "le" not in sample.labels:
                found[sample.name] += sample.value
            if sample.name == "http_requests_total" and sample.labels["method"] == "POST":
                found[f"answers {sample.labels['status']}"] += sample.value
    return found


async def at_rest(url: str) -> list[str]:
    """Wait until nothing goes on; return what never ends."""
    give_up_s = time.monotonic() + 60
    while True:
        found = await scrape(url)
        busy = [f"{name} is {found[name]}" for name in AT_REST if found[name]]
        if not busy or time.monotonic() > give_up_s:
            return busy
        await asyncio.sleep(0.05)


def check_calm(seen: Seen, grown: Counter[str]) -> list[str]:
    """Compare a calm load with what the counters grew by: they are equal."""
    expected = {
        "vllm:prompt_tokens_total": seen.prompt_tokens,
        "vllm:generation_tokens_total": seen.completion_tokens,
        "vllm:request_success_total": seen.num_sequences["ok"],
        "vllm:e2e_request_latency_seconds_count": seen.num_requests["ok"],
        "seamount:admission_wait_seconds_count": seen.num_requests["ok"],
        "seamount:request_failures_total": 0,
        "answers 200": seen.outcomes["ok"],
    }
    return [f"{name} grew by {grown[name]}, not {n}" for name, n in expected.items() if grown[name] != n]


def check_storm(seen: Seen, grown: Counter[str]) -> list[str]:
    """Compare a storm with the counters: of requests that were left, nobody knows how far they came."""
    ok, maybe = seen.num_requests["ok"], seen.num_requests["cancelled"]
    failed, sequences = seen.num_requests["failed"], seen.num_sequences
    ended = sum(
        grown[name]
        for name in (
            "vllm:e2e_request_latency_seconds_count",
            "seamount:request_failures_total",
            "seamount:requests_rejected_total",
        )
    )
    bounds = {
        "vllm:e2e_request_latency_seconds_count": (ok, ok + maybe + failed),
        "vllm:request_success_total": (sequences["ok"], sequences["ok"] + sequences["cancelled"] + sequences["failed"]),
        # Who leaves while sending leaves half a body, which is bad input too.
        "answers 400": (seen.outcomes["bad"], seen.outcomes["bad"] + seen.outcomes["cancelled"]),
    }
    wrong = [
        f"{name} grew by {grown[name]}, not {low} to {high}"
        for name, (low, high) in bounds.items()
        if not low <= grown[name] <= high
    ]
    answered = ok + seen.outcomes["bad"]  # what is refused ends too
    if not answered <= ended <= answered + maybe + failed:
        wrong.append(f"{ended} requests ended one way or another, not {answered} to {answered + maybe + failed}")
    if grown["vllm:generation_tokens_total"] < seen.completion_tokens:
        wrong.append("fewer tokens were counted than clients were told")
    return wrong


@asynccontextmanager
async def server(model: str) -> AsyncIterator[tuple[str, asyncio.subprocess.Process]]:
    """Run `seamount serve` in a folder of its own; yield its URL and its process."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "XDG_DATA_HOME": folder, "XDG_CONFIG_HOME": folder}
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "seamount", "serve", "--port", "0", model, env=environment,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL, cwd=ROOT,
        )  # fmt: skip
        try:
            yield await _url(process), process
        finally:
            if process.returncode is None:
                process.terminate()
            await process.wait()


async def _url(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    async for line in process.stdout:
        if found := re.search(r"http://\S+(?=/v1)", line.decode()):
            return found[0]
    raise SystemExit("the server did not start")


async def kill_workers(url: str, pid: int, at: list[float]) -> None:
    """Kill the server's worker whenever so many answers are out."""
    before = _num_answers(await scrape(url))
    for number in at:
        while _num_answers(await scrape(url)) - before < number or not _workers(pid):
            await asyncio.sleep(0.05)
        for worker in _workers(pid):
            worker.kill()


def _num_answers(found: Counter[str]) -> float:
    return sum(value for name, value in found.items() if name.startswith("answers"))


def _workers(pid: int) -> list[psutil.Process]:
    children = psutil.Process(pid).children()
    return [child for child in children if "seamount.engine.worker" in " ".join(child.cmdline())]


async def run(args: argparse.Namespace) -> dict[str, object]:
    """Calm, storm, calm; return what was seen and what is wrong."""
    chance = random.Random(args.seed)
    report: dict[str, object] = {}
    wrong: list[str] = []
    async with server(args.model) as (url, process):
        async with httpx.AsyncClient(base_url=url) as client:
            model = (await client.get("/v1/models")).json()["data"][0]["id"]
        for name in ("calm before", "storm", "calm after"):
            calm = name != "storm"
            count = max(args.requests // 20, 10) if calm else args.requests
            plans = [plan_request(chance, model, calm=calm) for _ in range(count)]
            before, started_s = await scrape(url), time.monotonic()
            killing = None
            if not calm:
                at = [count * (number + 1) / (args.kills + 1) for number in range(args.kills)]
                killing = asyncio.create_task(kill_workers(url, process.pid, at))
            seen = await load(url, plans, args.clients)
            took_s = time.monotonic() - started_s
            if killing is not None:
                killing.cancel()
                await asyncio.gather(killing, return_exceptions=True)
            left = await at_rest(url)
            grown = await scrape(url)
            grown.subtract(before)
            found = [*left, *seen.problems, *(check_calm if calm else check_storm)(seen, grown)]
            if seen.outcomes["stuck"]:
                found.append(f"{seen.outcomes['stuck']} requests never ended")
            if not calm and grown["seamount:worker_restarts_total"] != args.kills:
                found.append(f"the worker was restarted {grown['seamount:worker_restarts_total']} times")
            wrong += [f"{name}: {problem}" for problem in found]
            rss = psutil.Process(process.pid).memory_info().rss
            report[name] = {"outcomes": dict(seen.outcomes), "s": round(took_s, 2), "server_rss_bytes": rss}
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(60):
            report["exit"] = await process.wait()
    return {**report, "wrong": wrong}


def main() -> int:
    """Run the storm that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--model", default="seamount-tiny")
    report = asyncio.run(run(parser.parse_args()))
    print(json.dumps(report, indent=1))
    return 1 if report["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
