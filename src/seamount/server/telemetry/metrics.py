"""What /metrics says, in the Prometheus text format.

The field's dashboards, alerts and autoscalers read vLLM's metric names, so those that mean the same here carry
them, the prefix `vllm:` and the labels `model_name` and `engine` included: a dashboard made for vLLM works on
Seamount as it is. What only Seamount has carries `seamount:`. Requests are observed where their chunks pass
(`RequestTimer`, which also tells the HTTP request's `record`); gauges and cache counters come from the engine and from
admission when somebody scrapes. Labels have few values that are known beforehand: never a tenant, a key or a path.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from seamount.core.requests import Chunk, EngineStats, ModelFacts, Request
from seamount.server.admission.queue import Load
from seamount.server.admission.shares import BATCH
from seamount.version import __version__

from .gpu import GpuCollector
from .record import Record, current_record, known_method

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_LABELS = ("model_name", "engine")
_ENGINE = "0"

# Edges at 0.2 and 0.5 s: the two promises that alerts watch.
_LATENCY_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1, 2, 5, 10, 20, 40, 80, 160, 640)
_TOKEN_S = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2, 5, 10)
_TOKENS = tuple(2**power for power in range(21))
_SEQUENCES = (1, 2, 4, 8, 16, 32, 64, 128)
_WAIT_S = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_CLASSES = {BATCH: "batch", -1: "low", 0: "normal", 1: "high"}

_GAUGES: tuple[tuple[str, str, Callable[[EngineStats], float]], ...] = (
    ("vllm:num_requests_running", "Sequences that run now.", lambda s: s.num_running),
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
        self._now = _NowCollector()
        self._registry.register(self._now)
        ProcessCollector(registry=self._registry)
        # Of the engine's worker; where it has no process of its own, this finds nothing and says nothing.
        ProcessCollector(
            namespace="seamount_worker", pid=lambda: self._now.stats.worker_pid or "none", registry=self._registry
        )
        self._registry.register(GpuCollector(lambda: self._now.facts.device if self._now.facts else ""))
        self.prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens of requests that began to answer.")
        self.generated_tokens = self._counter("vllm:generation_tokens", "Generated tokens.")
        self.cached_tokens = self._counter("vllm:prompt_tokens_cached", "Prompt tokens that were not computed again.")
        self.success = self._counter("vllm:request_success", "Finished sequences, by reason.", "finished_reason")
        self.failures = self._counter(
            "seamount:request_failures", "Requests that failed or were refused, by error code.", "code"
        )
        self.rejections = self._counter("seamount:requests_rejected", "Requests that never began, by reason.", "reason")
        self.admission_s = self._histogram("seamount:admission_wait_seconds", "Waiting to be let in.", _WAIT_S)
        self.spans = Counter(
            "seamount:trace_spans", "Spans of traces, by what became of them.", ("outcome",), registry=self._registry
        )
        for outcome in ("sent", "dropped"):
            self.spans.labels(outcome)
        self.http_requests = Counter(
            "http_requests", "Answers.", ("handler", "method", "status"), registry=self._registry
        )
        self.http_s = Histogram(
            "http_request_duration_seconds",
            "Head of the request to the answer's end.",
            ("handler", "method"),
            registry=self._registry,
            buckets=_LATENCY_S,
        )
        self.first_token_s = self._histogram("vllm:time_to_first_token_seconds", "Request to first token.", _LATENCY_S)
        self.inter_token_s = self._histogram("vllm:inter_token_latency_seconds", "Between tokens.", _TOKEN_S)
        self.per_token_s = self._histogram(
            "vllm:request_time_per_output_token_seconds", "A request's mean time per token after the first.", _TOKEN_S
        )
        self.whole_s = self._histogram("vllm:e2e_request_latency_seconds", "Request to last token.", _LATENCY_S)
        self.queue_s = self._histogram(
            "vllm:request_queue_time_seconds", "Waiting, before the engine and in it.", _LATENCY_S
        )
        self.inference_s = self._histogram(
            "vllm:request_inference_time_seconds", "First work on it to last token.", _LATENCY_S
        )
        self.prefill_s = self._histogram("vllm:request_prefill_time_seconds", "In prefill.", _LATENCY_S)
        self.decode_s = self._histogram("vllm:request_decode_time_seconds", "First to last token.", _LATENCY_S)
        self.request_prompt_tokens = self._histogram(
            "vllm:request_prompt_tokens", "Prompt tokens per request.", _TOKENS
        )
        self.request_generated_tokens = self._histogram(
            "vllm:request_generation_tokens", "Generated tokens per request.", _TOKENS
        )

        self.request_n = self._histogram("vllm:request_params_n", "Answers asked for, per request.", _SEQUENCES)
        self.request_max_tokens = self._histogram(
            "vllm:request_params_max_tokens", "Limit on tokens, of requests that set one.", _TOKENS
        )

    def timer(self, model: str, request: Request) -> RequestTimer:
        """Begin to observe one request to the engine."""
        return RequestTimer(self, model, request, self._clock)

    def reject(self, model: str, code: str) -> None:
        """Count a request that ended before the engine had it: refused, or its client left."""
        self.rejections.labels(model, _ENGINE, code).inc()
        record = current_record()
        if record is not None:
            record.error = code

    def refuse(self, model: str, record: Record) -> None:
        """Count a request that was refused for what it asked, or for who asked."""
        if record.is_refused:
            self.failures.labels(model, _ENGINE, record.error).inc()

    def answered(self, handler: str, method: str, status: int, took_s: float) -> None:
        """Count an answer of one of the routes, spelled as in the router."""
        method = known_method(method)
        self.http_requests.labels(handler, method, str(status)).inc()
        self.http_s.labels(handler, method).observe(took_s)

    def render(
        self,
        model: str,
        stats: EngineStats,
        facts: ModelFacts | None = None,
        load: Load | None = None,
        num_active: int = 0,
    ) -> bytes:
        """Return the exposition text, with what the engine and admission say of now.

        Args:
            facts: None before the engine has started.
            num_active: requests that are being answered, from the first byte of their body to the last of the answer.
        """
        self._now.model, self._now.stats, self._now.facts = model, stats, facts
        self._now.load, self._now.num_active = load or Load(), num_active
        return generate_latest(self._registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, (*_LABELS, *labels), registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, _LABELS, registry=self._registry, buckets=buckets)


class RequestTimer:
    """Watches one request's chunks go by. A request with `n` sequences is one request; its times span them all."""

    def __init__(self, metrics: Metrics, model: str, request: Request, clock: Callable[[], float]) -> None:
        self._metrics = metrics
        self._labels = (model, _ENGINE)
        self._request = request
        self._clock = clock
        self._start_s = self._admitted_s = clock()
        self._record = current_record()
        if self._record is not None:
            self._record.begin_request(model, request)
        self._first_s: float | None = None
        self._last_s: dict[int, float] = {}
        self._num_tokens = 0
        self._queued_s = 0.0

    def admitted(self) -> None:
        """The request was let in; until now it waited for that."""
        self._admitted_s = self._clock()
        self._metrics.admission_s.labels(*self._labels).observe(self._admitted_s - self._start_s)
        if self._record is not None:
            self._record.happened("admitted")

    def observe(self, chunk: Chunk) -> None:
        """Count a chunk."""
        m, now_s = self._metrics, self._clock()
        if self._first_s is None:
            self._first_s = now_s
            if self._request.embedding is None:
                m.first_token_s.labels(*self._labels).observe(now_s - self._start_s)
            m.prompt_tokens.labels(*self._labels).inc(len(self._request.prompt_token_ids))
            m.cached_tokens.labels(*self._labels).inc(chunk.num_cached_tokens or 0)
            self._note_first(chunk)
            if chunk.queue_s is not None:
                self._queued_s = self._admitted_s - self._start_s + chunk.queue_s
                m.queue_s.labels(*self._labels).observe(self._queued_s)
            if chunk.prefill_s is not None:
                m.prefill_s.labels(*self._labels).observe(chunk.prefill_s)
        if chunk.token_ids:
            self._count_tokens(chunk.index, len(chunk.token_ids), now_s)
        if chunk.finish_reason is not None:
            m.success.labels(*self._labels, chunk.finish_reason).inc()
            if self._record is not None:
                self._record.finish_reasons.append(chunk.finish_reason)

    def _note_first(self, chunk: Chunk) -> None:
        if self._record is not None:
            if self._request.embedding is None:
                self._record.happened("first_token")
            self._record.num_prompt_tokens += len(self._request.prompt_token_ids)
            self._record.num_cached_tokens += chunk.num_cached_tokens or 0

    def _count_tokens(self, index: int, count: int, now_s: float) -> None:
        m = self._metrics
        if index in self._last_s:
            each_s = (now_s - self._last_s[index]) / count
            for _ in range(count):
                m.inter_token_s.labels(*self._labels).observe(each_s)
        self._last_s[index] = now_s
        self._num_tokens += count
        m.generated_tokens.labels(*self._labels).inc(count)
        if self._record is not None:
            self._record.num_generated_tokens += count

    def finish(self) -> None:
        """All sequences came to their end."""
        m, now_s = self._metrics, self._clock()
        m.whole_s.labels(*self._labels).observe(now_s - self._start_s)
        m.inference_s.labels(*self._labels).observe(now_s - self._start_s - self._queued_s)
        m.request_prompt_tokens.labels(*self._labels).observe(len(self._request.prompt_token_ids))
        if self._request.embedding is not None:  # nothing is generated
            return
        m.request_n.labels(*self._labels).observe(self._request.sampling.n)
        if self._request.sampling.max_tokens is not None:
            m.request_max_tokens.labels(*self._labels).observe(self._request.sampling.max_tokens)
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
        if self._record is not None:
            self._record.error = code


