"""The commands end to end in pipes, over a small real checkpoint."""

from __future__ import annotations

import io
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from seamount.cli.main import main
from seamount.engine.fake import FakeEngine, say

PATIENCE_S = 60


def test_generate_streams_the_same_text_for_the_same_seed(
    small_checkpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [
        "generate",
        str(small_checkpoint),
        "--prompt",
        "Hello",
        "--max-tokens",
        "12",
        "--seed",
        "5",
        "--ignore-eos",
    ]
    texts = []
    for _ in range(2):
        assert main(words) == 0
        texts.append(capfd.readouterr().out)
    assert texts[0] == texts[1]
    assert main([*words, "--json", "--n", "2", "--logprobs", "1"]) == 0
    shown = capfd.readouterr()
    lines = [json.loads(line) for line in shown.out.splitlines()]
    assert lines[0]["text"] + "\n" == texts[0]
    assert [line["index"] for line in lines] == [0, 1]
    assert [len(line["token_ids"]) for line in lines] == [12, 12]
    assert len(lines[0]["logprobs"]) == 12
    assert "weights: 100%" in shown.err


@pytest.mark.parametrize(("speculation", "told"), [("mtp", True), ("off", False)])
def test_generate_tells_how_many_guesses_were_right(
    speculation: str, told: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--prompt", "Count from 1 to 30.", "--chat", "--max-tokens", "12", "--temperature", "0"]
    assert main(["generate", "seamount-tiny", *words, "--speculation", speculation]) == 0
    assert ("tokens right (" in capsys.readouterr().err) is told


def test_generate_chat_goes_through_the_template(
    small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hi"))
    words = ["generate", str(small_checkpoint), "--prompt", "-", "--chat", "--json", "--max-tokens", "1"]
    assert main(words) == 0
    prompt = "user: hi\nassistant: "
    assert len(json.loads(capsys.readouterr().out)["prompt_token_ids"]) == len(prompt)


@pytest.mark.parametrize("more", [[], ["--n", "2"]])
def test_generate_chat_shows_the_answer_without_the_tags_of_reasoning(
    more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["generate", "seamount-tiny", "--chat", "--prompt", "Who are you?", "--max-tokens", "60", *more]
    assert main([*words, "--temperature", "0"] if not more else [*words, "--seed", "1"]) == 0
    shown = capsys.readouterr().out
    assert "think>" not in shown
    assert shown.startswith("[0] " if more else "I am seamount-tiny")


def test_an_empty_prompt_is_refused_before_the_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "/no/such/folder", "--prompt", ""]) == 2
    assert capsys.readouterr().err.startswith("error: The prompt is empty.")


def test_a_prompt_that_is_too_long_is_refused_with_numbers(
    small_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(small_checkpoint), "--prompt", "x" * 99, "--max-model-len", "64"]) == 2
    error = capsys.readouterr().err.split("error: ")[1]
    assert "99" in error
    assert "64" in error


def test_chat_answers_each_line_of_a_pipe(
    small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n/params\ntwo\n"))
    assert main(["chat", str(small_checkpoint), "--max-tokens", "3"]) == 0
    shown = capsys.readouterr()
    assert "max_tokens=3" in shown.err
    assert "tokens/s" not in shown.out + shown.err
    assert shown.out.endswith("\n")


async def test_chat_over_a_url_loads_no_torch_and_prints_the_content_alone(serve: Any) -> None:
    import asyncio

    running = await serve(FakeEngine(say("<think>quietly</think>Hello \N{CJK UNIFIED IDEOGRAPH-4F60}.")))
    program = (
        "import sys\n"
        "from seamount.cli.main import main\n"
        f"code = main(['chat', '--url', {running.url!r}])\n"
        "assert 'torch' not in sys.modules\n"
        "sys.exit(code)"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    out, err = await process.communicate(b"hi\nagain\n")
    assert (process.returncode, err) == (0, b"")
    assert out.decode().count("Hello \N{CJK UNIFIED IDEOGRAPH-4F60}.\n") == 2


def test_engine_flags_make_no_sense_beside_a_url(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "--url", "http://127.0.0.1:9", "--dtype", "float16"]) == 2
    assert "--dtype is for a model in this process" in capsys.readouterr().err


def test_a_server_that_is_not_there_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "--url", "http://127.0.0.1:9"]) == 1
    assert "hint: Is it running?" in capsys.readouterr().err


