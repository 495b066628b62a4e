"""The chat's server backend against scripted HTTP answers."""

from __future__ import annotations

import json
from collections.abc import Callable

import httpx
import pytest

from seamount.cli.remote import ServerBackend
from seamount.core.errors import BackendError, ConfigError, RequestError

Handler = Callable[[httpx.Request], httpx.Response]


def backend(handler: Handler, url: str = "http://server", model: str | None = "m") -> ServerBackend:
    return ServerBackend(url, model, transport=httpx.MockTransport(handler))


def events(*bodies: object, done: bool = True) -> Handler:
    lines = [f"data: {json.dumps(body)}\n\n" for body in bodies] + (["data: [DONE]\n\n"] if done else [])
    return lambda request: httpx.Response(200, text=": ping\n\n" + "".join(lines))


def delta(**fields: object) -> dict[str, object]:
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": None}]}


def ask(chat: ServerBackend) -> list[tuple[str, str, int]]:
    return [(p.reasoning, p.content, p.num_tokens) for p in chat.stream([{"role": "user", "content": "q"}], {}, None)]


def test_reasoning_content_and_usage_are_read() -> None:
    usage = {"choices": [], "usage": {"completion_tokens": 7}}
    chat = backend(events(delta(reasoning_content="hm"), delta(reasoning="!"), delta(content="Hi"), usage))
    assert ask(chat) == [("hm", "", 0), ("!", "", 0), ("", "Hi", 0), ("", "", 7)]


def test_what_is_sent() -> None:
    sent: list[httpx.Request] = []

    def handler(request: httpx.Request) -> httpx.Response:
        sent.append(request)
        return httpx.Response(200, text="data: [DONE]\n\n")

    list(backend(handler).stream([{"role": "user", "content": "q"}], {"temperature": 0.1}, True))
    assert str(sent[0].url) == "http://server/v1/chat/completions"
    assert json.loads(sent[0].content) == {
        "model": "m",
        "messages": [{"role": "user", "content": "q"}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.1,
        "chat_template_kwargs": {"thinking": True},
    }


@pytest.mark.parametrize(
    ("typed", "used"),
    [
        ("http://host:1", "http://host:1/v1/models"),
        ("host:1/", "http://host:1/v1/models"),
        ("https://host/api/v1/", "https://host/api/v1/models"),
    ],
)
def test_the_base_may_be_typed_loosely_and_the_first_model_is_taken(typed: str, used: str) -> None:
    asked: list[str] = []

    def handler(request: httpx.Request) -> httpx.Response:
        asked.append(str(request.url))
        return httpx.Response(200, json={"data": [{"id": "first"}, {"id": "second"}]})

    assert backend(handler, typed, None).name == "first"
    assert asked == [used]


@pytest.mark.parametrize("url", ["ftp://host", "http://", "http://[::1"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ConfigError):
        backend(events(), url)


def test_an_openai_error_is_told_in_its_own_words() -> None:
    chat = backend(lambda request: httpx.Response(400, json={"error": {"message": "too long", "type": "x"}}))
    with pytest.raises(RequestError, match="too long"):
        ask(chat)


def test_an_error_inside_the_stream_is_raised_after_what_came() -> None:
    stream = backend(events(delta(content="par"), {"error": {"message": "worker died"}, "choices": []})).stream(
        [], {}, None
    )
    assert next(stream).content == "par"
    with pytest.raises(BackendError, match="worker died"):
        next(stream)


@pytest.mark.parametrize(
    "handler",
    [
        events(delta(content="x"), done=False),
        events({"choices": [3]}),
        events([1]),
        events({"error": "odd"}),
        lambda request: httpx.Response(200, text="data: {nonsense\n\n"),
        lambda request: httpx.Response(502, text="<html>bad gateway</html>"),
    ],
)
def test_a_broken_answer_is_a_backend_error(handler: Handler) -> None:
    with pytest.raises(BackendError):
        ask(backend(handler))


def test_a_server_that_is_not_there_is_told_with_a_hint() -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    with pytest.raises(BackendError, match="does not answer") as caught:
        backend(handler, model=None)
    assert "seamount serve" in (caught.value.hint or "")


def test_a_page_that_is_no_api_is_told() -> None:
    with pytest.raises(BackendError, match="lists no model"):
        backend(lambda request: httpx.Response(200, text="<html>"), model=None)


def test_the_switch_for_reasoning_is_sent_under_the_name_that_the_template_has() -> None:
    sent: list[dict[str, bool]] = []

    def handler(request: httpx.Request) -> httpx.Response:
        kwargs = json.loads(request.content)["chat_template_kwargs"]
        sent.append(kwargs)
        if kwargs == {"enable_thinking": False}:
            return events(delta(content="ok"))(request)
        return httpx.Response(400, json={"error": {"message": "no", "param": "chat_template_kwargs"}})

    chat = backend(handler)
    assert [piece.content for piece in chat.stream([], {}, False)] == ["ok"]
    assert sent == [{"thinking": False}, {"enable_thinking": False}]


def test_a_template_without_a_switch_for_reasoning_is_told() -> None:
    body = {"error": {"message": "no such argument", "param": "chat_template_kwargs"}}
    chat = backend(lambda request: httpx.Response(400, json=body))
    with pytest.raises(RequestError, match="no switch for reasoning"):
        list(chat.stream([], {}, True))
