"""Serve a large checkpoint as a user would and measure what the user would feel.

    python bench/make_checkpoint.py r1-distill-qwen-1.5b /tmp/checkpoint
    python bench/serve_real.py /tmp/checkpoint

Reads the files once with nothing in the page cache, then starts `seamount serve` in the same condition; then lets
clients stream side by side. Prints seconds to read and to be ready, peak memory against weights and cache, and tokens
per second; `--json` prints the same as one object. It measures and never fails on a number.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil

READ_BYTES = 16 * 2**20


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    result = measure(args.folder, args.clients, args.prompt_tokens, args.new_tokens)
    if args.json:
        print(json.dumps(result, indent=1))
        return
    for name, value in result.items():
        print(f"{name:28} {value}")


def measure(folder: Path, num_clients: int, prompt_tokens: int, new_tokens: int) -> dict[str, object]:
    """Return the measurements by name; sizes in GB (10^9 bytes), times in seconds."""
    files = sorted(folder.glob("*.safetensors"))
    read_s = time_reading(files)
    forget(files)
    started = time.monotonic()
    command = [sys.executable, "-m", "seamount", "serve", str(folder), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            url = wait_for_url(server)
            ready_s = time.monotonic() - started
            clients = asyncio.run(stream_all(url, num_clients, prompt_tokens, new_tokens))
            peaks = peak_bytes(server.pid)
            gauges = httpx.get(f"{url}/metrics").text
        finally:
            server.terminate()
    weights = sum(file.stat().st_size for file in files)
    return {
        "checkpoint_gb": round(weights / 1e9, 3),
        "read_s": round(read_s, 2),
        "ready_s": round(ready_s, 2),
        "ready_limit_s": round(1.5 * read_s + 5, 2),
        "worker_peak_gb": round(max(peaks) / 1e9, 3),
        "all_processes_peak_gb": round(sum(peaks) / 1e9, 3),
        "peak_over_weights_gb": round((sum(peaks) - weights) / 1e9, 3),
        "clients": num_clients,
        "clients_that_finished": sum(c["finish_reason"] == "length" for c in clients),
        "median_first_token_s": round(statistics.median(c["first_token_s"] for c in clients), 2),
        "median_total_s": round(statistics.median(c["total_s"] for c in clients), 2),
        "output_tokens_per_s": round(sum(c["tokens"] for c in clients) / max(c["total_s"] for c in clients), 1),
        "blocks_in_use_at_the_end": re.findall(r"^\S*kv_cache_usage_perc\{\S* (\S+)", gauges, re.MULTILINE),
    }


def time_reading(files: list[Path]) -> float:
    """Seconds to read the files from disk in order, as `cat` would."""
    forget(files)
    buffer = bytearray(READ_BYTES)
    started = time.monotonic()
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    return time.monotonic() - started


def forget(files: list[Path]) -> None:
    """Drop the files from the page cache, so that each reader finds the same condition."""
    for file in files:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def wait_for_url(server: subprocess.Popen[str]) -> str:
    """Return the API's base once the server has announced it."""
    assert server.stdout is not None
    for line in server.stdout:
        found = re.search(r"API base\s+(http\S+)/v1", line)
        if found:
            return found.group(1)
    raise SystemExit("The server ended before it was ready.")


def peak_bytes(pid: int) -> list[int]:
    """Peak resident memory of the server and of its worker."""
    server = psutil.Process(pid)
    peaks = []
    for process in (server, *server.children(recursive=True)):
        status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
        (kilobytes,) = re.findall(r"VmHWM:\s+(\d+) kB", status)
        peaks.append(int(kilobytes) * 1024)
    return peaks


async def stream_all(url: str, num_clients: int, prompt_tokens: int, new_tokens: int) -> list[dict]:
    """Let all clients stream at once; return what each saw."""
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        name = (await client.get("/v1/models")).json()["data"][0]["id"]

        async def one(number: int) -> dict:
            body = {
                "model": name,
                "prompt": [(number * 7919 + i * 31) % 5000 + 300 for i in range(prompt_tokens)],
                "max_tokens": new_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            seen = {"tokens": 0, "finish_reason": None, "first_token_s": None}
            started = time.monotonic()
            async with client.stream("POST", "/v1/completions", json=body) as response:
                response.raise_for_status()
                async for line in response.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    chunk = json.loads(line[6:])
                    seen["first_token_s"] = seen["first_token_s"] or time.monotonic() - started
                    for choice in chunk["choices"]:
                        seen["finish_reason"] = choice["finish_reason"] or seen["finish_reason"]
                    if chunk.get("usage"):
                        seen["tokens"] = chunk["usage"]["completion_tokens"]
            seen["total_s"] = time.monotonic() - started
            return seen

        return await asyncio.gather(*(one(i) for i in range(num_clients)))


if __name__ == "__main__":
    main()