def test_bench_prints_a_table_for_people_and_json_for_scripts(
    small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("seamount.ops.ceiling._READ_BYTES", 2**20)
    monkeypatch.setattr("seamount.ops.ceiling._SIDES", (64,))
    words = ["bench", "engine", str(small_checkpoint), "--prompt-lengths", "32,5000", "--output-lengths", "4"]
    words += ["--concurrency", "2", "--rounds", "1", "--num-threads", "1"]
    assert main(words) == 0
    shown = capfd.readouterr()
    first = shown.out.splitlines()[:6]
    for name, line in zip(("Model", "Precision", "Device", "Threads", "CPU features", "Kernels"), first, strict=True):
        assert line.startswith(name)
    assert "32+4 x2" in shown.out
    assert "prompt 5000, output 4, concurrency 2: 5004 tokens exceed the context of 4096." in shown.out
    assert "[1/1] prompt 32, output 4, concurrency 2: prefill " in shown.err
    assert main([*words, "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert [row["num_rounds"] for row in report["rows"]] == [1, 0]
    assert report["rows"][0]["decode_tokens_per_s"] > 0


def test_ctrl_c_in_a_long_benchmark_prints_what_it_has(small_checkpoint: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "seamount",
        "bench",
        "engine",
        str(small_checkpoint),
        "--json",
        "--rounds",
        "99999",
    ]
    command += ["--prompt-lengths", "32", "--output-lengths", "4", "--concurrency", "1", "--num-threads", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("[1/"):
            break
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    report = json.loads(out)
    assert report["interrupted"] is True
    assert report["rows"][0]["num_rounds"] >= 1


@pytest.fixture(scope="module")
def server(small_checkpoint: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A running `seamount serve` and what it has printed."""
    command = [
        sys.executable,
        "-m",
        "seamount",
        "serve",
        str(small_checkpoint),
        "--port",
        "0",
        "--max-model-len",
        "128",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    printed = ""
    while "Ctrl-C stops the server." not in printed:
        ready, _, _ = select.select([process.stdout], [], [], PATIENCE_S)
        line = os.read(process.stdout.fileno(), 65536).decode() if ready else ""
        if not line:
            process.kill()
            raise AssertionError(f"the server did not start: {printed!r} {process.communicate()[1]!r}")
        printed += line
    yield process, printed
    if process.poll() is None:
        process.kill()
    process.communicate()


def test_the_printed_addresses_answer_and_the_printed_call_works_when_pasted(
    server: tuple[subprocess.Popen[str], str],
) -> None:
    _, printed = server
    found = {line.split("    ")[0].strip(): line.split()[-1] for line in printed.splitlines() if "http" in line}
    with urllib.request.urlopen(found["Chat in a browser"]) as page:
        assert b"<title>" in page.read()
    with urllib.request.urlopen(found["API base"] + "/models") as answer:
        assert json.load(answer)["data"][0]["id"] == "small-qwen2"
    if shutil.which("curl") is None:
        pytest.skip("there is no curl here to paste the call for")
    call = next(line.split("One call", 1)[1].strip() for line in printed.splitlines() if "One call" in line)
    done = subprocess.run(["sh", "-c", call], capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    assert json.loads(done.stdout)["choices"][0]["message"]["role"] == "assistant"


def test_a_taken_port_is_told_before_anything_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--port", str(port), "/no/such/folder"]) == 2
    shown = capsys.readouterr().err
    assert f"error: Something already listens on 127.0.0.1 port {port}." in shown
    assert "Loading" not in shown


def test_ctrl_c_stops_the_server_without_a_traceback(server: tuple[subprocess.Popen[str], str]) -> None:
    process, _ = server
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0
    assert "Traceback" not in errors


def test_a_missing_model_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--port", "0", "/no/such/folder"]) == 2
    assert "error: There is no model or folder named /no/such/folder.\nhint: " in capsys.readouterr().err
