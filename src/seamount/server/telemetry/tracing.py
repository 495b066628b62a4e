"""Traces: one OpenTelemetry span per request, sent to a collector by OTLP over HTTP. Only where a setting names one.

Imported by `app` when `server.otlp_endpoint` is set, and not before: what it needs is the extra `tracing`. A span has
OpenTelemetry's names for HTTP and for generative AI, numbers, and the server's own names for model, tenant and key;
never a prompt, an answer, a path or a header.

Spans are made of OpenTelemetry's own protobuf messages, without its SDK: that one reads a dozen variables of the
environment, any of which could send traces elsewhere. For the same reason the client here knows no proxies of the
environment and follows no redirects. Requests never wait for the collector: what it does not take in time is dropped,
and counted.

Formats: https://www.w3.org/TR/trace-context/ (version 00), https://opentelemetry.io/docs/specs/otlp/ (OTLP/HTTP,
binary), https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/.
"""

from __future__ import annotations

import logging
import queue
import re
import secrets
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple

import httpx
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, ArrayValue, InstrumentationScope, KeyValue
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans, Span, Status

from seamount.version import __version__

from .record import Record

_log = logging.getLogger(__name__)

MAX_WAITING = 2048
_MAX_BATCH = 256
_LINGER_S = 1.0
_TIMEOUT_S = 5.0
# Waits before a batch is sent again; a collector that is restarted is back by then.
_RETRY_S = (1.0, 4.0)
_TRY_AGAIN = frozenset({429, 502, 503, 504})
_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_SAMPLED = 0x01
_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
    "/seamount.v1.Seamount/Chat": "chat",
    "/seamount.v1.Seamount/StreamChat": "chat",
    "/seamount.v1.Seamount/Complete": "text_completion",
    "/seamount.v1.Seamount/StreamComplete": "text_completion",
}

Value = str | bool | int | float | Sequence[str]


class Parent(NamedTuple):
    """The caller's span, as its traceparent names it."""

    trace_id: bytes
    span_id: bytes
    is_sampled: bool


def parent_of(traceparent: str) -> Parent | None:
    """Return the span that a traceparent names; None where it names none."""
    match = _TRACEPARENT.fullmatch(traceparent)
    if match is None or match[1] == "ff" or (match[1] == "00" and match[5]):
        return None
    trace_id, span_id = bytes.fromhex(match[2]), bytes.fromhex(match[3])
    if not any(trace_id) or not any(span_id):
        return None
    return Parent(trace_id, span_id, bool(int(match[4], 16) & _SAMPLED))


def span_of(record: Record, parent: Parent | None = None) -> Span:
    """Return the span of a request that is over; without a parent it begins a trace of its own."""
    failed = record.status >= 500 or bool(record.error)
    return Span(
        trace_id=parent.trace_id if parent else secrets.token_bytes(16),
        span_id=secrets.token_bytes(8),
        parent_span_id=parent.span_id if parent else b"",
        flags=_SAMPLED,
        name=_name(record),
        kind=Span.SPAN_KIND_SERVER,
        start_time_unix_nano=record.begin_ns,
        end_time_unix_nano=record.end_ns,
        attributes=_key_values(_attributes(record)),
        events=[Span.Event(time_unix_nano=at_ns, name=name) for name, at_ns in record.events.items()],
        status=Status(code=Status.STATUS_CODE_ERROR if failed else Status.STATUS_CODE_UNSET),
    )


def _name(record: Record) -> str:
    operation = _OPERATIONS.get(record.route or "")
    if operation and record.request is not None:
        return f"{operation} {record.model}"
    return f"{record.method} {record.route}" if record.route else record.method


def _attributes(record: Record) -> dict[str, Value | None]:
    """Return the attributes by name; those that are None are not known, and left out."""
    who = record.principal
    found: dict[str, Value | None] = {
        "http.request.method": "_OTHER" if record.method == "other" else record.method,
        "http.route": record.route,
        "http.response.status_code": record.status,
        "error.type": record.error or (str(record.status) if record.status >= 500 else None),
        "seamount.request_id": record.request_id,
        "seamount.tenant": who.tenant if who else None,
        "seamount.key_id": who.key_id if who else None,
    }
    if record.request is None:
        return found
    sampling = record.request.sampling
    return {
        **found,
        "gen_ai.provider.name": "seamount",
        "gen_ai.operation.name": _OPERATIONS.get(record.route or ""),
        "gen_ai.request.model": record.model,
        "gen_ai.response.model": record.model,
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.top_k": sampling.top_k or None,
        "gen_ai.request.frequency_penalty": sampling.frequency_penalty or None,
        "gen_ai.request.presence_penalty": sampling.presence_penalty or None,
        "gen_ai.request.seed": sampling.seed,
        "gen_ai.request.choice.count": sampling.n if sampling.n != 1 else None,
        "gen_ai.response.finish_reasons": tuple(record.finish_reasons) or None,
        "gen_ai.usage.input_tokens": record.num_prompt_tokens,
        "gen_ai.usage.output_tokens": record.num_generated_tokens,
        "gen_ai.usage.cache_read.input_tokens": record.num_cached_tokens,
    }


