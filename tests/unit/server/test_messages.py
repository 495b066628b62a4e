"""Anthropic's routes: answers whole and streamed, counting, and refusals in its form by whichever layer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import pytest

from seamount.core import errors as core
from seamount.core.identity import Principal
from seamount.core.requests import Request
from seamount.engine.fake import FAKE_FACTS, FakeEngine, say
from seamount.engine.fake_encoder import ByteEncoder
from seamount.server.door.access import Access
from seamount.server.messages import routes as messages_module
from seamount.server.streaming import EventStream

ASK: dict[str, Any] = {"model": "fake", "max_tokens": 50, "messages": [{"role": "user", "content": "hi"}]}
COUNT: dict[str, Any] = {name: value for name, value in ASK.items() if name != "max_tokens"}
PROMPT_TOKENS = len("user: hi\n") + 2


class Names:
    """Takes a caller's name as their proof."""

    async def authenticate(self, credential: str | None, peer: str | None) -> Principal:
        if credential == "clerk":
            return Principal(key_id="c", tenant="bank")
        if credential == "other":
            return Principal(key_id="o", tenant="bank", models=("another",))
        if credential == "scraper":
            return Principal(key_id="s", tenant="ops", routes=("/metrics",))
        raise core.UnauthenticatedError("Nobody knows you.")

    async def ended(self, key_ids: Collection[str]) -> dict[str, core.UnauthenticatedError]:
        return {}


def events_of(text: str) -> list[dict[str, Any]]:
    """Return the events of a stream, whose names are their types."""
    found = []
    for part in text.removesuffix("\n\n").split("\n\n"):
        name, data = part.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        found.append(event)
    return found


async def test_a_whole_answer(open_app):
    client = await open_app(FakeEngine(say("<think>hm</think>Hello."), num_cached_tokens=4))
    answer = await client.post("/v1/messages", json=ASK, headers={"x-request-id": "r-1"})
    body = answer.json()
    assert body.pop("id").startswith("msg_")
    num_output = len("hmHello.") + 3
    assert body == {
        "type": "message",
        "role": "assistant",
        "model": "fake",
        "content": [
            {"type": "thinking", "thinking": "hm", "signature": ""},
            {"type": "text", "text": "Hello."},
        ],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": PROMPT_TOKENS - 4,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 4,
            "output_tokens": num_output,
            "output_tokens_details": {"thinking_tokens": 4},
        },
    }
    assert answer.headers["request-id"] == "r-1"
    assert "x-seamount-ignored" not in answer.headers


