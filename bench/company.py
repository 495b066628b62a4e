"""What company costs a person who asks: alone, beside a batch, and in a burst.

    python bench/company.py [MODEL]

One server, rounds of three parts. Alone: one client asks one short question after the other. Beside a batch: the same
while the lines of a batch fill idle time; the batch's own speed is measured meanwhile and when it has the server for
itself. Burst: many clients ask at the same moment after a silence. Told are the time to the first token, the time from
one token to the next and the time to the end; prints medians and 99th percentiles over all rounds, `--json` prints all
of them. It measures and never fails on a number.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

from overhead import PROMPT, serving
from serve_real import wait_for_url

LINE_TOKENS = 256


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="seamount-tiny")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--num-short", type=int, default=60, help="questions of one part")
    parser.add_argument("--burst", type=int, default=64, help="clients that ask at the same moment")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(
            serving(args.model, folder), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as server,
    ):
        try:
            url = wait_for_url(server)
            rounds = asyncio.run(measure(url, args))
        finally:
            server.terminate()
    if args.json:
        print(json.dumps(rounds, indent=1))
    else:
        report(rounds)


async def measure(url: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return what each round measured; the first round warms up and is left out."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits, trust_env=False) as client:
        asked = {"model": Path(args.model).name, "max_tokens": args.new_tokens, "temperature": 0, "ignore_eos": True}
        rounds = []
        for _ in range(args.rounds + 1):
            told: dict[str, Any] = {"alone": await one_by_one(client, asked, args.num_short)}
            batch = await begin_batch(client, asked, num_lines=4000)
            told["batch_alone_tokens_per_s"] = await batch_speed(client, asyncio.sleep(5))
            parts: list[dict[str, float]] = []
            told["batch_beside_tokens_per_s"] = await batch_speed(
                client, one_by_one(client, asked, args.num_short, parts), args.num_short * args.new_tokens
            )
            told["beside_a_batch"] = parts
            await end_batch(client, batch)
            started = time.perf_counter()
            told["burst"] = await asyncio.gather(*(ask(client, asked, n) for n in range(args.burst)))
            told["burst_tokens_per_s"] = args.burst * args.new_tokens / (time.perf_counter() - started)
            rounds.append(told)
    return rounds[1:]


async def one_by_one(
    client: httpx.AsyncClient, asked: dict[str, Any], count: int, into: list[dict[str, float]] | None = None
) -> list[dict[str, float]]:
    """Ask `count` questions, each when the one before is answered; appends to `into` where it is given."""
    times = [] if into is None else into
    for number in range(count):
        times.append(await ask(client, asked, number))
    return times


async def ask(client: httpx.AsyncClient, asked: dict[str, Any], number: int) -> dict[str, float]:
    """Return the seconds of one answer: `first` to its first token, `between` two tokens on average, `whole`."""
    body = asked | {"prompt": f"{number} {PROMPT}", "stream": True}
    started = first = time.perf_counter()
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if first == started and line.startswith("data: {"):
                first = time.perf_counter()
    ended = time.perf_counter()
    return {
        "first": first - started,
        "between": (ended - first) / max(asked["max_tokens"] - 1, 1),
        "whole": ended - started,
    }


async def begin_batch(client: httpx.AsyncClient, asked: dict[str, Any], num_lines: int) -> str:
    """Start a batch that lasts longer than a part; return its id once lines of it are answered."""
    lines = (
        {
            "custom_id": str(number),
            "method": "POST",
            "url": "/v1/completions",
            "body": asked | {"prompt": f"{number} {PROMPT}", "max_tokens": LINE_TOKENS},
        }
        for number in range(num_lines)
    )
    text = "\n".join(json.dumps(line) for line in lines)
    file = await client.post("/v1/files", files={"file": ("lines.jsonl", text)}, data={"purpose": "batch"})
    file.raise_for_status()
    made = await client.post(
        "/v1/batches",
        json={"input_file_id": file.json()["id"], "endpoint": "/v1/completions", "completion_window": "24h"},
    )
    made.raise_for_status()
    batch = str(made.json()["id"])
    while (await client.get(f"/v1/batches/{batch}")).json()["request_counts"]["completed"] < 1:
        await asyncio.sleep(0.2)
    return batch


async def end_batch(client: httpx.AsyncClient, batch: str) -> None:
    """Cancel a batch and wait until nothing of it runs."""
    (await client.post(f"/v1/batches/{batch}/cancel")).raise_for_status()
    while (await client.get(f"/v1/batches/{batch}")).json()["status"] not in ("cancelled", "completed"):
        await asyncio.sleep(0.2)


async def batch_speed(client: httpx.AsyncClient, during: Any, not_its: int = 0) -> float:
    """Return the tokens/s that the engine generated while `during` ran, less `not_its` tokens of others."""
    before, started = await generated(client), time.perf_counter()
    await during
    took_s = time.perf_counter() - started
    return (await generated(client) - before - not_its) / took_s


async def generated(client: httpx.AsyncClient) -> float:
    """Return the tokens that the server has generated so far."""
    text = (await client.get("/metrics")).text
    found = [line for line in text.splitlines() if line.startswith("vllm:generation_tokens_total")]
    return float(found[0].rsplit(" ", 1)[1])


def report(rounds: list[dict[str, Any]]) -> None:
    """Print what was measured."""
    print(f"{'milliseconds, p50 / p99':24}{'first token':>18}{'between tokens':>18}{'whole answer':>20}")
    for name in ("alone", "beside_a_batch", "burst"):
        times = [one for told in rounds for one in told[name]]
        cells = []
        for part in ("first", "between", "whole"):
            values = sorted(one[part] * 1e3 for one in times)
            cells.append(f"{statistics.median(values):8.2f} /{values[int(len(values) * 0.99)]:8.2f}")
        print(f"{name:24}{cells[0]:>18}{cells[1]:>18}{cells[2]:>20}")
    for name in ("batch_alone", "batch_beside", "burst"):
        rates = [told[f"{name}_tokens_per_s"] for told in rounds]
        print(f"{name:24}{statistics.median(rates):8.0f} tokens/s  ({min(rates):.0f} to {max(rates):.0f})")


if __name__ == "__main__":
    main()
