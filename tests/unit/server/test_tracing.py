"""Spans: what they say of a request, whose children they are, and what becomes of them when nobody takes them."""

from __future__ import annotations

import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

pytest.importorskip("opentelemetry.proto.trace.v1.trace_pb2", reason="the extra `tracing` is not installed")

from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from seamount.core.identity import Principal
from seamount.core.requests import Request
from seamount.core.sampling import SamplingParams
from seamount.server.telemetry.record import Record
from seamount.server.telemetry.tracing import Parent, Spans, parent_of, span_of

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
GIVEN = f"00-{TRACE}-{PARENT}-01"


def attributes(span: Span) -> dict[str, object]:
    found = {}
    for each in span.attributes:
        kind = each.value.WhichOneof("value")
        value = getattr(each.value, kind)
        found[each.key] = [one.string_value for one in value.values] if kind == "array_value" else value
    return found


def record(**known: object) -> Record:
    return Record(**{"request_id": "r-1", "method": "POST", "begin_ns": 1000, "end_ns": 5000, "status": 200} | known)


@pytest.mark.parametrize(
    ("text", "parent"),
    [
        (GIVEN, Parent(bytes.fromhex(TRACE), bytes.fromhex(PARENT), True)),
        (f"00-{TRACE}-{PARENT}-00", Parent(bytes.fromhex(TRACE), bytes.fromhex(PARENT), False)),
        (f"00-{TRACE}-{PARENT}-03", Parent(bytes.fromhex(TRACE), bytes.fromhex(PARENT), True)),
        (
            f"cc-{TRACE}-{PARENT}-01-what-the-future-will-be-like",
            Parent(bytes.fromhex(TRACE), bytes.fromhex(PARENT), 1),
        ),
        (f"00-{TRACE}-{PARENT}-01-more", None),
        (f"ff-{TRACE}-{PARENT}-01", None),
        (f"00-{'0' * 32}-{PARENT}-01", None),
        (f"00-{TRACE}-{'0' * 16}-01", None),
        (f"00-{TRACE.upper()}-{PARENT}-01", None),
        (f"00-{TRACE}-{PARENT}", None),
        (f" {GIVEN}", None),
        (f"{GIVEN}\n", None),
        ("", None),
        ("x" * 10_000, None),
    ],
)
def test_a_traceparent_is_read_as_the_recommendation_says(text, parent):
    assert parent_of(text) == parent


def test_a_span_continues_the_callers_trace_or_begins_one():
    child = span_of(record(), parent_of(GIVEN))
    assert (child.trace_id.hex(), child.parent_span_id.hex()) == (TRACE, PARENT)
    assert len(child.span_id) == 8 and child.span_id.hex() != PARENT
    first, second = span_of(record()), span_of(record())
    assert len(first.trace_id) == 16 and first.trace_id != second.trace_id
    assert first.parent_span_id == b""


def test_a_generation_has_the_names_of_the_convention():
    done = record(route="/v1/chat/completions", principal=Principal(key_id="k", tenant="bank"))
    sampling = SamplingParams(max_tokens=7, temperature=0.5, seed=3, n=2, stop=("secret",))
    done.begin_request("seamount-tiny", Request(id="x", prompt_token_ids=(1, 2, 3), sampling=sampling))
    done.events = {"queued": 1100, "admitted": 1200, "first_token": 3000}
    done.num_prompt_tokens, done.num_cached_tokens, done.num_generated_tokens = 3, 2, 9
    done.finish_reasons = ["stop", "length"]
    span = span_of(done)
    assert (span.name, span.kind) == ("chat seamount-tiny", Span.SPAN_KIND_SERVER)
    assert (span.start_time_unix_nano, span.end_time_unix_nano) == (1000, 5000)
    assert [(event.name, event.time_unix_nano) for event in span.events] == list(done.events.items())
    assert span.status.code == Status.STATUS_CODE_UNSET
    found = attributes(span)
    expected = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "seamount",
        "gen_ai.request.model": "seamount-tiny",
        "gen_ai.response.model": "seamount-tiny",
        "gen_ai.request.max_tokens": 7,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.seed": 3,
        "gen_ai.request.choice.count": 2,
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 9,
        "gen_ai.usage.cache_read.input_tokens": 2,
        "gen_ai.response.finish_reasons": ["stop", "length"],
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
        "seamount.request_id": "r-1",
        "seamount.tenant": "bank",
        "seamount.key_id": "k",
    }
    assert {name: found[name] for name in expected} == expected
    assert "secret" not in str(span)


