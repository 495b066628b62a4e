"""Building token shards in a real process: killed, interrupted and out of room, it goes on to the same bytes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# The command's own shards are larger than a test's data.
PROGRAM = """
import resource, sys
from pathlib import Path
from seamount.cli import data_build, main
from seamount.training.shards import build, chunks, scan
chunks._CHUNK_RECORDS, scan._SAVED_EVERY = 20, 200
build.Job.__init__.__defaults__ = (*build.Job.__init__.__defaults__[:-1], 3000)
most = int(sys.argv[1])
if most:
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
sys.exit(main.main(["data", "build", *sys.argv[2:]]))
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for number in range(3000):
            question = {"role": "user", "content": f"What comes after {number}?"}
            answer = {"role": "assistant", "content": f"After {number} comes {number + 1}. " * (number % 7 + 1)}
            file.write(json.dumps({"messages": [question, answer]}) + "\n")
    return path


def start(corpus: Path, output: Path, most_bytes: int = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, str(most_bytes), str(corpus), "--output", str(output)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(corpus: Path, output: Path, most_bytes: int = 0) -> tuple[int, str]:
    process = start(corpus, output, most_bytes)
    _, said = process.communicate(timeout=300)
    return process.returncode, said


def num_shards(output: Path) -> int:
    try:
        return len(json.loads((output / "progress.json").read_text())["shards"])
    except FileNotFoundError:
        return 0


def wait_for_shards(process: subprocess.Popen[str], output: Path, count: int) -> None:
    while num_shards(output) < count:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def whole(corpus: Path) -> Path:
    code, said = run(corpus, corpus.parent / "whole")
    assert code == 0, said
    return corpus.parent / "whole"


def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(corpus: Path, whole: Path, tmp_path: Path) -> None:
    manifest = json.loads((whole / "manifest.json").read_text())
    assert len(manifest["shards"]) > 10
    output, kills = tmp_path / "out", 0
    for count in (1, 3, 4, 8, len(manifest["shards"]) - 1):
        process = start(corpus, output)
        wait_for_shards(process, output, count)
        process.kill()
        process.communicate()
        kills += not (output / "manifest.json").exists()
    assert kills >= 3
    assert run(corpus, output)[0] == 0
    assert contents(output) == contents(whole)


def test_interrupted_it_says_how_to_go_on(corpus: Path, whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    process = start(corpus, output)
    wait_for_shards(process, output, 2)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "The same command goes on" in said
    assert "Traceback" not in said
    assert run(corpus, output)[0] == 0
    assert contents(output) == contents(whole)


def test_without_room_it_says_so_and_goes_on_when_there_is(corpus: Path, whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    code, said = run(corpus, output, most_bytes=12_000)  # of one file: the index grows beyond it
    assert code == 1
    assert said.splitlines()[-2:] == [
        f"error: {output} cannot be written: File too large.",
        "hint: Finished shards are kept: make room, and give the same command again to go on.",
    ]
    assert run(corpus, output)[0] == 0
    assert contents(output) == contents(whole)