async def test_a_streamed_answer_adds_up_to_the_whole_one(open_app):
    client = await open_app(FakeEngine(say("<think>hm</think>Hello."), num_cached_tokens=4))
    whole = (await client.post("/v1/messages", json=ASK)).json()
    answer = await client.post("/v1/messages", json={**ASK, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = events_of(answer.text)
    assert [event["type"] for event in events[:3]] == ["message_start", "content_block_start", "content_block_delta"]
    assert [event["type"] for event in events[-3:]] == ["content_block_stop", "message_delta", "message_stop"]
    start = events[0]["message"]
    assert start["usage"] == {**whole["usage"], "output_tokens": 1, "output_tokens_details": {"thinking_tokens": 0}}
    assert {**start, "id": "", "usage": {}} == {**whole, "id": "", "usage": {}, "content": [], "stop_reason": None}
    assert events[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert events[-2]["usage"] == whole["usage"]
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    assert "".join(delta.get("thinking", "") for delta in deltas) == "hm"
    assert "".join(delta.get("text", "") for delta in deltas) == "Hello."


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "stop_reason", "stop_sequence"),
    [
        ({}, "end_turn", None),
        ({"stop_sequences": ["ONE", "END"]}, "stop_sequence", "END"),
        ({"max_tokens": 3}, "max_tokens", None),
        ({"max_tokens": 10**6}, "end_turn", None),
    ],
)
async def test_how_an_answer_ended(open_app, stream, fields, stop_reason, stop_sequence):
    client = await open_app(FakeEngine(say("one END two")))
    answer = await client.post("/v1/messages", json={**ASK, **fields, "stream": stream})
    told = events_of(answer.text)[-2]["delta"] if stream else answer.json()
    assert (told["stop_reason"], told["stop_sequence"]) == (stop_reason, stop_sequence)


async def test_a_limit_beyond_the_context_is_lowered_and_the_end_says_so(open_app):
    seen: list[Request] = []

    def reply(request: Request, index: int) -> Any:
        seen.append(request)
        return say("x" * 100)(request, index)

    client = await open_app(FakeEngine(reply, facts=replace(FAKE_FACTS, max_model_len=PROMPT_TOKENS + 5)))
    body = (await client.post("/v1/messages", json={**ASK, "max_tokens": 32000})).json()
    assert (body["stop_reason"], body["usage"]["output_tokens"]) == ("model_context_window_exceeded", 5)
    exact = (await client.post("/v1/messages", json={**ASK, "max_tokens": 5})).json()
    assert exact["stop_reason"] == "max_tokens"
    assert [request.sampling.max_tokens for request in seen] == [5, 5]


async def test_thinking_can_be_switched_and_hidden(open_app):
    client = await open_app(FakeEngine(say("secret</think>Hi")))
    thinking = {"type": "enabled", "budget_tokens": 1024, "display": "omitted"}
    answer = await client.post("/v1/messages", json={**ASK, "thinking": thinking})
    assert answer.json()["content"] == [
        {"type": "thinking", "thinking": "", "signature": ""},
        {"type": "text", "text": "Hi"},
    ]
    assert answer.headers["x-seamount-ignored"] == "thinking.budget_tokens"
    off = await client.post("/v1/messages", json={**ASK, "thinking": {"type": "disabled"}})
    assert off.json()["content"] == [{"type": "text", "text": "secret</think>Hi"}]


async def test_what_anthropics_clients_send_beside_the_body_is_taken(open_app):
    client = await open_app(FakeEngine(say("ok")), access=Access(Names()))
    headers = {
        "x-api-key": "clerk",
        "anthropic-version": "2023-06-01",
        "anthropic-beta": "interleaved-thinking-2025-05-14,other",
        "anthropic-dangerous-direct-browser-access": "true",
        "x-stainless-lang": "js",
        "x-stainless-timeout": "600",
        "x-stainless-retry-count": "0",
        "x-app": "cli",
    }
    for path, body in (("/v1/messages", ASK), ("/v1/messages/count_tokens", COUNT)):
        answer = await client.post(f"{path}?beta=true", json=body, headers=headers)
        assert answer.status_code == 200, answer.text


async def test_counting_gives_what_an_answer_is_charged(open_app):
    client = await open_app(FakeEngine(say("ok")))
    conversation = {"system": "Be kind.", "thinking": {"type": "enabled", "budget_tokens": 2000}}
    charged = (await client.post("/v1/messages", json={**ASK, **conversation})).json()["usage"]["input_tokens"]
    counted = await client.post("/v1/messages/count_tokens", json={**COUNT, **conversation})
    assert counted.json() == {"input_tokens": charged}
    assert counted.headers["x-seamount-ignored"] == "thinking.budget_tokens"


async def test_counting_needs_no_room_and_tells_of_more_than_one_context(open_app):
    engine = FakeEngine(say("ok"), facts=replace(FAKE_FACTS, max_model_len=20))
    client = await open_app(engine)
    long = {**COUNT, "messages": [{"role": "user", "content": "x" * 100}]}
    assert (await client.post("/v1/messages/count_tokens", json=long)).json()["input_tokens"] > 100
    refused = await client.post("/v1/messages", json={**ASK, **long})
    assert refused.json()["error"]["message"].startswith("prompt is too long: ")
    longer = {**COUNT, "messages": [{"role": "user", "content": "x" * 1000}]}
    answer = await client.post("/v1/messages/count_tokens", json=longer)
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")
    assert "more than 160 tokens" in answer.json()["error"]["message"]


def check_error(answer: Any, status: int, kind: str) -> str:
    body = answer.json()
    assert set(body) == {"type", "error", "request_id"}
    assert set(body["error"]) == {"type", "message"}
    assert (answer.status_code, body["type"], body["error"]["type"]) == (status, "error", kind)
    assert body["request_id"] == answer.headers["request-id"] == answer.headers["x-request-id"]
    assert int(answer.headers["content-length"]) == len(answer.content)
    return body["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "content", "headers", "status", "kind"),
    [
        ("POST", "/v1/messages", b"", {}, 401, "authentication_error"),
        ("POST", "/v1/messages/count_tokens", b"", {"x-api-key": "nobody"}, 401, "authentication_error"),
        ("POST", "/v1/messages", b"", {"x-api-key": "scraper"}, 403, "permission_error"),
        ("POST", "/v1/messages", json.dumps(ASK), {"x-api-key": "other"}, 403, "permission_error"),
        ("POST", "/v1/messages/count_tokens", json.dumps(COUNT), {"x-api-key": "other"}, 403, "permission_error"),
        ("POST", "/v1/messages", b"", {"origin": "https://evil.example"}, 403, "permission_error"),
        ("POST", "/v1/messages", b"{}", {"x-api-key": "clerk", "host": "evil.example"}, 403, "permission_error"),
        ("GET", "/v1/messages", b"", {"x-api-key": "clerk"}, 405, "invalid_request_error"),
        ("POST", "/v1/messages/batches", b"{}", {"x-api-key": "clerk"}, 404, "not_found_error"),
        ("POST", "/v1/messages/", b"{}", {"x-api-key": "clerk"}, 404, "not_found_error"),
        ("POST", "/v1/messages", b"{", {"x-api-key": "clerk"}, 400, "invalid_request_error"),
        ("POST", "/v1/messages", b"[]", {"x-api-key": "clerk"}, 400, "invalid_request_error"),
        ("POST", "/v1/messages", b"\xff", {"x-api-key": "clerk"}, 400, "invalid_request_error"),
        ("POST", "/v1/messages", b'{"model": "a", "model": "b"}', {"x-api-key": "clerk"}, 400, "invalid_request_error"),
        ("POST", "/v1/messages", b"x" * 5000, {"x-api-key": "clerk"}, 413, "request_too_large"),
        (
            "POST",
            "/v1/messages",
            json.dumps({**ASK, "model": "no"}),
            {"x-api-key": "clerk"},
            404,
            "not_found_error",
        ),
        (
            "POST",
            "/v1/messages",
            json.dumps(ASK),
            {"x-api-key": "clerk", "x-request-timeout": "soon"},
            400,
            "invalid_request_error",
        ),
    ],
)
async def test_refusals_by_every_layer_have_anthropics_form(open_app, method, path, content, headers, status, kind):
    client = await open_app(FakeEngine(say("ok")), access=Access(Names()), max_body_bytes=4096)
    sent = {"content-type": "application/json", **headers}
    answer = await client.request(method, path, content=content, headers=sent)
    assert check_error(answer, status, kind)


async def test_a_body_too_large_that_was_not_announced(open_app):
    async def parts():
        for _ in range(10):
            yield b"[" * 1000

    client = await open_app(FakeEngine(say("ok")), max_body_bytes=4096)
    answer = await client.post("/v1/messages", content=parts(), headers={"content-type": "application/json"})
    check_error(answer, 413, "request_too_large")


@pytest.mark.parametrize("path", ["/v1/messagesx", "/v1/message", "/v1/chat/completions", "/x/v1/messages"])
async def test_everywhere_else_refusals_keep_openais_form(open_app, path):
    client = await open_app(FakeEngine())
    answer = await client.request("PATCH", path)
    assert set(answer.json()) == {"error"}
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert "request-id" not in answer.headers


@pytest.mark.parametrize(
    ("failure", "status", "kind"),
    [
        (core.QueueFullError("Full.", retry_after=2.5), 503, "overloaded_error"),
        (core.QuotaError("Enough.", retry_after=60), 429, "rate_limit_error"),
        (core.EngineError("It broke."), 500, "api_error"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_failures_before_the_first_token_keep_their_status(open_app, failure, status, kind, stream):
    client = await open_app(FakeEngine(fail_after_tokens=0, failure=failure))
    answer = await client.post("/v1/messages", json={**ASK, "stream": stream})
    check_error(answer, status, kind)
    assert (answer.headers.get("retry-after") is not None) is (status != 500)


@pytest.mark.parametrize(
    ("failure", "kind", "words"),
    [
        (core.EngineError("The engine broke."), "api_error", "The engine broke."),
        (core.WorkerDiedError("It died."), "overloaded_error", "It died."),
    ],
)
async def test_a_failure_midway_is_the_last_event(open_app, failure, kind, words):
    client = await open_app(FakeEngine(say("abcdef"), fail_after_tokens=2, failure=failure))
    answer = await client.post("/v1/messages", json={**ASK, "stream": True})
    events = events_of(answer.text)
    assert events[-1] == {
        "type": "error",
        "error": {"type": kind, "message": words},
        "request_id": answer.headers["x-request-id"],
    }
    assert "message_stop" not in [event["type"] for event in events]


async def test_silence_is_filled_with_pings(open_app, monkeypatch):
    class Impatient(EventStream):
        def __init__(self, *given: Any, **more: Any) -> None:
            super().__init__(*given, **more, keep_alive_s=0.01)

    monkeypatch.setattr(messages_module, "EventStream", Impatient)
    client: Any = None
    pings = asyncio.Event()

    async def pause() -> None:
        await pings.wait()

    client = await open_app(FakeEngine(say("ok"), pause=pause))
    app = client._transport.app
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)
        if message.get("body", b"").startswith(b"event: ping"):
            pings.set()

    body = json.dumps({**ASK, "stream": True}).encode()
    given = [{"type": "http.request", "body": body}]

    async def receive() -> dict[str, Any]:
        if given:
            return given.pop()
        await asyncio.Event().wait()
        raise AssertionError

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/messages",
        "raw_path": b"/v1/messages",
        "query_string": b"",
        "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
        "client": ("127.0.0.1", 1),
        "server": ("localhost", 80),
        "scheme": "http",
        "http_version": "1.1",
    }
    await app(scope, receive, send)
    events = events_of(b"".join(message.get("body", b"") for message in sent).decode())
    types = [event["type"] for event in events]
    assert types[0] == "ping"
    assert next(kind for kind in types if kind != "ping") == "message_start"
    assert types[-1] == "message_stop"
    assert events[0] == {"type": "ping"}


async def test_a_model_without_template_is_told(open_app):
    class NoTemplate(ByteEncoder):
        has_chat_template = False

    client = await open_app(FakeEngine(), NoTemplate())
    for path, body in (("/v1/messages", ASK), ("/v1/messages/count_tokens", COUNT)):
        assert "no chat template" in check_error(await client.post(path, json=body), 400, "invalid_request_error")
