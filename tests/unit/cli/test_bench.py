"""What `seamount bench` shows: flags, progress lines, and a table that fits a terminal."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from seamount.cli import bench
from seamount.cli.main import command_parser, main
from seamount.core.requests import ModelFacts
from seamount.ops.bench_run import Shape, Timing
from seamount.ops.benchmark import Report, Row
from seamount.ops.ceiling import Ceiling
from seamount.ops.machine import Machine

SHAPE = Shape(prompt_tokens=2048, output_tokens=64, concurrency=32)
TIMING = Timing(
    prefill_s=4.0,
    first_token_s=(1.0,),
    gaps_s=(0.1,),
    decode_s=2.0,
    decode_steps=10,
    decode_tokens=320,
    decode_context_tokens=0.0,
    cached_tokens=(0,),
)
FULL = Row(
    **dataclasses.asdict(SHAPE),
    num_rounds=3,
    prefill_tokens_per_s=123456.0,
    decode_tokens_per_s=98765.0,
    first_token_p50_s=101.5,
    first_token_p95_s=130.0,
    inter_token_p50_s=0.1023,
    inter_token_p95_s=1.2046,
    num_decode_steps=32,
    num_cached_tokens=1024,
    peak_memory_bytes=123_450_000_000,
    prefill_share=0.512,
    decode_share=0.0341,
    decode_bound="memory",
)
BARE = Row(
    prompt_tokens=8, output_tokens=1, concurrency=2, shared_prefix_tokens=4, num_rounds=0, not_measured="too [big]"
)
REPORT = Report(
    machine=Machine(
        processor="p",
        device="cpu",
        num_cores=1,
        num_threads=1,
        instruction_sets=(),
        kernels="k",
        memory_bytes=1,
        seamount_version="0",
        torch_version="0",
        python_version="0",
    ),
    model=ModelFacts(
        name="m",
        family="llama",
        num_parameters=1,
        num_active_parameters=1,
        dtype="bfloat16",
        device="cpu",
        vocab_size=1,
        max_model_len=1,
        num_blocks=1,
        block_size=1,
        cache_bytes_per_token=1,
        weight_bytes=1,
        load_s=0.0,
    ),
    precision="int8",
    weight_bytes_per_parameter=1.0,
    settings={},
    ceiling=Ceiling(read_bytes_per_s=20.5e9, matrix_ops_per_s={"int8": 3.25e12}),
    rows=(FULL, BARE),
    interrupted=False,
)


def test_lists_of_numbers_lose_their_doubles_and_keep_their_order() -> None:
    args = command_parser("bench").parse_args(["engine", "m", "--prompt-lengths", "64,8,64", "--dtype", "float32"])
    assert (args.prompt_lengths, args.output_lengths, args.concurrency) == ((64, 8), (64,), (1, 8, 32))
    assert (args.model, args.dtype, args.shared_prefix) == ("m", "float32", 0)


@pytest.mark.parametrize("words", [["serve"], ["engine", "--concurrency", "1,0"], ["engine", "--prompt-lengths", "a"]])
def test_wrong_flags_are_told(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *words]) == 2
    shown = capsys.readouterr().err.splitlines()
    assert (len(shown), shown[1]) == (2, "hint: `seamount bench --help` lists the flags.")


def test_a_missing_model_is_told_before_anything_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "engine", "/no/such/folder"]) == 2
    assert capsys.readouterr().err.startswith("error: There is no model or folder named /no/such/folder.")


def test_the_widest_table_fits_80_columns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench, "_PIPE_WIDTH", 80)
    bench._print_table(dataclasses.replace(REPORT, rows=(dataclasses.replace(FULL, num_cached_tokens=0), BARE)))
    shown = capsys.readouterr().out
    row = next(line for line in shown.splitlines() if "2048+64 x32" in line)
    assert " ".join(row.split()) == "2048+64 x32 123,456 51% 98,765 3.4% mem 102 s 102/1205 ms 123 GB"
    assert "20.5 GB/s read, 3.25 T int8 operations/s" in shown
    assert "prompt 8 (4 shared), output 1, concurrency 2: too [big]." in shown


def test_cached_tokens_are_shown_where_there_are_some(capsys: pytest.CaptureFixture[str]) -> None:
    bench._print_table(REPORT)
    assert "Of each prompt, 1024 tokens were in the cache." in capsys.readouterr().out


def test_nothing_measured_needs_no_table(capsys: pytest.CaptureFixture[str]) -> None:
    bench._print_table(dataclasses.replace(REPORT, rows=(BARE,), ceiling=None))
    assert capsys.readouterr().out.strip() == "prompt 8 (4 shared), output 1, concurrency 2: too [big]."


def test_progress_is_a_line_for_each_run(capsys: pytest.CaptureFixture[str]) -> None:
    with bench._Progress() as progress:
        progress.stage("warming up")
        progress.finished(SHAPE, "it does not fit")
        progress.started(SHAPE, 1, 2)
        progress.ticked(40)
        progress.finished(SHAPE, TIMING)
        progress.started(SHAPE, 2, 2)
    name = "prompt 2048, output 64, concurrency 32"
    assert capsys.readouterr().err.splitlines() == [
        "warming up ...",
        f"{name}: not measured: it does not fit",
        f"[1/2] {name}: prefill 16,384 tokens/s, decode 160 tokens/s",
        f"[2/2] {name}: ",
    ]


def test_on_a_terminal_tokens_are_counted_meanwhile(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with bench._Progress() as progress:
        progress.started(SHAPE, 1, 1)
        progress.ticked(40)
        progress.finished(SHAPE, TIMING)
    assert "concurrency 32: 40 tokens in 0 s \r\x1b[K[1/1]" in capsys.readouterr().err


def test_ctrl_c_prints_what_was_measured(
    small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(self: object, num_rounds: int, watcher: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("seamount.ops.benchmark.EngineBenchmark.run", interrupted)
    words = ["bench", "engine", str(small_checkpoint), "--prompt-lengths", "8", "--concurrency", "1"]
    assert main([*words, "--max-model-len", "128"]) == 130
    shown = capsys.readouterr()
    assert "concurrency 1: interrupted before it was run." in shown.out
    assert "Interrupted" in shown.err
    assert "Traceback" not in shown.err