@pytest.mark.parametrize(
    ("known", "name", "error"),
    [
        ({"route": "/v1/models", "method": "GET"}, "GET /v1/models", None),
        ({"route": "/v1/chat/completions", "status": 400}, "POST /v1/chat/completions", None),
        ({"route": None, "status": 404}, "POST", None),
        ({"route": "/v1/completions", "status": 500}, "POST /v1/completions", "500"),
        ({"route": "/v1/completions", "status": 200, "error": "worker_died"}, "POST /v1/completions", "worker_died"),
    ],
)
def test_other_requests_are_called_by_their_route_and_failures_are_marked(known, name, error):
    span = span_of(record(**known))
    assert span.name == name
    assert attributes(span).get("error.type") == error
    assert (span.status.code == Status.STATUS_CODE_ERROR) is (error is not None)


class Counts:
    """What became of spans."""

    def __init__(self) -> None:
        self.sent = self.dropped = 0
        self._lock = threading.Lock()

    def add_sent(self, num: int) -> None:
        with self._lock:
            self.sent += num

    def add_dropped(self, num: int) -> None:
        with self._lock:
            self.dropped += num


def spans(endpoint: str, counts: Counts, **how: object) -> Spans:
    how = {"linger_s": 0.0, "retry_s": (), **how}
    return Spans(endpoint, on_sent=counts.add_sent, on_dropped=counts.add_dropped, **how)


def test_what_does_not_fit_the_queue_is_dropped_and_counted():
    counts = Counts()
    sender = spans("http://127.0.0.1:9", counts, max_waiting=5)  # never started: nobody empties the queue
    for _ in range(12):
        sender.end(record())
    assert (counts.sent, counts.dropped) == (0, 7)


def test_what_nobody_takes_is_counted_and_said_once(caplog):
    counts = Counts()
    sender = spans("http://127.0.0.1:9", counts)
    sender.start()
    for _ in range(40):
        sender.end(record())
    sender.close()
    assert (counts.sent, counts.dropped) == (0, 40)
    assert [entry.levelname for entry in caplog.records if "Traces cannot be sent" in entry.message] == ["WARNING"]


def test_callers_who_do_not_sample_are_obeyed():
    counts = Counts()
    sender = spans("http://127.0.0.1:9", counts, max_waiting=1)
    for _ in range(3):
        sender.end(record(traceparent=f"00-{TRACE}-{PARENT}-00"))
    assert counts.dropped == 0


@pytest.fixture
def answers():
    """A server that answers with the statuses of a list, then 200; yields (base URL, list, paths asked)."""
    statuses: list[int] = []
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            asked.append(self.path)
            self.send_response(statuses.pop(0) if statuses else 200)
            self.send_header("location", "/elsewhere")
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *words: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", statuses, asked
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize(
    ("statuses", "retries", "sent", "num_asked"),
    [([503, 429], (0.0, 0.0), 1, 3), ([400], (0.0,), 0, 1), ([307], (0.0,), 0, 1), ([503, 503], (0.0,), 0, 2)],
)
def test_a_busy_collector_is_asked_again_and_no_redirect_is_followed(answers, statuses, retries, sent, num_asked):
    url, answering, asked = answers
    answering.extend(statuses)
    counts, told = Counts(), threading.Event()
    sender = Spans(
        url + "/",
        on_sent=lambda num: (counts.add_sent(num), told.set()),
        on_dropped=lambda num: (counts.add_dropped(num), told.set()),
        linger_s=0.0,
        retry_s=retries,
    )
    sender.start()
    sender.end(record())
    assert told.wait(20)
    sender.close()
    assert (counts.sent, counts.dropped) == (sent, 1 - sent)
    assert asked == ["/v1/traces"] * num_asked


def test_proxies_and_collectors_of_the_environment_are_not_asked(answers, monkeypatch):
    url, _, asked = answers
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "OTEL_EXPORTER_OTLP_ENDPOINT"):
        monkeypatch.setenv(name, url)
    counts = Counts()
    sender = spans("http://127.0.0.1:9", counts)
    sender.start()
    sender.end(record())
    sender.close()
    assert (counts.dropped, asked) == (1, [])


def test_nothing_of_it_is_imported_before_it_is_asked_for():
    import subprocess

    program = "import sys, seamount.server.app; sys.exit('seamount.server.telemetry.tracing' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
