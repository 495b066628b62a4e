"""`seamount data` as a person or a script runs it, over the embedded model's tokenizer and template."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from seamount.cli.main import main

GOOD = [
    {"messages": [{"role": "user", "content": f"What is {n} + 1?"}, {"role": "assistant", "content": str(n + 1)}]}
    for n in range(3)
]
BAD = [
    '{"messages": [{"role": "user", "content": "Hi"}',
    json.dumps({"messages": [{"role": "asistant\x1b[2J", "content": "Hi"}]}),
    json.dumps({"messages": [{"role": "user", "content": "Hi"}]}),
]


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


def test_good_data_is_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", write(tmp_path / "d.jsonl", GOOD)]) == 0
    shown = capsys.readouterr().out
    assert "messages" in shown
    assert "bad record" not in shown
    assert main(["data", "check", str(tmp_path), "--json", "--thinking", "off"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["num_records"], report["num_examples"], report["num_bad"]) == (3, 3, 0)
    assert report["num_trained"] == 6  # a digit and the end, three times
    assert report["is_good"]


def test_every_bad_record_is_listed_and_fails_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "d.jsonl", [*GOOD, *BAD])
    assert main(["data", "check", path]) == 1
    shown = capsys.readouterr().out
    for row in (4, 5, 6):
        assert f"{path}:{row}" in shown
    assert "messages[0].role" in shown
    assert "\x1b" not in shown
    assert "Roles are system" in shown


def test_a_record_is_shown_with_its_trained_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "d.jsonl", [*GOOD, *BAD])
    assert main(["data", "show", path, "--number", "2"]) == 0
    shown = capsys.readouterr().out
    assert f"{path}:2: " in shown
    assert "<｜User｜>›What is 1 + 1?‹<｜Assistant｜><think>›⟦‹</think>›2‹<｜end▁of▁sentence｜>›⟧" in shown
    assert main(["data", "show", path, "--number", "4"]) == 2
    assert f"error: {path}:4: is not JSON" in capsys.readouterr().err
    assert main(["data", "show", path, "--number", "7"]) == 2
    assert "There is no record 7; the data has 6." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["check"], "The following arguments are required: FILE"),
        (["check", "missing.jsonl"], "There is no file missing.jsonl"),
        (["check", "d.jsonl", "--language", "xx"], "'xx' cannot be checked"),
        (["check", "d.jsonl", "--max-length", "1"], "must be at least 2"),
        (["show", "d.jsonl", "--model", "nothing"], "nothing"),
        (["show", "d.jsonl", "--number", "0"], "must be at least 1"),
        (["show", "d.jsonl", "--number", "-1"], "must be at least 1"),
        (["show", "d.jsonl", "--number", "x"], "'x' is no whole number"),
        (["check", ""], "has an empty name"),
        (["check", "pipe.jsonl"], "pipe.jsonl is no file but a pipe"),
        (["show", "pipe.jsonl"], "pipe.jsonl is no file but a pipe"),
        (["build", "pipe.jsonl", "--output", "out"], "pipe.jsonl is no file but a pipe"),
        (["look"], "invalid choice"),
    ],
)
def test_wrong_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "d.jsonl", GOOD)
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert main(["data", *words]) == 2
    assert said in capsys.readouterr().err


def test_json_lines_need_neither_torch_nor_pyarrow(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", GOOD)
    program = (
        "import sys\nfrom seamount.cli.main import main\n"
        f"code = main(['data', 'check', {path!r}, '--json'])\n"
        "sys.exit(code or any(name in sys.modules for name in ('torch', 'pyarrow', 'transformers')))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_file_larger_than_the_memory_that_is_used(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    row = json.dumps({"messages": [*GOOD[0]["messages"][:1], {"role": "assistant", "content": "x" * 20_000}]})
    with path.open("w") as file:
        file.write("[" + ",".join([row] * 2500) + "]")  # 50 MB
    program = (
        "import resource, sys\nfrom pathlib import Path\n"
        "from seamount.training.examples.reading import read_records\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"count = sum(1 for _ in read_records(Path({str(path)!r})))\n"
        "print(count, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    count, grown_mib = map(int, done.stdout.split())
    assert count == 2500
    assert grown_mib < 25
