"""What a client sees on the wire: events, errors, limits, the guard, metrics."""

from __future__ import annotations

import asyncio
import json
import threading

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from seamount.engine.fake import FakeEngine, say
from seamount.server import streaming
from seamount.server.door import body, middleware

CHAT = {"model": "fake", "messages": [{"role": "user", "content": "geheimer Text"}]}


async def test_events_are_data_lines_with_an_end(serve):
    running = await serve(FakeEngine(say("a\nb")))
    async with httpx.AsyncClient(base_url=running.url) as client:
        answer = await client.post("/v1/chat/completions", json={**CHAT, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-store"
    assert "content-length" not in answer.headers
    events = answer.text.split("\n\n")
    assert events.pop() == ""
    assert all(event.startswith("data: ") and "\n" not in event for event in events)
    assert events.pop() == "data: [DONE]"
    assert all("choices" in json.loads(event[6:]) for event in events)


async def test_silence_is_filled_with_comments(serve, monkeypatch):
    monkeypatch.setitem(streaming.EventStream.__init__.__kwdefaults__, "keep_alive_s", 0.01)
    release = asyncio.Event()
    running = await serve(FakeEngine(say("ok"), pause=release.wait))
    async with (
        httpx.AsyncClient(base_url=running.url) as client,
        client.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True}) as answer,
    ):
        lines = answer.aiter_lines()
        assert await anext(lines) == ": keep-alive"
        release.set()
        rest = [line async for line in lines]
    assert rest[-2:] == ["data: [DONE]", ""]


async def test_a_failure_after_silence_is_told_in_the_stream(serve, monkeypatch):
    monkeypatch.setitem(streaming.EventStream.__init__.__kwdefaults__, "keep_alive_s", 0.01)
    release = asyncio.Event()
    running = await serve(FakeEngine(say("ok"), pause=release.wait, fail_after_tokens=0))
    async with (
        httpx.AsyncClient(base_url=running.url) as client,
        client.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True}) as answer,
    ):
        lines = answer.aiter_lines()
        await anext(lines)
        release.set()
        rest = [line async for line in lines if line.startswith("data")]
    last = json.loads(rest[-1][6:])
    assert (last["choices"], last["error"]["code"]) == ([], "engine_error")


async def test_an_announced_body_over_the_limit_is_refused_unread(serve):
    running = await serve(FakeEngine(), max_body_bytes=2000)
    reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2001\r\n\r\n")
    answer = (await reader.read()).decode()
    writer.close()
    assert answer.startswith("HTTP/1.1 413")
    assert json.loads(answer.partition("\r\n\r\n")[2])["error"]["code"] == "body_too_large"


async def test_others_are_answered_while_a_large_wrong_body_is_read(serve, monkeypatch):
    """Whatever it takes to read it: here, until somebody else was answered."""
    running = await serve(FakeEngine(say("ok")))
    may_go, read = threading.Event(), body.strict_json
    monkeypatch.setattr(body, "strict_json", lambda text: (may_go.wait(60), read(text))[1])
    wrong = json.dumps({**CHAT, "stop": [1] * 1_200_000})
    headers = {"content-type": "application/json"}
    async with httpx.AsyncClient(base_url=running.url, timeout=120) as client:
        reading = asyncio.create_task(client.post("/v1/chat/completions", content=wrong, headers=headers))
        for path in ("/healthz", "/readyz", "/v1/models"):
            assert (await client.get(path)).status_code == 200
        assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200
        assert not reading.done()
        may_go.set()
        async with asyncio.timeout(60):
            while not reading.done():
                assert (await client.get("/healthz")).status_code == 200
        answer = reading.result()
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "stop[0]")


