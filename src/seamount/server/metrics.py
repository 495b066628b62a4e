"""What /metrics says, in the Prometheus text format.

The field's dashboards, alerts and autoscalers read vLLM's metric names, so those that mean the same here carry
them, the prefix `vllm:` and the labels `model_name` and `engine` included: a dashboard made for vLLM works on
Seamount as it is. What only Seamount has carries `seamount:`. Requests are observed where their chunks pass
(`RequestTimer`); gauges and cache counters come from the engine when somebody scrapes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from seamount.core.requests import Chunk, EngineStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_LABELS = ("model_name", "engine")
_ENGINE = "0"

# Edges at 0.2 and 0.5 s: the two promises that alerts watch.
_LATENCY_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1, 2, 5, 10, 20, 40, 80, 160, 640)
_TOKEN_S = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2, 5, 10)
_TOKENS = tuple(2**power for power in range(21))

_GAUGES: tuple[tuple[str, str, Callable[[EngineStats], float]], ...] = (
    ("vllm:num_requests_running", "Sequences that run now.", lambda s: s.num_running),
    ("vllm:num_requests_waiting", "Sequences that wait.", lambda s: s.num_waiting),
    (
        "vllm:kv_cache_usage_perc",
        "Share of cache blocks in use, 0 to 1.",
        lambda s: 1 - s.num_free_blocks / s.num_blocks if s.num_blocks else 0.0,
    ),
)
_COUNTERS: tuple[tuple[str, str, Callable[[EngineStats], float]], ...] = (
    (
        "vllm:prefix_cache_queries",
        "Prompt tokens looked up in the prefix cache.",
        lambda s: s.num_prefix_queried_tokens,
    ),
    ("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.", lambda s: s.num_prefix_hit_tokens),
    ("vllm:num_preemptions", "Sequences put back because blocks ran out.", lambda s: s.num_preemptions),
    (
        "vllm:spec_decode_num_draft_tokens",
        "Tokens that speculative decoding guessed and verified.",
        lambda s: s.num_draft_tokens,
    ),
    ("vllm:spec_decode_num_accepted_tokens", "Guessed tokens that were right.", lambda s: s.num_accepted_tokens),
    ("seamount:engine_steps", "Steps of the engine.", lambda s: s.num_steps),
    ("seamount:worker_restarts", "Times that the engine's worker was started again.", lambda s: s.num_worker_restarts),
)


class Metrics:
    """All metrics of one server. Its registry is its own: two servers in a process do not mix."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._registry = CollectorRegistry()
        self._stats = _StatsCollector()
        self._registry.register(self._stats)
        self.prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens of requests that began to answer.")
        self.generated_tokens = self._counter("vllm:generation_tokens", "Generated tokens.")
        self.success = self._counter("vllm:request_success", "Finished sequences, by reason.", "finished_reason")
        self.failures = self._counter("seamount:request_failures", "Requests that failed, by error code.", "code")
        self.first_token_s = self._histogram("vllm:time_to_first_token_seconds", "Request to first token.", _LATENCY_S)
        self.inter_token_s = self._histogram("vllm:inter_token_latency_seconds", "Between tokens.", _TOKEN_S)
        self.per_token_s = self._histogram(
            "vllm:request_time_per_output_token_seconds", "A request's mean time per token after the first.", _TOKEN_S
        )
        self.whole_s = self._histogram("vllm:e2e_request_latency_seconds", "Request to last token.", _LATENCY_S)
        self.queue_s = self._histogram("vllm:request_queue_time_seconds", "Waiting in the engine.", _LATENCY_S)
        self.prefill_s = self._histogram("vllm:request_prefill_time_seconds", "In prefill.", _LATENCY_S)
        self.decode_s = self._histogram("vllm:request_decode_time_seconds", "First to last token.", _LATENCY_S)
        self.request_prompt_tokens = self._histogram(
            "vllm:request_prompt_tokens", "Prompt tokens per request.", _TOKENS
        )
        self.request_generated_tokens = self._histogram(
            "vllm:request_generation_tokens", "Generated tokens per request.", _TOKENS
        )

    def timer(self, model: str, num_prompt_tokens: int) -> RequestTimer:
        """Begin to observe one request to the engine."""
        return RequestTimer(self, model, num_prompt_tokens, self._clock)

    def render(self, model: str, stats: EngineStats) -> bytes:
        """Return the exposition text, with the engine's counters as they are in `stats`."""
        self._stats.model, self._stats.stats = model, stats
        return generate_latest(self._registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, (*_LABELS, *labels), registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, _LABELS, registry=self._registry, buckets=buckets)


