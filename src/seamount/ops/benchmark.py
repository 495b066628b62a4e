"""Measures the engine: prefill and decode rates, latencies, memory, and the share of what the machine could do.

Called by `seamount bench engine`. The engine runs in this process, step by step, so that the time of every token is
exact and no socket or server is in it. Rounds go over all shapes in turn, so that a disturbance of the machine does not
fall on one of them alone; what is reported is the median over the rounds. The ceiling is measured in every round too.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from seamount import kernels
from seamount.core.errors import SeamountError
from seamount.core.requests import ModelFacts
from seamount.core.settings import EngineConfig
from seamount.engine.build import build_engine
from seamount.models.config import ModelConfig
from seamount.models.locate import locate_model

from .bench_run import Shape, Timing, fill_prefix, make_requests, record, timing
from .ceiling import Ceiling, measure_ceiling
from .machine import Machine, describe_machine, peak_memory_bytes, reset_peak_memory
from .roofline import ModelWork

_SEED = 1
_WARM_PROMPT, _WARM_OUTPUT = 16, 4


class Watcher(Protocol):
    """Is told how far the benchmark is."""

    def stage(self, what: str) -> None:
        """Something that is not a run begins: warming up, measuring the ceiling."""
        ...

    def started(self, shape: Shape, number: int, total: int) -> None:
        """Run `number` of `total` begins."""
        ...

    def ticked(self, num_tokens: int) -> None:
        """The run goes on and has put out so many tokens."""
        ...

    def finished(self, shape: Shape, result: Timing | str) -> None:
        """The run ended, with its timing or with the reason why there is none."""
        ...


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was measured of one shape; numbers are None where there are none.

    Rates are medians over the rounds, latencies percentiles over all requests of all rounds.

    Attributes:
        num_rounds: rounds that were measured to their end.
        prefill_tokens_per_s: prompt tokens, cached ones included, over the time until every request has its first.
        decode_tokens_per_s: of all requests together, in the steady state.
        first_token_*_s, inter_token_*_s: as a user waits for them.
        num_decode_steps: steps of the steady state in one round.
        num_cached_tokens: prompt tokens of one request that were found in the cache, at least.
        acceptance: share of the guesses of speculative decoding that were right; None where nothing was guessed.
        peak_memory_bytes: the most over the rounds, weights and cache included.
        prefill_share, decode_share: of the ceiling; `decode_bound` names the nearer one for decode, "memory" or
            "matrix"; for prefill it is always the matrix rate.
        not_measured: the reason why there is nothing, or not all.
    """

    prompt_tokens: int
    output_tokens: int
    concurrency: int
    shared_prefix_tokens: int
    num_rounds: int
    prefill_tokens_per_s: float | None = None
    decode_tokens_per_s: float | None = None
    first_token_p50_s: float | None = None
    first_token_p95_s: float | None = None
    inter_token_p50_s: float | None = None
    inter_token_p95_s: float | None = None
    num_decode_steps: int | None = None
    num_cached_tokens: int | None = None
    acceptance: float | None = None
    peak_memory_bytes: int | None = None
    prefill_share: float | None = None
    decode_share: float | None = None
    decode_bound: str | None = None
    decode_memory_share: float | None = None
    decode_matrix_share: float | None = None
    not_measured: str | None = None


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that a run of the benchmark found; `ceiling` is None when it was interrupted before that was measured."""

    machine: Machine
    model: ModelFacts
    precision: str
    weight_bytes_per_parameter: float
    settings: dict[str, Any]
    ceiling: Ceiling | None
    rows: tuple[Row, ...]
    interrupted: bool

    def to_json(self) -> str:
        """All fields as one JSON object."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False)


@dataclass(frozen=True)
class _Run:
    timing: Timing
    peak_bytes: int
    num_draft_tokens: int
    num_accepted_tokens: int


