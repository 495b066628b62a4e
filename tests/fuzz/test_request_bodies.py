"""Whatever a body holds, the answer is a success or a 4xx with OpenAI's error object: never a 500."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seamount.core.settings import ServerConfig
from seamount.engine.fake import FakeEngine, say
from seamount.engine.fake_encoder import ByteEncoder
from seamount.server.app import create_app
from seamount.server.wire.chat import ChatRequest
from seamount.server.wire.completions import CompletionRequest

TEXT = st.text(st.characters(), max_size=8)  # lone surrogates included
NUMBERS = st.integers(-(2**70), 2**70) | st.floats() | st.sampled_from([-1, 0, 1, 2, 2**31, 2**63])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
ROLES = st.sampled_from(["system", "developer", "user", "assistant", "tool"]) | TEXT
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": ROLES},
        optional={
            "content": TEXT | VALUES,
            "tool_call_id": TEXT,
            "reasoning": VALUES,
            "tool_calls": VALUES,
            "name": VALUES,
        },
    ),
    max_size=3,
)


def bodies(schema: type, needed: dict) -> st.SearchStrategy:
    names = st.sampled_from(sorted(set(schema.model_fields) - {"model", *needed})) | TEXT
    return st.builds(
        lambda base, more: {**more, **base, "model": "fake"},
        st.fixed_dictionaries(needed),
        st.dictionaries(names, VALUES, max_size=3),
    )


CHATS = bodies(ChatRequest, {"messages": MESSAGES}).map(lambda body: ("/v1/chat/completions", body))
TEXTS = bodies(CompletionRequest, {"prompt": TEXT | VALUES}).map(lambda body: ("/v1/completions", body))


Post = Callable[[str, bytes], httpx.Response]


@pytest.fixture(scope="module")
def post() -> Iterator[Post]:
    """Return `post(path, body)` to an app that lives in an event loop of its own."""
    app = create_app(FakeEngine(say("ok")), ByteEncoder(), ServerConfig())

    async def send(path: str, content: bytes) -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.post(path, content=content, headers={"content-type": "application/json"})

    lifespan = app.router.lifespan_context(app)
    with asyncio.Runner() as runner:
        runner.run(lifespan.__aenter__())
        yield lambda path, content: runner.run(send(path, content))
        runner.run(lifespan.__aexit__(None, None, None))


def check(answer: httpx.Response) -> None:
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


@settings(max_examples=200, deadline=None)
@given(case=CHATS | TEXTS)
def test_json_bodies(post, case):
    path, body = case
    check(post(path, json.dumps(body).encode()))


@settings(max_examples=50, deadline=None)
@given(content=st.binary(max_size=60))
def test_bytes(post, content):
    check(post("/v1/chat/completions", content))
