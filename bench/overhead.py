"""What the way over HTTP costs: the same requests asked of the engine in its own process, and of a server.

    python bench/overhead.py [MODEL]

Throughput: clients side by side, each streaming one long answer after the other; tokens/s of all together. Latency:
one client, short answers, time from the request to its end. Engine and server answer in turn, round by round, with the
same prompts and lengths; the clients of the server are plain sockets in a process of their own, so that no client
library is measured, though they share the processors. Prints medians and ratios; `--json` prints all rounds. It
measures and never fails on a number.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from serve_real import wait_for_url

PROMPT = "Tell me about the sea, its mountains, and those who measure them. "


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="seamount-tiny")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=1024)
    parser.add_argument("--short-tokens", type=int, default=8)
    parser.add_argument("--num-short", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    short = (args.num_short, args.short_tokens)
    # One process holds the engine, one the clients: started afresh, for the engine's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as folder,  # a database of its own: without keys
        ProcessPoolExecutor(1, context) as inside,
        ProcessPoolExecutor(1, context) as outside,
        subprocess.Popen(
            serving(args.model, folder), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as server,
    ):
        try:
            url = wait_for_url(server)
            rounds = []
            for _ in range(args.rounds + 1):
                told = {
                    "engine": inside.submit(ask_engine, args.model, args.clients, args.new_tokens).result(),
                    "http": outside.submit(ask_server, url, args.model, args.clients, args.new_tokens).result(),
                    "engine_short_s": inside.submit(short_engine, *short).result(),
                    "http_short_s": outside.submit(short_server, url, args.model, *short).result(),
                }
                rounds.append(told)
        finally:
            server.terminate()
    report(rounds[1:], as_json=args.json)  # the first one warms up


def serving(model: str, folder: str) -> list[str]:
    """Return the command that serves a model with its state in a folder."""
    return [sys.executable, "-m", "seamount", "serve", model, "--port", "0", "--database", f"{folder}/state.db"]


def report(rounds: list[dict[str, Any]], *, as_json: bool) -> None:
    """Print what was measured."""
    if as_json:
        print(json.dumps(rounds, indent=1))
        return
    for name in ("engine", "http"):
        rates = [told[name] for told in rounds]
        print(f"{name:8} {statistics.median(rates):9.0f} tokens/s  ({min(rates):.0f} to {max(rates):.0f})")
    shares = [told["http"] / told["engine"] for told in rounds]
    print(f"HTTP gives {statistics.median(shares):.1%} of the engine's rate ({min(shares):.1%} to {max(shares):.1%})")
    p50 = {name: [statistics.median(told[f"{name}_short_s"]) for told in rounds] for name in ("engine", "http")}
    added = [after - before for before, after in zip(p50["engine"], p50["http"], strict=True)]
    medians = {name: statistics.median(values) * 1e3 for name, values in p50.items()}
    print(f"a short answer takes {medians['engine']:.2f} ms in the engine, {medians['http']:.2f} ms over HTTP (p50)")
    print(f"added: {statistics.median(added) * 1e3:.2f} ms ({min(added) * 1e3:.2f} to {max(added) * 1e3:.2f})")


_llm: Any = None


def ask_engine(model: str, num_clients: int, new_tokens: int) -> float:
    """Tokens/s of an engine in this process, loaded at the first call."""
    global _llm
    from seamount import LLM, SamplingParams

    if _llm is None:
        _llm = LLM(model)
    sampling = SamplingParams(max_tokens=new_tokens, temperature=0, ignore_eos=True)
    started = time.perf_counter()
    answers = _llm.generate([f"{number} {PROMPT}" for number in range(num_clients)], sampling)
    return sum(len(answer.token_ids) for answer in answers) / (time.perf_counter() - started)


def short_engine(count: int, new_tokens: int) -> list[float]:
    """Seconds of each of `count` short answers, one after the other."""
    from seamount import SamplingParams

    sampling = SamplingParams(max_tokens=new_tokens, temperature=0, ignore_eos=True)
    times = []
    for number in range(count):
        started = time.perf_counter()
        _llm.generate(f"{number} {PROMPT}", sampling)
        times.append(time.perf_counter() - started)
    return times


def ask_server(url: str, model: str, num_clients: int, new_tokens: int) -> float:
    """Tokens/s of streams side by side."""

    async def all_streams() -> float:
        clients = [await Client.open(url, model) for _ in range(num_clients)]
        started = time.perf_counter()
        counts = await asyncio.gather(*(c.stream(f"{number} {PROMPT}", new_tokens) for number, c in enumerate(clients)))
        took_s = time.perf_counter() - started
        for client in clients:
            client.close()
        return sum(counts) / took_s

    return asyncio.run(all_streams())


def short_server(url: str, model: str, count: int, new_tokens: int) -> list[float]:
    """Seconds of each of `count` short streams over one connection, one after the other."""

    async def one_by_one() -> list[float]:
        client = await Client.open(url, model)
        times = []
        for number in range(count):
            started = time.perf_counter()
            await client.stream(f"{number} {PROMPT}", new_tokens)
            times.append(time.perf_counter() - started)
        client.close()
        return times

    return asyncio.run(one_by_one())


class Client:
    """One connection that streams completions, with as little work as can be: it reads usage, not text."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str, model: str) -> None:
        self._reader, self._writer, self._host, self._model = reader, writer, host, model

    @classmethod
    async def open(cls, url: str, model: str) -> Client:
        """Connect to the server at `url`."""
        parts = urlsplit(url)
        return cls(*await asyncio.open_connection(parts.hostname, parts.port), parts.netloc, Path(model).name)

    async def stream(self, prompt: str, new_tokens: int) -> int:
        """Return the tokens that the server says it generated, once the whole answer has come."""
        asked = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        body = json.dumps(asked).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: {self._host}\r\ncontent-type: application/json\r\n"
        self._writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        answer = b""
        while not answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
            got = await self._reader.read(2**16)
            if not got or answer.startswith(b"HTTP/1.1 4"):
                raise SystemExit(f"the server answered: {(answer + got)[:1000]!r}")
            answer = (answer + got)[-4096:]
        usage = answer[answer.rindex(b'"completion_tokens":') :].split(b":", 1)[1]
        return int(usage.split(b",", 1)[0])

    def close(self) -> None:
        """Close the connection."""
        self._writer.close()


if __name__ == "__main__":
    main()
