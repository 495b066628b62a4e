"""Routes, error bodies, headers and limits of the app."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from seamount.core import errors as core
from seamount.engine.fake import FAKE_FACTS, FakeEngine, say
from seamount.engine.fake_encoder import ByteEncoder
from seamount.server import app as app_module
from seamount.server.errors import error_response
from seamount.server.openapi import openapi_text
from seamount.server.pages import CONTENT_SECURITY_POLICY

CHAT = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}
JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code", "param"),
    [
        ("GET", "/nowhere", None, 404, "not_found", None),
        ("GET", "/v1/chat/completions", None, 405, "method_not_allowed", None),
        ("POST", "/v1/chat/completions/", b"{}", 404, "not_found", None),
        ("POST", "/v1/chat/completions", b"", 400, "invalid_body", None),
        ("POST", "/v1/chat/completions", b'{"model": ', 400, "invalid_json", None),
        ("POST", "/v1/chat/completions", b"[]", 400, "invalid_body", None),
        ("POST", "/v1/chat/completions", b"[" * 100_000, 400, "invalid_body", None),
        ("POST", "/v1/chat/completions", b"\xff\xfe{", 400, "invalid_body", None),
        ("POST", "/v1/chat/completions", b'{"seed": ' + b"1" * 5000 + b"}", 400, "number_too_long", None),
        ("POST", "/v1/responses", b'{"input": [-' + b"1" * 5000 + b"]}", 400, "number_too_long", None),
        ("POST", "/v1/chat/completions", b"{}", 400, "missing_parameter", "model"),
        ("POST", "/v1/completions", b'{"model": "fake"}', 400, "missing_parameter", "prompt"),
        ("POST", "/v1/completions", b'{"model": "fake", "prompt": "x", "n": 1e999}', 400, "invalid_value", "n"),
        ("POST", "/v1/completions", b'{"model": "fake", "prompt": "x", "n": NaN}', 400, "invalid_value", "n"),
        ("POST", "/v1/completions", b'{"model": "fake", "prompt": "\\ud800"}', 400, "invalid_value", "prompt"),
        (
            "POST",
            "/v1/completions",
            b'{"model": "fake", "prompt": "x", "stop": "\\ud800"}',
            400,
            "invalid_value",
            "stop",
        ),
        (
            "POST",
            "/v1/completions",
            b'{"model": "fake", "prompt": "x", "seed": 1, "seed": 2}',
            400,
            "duplicate_parameter",
            "seed",
        ),
        ("POST", "/v1/completions", b'{"prompt": [{"a": 1, "b": 1, "a": 1}]}', 400, "duplicate_parameter", "a"),
        ("POST", "/v1/completions", b'{"\\ud800": 1, "\\ud800": 2}', 400, "duplicate_parameter", "?"),
        ("POST", "/v1/completions", b'{"model": "no", "prompt": "x"}', 404, "model_not_found", "model"),
        ("POST", "/v1/completions", b'{"model": "fake", "prompt": [262]}', 400, "invalid_value", "prompt"),
        ("GET", "/v1/models/no", None, 404, "model_not_found", "model"),
        ("GET", "/redoc", None, 404, "not_found", None),
        ("GET", "/console/../app.py", None, 404, "not_found", None),
        ("GET", "/console/%2e%2e/app.py", None, 404, "not_found", None),
    ],
)
async def test_every_error_has_openais_body(open_app, method, path, body, status, code, param):
    client = await open_app(FakeEngine())
    answer = await client.request(method, path, content=body, headers=JSON)
    error = answer.json()["error"]
    assert set(answer.json()) == {"error"}
    assert set(error) == {"message", "type", "param", "code"}
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param)
    assert error["type"] == "invalid_request_error"
    assert error["message"]


LONE = "\ud800"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": LONE}, "model"),
        ({"stop": LONE}, "stop"),
        ({"stop": ["a", "b" + LONE]}, "stop"),
        ({"logit_bias": {LONE: 1}}, "logit_bias"),
        ({"messages": [{"role": "system", "content": LONE}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": LONE}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "name": LONE}]}, "messages[0].name"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": LONE}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "assistant", "reasoning": LONE}]}, "messages[0].reasoning"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": LONE}]}, "messages[0].tool_call_id"),
        ({"chat_template_kwargs": {"thinking": LONE}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {LONE: True}}, "chat_template_kwargs"),
    ],
)
async def test_text_that_is_not_unicode_is_refused_wherever_it_stands(open_app, fields, param):
    client = await open_app(FakeEngine(say("ok")))
    answer = await client.post("/v1/chat/completions", content=json.dumps({**CHAT, **fields}), headers=JSON)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith(param)


async def test_head_is_answered_as_get_without_the_body(open_app, monkeypatch, tmp_path):
    (tmp_path / "index.html").write_text("<p>page</p>")
    monkeypatch.setattr(app_module, "CONSOLE_FOLDER", tmp_path)
    client = await open_app(FakeEngine())
    for path in ("/", "/healthz", "/readyz", "/metrics", "/v1/models", "/v1/models/fake", "/nowhere"):
        whole, head = await client.get(path), await client.head(path)
        assert (head.status_code, head.content) == (whole.status_code, b""), path
        assert head.headers["content-type"] == whole.headers["content-type"]
        assert "content-length" in head.headers
    assert (await client.head("/v1/completions")).status_code == 405


async def test_405_says_what_is_allowed(open_app):
    client = await open_app(FakeEngine())
    assert (await client.get("/v1/completions")).headers["allow"] == "POST"


async def test_a_body_must_be_declared_json(open_app):
    client = await open_app(FakeEngine())
    answer = await client.post(
        "/v1/completions", content=json.dumps({"model": "fake", "prompt": "x"}), headers={"content-type": "text/plain"}
    )
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_body")
    assert "application/json" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("error", "status", "kind", "retry"),
    [
        (core.InvalidRequestError("m", param="p"), 400, "invalid_request_error", None),
        (core.ContextTooLongError("m"), 400, "invalid_request_error", None),
        (core.NotFoundError("m"), 404, "invalid_request_error", None),
        (core.QueueFullError("m", retry_after=0.25), 503, "service_unavailable", "1"),
        (core.DrainingError("m"), 503, "service_unavailable", "1"),
        (core.WorkerDiedError("m"), 503, "service_unavailable", "1"),
        (core.EngineError("m"), 500, "server_error", None),
        (core.IntegrityError("m"), 500, "server_error", None),
        (core.ConfigError("m"), 500, "server_error", None),
        (core.BackendError("m"), 502, "server_error", None),
    ],
)
def test_the_table_of_errors(error, status, kind, retry):
    answer = error_response(error)
    body = json.loads(answer.body)["error"]
    assert (answer.status_code, body["type"], body["code"], body["param"]) == (status, kind, error.code, error.param)
    assert answer.headers.get("retry-after") == retry
    expected = None if status < 500 else "true" if status == 503 else "false"
    assert answer.headers.get("x-should-retry") == expected


def test_a_hint_ends_the_message():
    answer = error_response(core.InvalidRequestError("It is wrong.", hint="Mend it."))
    assert json.loads(answer.body)["error"]["message"] == "It is wrong. Mend it."


async def test_context_limits_are_refused_with_numbers(open_app):
    client = await open_app(FakeEngine(say("x" * 100), facts=replace(FAKE_FACTS, max_model_len=32)))

    async def complete(**fields):
        return await client.post("/v1/completions", json={"model": "fake", **fields})

    long = (await complete(prompt=[1] * 32)).json()["error"]
    assert (long["code"], long["param"]) == ("context_length_exceeded", "prompt")
    assert "32 tokens" in long["message"]
    both = (await complete(prompt=[1] * 20, max_tokens=13)).json()["error"]
    assert (both["code"], both["param"]) == ("context_length_exceeded", "max_tokens")
    assert all(number in both["message"] for number in ("20", "13", "32", "12"))
    fits = await complete(prompt=[1] * 20, max_tokens=12)
    assert fits.json()["usage"]["completion_tokens"] == 12
    # The API's own default is not the caller's wish: it yields to the context.
    assert (await complete(prompt=[1] * 25)).json()["usage"]["completion_tokens"] == 7
    message = {"role": "user", "content": "x" * 20}
    chat = await client.post(
        "/v1/chat/completions", json={"model": "fake", "messages": [message], "max_completion_tokens": 30}
    )
    assert chat.json()["error"]["param"] == "max_completion_tokens"
    longer = await client.post("/v1/chat/completions", json={"model": "fake", "messages": [message] * 9})
    assert (longer.status_code, longer.json()["error"]["param"]) == (400, "messages")


async def test_an_empty_prompt_is_refused(open_app):
    class NoStart(ByteEncoder):
        def encode_text(self, text: str, **options: Any) -> tuple[int, ...]:
            return ()

    client = await open_app(FakeEngine(), NoStart())
    answer = await client.post("/v1/completions", json={"model": "fake", "prompt": ""})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")


async def test_a_model_without_template_points_to_completions(open_app):
    class NoTemplate(ByteEncoder):
        has_chat_template = False

    client = await open_app(FakeEngine(), NoTemplate())
    answer = await client.post("/v1/chat/completions", json=CHAT)
    assert answer.status_code == 400
    assert "/v1/completions" in answer.json()["error"]["message"]


async def test_ignored_parameters_are_named_in_a_header(open_app):
    client = await open_app(FakeEngine(say("ok")))
    for stream in (False, True):
        answer = await client.post("/v1/chat/completions", json={**CHAT, "user": "x", "store": True, "stream": stream})
        assert answer.headers["x-seamount-ignored"] == "store, user"
    assert "x-seamount-ignored" not in (await client.post("/v1/chat/completions", json=CHAT)).headers


@pytest.mark.parametrize(("given", "kept"), [("abc-1.2_Z", True), ("a b", False), ("x" * 129, False), ("", False)])
async def test_request_ids(open_app, given, kept):
    client = await open_app(FakeEngine())
    answer = await client.get("/healthz", headers={"x-request-id": given})
    assert (answer.headers["x-request-id"] == given) is kept
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"


async def test_console_pages_carry_the_policy(open_app, monkeypatch, tmp_path):
    (tmp_path / "index.html").write_text("<p>page</p>")
    (tmp_path / "a.js").write_text("1")
    monkeypatch.setattr(app_module, "CONSOLE_FOLDER", tmp_path)
    client = await open_app(FakeEngine())
    for path, kind in (("/", "text/html"), ("/console/a.js", "javascript")):
        answer = await client.get(path)
        assert answer.status_code == 200
        assert kind in answer.headers["content-type"]
        assert answer.headers["content-security-policy"] == CONTENT_SECURITY_POLICY
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-cache"


async def test_readiness_follows_the_worker(open_app):
    engine = FakeEngine(say("ok"))
    client = await open_app(engine)
    engine.kill_worker()
    answer = await client.get("/readyz")
    assert (answer.status_code, answer.json()["status"]) == (503, "restarting")
    assert answer.json()["reason"]
    engine.restart_worker()
    assert (await client.get("/readyz")).status_code == 200


def test_the_openapi_document_is_the_one_checked_in():
    checked_in = Path(__file__).parents[3] / "docs" / "openapi.json"
    assert openapi_text() == checked_in.read_text(encoding="utf-8"), (
        "The API changed: run `python -m seamount.server.openapi docs/openapi.json`."
    )