class RequestTimer:
    """Watches one request's chunks go by. A request with `n` sequences is one request; its times span them all."""

    def __init__(self, metrics: Metrics, model: str, num_prompt_tokens: int, clock: Callable[[], float]) -> None:
        self._metrics = metrics
        self._labels = (model, _ENGINE)
        self._num_prompt_tokens = num_prompt_tokens
        self._clock = clock
        self._start_s = clock()
        self._first_s: float | None = None
        self._last_s: dict[int, float] = {}
        self._num_tokens = 0

    def observe(self, chunk: Chunk) -> None:
        """Count a chunk."""
        m, now_s = self._metrics, self._clock()
        if self._first_s is None:
            self._first_s = now_s
            m.first_token_s.labels(*self._labels).observe(now_s - self._start_s)
            m.prompt_tokens.labels(*self._labels).inc(self._num_prompt_tokens)
            if chunk.queue_s is not None:
                m.queue_s.labels(*self._labels).observe(chunk.queue_s)
            if chunk.prefill_s is not None:
                m.prefill_s.labels(*self._labels).observe(chunk.prefill_s)
        if chunk.token_ids:
            self._count_tokens(chunk.index, len(chunk.token_ids), now_s)
        if chunk.finish_reason is not None:
            m.success.labels(*self._labels, chunk.finish_reason).inc()

    def _count_tokens(self, index: int, count: int, now_s: float) -> None:
        m = self._metrics
        if index in self._last_s:
            each_s = (now_s - self._last_s[index]) / count
            for _ in range(count):
                m.inter_token_s.labels(*self._labels).observe(each_s)
        self._last_s[index] = now_s
        self._num_tokens += count
        m.generated_tokens.labels(*self._labels).inc(count)

    def finish(self) -> None:
        """All sequences came to their end."""
        m, now_s = self._metrics, self._clock()
        m.whole_s.labels(*self._labels).observe(now_s - self._start_s)
        m.request_prompt_tokens.labels(*self._labels).observe(self._num_prompt_tokens)
        m.request_generated_tokens.labels(*self._labels).observe(self._num_tokens)
        if self._first_s is not None:
            decode_s = now_s - self._first_s
            m.decode_s.labels(*self._labels).observe(decode_s)
            later = self._num_tokens - len(self._last_s)
            if later:
                m.per_token_s.labels(*self._labels).observe(decode_s / later)

    def fail(self, code: str) -> None:
        """The request ended in an error, or its client went away."""
        self._metrics.failures.labels(*self._labels, code).inc()


class _StatsCollector:
    """Turns the engine's stats into metrics at the moment of a scrape."""

    def __init__(self) -> None:
        self.model = ""
        self.stats = EngineStats()

    def collect(self) -> Iterator[Metric]:
        labels = (self.model, _ENGINE)
        for name, text, read in _GAUGES:
            gauge = GaugeMetricFamily(name, text, labels=_LABELS)
            gauge.add_metric(labels, read(self.stats))
            yield gauge
        for name, text, read in _COUNTERS:
            counter = CounterMetricFamily(name, text, labels=_LABELS)
            counter.add_metric(labels, read(self.stats))
            yield counter
