"""Can one tenant tell by timing what another sent? Measures first-token times and prints how likely their ranks are.

    python bench/tenant_timing.py
    python bench/tenant_timing.py --pairs 200 --tokens 400

Starts `seamount serve` with the embedded model and keys for two tenants. For each pair of prompts of random tokens,
the first tenant sends one of them; then the second one sends both, in random order, and times the first token of each.
Where tenants share nothing, both come from the same distribution, and p (two-sided Mann-Whitney test) is uniform
between 0 and 1: below 0.01 in one run of a hundred. As a control, what the second tenant sees of its own repeated
prompts: there p must be tiny, else this measures nothing. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

ROOT = Path(__file__).parents[1]
MODEL = "seamount-tiny"


def mann_whitney_p(ones: Sequence[float], others: Sequence[float]) -> float:
    """Return the two-sided p-value that both come from one distribution; normal approximation, ties corrected.

    H. B. Mann and D. R. Whitney, Annals of Mathematical Statistics 18 (1947). Good from about 20 values each.
    """
    values = sorted([*ones, *others])
    rank: dict[float, float] = {}
    ties = 0.0
    begin = 0
    while begin < len(values):
        end = begin
        while end < len(values) and values[end] == values[begin]:
            end += 1
        rank[values[begin]] = (begin + 1 + end) / 2
        ties += (end - begin) ** 3 - (end - begin)
        begin = end
    n, m = len(ones), len(others)
    u = sum(rank[value] for value in ones) - n * (n + 1) / 2
    variance = n * m / 12 * (n + m + 1 - ties / ((n + m) * (n + m - 1)))
    if variance == 0:
        return 1.0
    return math.erfc(max(abs(u - n * m / 2) - 0.5, 0.0) / math.sqrt(2 * variance))


@contextmanager
def server(folder: Path) -> Iterator[tuple[str, str, str]]:
    """Serve, and yield the address and the keys of two tenants."""
    seamount = [sys.executable, "-m", "seamount"]
    database = ["--database", str(folder / "state.db")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}

    def run(*words: str) -> str:
        return subprocess.run(
            [*seamount, *words, *database], env=environment, capture_output=True, text=True, check=True
        ).stdout.strip()

    run("init")
    keys = [run("keys", "add", "--tenant", tenant) for tenant in ("sender", "listener")]
    process = subprocess.Popen(
        [*seamount, "serve", MODEL, "--port", "0", "--log-level", "warning", *database],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        if process.stdout is None:
            raise RuntimeError("the server has no output")
        url = next(found[1] for line in process.stdout if (found := re.search(r"API base\s+(\S+)/v1", line)))
        yield url, keys[0], keys[1]
    finally:
        process.terminate()
        process.communicate()


def first_token_s(client: httpx.Client, key: str, prompt: list[int]) -> float:
    """Return the seconds until the first token of a stream comes."""
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 1, "stream": True, "ignore_eos": True}
    begin_s = time.perf_counter()
    with client.stream("POST", "/v1/completions", json=body, headers={"authorization": f"Bearer {key}"}) as answer:
        answer.raise_for_status()
        pieces = answer.iter_raw()
        next(pieces)
        took_s = time.perf_counter() - begin_s
        for _ in pieces:
            continue
    return took_s


def measure(url: str, sender: str, listener: str, args: argparse.Namespace) -> dict[str, object]:
    """Return the report."""
    draw = random.Random(args.seed)
    sent: list[float] = []
    unsent: list[float] = []
    repeated: list[float] = []

    def prompt() -> list[int]:
        return [draw.randrange(40, 240) for _ in range(args.tokens)]

    with httpx.Client(base_url=url, timeout=60) as client:
        for _ in range(5):  # what a first request pays for
            first_token_s(client, listener, prompt())
        for _ in range(args.pairs):
            one, other = prompt(), prompt()
            first_token_s(client, sender, one)
            order = [(one, sent), (other, unsent)]
            draw.shuffle(order)
            for tokens, times in order:
                times.append(first_token_s(client, listener, tokens))
            repeated.append(first_token_s(client, listener, draw.choice((one, other))))

    def ms(times: Sequence[float]) -> dict[str, float]:
        return {
            "median_ms": round(statistics.median(times) * 1000, 3),
            "mean_ms": round(statistics.fmean(times) * 1000, 3),
        }

    return {
        "pairs": args.pairs,
        "prompt_tokens": args.tokens,
        "sent_by_another_tenant": ms(sent),
        "sent_by_nobody": ms(unsent),
        "p_sent_or_not": round(mann_whitney_p(sent, unsent), 4),
        "control_sent_by_itself": ms(repeated),
        "p_control": mann_whitney_p(repeated, unsent),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=150)
    parser.add_argument("--tokens", type=int, default=320)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, server(Path(folder)) as (url, sender, listener):
        print(json.dumps(measure(url, sender, listener, args), indent=1))


if __name__ == "__main__":
    main()
