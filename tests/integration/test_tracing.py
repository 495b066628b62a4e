"""Traces of a real server, as a collector gets them.

The collector here is a stand-in: a small HTTP server that reads OTLP with OpenTelemetry's own messages. OpenTelemetry's
collector is in no package of Debian or Python.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

pytest.importorskip("opentelemetry.proto.trace.v1.trace_pb2", reason="the extra `tracing` is not installed")

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from prometheus_client.parser import text_string_to_metric_families

from seamount.core.errors import EngineError
from seamount.engine.fake import FakeEngine, say

CANARY = "canary-7f3a"
CHAT = {"model": "fake", "messages": [{"role": "user", "content": CANARY}], "stop": [CANARY], "user": CANARY}
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Collector:
    """A stand-in for a collector: keeps what it is sent."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.messages: list[ExportTraceServiceRequest] = []
        self._changed = threading.Condition()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                right = self.path == "/v1/traces" and self.headers["content-type"] == "application/x-protobuf"
                if right:
                    collector._take(body)
                answer = ExportTraceServiceResponse().SerializeToString()
                self.send_response(200 if right else 404)
                self.send_header("content-type", "application/x-protobuf")
                self.send_header("content-length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *words: object) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def _take(self, body: bytes) -> None:
        with self._changed:
            self.bodies.append(body)
            self.messages.append(ExportTraceServiceRequest.FromString(body))
            self._changed.notify_all()

    def spans(self) -> list[Span]:
        return [
            span
            for message in self.messages
            for resource in message.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    async def wait_for(self, count: int) -> list[Span]:
        """Return the spans as soon as there are that many."""

        def wait() -> bool:
            with self._changed:
                return self._changed.wait_for(lambda: len(self.spans()) >= count, timeout=30)

        assert await asyncio.to_thread(wait), f"{len(self.spans())} spans came"
        return self.spans()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def collector() -> Iterator[Collector]:
    opened = Collector()
    yield opened
    opened.close()


def values(span: Span) -> dict[str, object]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes}


async def test_every_request_is_a_span_in_the_callers_trace_with_numbers_and_without_content(serve, collector):
    running = await serve(FakeEngine(say(f"{CANARY} is what I say")), otlp_endpoint=collector.url)
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": f"v={CANARY}", "x-request-id": "r-1"}
    async with httpx.AsyncClient(base_url=running.url) as client:
        whole = await client.post("/v1/chat/completions", json={**CHAT, "stop": None, "seed": 5}, headers=headers)
        streamed = await client.post("/v1/completions", json={"model": "fake", "prompt": CANARY, "stream": True})
        await client.get(f"/v1/models/{CANARY}?q={CANARY}", headers={"user-agent": CANARY})
        await client.post("/v1/chat/completions", content=CANARY)
        spans = await collector.wait_for(4)
    chat, text, model, broken = spans
    assert (chat.trace_id.hex(), chat.parent_span_id.hex()) == (TRACE, PARENT)
    assert (chat.name, chat.kind) == ("chat fake", Span.SPAN_KIND_SERVER)
    found, usage = values(chat), whole.json()["usage"]
    assert found["gen_ai.operation.name"] == "chat"
    assert found["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
    assert found["gen_ai.usage.output_tokens"] == usage["completion_tokens"]
    assert (found["gen_ai.request.seed"], found["seamount.request_id"]) == (5, "r-1")
    assert found["http.response.status_code"] == 200
    assert [event.name for event in chat.events] == ["queued", "admitted", "first_token"]
    times = [chat.start_time_unix_nano, *(e.time_unix_nano for e in chat.events), chat.end_time_unix_nano]
    assert times == sorted(times)
    assert (text.name, text.parent_span_id) == ("text_completion fake", b"")
    assert text.trace_id != chat.trace_id
    assert streamed.text.endswith("data: [DONE]\n\n")
    assert (model.name, values(model)["http.response.status_code"]) == ("GET /v1/models/{model:path}", 404)
    assert (broken.name, values(broken)["http.response.status_code"]) == ("POST /v1/chat/completions", 400)
    assert not any(CANARY.encode() in body for body in collector.bodies)
    resource = {
        each.key: each.value.string_value for each in collector.messages[0].resource_spans[0].resource.attributes
    }
    assert resource["service.name"] == "seamount"


async def test_failures_and_clients_who_leave_are_marked(serve, collector):
    engine = FakeEngine(say("abc"), fail_after_tokens=2, failure=EngineError("It broke."))
    running = await serve(engine, otlp_endpoint=collector.url)
    async with httpx.AsyncClient(base_url=running.url) as client:
        await client.post("/v1/completions", json={"model": "fake", "prompt": "x", "stream": True})
        (span,) = await collector.wait_for(1)
    assert values(span)["error.type"] == "engine_error"
    assert (values(span)["http.response.status_code"], values(span)["gen_ai.usage.output_tokens"]) == (200, 2)


async def test_spans_that_wait_are_sent_when_the_server_stops(serve, collector):
    running = await serve(FakeEngine(say("ok")), otlp_endpoint=collector.url)
    async with httpx.AsyncClient(base_url=running.url) as client:
        for _ in range(20):
            assert (await client.get("/v1/models")).status_code == 200
    running.server.stop()
    await running.task
    assert len(collector.spans()) == 20
    sent = running.service.metrics.render("fake", await running.service.engine.stats()).decode()
    assert 'seamount:trace_spans_total{outcome="sent"} 20.0' in sent


async def test_a_collector_that_is_gone_holds_up_nobody_and_what_it_missed_is_counted(serve, collector):
    collector.close()
    running = await serve(FakeEngine(say("ok")), otlp_endpoint=collector.url)
    async with httpx.AsyncClient(base_url=running.url) as client:
        for _ in range(20):
            answer = await client.post("/v1/completions", json={"model": "fake", "prompt": "x"})
            assert answer.status_code == 200
    running.server.stop()
    await running.task
    text = running.service.metrics.render("fake", await running.service.engine.stats()).decode()
    dropped = {
        sample.labels["outcome"]: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "seamount:trace_spans_total"
    }
    assert dropped == {"sent": 0, "dropped": 20}


async def test_without_the_setting_nothing_is_sent_whatever_the_environment_says(serve, collector, monkeypatch):
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        monkeypatch.setenv(name, collector.url)
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "otlp")
    running = await serve(FakeEngine(say("ok")))
    async with httpx.AsyncClient(base_url=running.url) as client:
        await client.post("/v1/completions", json={"model": "fake", "prompt": "x"})
    running.server.stop()
    await running.task
    assert collector.messages == []