@pytest.mark.parametrize(
    ("target", "host", "status"),
    [
        ("http://localhost:{port}/v1/models?x=1", "localhost", 200),
        ("HTTP://127.0.0.1:{port}/v1/models", "evil.example", 200),  # the target outdoes the header
        ("http://evil.example/v1/models", "localhost", 403),
        ("http://user@localhost/v1/models", "localhost", 403),
        ("http://localhost/nowhere", "localhost", 404),
        ("http://localhost", "localhost", 200),
    ],
)
async def test_a_target_that_is_a_whole_url_is_understood(serve, target, host, status):
    running = await serve(FakeEngine())
    reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
    asked = target.format(port=running.port)
    writer.write(f"GET {asked} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
    answer = (await reader.read()).decode()
    writer.close()
    assert int(answer.split(" ", 2)[1]) == status
    if status == 200 and "models" in target:
        assert '"fake"' in answer


HALF = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{"


async def test_a_body_that_does_not_come_holds_nothing_for_long(serve, monkeypatch):
    monkeypatch.setattr(middleware, "BODY_S", 0.05)
    running = await serve(FakeEngine())
    reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
    writer.write(HALF)
    answer = (await reader.read()).decode()
    writer.close()
    assert answer.startswith("HTTP/1.1 408")
    assert json.loads(answer.partition("\r\n\r\n")[2])["error"]["code"] == "body_too_slow"
    assert running.service.num_active == 0


async def test_a_body_that_does_not_come_does_not_keep_a_server_from_stopping(serve, monkeypatch):
    monkeypatch.setattr(middleware, "_LOOK_S", 0.01)
    running = await serve(FakeEngine(), drain_timeout_s=3600)
    reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
    writer.write(HALF)
    async with asyncio.timeout(20):
        while not running.service.num_active:
            await asyncio.sleep(0.002)
        running.server.stop()
        answer = (await reader.read()).decode()
        writer.close()
        await running.task
    assert answer.startswith("HTTP/1.1 503")
    assert json.loads(answer.partition("\r\n\r\n")[2])["error"]["code"] == "draining"


@pytest.mark.parametrize("first", ["length", "chunked"])
async def test_a_body_of_two_lengths_is_refused_and_nothing_behind_it_is_read(serve, first: str):
    running = await serve(FakeEngine())
    reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
    lengths = ["Content-Length: 5", "Transfer-Encoding: chunked"]
    head = ["POST /v1/completions HTTP/1.1", "Host: localhost", *(lengths if first == "length" else lengths[::-1])]
    smuggled = "GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    writer.write(("\r\n".join(head) + "\r\n\r\n0\r\n\r\n" + smuggled).encode())
    answer = (await reader.read()).decode()
    writer.close()
    assert answer.startswith("HTTP/1.1 400")
    assert answer.count("HTTP/1.1") == 1


async def test_a_chunked_body_over_the_limit_is_refused_as_it_grows(serve):
    running = await serve(FakeEngine(), max_body_bytes=2000)
    reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
        b"Content-Type: application/json\r\n\r\n" + (b"3e8\r\n" + b" " * 1000 + b"\r\n") * 3
    )
    answer = (await reader.read()).decode()  # the body has no end: the server must close
    writer.close()
    assert answer.startswith("HTTP/1.1 413")
    assert json.loads(answer.partition("\r\n\r\n")[2])["error"]["code"] == "body_too_large"


async def test_a_body_in_very_many_pieces_is_refused_after_a_few_of_them(serve):
    running = await serve(FakeEngine(), max_body_bytes=10**6)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
    writer.write(head + b"1\r\n \r\n" * 6000)
    answer = (await reader.read()).decode()  # the body has no end: the server must close
    writer.close()
    assert answer.startswith("HTTP/1.1 400")
    assert "larger chunks" in json.loads(answer.partition("\r\n\r\n")[2])["error"]["message"]
    # Each request of a connection may have as many; and an answer that is out already does not let more come.
    body = json.dumps({"model": "fake", "prompt": "a", "max_tokens": 1}).encode()
    pieces = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"1\r\n \r\n" * 3000 + b"0\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
    for _ in range(2):
        writer.write(head + pieces)
        status = await reader.readuntil(b"\r\n\r\n")
        assert status.startswith(b"HTTP/1.1 4"), status  # no content-type
        await reader.readexactly(int(status.lower().partition(b"content-length: ")[2].split(b"\r\n")[0]))
    writer.write(head.replace(b"/v1/completions", b"/nowhere"))
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"1\r\n \r\n" * 6000)
    while await reader.read(65536):
        pass
    writer.close()


@pytest.mark.parametrize(
    ("headers", "allowed"),
    [
        ({}, True),
        ({"host": "localhost:1234"}, True),
        ({"host": "[::1]:8000"}, True),
        ({"host": "evil.example"}, False),
        ({"host": "evil.example:8000", "origin": "http://evil.example:8000"}, False),
        ({"host": "127.0.0.1.evil.example"}, False),
        ({"host": "127.0.0.1:8000", "origin": "http://127.0.0.1:8000"}, True),
        ({"host": "127.0.0.1:8000", "origin": "http://127.0.0.1:9000"}, False),
        ({"origin": "https://evil.example"}, False),
        ({"origin": "null"}, False),
    ],
)
async def test_only_our_own_page_may_call(serve, headers, allowed):
    running = await serve(FakeEngine(say("ok")))
    async with httpx.AsyncClient(base_url=running.url) as client:
        answer = await client.post("/v1/chat/completions", json=CHAT, headers=headers)
    assert answer.status_code == (200 if allowed else 403)
    if not allowed:
        assert answer.json()["error"]["code"] == "forbidden"
        assert "x-request-id" in answer.headers