class _NowCollector:
    """Turns what the engine and admission say of now into metrics, at the moment of a scrape."""

    def __init__(self) -> None:
        self.model = ""
        self.stats = EngineStats()
        self.facts: ModelFacts | None = None
        self.load = Load()
        self.num_active = 0

    def collect(self) -> Iterator[Metric]:
        for name, text, read in _GAUGES:
            yield self._gauge(name, text, read(self.stats))
        for name, text, read in _COUNTERS:
            counter = CounterMetricFamily(name, text, labels=_LABELS)
            counter.add_metric((self.model, _ENGINE), read(self.stats))
            yield counter
        yield from self._waiting()
        load = self.load
        yield self._gauge("seamount:requests_active", "Requests that are being answered.", self.num_active)
        yield self._gauge("seamount:requests_admitted", "Requests that the engine has.", load.num_admitted)
        yield self._gauge("seamount:tokens_admitted", "Tokens that those will about need.", load.num_admitted_tokens)
        yield self._gauge(
            "seamount:saturated_tokens_per_second", "Measured while requests wait; 0: never yet.", load.tokens_per_s
        )
        build = GaugeMetricFamily("seamount:build_info", "The program.", labels=("version",))
        build.add_metric((__version__,), 1)
        yield build
        if self.facts is not None:
            info = GaugeMetricFamily(
                "vllm:cache_config_info", "The cache.", labels=(*_LABELS, "block_size", "num_gpu_blocks")
            )
            info.add_metric((self.model, _ENGINE, str(self.facts.block_size), str(self.facts.num_blocks)), 1)
            yield info

    def _waiting(self) -> Iterator[Metric]:
        load = self.load
        # Without lines of batches, one of which always waits: autoscalers read this.
        waiting = self.stats.num_waiting + sum(n for priority, n in load.num_waiting.items() if priority != BATCH)
        yield self._gauge("vllm:num_requests_waiting", "Requests that wait to be let in, or in the engine.", waiting)
        for name, text, values in (
            ("seamount:admission_queue_requests", "Requests that wait to be let in.", load.num_waiting),
            ("seamount:admission_queue_tokens", "Tokens that those will about need.", load.num_waiting_tokens),
        ):
            gauge = GaugeMetricFamily(name, text, labels=(*_LABELS, "priority"))
            for priority, word in _CLASSES.items():
                gauge.add_metric((self.model, _ENGINE, word), values.get(priority, 0))
            yield gauge

    def _gauge(self, name: str, text: str, value: float) -> GaugeMetricFamily:
        gauge = GaugeMetricFamily(name, text, labels=_LABELS)
        gauge.add_metric((self.model, _ENGINE), value)
        return gauge
