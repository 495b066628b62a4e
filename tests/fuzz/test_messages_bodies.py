"""Whatever a body holds, Anthropic's routes and those for tokens answer with a success or a 4xx in their form."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seamount.core.settings import ServerConfig
from seamount.engine.fake import FakeEngine, say
from seamount.engine.fake_encoder import ByteEncoder
from seamount.models.builtin_templates import QWEN3
from seamount.models.tools import choose_format
from seamount.server.app import create_app
from seamount.server.wire.messages import CountRequest, MessageRequest
from seamount.server.wire.tokens import DetokenizeRequest, TokenizeRequest

TEXT = st.text(st.characters(), max_size=8)  # lone surrogates included
NUMBERS = st.integers(-(2**70), 2**70) | st.floats() | st.sampled_from([-1, 0, 1, 2, 2**31, 2**63])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
KINDS = st.sampled_from(["text", "thinking", "tool_use", "tool_result", "image", "redacted_thinking"]) | TEXT
BLOCKS = st.fixed_dictionaries(
    {"type": KINDS},
    optional={
        "text": TEXT,
        "thinking": TEXT,
        "signature": TEXT,
        "id": TEXT,
        "name": TEXT,
        "input": st.dictionaries(TEXT, VALUES, max_size=2) | VALUES,
        "tool_use_id": TEXT,
        "content": TEXT | VALUES,
        "is_error": st.booleans() | VALUES,
        "cache_control": VALUES,
    },
)
CONTENT = TEXT | st.lists(BLOCKS, max_size=3) | VALUES
TURNS = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]) | TEXT, "content": CONTENT}),
    max_size=3,
)
TOOLS = st.lists(
    st.fixed_dictionaries(
        {"name": st.sampled_from(["f", "g"]) | TEXT, "input_schema": st.just({"type": "object"}) | VALUES},
        optional={"strict": VALUES, "type": VALUES, "description": TEXT},
    ),
    max_size=2,
)
GOOD = {
    "tools": TOOLS,
    "tool_choice": st.fixed_dictionaries(
        {"type": st.sampled_from(["auto", "any", "tool", "none"])}, optional={"name": st.just("f") | TEXT}
    ),
    "thinking": st.fixed_dictionaries({"type": st.sampled_from(["enabled", "disabled", "adaptive"])}),
    "system": CONTENT,
    "stream": st.booleans(),
    "output_config": st.just({"format": {"type": "json_schema", "schema": {"type": "object"}}}) | VALUES,
}
CALL = '<think>hm</think>Hi <tool_call>\n{"name": "f", "arguments": {"a": [1, "b"]}}\n</tool_call>'


class CallingEncoder(ByteEncoder):
    """Bytes, and Qwen's way to call tools."""

    tool_format = choose_format(QWEN3, ())

    def encode_chat(self, messages: Any, *, tools: Any = None, continue_final: bool = False, **more: Any) -> Any:
        return super().encode_chat(messages, **more)


def bodies(path: str, schema: type, needed: dict[str, Any]) -> st.SearchStrategy[tuple[str, dict[str, Any]]]:
    names = st.sampled_from(sorted({"color", *schema.model_fields} - {"model", *needed})) | TEXT
    good = st.fixed_dictionaries({}, optional={name: GOOD[name] for name in GOOD if name in schema.model_fields})
    return st.builds(
        lambda base, more, likely: (path, {**more, **likely, **base, "model": "fake"}),
        st.fixed_dictionaries(needed),
        st.dictionaries(names, VALUES, max_size=2),
        good,
    )


CASES = st.one_of(
    bodies("/v1/messages", MessageRequest, {"messages": TURNS, "max_tokens": st.just(50) | NUMBERS}),
    bodies("/v1/messages/count_tokens", CountRequest, {"messages": TURNS}),
    bodies("/v1/tokenize", TokenizeRequest, {"prompt": TEXT | VALUES}),
    bodies("/v1/tokenize", TokenizeRequest, {"messages": TURNS}),
    bodies("/v1/detokenize", DetokenizeRequest, {"tokens": st.lists(NUMBERS, max_size=4) | VALUES}),
)
Post = Callable[[str, bytes], httpx.Response]


@pytest.fixture(scope="module")
def post() -> Iterator[Post]:
    """Return `post(path, body)` to an app that lives in an event loop of its own."""
    app = create_app(FakeEngine(say(CALL)), CallingEncoder(), ServerConfig())

    async def send(path: str, content: bytes) -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.post(path, content=content, headers={"content-type": "application/json"})

    lifespan = app.router.lifespan_context(app)
    with asyncio.Runner() as runner:
        runner.run(lifespan.__aenter__())
        yield lambda path, content: runner.run(send(path, content))
        runner.run(lifespan.__aexit__(None, None, None))


def check(path: str, answer: httpx.Response) -> None:
    assert answer.status_code < 500, answer.text
    assert "event: error" not in answer.text
    if answer.status_code < 400:
        return
    body = answer.json()
    if path.startswith("/v1/messages"):
        assert set(body) == {"type", "error", "request_id"}
        assert set(body["error"]) == {"type", "message"}
    else:
        assert set(body["error"]) == {"message", "type", "param", "code"}


@settings(max_examples=300)
@given(case=CASES)
def test_json_bodies(post, case):
    path, body = case
    check(path, post(path, json.dumps(body).encode()))


@settings(max_examples=50)
@given(path=st.sampled_from(["/v1/messages", "/v1/tokenize"]), content=st.binary(max_size=60))
def test_bytes(post, path, content):
    check(path, post(path, content))