async def test_metrics_are_exact_for_a_known_load(serve):
    running = await serve(FakeEngine(say("abc"), num_cached_tokens=1))
    async with httpx.AsyncClient(base_url=running.url) as client:
        for _ in range(3):
            await client.post("/v1/completions", json={"model": "fake", "prompt": [1, 2, 3, 4, 5], "n": 2})
        await client.post("/v1/completions", json={"model": "fake", "prompt": [9], "max_tokens": 2, "stream": True})
        await client.post("/v1/completions", json={"model": "wrong", "prompt": [9]})
        answer = await client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    samples = {
        (sample.name, sample.labels.get("finished_reason")): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
        if sample.labels.get("le") is None
    }
    expected = {
        "vllm:prompt_tokens_total": 3 * 5 + 1,
        "vllm:generation_tokens_total": 3 * 2 * 4 + 2,
        "vllm:time_to_first_token_seconds_count": 4,
        "vllm:e2e_request_latency_seconds_count": 4,
        "vllm:inter_token_latency_seconds_count": 3 * 2 * 3 + 1,
        "vllm:request_time_per_output_token_seconds_count": 4,
        "vllm:request_queue_time_seconds_count": 4,
        "vllm:request_prefill_time_seconds_count": 4,
        "vllm:request_decode_time_seconds_count": 4,
        "vllm:request_prompt_tokens_sum": 3 * 5 + 1,
        "vllm:request_generation_tokens_sum": 3 * 2 * 4 + 2,
        "vllm:num_requests_running": 0,
        "vllm:num_requests_waiting": 0,
        "vllm:kv_cache_usage_perc": 0,
        "vllm:prefix_cache_queries_total": 0,
        "vllm:prefix_cache_hits_total": 0,
        "vllm:spec_decode_num_draft_tokens_total": 0,
        "vllm:spec_decode_num_accepted_tokens_total": 0,
        "seamount:worker_restarts_total": 0,
    }
    assert {name: samples[name, None] for name in expected} == expected
    assert samples["vllm:request_success_total", "stop"] == 6
    assert samples["vllm:request_success_total", "length"] == 1
    assert 'model_name="fake"' in answer.text
    assert 'engine="0"' in answer.text


async def test_metrics_show_a_running_request_and_count_a_failed_one(serve):
    release = asyncio.Event()
    engine = FakeEngine(say("abc"), pause=release.wait, fail_after_tokens=1)
    running = await serve(engine)
    async with httpx.AsyncClient(base_url=running.url) as client:
        request = asyncio.create_task(client.post("/v1/chat/completions", json=CHAT))
        async with asyncio.timeout(20):
            while not (await engine.stats()).num_running:
                await asyncio.sleep(0.01)
        assert 'vllm:num_requests_running{engine="0",model_name="fake"} 1.0' in (await client.get("/metrics")).text
        release.set()
        await request
        text = (await client.get("/metrics")).text
    assert 'seamount:request_failures_total{code="engine_error",engine="0",model_name="fake"} 1.0' in text
    assert "vllm:e2e_request_latency_seconds_count{" not in text


async def test_logs_and_errors_hold_no_prompt(serve, caplog):
    caplog.set_level("DEBUG")

    def reply(request, index):
        raise ValueError(f"secret {bytes(request.prompt_token_ids[1:-1])!r} geheim")

    running = await serve(FakeEngine(reply))
    async with httpx.AsyncClient(base_url=running.url) as client:
        broken = await client.post("/v1/chat/completions?q=geheim", json=CHAT)
        streamed = await client.post("/v1/chat/completions", json={**CHAT, "stream": True})
        wrong = await client.post(
            "/v1/chat/completions", json={**CHAT, "messages": [{"role": "user", "content": {"geheim": 1}}]}
        )
    for answer, status in ((broken, 500), (streamed, 500), (wrong, 400)):
        assert answer.status_code == status
        assert "geheim" not in answer.text
        assert "detail" not in answer.json()
        assert answer.headers["x-request-id"]
    ours = [record for record in caplog.records if record.name.startswith("seamount")]
    assert any("ValueError" in record.getMessage() for record in ours)
    assert not any("geheim" in record.getMessage() for record in caplog.records if not record.name.startswith("http"))