def _key_values(attributes: dict[str, Value | None]) -> list[KeyValue]:
    return [KeyValue(key=name, value=_any(value)) for name, value in attributes.items() if value is not None]


def _any(value: Value) -> AnyValue:
    if isinstance(value, bool):
        return AnyValue(bool_value=value)
    if isinstance(value, int):
        return AnyValue(int_value=value)
    if isinstance(value, float):
        return AnyValue(double_value=value)
    if isinstance(value, str):
        return AnyValue(string_value=value)
    return AnyValue(array_value=ArrayValue(values=[AnyValue(string_value=each) for each in value]))


class Spans:
    """Sends spans from a thread of its own.

    Args:
        endpoint: base URL of the collector; spans go to /v1/traces below it.
        on_sent, on_dropped: told how many spans arrived, and how many never will; called from any thread.
        max_waiting: spans that may wait to be sent.
        linger_s: how long a span waits for company.
        retry_s: waits before a batch is sent again.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        on_sent: Callable[[int], None],
        on_dropped: Callable[[int], None],
        max_waiting: int = MAX_WAITING,
        linger_s: float = _LINGER_S,
        retry_s: Sequence[float] = _RETRY_S,
    ) -> None:
        self._url = f"{endpoint.rstrip('/')}/v1/traces"
        self._on_sent = on_sent
        self._on_dropped = on_dropped
        self._linger_s = linger_s
        self._retry_s = retry_s
        self._queue: queue.Queue[Span] = queue.Queue(max_waiting)
        self._closing = threading.Event()
        self._failing = False
        self._thread = threading.Thread(target=self._run, name="traces", daemon=True)

    def start(self) -> None:
        """Begin to send."""
        self._thread.start()

    def end(self, record: Record) -> None:
        """Take a request that is over; takes no time and cannot fail. Callers who trace, but not this, are obeyed."""
        parent = parent_of(record.traceparent)
        if parent is not None and not parent.is_sampled:
            return
        try:
            self._queue.put_nowait(span_of(record, parent))
        except queue.Full:
            self._on_dropped(1)

    def close(self) -> None:
        """Send what waits, without trying twice, and stop; what cannot be sent in time is dropped."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        # trust_env: neither proxies nor credentials of the environment.
        with httpx.Client(trust_env=False, timeout=_TIMEOUT_S, follow_redirects=False) as client:
            while not self._closing.is_set() or not self._queue.empty():
                batch = self._batch()
                if not batch:
                    continue
                if self._send(client, _message(batch)):
                    self._on_sent(len(batch))
                else:
                    self._on_dropped(len(batch))
                    if self._closing.is_set():  # it would not take the others either
                        self._on_dropped(self._discard())

    def _batch(self) -> list[Span]:
        """Return spans that wait; after a while, an empty list where none came."""
        batch: list[Span] = []
        with suppress(queue.Empty):
            batch.append(self._queue.get(timeout=min(self._linger_s, 0.2)))
            self._closing.wait(self._linger_s)
            while len(batch) < _MAX_BATCH:
                batch.append(self._queue.get_nowait())
        return batch

    def _discard(self) -> int:
        num = 0
        with suppress(queue.Empty):
            while True:
                self._queue.get_nowait()
                num += 1
        return num

    def _send(self, client: httpx.Client, message: ExportTraceServiceRequest) -> bool:
        """Return whether the collector took it."""
        content = message.SerializeToString()
        headers = {"content-type": "application/x-protobuf", "user-agent": f"seamount/{__version__}"}
        for wait_s in (*self._retry_s, None):
            try:
                status = client.post(self._url, content=content, headers=headers).status_code
                problem, again = f"it answered {status}", status in _TRY_AGAIN
            except httpx.HTTPError as error:
                status, problem, again = 0, type(error).__name__, True
            if 200 <= status < 300:
                self._failing = False
                return True
            if wait_s is None or not again or self._closing.wait(wait_s):
                break
        if not self._failing:
            _log.warning("Traces cannot be sent to the collector, and are dropped: %s", problem)
        self._failing = True
        return False


def _message(spans: Sequence[Span]) -> ExportTraceServiceRequest:
    resource = Resource(attributes=_key_values({"service.name": "seamount", "service.version": __version__}))
    scope = InstrumentationScope(name="seamount", version=__version__)
    return ExportTraceServiceRequest(
        resource_spans=[ResourceSpans(resource=resource, scope_spans=[ScopeSpans(scope=scope, spans=spans)])]
    )