class EngineBenchmark:
    """A loaded engine and what has been measured of it so far; `report` may be asked at any time.

    Args:
        config: as for any engine.
        shapes: what to measure.
        on_progress: see `build_engine`.

    Raises:
        SeamountError: the model cannot be loaded.
    """

    def __init__(
        self,
        config: EngineConfig,
        shapes: Sequence[Shape],
        on_progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        self.engine, _ = build_engine(config, on_progress)
        self.facts = self.engine.facts
        self._device = torch.device(self.facts.device)
        self.machine = describe_machine(self._device)
        is_packed = self._device.type == "cpu" and kernels.library() is not None
        model_config = ModelConfig.from_folder(locate_model(config.model))
        self.work = ModelWork.of(model_config, self.facts, is_packed=is_packed)
        self.ceiling: Ceiling | None = None
        self._config = config
        self._reasons = {shape: why_not(shape, self.facts, config) for shape in dict.fromkeys(shapes)}
        self._runs: dict[Shape, list[_Run]] = {shape: [] for shape in self._reasons}
        self._random = random.Random(_SEED)

    def run(self, num_rounds: int, watcher: Watcher) -> None:
        """Measure every shape so many times. A shape that fails is given up; its reason is kept, and others go on."""
        for shape, reason in self._reasons.items():
            if reason:
                watcher.finished(shape, reason)
        if not self._fitting():
            return
        watcher.stage("warming up")
        self._warm_up()
        total, number = num_rounds * len(self._fitting()), 0
        for _ in range(num_rounds):
            watcher.stage("measuring the ceiling")
            self._measure_ceiling()
            for shape in self._fitting():
                number += 1
                watcher.started(shape, number, total)
                watcher.finished(shape, self._measure(shape, watcher))

    def report(self, *, interrupted: bool = False) -> Report:
        """Return what was measured until now."""
        return Report(
            machine=self.machine,
            model=self.facts,
            precision=self.work.precision,
            weight_bytes_per_parameter=self.work.weight_bytes_per_parameter,
            settings=self._config.model_dump(mode="json"),
            ceiling=self.ceiling,
            rows=tuple(self._row(shape) for shape in self._reasons),
            interrupted=interrupted,
        )

    def _fitting(self) -> list[Shape]:
        return [shape for shape, reason in self._reasons.items() if reason is None]

    def _warm_up(self) -> None:
        """Run each prompt length and each number of sequences once, briefly: libraries prepare themselves by shape."""
        fitting = self._fitting()
        alone = {Shape(prompt_tokens=s.prompt_tokens, output_tokens=1, concurrency=1) for s in fitting}
        many = {
            Shape(
                prompt_tokens=min(_WARM_PROMPT, s.prompt_tokens),
                output_tokens=min(_WARM_OUTPUT, s.output_tokens),
                concurrency=s.concurrency,
            )
            for s in fitting
        }
        for shape in alone | many:
            record(self.engine, make_requests(shape, self.facts.vocab_size, self._random))

    def _measure_ceiling(self) -> None:
        precisions = tuple(dict.fromkeys(("bfloat16", "int8", self.work.matrix_precision)))
        found = measure_ceiling(self.machine.num_threads, precisions, self._device)
        self.ceiling = found if self.ceiling is None else self.ceiling.best_of(found)

    def _measure(self, shape: Shape, watcher: Watcher) -> Timing | str:
        requests = make_requests(shape, self.facts.vocab_size, self._random)
        try:
            fill_prefix(self.engine, shape, requests)
            reset_peak_memory(self._device)
            before = self.engine.stats()
            result = timing(shape, record(self.engine, requests, watcher.ticked))
        except SeamountError as error:
            self._reasons[shape] = str(error)
            return str(error)
        after = self.engine.stats()
        self._runs[shape].append(
            _Run(
                result,
                peak_memory_bytes(self._device),
                after.num_draft_tokens - before.num_draft_tokens,
                after.num_accepted_tokens - before.num_accepted_tokens,
            )
        )
        return result

    def _row(self, shape: Shape) -> Row:
        runs = self._runs[shape]
        row = Row(**dataclasses.asdict(shape), num_rounds=len(runs), not_measured=self._reasons[shape])
        if not runs or self.ceiling is None:
            return row if row.not_measured else dataclasses.replace(row, not_measured="interrupted before it was run")
        timings = [run.timing for run in runs]
        measured = summarize(shape, timings, self.work, self.ceiling)
        num_drafts = sum(run.num_draft_tokens for run in runs)
        return dataclasses.replace(
            row,
            **measured,
            peak_memory_bytes=max(run.peak_bytes for run in runs),
            acceptance=sum(run.num_accepted_tokens for run in runs) / num_drafts if num_drafts else None,
        )


def shapes_of(
    prompt_lengths: Sequence[int], output_lengths: Sequence[int], concurrencies: Sequence[int], shared_prefix: int = 0
) -> list[Shape]:
    """Return every combination, in the order of reading."""
    return [
        Shape(prompt_tokens=p, output_tokens=o, concurrency=c, shared_prefix_tokens=shared_prefix)
        for p, o, c in itertools.product(prompt_lengths, output_lengths, concurrencies)
    ]


def why_not(shape: Shape, facts: ModelFacts, config: EngineConfig) -> str | None:
    """Return why this engine cannot run the shape with all its requests side by side; None when it can."""
    if shape.shared_prefix_tokens >= shape.prompt_tokens:
        return f"a shared prefix of {shape.shared_prefix_tokens} leaves nothing of a prompt of {shape.prompt_tokens}"
    length = shape.prompt_tokens + shape.output_tokens
    if length > facts.max_model_len:
        return f"{length} tokens exceed the context of {facts.max_model_len}"
    if shape.concurrency > config.max_num_seqs:
        return f"max_num_seqs is {config.max_num_seqs}; --max-num-seqs {shape.concurrency} would do"
    shared = shape.shared_prefix_tokens // facts.block_size if config.enable_prefix_cache else 0
    own = -(-length // facts.block_size) - shared
    needed = shared + shape.concurrency * own
    if needed > facts.num_blocks:
        wanted = needed * facts.block_size * facts.cache_bytes_per_token
        return f"needs {needed} blocks of cache, there are {facts.num_blocks}; cache_memory_bytes {wanted} would do"
    return None


def summarize(shape: Shape, timings: Sequence[Timing], work: ModelWork, ceiling: Ceiling) -> dict[str, Any]:
    """Return the measured fields of a `Row`, all but the memory.

    Shares: prefill is `prefill_ops / time / matrix rate`; decode is the larger of `decode_bytes / step time / read
    rate` and `decode_ops / step time / matrix rate`, with the rates of `ceiling` and the counts of `work`.
    """
    matrix_rate = ceiling.matrix_ops_per_s[work.matrix_precision]
    firsts = [value for t in timings for value in t.first_token_s]
    gaps = [value for t in timings for value in t.gaps_s]
    prefill_ops = [sum(work.prefill_ops(1, shape.prompt_tokens, cached) for cached in t.cached_tokens) for t in timings]
    found: dict[str, Any] = {
        "prefill_tokens_per_s": statistics.median(
            shape.concurrency * shape.prompt_tokens / t.prefill_s for t in timings
        ),
        "first_token_p50_s": percentile(firsts, 0.5),
        "first_token_p95_s": percentile(firsts, 0.95),
        "num_cached_tokens": min(cached for t in timings for cached in t.cached_tokens),
        "num_decode_steps": min(t.decode_steps for t in timings),
        "prefill_share": statistics.median(
            ops / t.prefill_s / matrix_rate for ops, t in zip(prefill_ops, timings, strict=True)
        ),
    }
    if gaps:
        found |= {"inter_token_p50_s": percentile(gaps, 0.5), "inter_token_p95_s": percentile(gaps, 0.95)}
    steady = [t for t in timings if t.decode_steps]
    if not steady:
        reason = "no steady decode: the first request ends before the last one begins; more output tokens are needed"
        return found | {"not_measured": reason if shape.output_tokens > 1 else None}
    memory = statistics.median(_decode_bytes(shape, t, work) / t.decode_s for t in steady) / ceiling.read_bytes_per_s
    matrix = statistics.median(_decode_ops(shape, t, work) / t.decode_s for t in steady) / matrix_rate
    return found | {
        "decode_tokens_per_s": statistics.median(t.decode_tokens / t.decode_s for t in steady),
        "decode_memory_share": memory,
        "decode_matrix_share": matrix,
        "decode_share": max(memory, matrix),
        "decode_bound": "memory" if memory >= matrix else "matrix",
    }


def _decode_bytes(shape: Shape, t: Timing, work: ModelWork) -> float:
    repeated = (shape.concurrency - 1) * min(t.cached_tokens)
    return t.decode_steps * work.decode_bytes(shape.concurrency, t.decode_context_tokens - repeated)


def _decode_ops(shape: Shape, t: Timing, work: ModelWork) -> float:
    return t.decode_steps * work.decode_ops(shape.concurrency, t.decode_context_tokens)


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value that `share` of the values do not exceed, interpolated between neighbours."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)
