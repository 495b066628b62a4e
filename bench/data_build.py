"""Measure `seamount data build` on a made-up corpus of a given size: MB/s, and memory at its highest.

    python bench/data_build.py --gigabytes 10 --folder /tmp/corpus

The corpus is JSON lines, of `text` or of `messages`: English sentences in random order, in documents of 200 bytes to a
megabyte, one in a hundred a copy of an earlier one. It is the same for the same size. Memory is that of the process and
of the template's child process together, counted ten times a second.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import resource
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import psutil


def main() -> None:
    """Make the corpus, build it, print a JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=0.2)
    parser.add_argument("--kind", choices=("text", "messages"), default="text")
    parser.add_argument("--model", default="seamount-tiny")
    parser.add_argument("--folder", type=Path, required=True, help="for corpus and shards; removed at the end")
    parser.add_argument("--keep", action="store_true", help="leave the folder as it is")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    corpus, shards = args.folder / f"{args.kind}.jsonl", args.folder / "shards"
    began = time.monotonic()
    write_corpus(corpus, round(args.gigabytes * 1e9), args.kind)
    print(f"corpus of {corpus.stat().st_size / 1e9:.2f} GB in {time.monotonic() - began:.0f} s", file=sys.stderr)
    command = [sys.executable, "-m", "seamount", "data", "build", str(corpus), "--output", str(shards)]
    command += ["--model", args.model, "--overlong", "skip", "--json"]
    print(json.dumps(measure(command, corpus.stat().st_size, shards), indent=1))
    if not args.keep:
        shutil.rmtree(args.folder)


def measure(command: list[str], num_bytes: int, shards: Path) -> dict[str, Any]:
    """Run the build; what it took."""
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    peak = [0]
    watcher = threading.Thread(target=watch, args=(process, peak))
    watcher.start()
    reader = threading.Thread(target=lambda: [print(line, end="", file=sys.stderr) for line in process.stderr or ()])
    reader.start()
    output = process.stdout.read() if process.stdout else ""
    code = process.wait()
    watcher.join()
    reader.join()
    seconds = time.monotonic() - began
    if code:
        raise SystemExit(f"the build ended with code {code}")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    manifest = json.loads(output)
    written = sum(path.stat().st_size for path in shards.iterdir())
    return {
        "corpus_mb": round(num_bytes / 1e6),
        "seconds": round(seconds, 1),
        "processor_seconds": round(used.ru_utime + used.ru_stime, 1),
        "mb_per_s": round(num_bytes / 1e6 / seconds, 2),
        "million_tokens_per_s": round(manifest["num_tokens"] / 1e6 / seconds, 3),
        "peak_memory_mb": round(peak[0] / 1e6),
        "written_mb": round(written / 1e6),
        "num_shards": len(manifest["shards"]),
        "num_examples": manifest["num_examples"],
        "num_tokens": manifest["num_tokens"],
        "counts": manifest["counts"],
    }


def watch(process: subprocess.Popen[str], peak: list[int]) -> None:
    """Note the highest resident memory of a process and its children, until it ends."""
    main_process = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            family = [main_process, *main_process.children(recursive=True)]
            peak[0] = max(peak[0], sum(one.memory_info().rss for one in family))
        except psutil.NoSuchProcess:
            pass
        time.sleep(0.1)


def write_corpus(path: Path, num_bytes: int, kind: str) -> None:
    """Write lines until there are so many bytes."""
    random_ = random.Random(0)
    sentences = make_sentences()
    earlier: list[str] = []
    left = num_bytes
    with open(path, "w", encoding="utf-8") as file:
        while left > 0:
            if earlier and random_.random() < 0.01:
                line = random_.choice(earlier)
            else:
                line = json.dumps(record(random_, sentences, kind), ensure_ascii=False) + "\n"
                if len(earlier) < 1000 and len(line) < 20_000:
                    earlier.append(line)
            file.write(line)
            left -= len(line.encode())


def record(random_: random.Random, sentences: list[str], kind: str) -> dict[str, Any]:
    """One record: a text of between 3 and 10,000 sentences, or a conversation of two to six short messages."""
    if kind == "text":
        count = min(int(3 * random_.paretovariate(0.9)), 10_000)
        return {"text": " ".join(random_.choices(sentences, k=count))}
    messages = []
    for _ in range(random_.randint(1, 3)):
        messages.append({"role": "user", "content": " ".join(random_.choices(sentences, k=random_.randint(1, 4)))})
        messages.append({"role": "assistant", "content": " ".join(random_.choices(sentences, k=random_.randint(1, 6)))})
    return {"messages": messages}


def make_sentences() -> list[str]:
    """English sentences: those of the documentation that Python brings along."""
    text = " ".join(" ".join(topic.split()) for topic in topics.values())
    found = re.findall(r"[A-Z][^.!?]{20,300}[.!?]", text)
    return list(dict.fromkeys(found))


if __name__ == "__main__":
    main()
