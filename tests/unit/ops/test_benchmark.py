"""What the benchmark's numbers mean, and that one bad combination does not spoil the others."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import pytest

from seamount.core.errors import EngineError, QueueFullError, error_to_fields
from seamount.core.requests import Chunk, ModelFacts, Request
from seamount.core.settings import EngineConfig
from seamount.ops import benchmark, ceiling
from seamount.ops.bench_run import Recording, Shape, Timing, fill_prefix, make_requests, record, timing
from seamount.ops.benchmark import EngineBenchmark, percentile, shapes_of, summarize, why_not
from seamount.ops.ceiling import Ceiling
from seamount.ops.roofline import ModelWork

TWO = Shape(prompt_tokens=10, output_tokens=4, concurrency=2)
FACTS = ModelFacts(
    name="m",
    family="qwen2",
    num_parameters=100,
    num_active_parameters=80,
    dtype="bfloat16",
    device="cpu",
    vocab_size=50,
    max_model_len=64,
    num_blocks=10,
    block_size=8,
    cache_bytes_per_token=4,
    weight_bytes=200,
    load_s=0.1,
)
WORK = ModelWork(
    weight_bytes_per_parameter=2.0,
    precision="bfloat16",
    num_fixed_parameters=80,
    num_head_parameters=20,
    num_expert_parameters=0,
    num_expert_layers=0,
    num_experts=0,
    num_chosen=0,
    num_layers=1,
    decode_ops_per_pair=0,
    prefill_ops_per_pair=0,
    cache_bytes_per_token=4,
)


class Quiet:
    """A watcher that remembers what it was told."""

    def __init__(self, stop_at: int = 10**9) -> None:
        self.stop_at = stop_at
        self.told: list[tuple[Shape, Timing | str]] = []
        self.stages: list[str] = []

    def stage(self, what: str) -> None:
        self.stages.append(what)

    def started(self, shape: Shape, number: int, total: int) -> None:
        if number == self.stop_at:
            raise KeyboardInterrupt

    def ticked(self, num_tokens: int) -> None:
        """Counts nothing."""

    def finished(self, shape: Shape, result: Timing | str) -> None:
        self.told.append((shape, result))


def token(name: str, *, end: bool = False, cached: int | None = None) -> Chunk:
    return Chunk(request_id=name, token_ids=(1,), finish_reason="length" if end else None, num_cached_tokens=cached)


@pytest.fixture
def staggered() -> Recording:
    """Two requests of four tokens, of which b begins a step later than a."""
    return Recording(
        added_s={"a": 1.0, "b": 1.5},
        steps=[
            (2.0, [token("a", cached=0)]),
            (4.0, [token("a"), token("b", cached=8)]),
            (5.0, [token("a"), token("b")]),
            (7.0, [token("a", end=True), token("b")]),
            (8.0, [token("b", end=True)]),
        ],
    )


def test_the_definitions_of_the_numbers(staggered: Recording) -> None:
    found = timing(TWO, staggered)
    assert found.prefill_s == 3.0
    assert found.first_token_s == (1.0, 2.5)
    assert sorted(found.gaps_s) == [1.0, 1.0, 1.0, 2.0, 2.0, 2.0]
    assert (found.decode_s, found.decode_steps, found.decode_tokens) == (3.0, 2, 4)
    # Both steady steps attend to 20 tokens of prompt; 3 tokens were out before the first, 5 before the second.
    assert found.decode_context_tokens == 24.0
    assert found.cached_tokens == (0, 8)


def test_tokens_that_come_together_share_the_time_since_the_last(staggered: Recording) -> None:
    staggered.steps[2:] = [
        (5.0, [token("a"), token("b"), token("a", end=True)]),
        (7.0, [token("b"), token("b", end=True)]),
    ]
    found = timing(TWO, staggered)
    assert sorted(found.gaps_s) == [0.5, 0.5, 1.0, 1.0, 1.0, 2.0]
    assert (found.decode_steps, found.decode_tokens) == (1, 3)


def test_there_is_no_steady_decode_when_the_first_request_ends_before_the_last_begins() -> None:
    steps = [(1.0, [token("a")]), (2.0, [token("a", end=True)]), (3.0, [token("b")]), (4.0, [token("b", end=True)])]
    shape = Shape(prompt_tokens=10, output_tokens=2, concurrency=2)
    found = timing(shape, Recording(added_s={"a": 0.0, "b": 0.0}, steps=steps))
    assert (found.decode_s, found.decode_steps, found.decode_tokens) == (0.0, 0, 0)
    row = summarize(shape, [found], WORK, Ceiling(read_bytes_per_s=1e3, matrix_ops_per_s={"bfloat16": 1e4}))
    assert "decode_tokens_per_s" not in row
    assert "more output tokens" in row["not_measured"]


def test_rates_and_shares(staggered: Recording) -> None:
    machine = Ceiling(read_bytes_per_s=1000.0, matrix_ops_per_s={"bfloat16": 10_000.0, "int8": 1.0})
    row = summarize(TWO, [timing(TWO, staggered)], WORK, machine)
    assert row["prefill_tokens_per_s"] == pytest.approx(20 / 3)
    assert row["decode_tokens_per_s"] == pytest.approx(4 / 3)
    # Prompts: a computes 10 tokens, b 2; 2 operations for 60 parameters each, and the head once for both.
    assert row["prefill_share"] == pytest.approx((12 * 2 * 60 + 2 * 2 * 20) / 3 / 10_000)
    # Two steps in three seconds: 160 bytes of weights and 24 tokens of 4 bytes each; 2 * 80 operations for both.
    assert row["decode_memory_share"] == pytest.approx(2 * (160 + 24 * 4) / 3 / 1000)
    assert row["decode_matrix_share"] == pytest.approx(2 * 2 * 2 * 80 / 3 / 10_000)
    assert (row["decode_bound"], row["decode_share"]) == ("memory", row["decode_memory_share"])


def test_a_shared_prefix_is_read_once(staggered: Recording) -> None:
    shared = [
        (end, [dataclasses.replace(c, num_cached_tokens=8) if c.num_cached_tokens == 0 else c for c in chunks])
        for end, chunks in staggered.steps
    ]
    machine = Ceiling(read_bytes_per_s=1000.0, matrix_ops_per_s={"bfloat16": 10_000.0})
    row = summarize(TWO, [timing(TWO, dataclasses.replace(staggered, steps=shared))], WORK, machine)
    assert row["decode_memory_share"] == pytest.approx(2 * (160 + (24 - 8) * 4) / 3 / 1000)
    assert row["num_cached_tokens"] == 8


@pytest.mark.parametrize(("share", "value"), [(0.0, 1.0), (0.5, 2.5), (0.95, 3.85), (1.0, 4.0)])
def test_percentiles_are_interpolated(share: float, value: float) -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], share) == pytest.approx(value)


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        (TWO, None),
        (Shape(prompt_tokens=60, output_tokens=5, concurrency=1), "65 tokens exceed the context of 64"),
        (Shape(prompt_tokens=30, output_tokens=2, concurrency=3), "needs 12 blocks of cache, there are 10"),
        (Shape(prompt_tokens=30, output_tokens=2, concurrency=3, shared_prefix_tokens=16), None),
        (Shape(prompt_tokens=1, output_tokens=1, concurrency=5), "max_num_seqs is 4; --max-num-seqs 5 would do"),
        (Shape(prompt_tokens=8, output_tokens=1, concurrency=1, shared_prefix_tokens=8), "leaves nothing"),
    ],
)
def test_what_does_not_fit_is_told_with_numbers(shape: Shape, reason: str | None) -> None:
    found = why_not(shape, FACTS, EngineConfig(max_num_seqs=4))
    assert found is None if reason is None else reason in (found or "")


def test_prompts_share_only_the_prefix() -> None:
    shape = Shape(prompt_tokens=40, output_tokens=3, concurrency=3, shared_prefix_tokens=16)
    prompts = [r.prompt_token_ids for r in make_requests(shape, 1000, random.Random(0))]
    assert {len(p) for p in prompts} == {40}
    assert len({p[:16] for p in prompts}) == 1
    assert len({p[16:24] for p in prompts}) == 3
    requests = make_requests(dataclasses.replace(shape, shared_prefix_tokens=0), 1000, random.Random(0))
    assert len({r.prompt_token_ids[:8] for r in requests}) == 3
    assert all(r.sampling.max_tokens == 3 and r.sampling.ignore_eos for r in requests)


class Broken:
    """An engine that takes so many requests, and then cannot compute them."""

    def __init__(self, room: int = 8) -> None:
        self.room = room
        self.running: list[str] = []

    @property
    def idle(self) -> bool:
        return not self.running

    def add(self, request: Request) -> None:
        if len(self.running) == self.room:
            raise QueueFullError("full")
        self.running.append(request.id)

    def step(self) -> list[Chunk]:
        error = error_to_fields(EngineError("not a number"))
        return [Chunk(request_id=self.running.pop(), finish_reason="error", error=error)]

    def abort(self, request_id: str) -> list[Chunk]:
        self.running = [name for name in self.running if name != request_id]
        return []


@pytest.mark.parametrize(("room", "message"), [(8, "not a number"), (1, "full")])
def test_nothing_is_left_running_when_a_run_breaks_off(room: int, message: str) -> None:
    engine = Broken(room)
    with pytest.raises((EngineError, QueueFullError), match=message):
        record(engine, make_requests(TWO, 50, random.Random(0)))
    assert engine.idle


@pytest.fixture
def quick_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceiling, "_READ_BYTES", 2**16)
    monkeypatch.setattr(ceiling, "_SIDES", (32,))


SMALL = {"max_model_len": 64, "cache_memory_bytes": 2**17, "num_threads": 1}


@pytest.mark.usefixtures("quick_ceiling")
def test_a_small_model_is_measured_and_what_does_not_fit_is_told(small_checkpoint: Path) -> None:
    config = EngineConfig(model=str(small_checkpoint), **SMALL)
    bench = EngineBenchmark(config, shapes_of((20, 100), (4,), (1, 3)))
    watcher = Quiet()
    bench.run(2, watcher)
    report = json.loads(bench.report().to_json())
    assert [(row["prompt_tokens"], row["num_rounds"]) for row in report["rows"]] == [
        (20, 2),
        (20, 2),
        (100, 0),
        (100, 0),
    ]
    for row in report["rows"][:2]:
        assert row["not_measured"] is None
        assert min(row[name] for name in ("prefill_tokens_per_s", "decode_tokens_per_s", "decode_share")) > 0
        assert 0 < row["inter_token_p50_s"] <= row["inter_token_p95_s"]
        assert row["num_decode_steps"] == 3
        assert row["num_cached_tokens"] == 0
        assert row["peak_memory_bytes"] > 2**20
    assert "104 tokens exceed the context of 64" in report["rows"][2]["not_measured"]
    assert (report["precision"], report["interrupted"]) == ("float32", False)
    assert set(report["ceiling"]["matrix_ops_per_s"]) == {"bfloat16", "int8", "float32"}
    assert watcher.stages == ["warming up", "measuring the ceiling", "measuring the ceiling"]
    assert len(watcher.told) == 6


@pytest.mark.usefixtures("quick_ceiling")
def test_a_shared_prefix_is_found_in_the_cache_from_the_first_round_on(small_checkpoint: Path) -> None:
    config = EngineConfig(model=str(small_checkpoint), **SMALL)
    bench = EngineBenchmark(config, shapes_of((40,), (2,), (3,), shared_prefix=35))
    bench.run(1, Quiet())
    assert bench.report().rows[0].num_cached_tokens == 32


@pytest.mark.usefixtures("quick_ceiling")
def test_an_interrupted_run_reports_what_it_has(small_checkpoint: Path) -> None:
    config = EngineConfig(model=str(small_checkpoint), **SMALL)
    bench = EngineBenchmark(config, shapes_of((20, 30), (4,), (1,)))
    assert bench.report(interrupted=True).ceiling is None
    with pytest.raises(KeyboardInterrupt):
        bench.run(5, Quiet(stop_at=2))
    report = bench.report(interrupted=True)
    assert [row.num_rounds for row in report.rows] == [1, 0]
    measured = report.rows[0]
    assert measured.decode_tokens_per_s
    assert (measured.num_decode_steps, measured.first_token_p95_s) == (3, measured.first_token_p50_s)
    assert measured.decode_share == max(measured.decode_memory_share or 0, measured.decode_matrix_share or 0)
    assert report.rows[1].not_measured == "interrupted before it was run"


@pytest.mark.usefixtures("quick_ceiling")
def test_a_shape_that_fails_is_given_up_and_the_others_go_on(
    small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(engine: object, shape: Shape, requests: object) -> None:
        if shape.prompt_tokens == 20:
            raise EngineError("It broke.")
        fill_prefix(engine, shape, requests)

    monkeypatch.setattr(benchmark, "fill_prefix", failing)
    config = EngineConfig(model=str(small_checkpoint), **SMALL)
    bench = EngineBenchmark(config, shapes_of((20, 30), (4,), (1,)))
    watcher = Quiet()
    bench.run(2, watcher)
    rows = bench.report().rows
    assert [(row.num_rounds, row.not_measured) for row in rows] == [(0, "It broke."), (2, None)]
    assert [shape.prompt_tokens for shape, _ in watcher.told] == [20, 30, 30]
