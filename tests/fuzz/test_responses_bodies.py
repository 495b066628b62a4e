"""Whatever a body for /v1/responses holds, the answer is a success or a 4xx with OpenAI's error object: never a 500."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from urllib.parse import quote, urlencode

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seamount.core.settings import ServerConfig
from seamount.core.state import open_state
from seamount.engine.fake import FakeEngine, say
from seamount.engine.fake_encoder import ByteEncoder
from seamount.server.app import create_app
from seamount.server.wire.responses import ResponsesRequest

TEXT = st.text(st.characters(), max_size=8)  # lone surrogates included
NUMBERS = st.integers(-(2**70), 2**70) | st.floats() | st.sampled_from([-1, 0, 1, 2, 2**31, 2**63])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
KINDS = st.sampled_from(["message", "reasoning", "function_call", "function_call_output", "item_reference"]) | VALUES
PARTS = st.lists(
    st.fixed_dictionaries(
        {"type": st.sampled_from(["input_text", "output_text", "reasoning_text", "refusal"]), "text": TEXT},
        optional={"logprobs": VALUES, "annotations": VALUES, "prompt_cache_breakpoint": VALUES},
    ),
    max_size=2,
)
ITEMS = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "type": KINDS,
            "role": st.sampled_from(["user", "system", "developer", "assistant"]) | VALUES,
            "content": TEXT | PARTS | VALUES,
            "id": st.sampled_from(["msg_1"]) | VALUES,
            "call_id": st.sampled_from(["c"]) | TEXT,
            "output": TEXT | PARTS,
            "name": TEXT,
            "arguments": TEXT,
            "summary": VALUES,
            "status": VALUES,
        },
    ),
    max_size=4,
)
NAMES = st.sampled_from(sorted(set(ResponsesRequest.model_fields) - {"model", "input"})) | TEXT
SHAPES = st.fixed_dictionaries({"format": st.fixed_dictionaries({"type": TEXT | st.just("json_schema")}) | VALUES})
BODIES = st.builds(
    lambda more, given, shape: {**more, **({"text": shape} if shape else {}), "input": given, "model": "fake"},
    st.dictionaries(NAMES, VALUES, max_size=3),
    TEXT | ITEMS | VALUES,
    st.none() | SHAPES,
)
Ask = Callable[[str, str, bytes], httpx.Response]


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    """Return `ask(method, path, body)` to an app that keeps responses, in an event loop of its own."""
    state = open_state(str(tmp_path_factory.mktemp("state") / "state.db"))
    app = create_app(FakeEngine(say("ok")), ByteEncoder(), ServerConfig(), state=state)

    async def send(method: str, path: str, content: bytes) -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.request(method, path, content=content, headers={"content-type": "application/json"})

    lifespan = app.router.lifespan_context(app)
    with asyncio.Runner() as runner:
        runner.run(lifespan.__aenter__())
        yield lambda method, path, content: runner.run(send(method, path, content))
        runner.run(lifespan.__aexit__(None, None, None))
    state.close()


def check(answer: httpx.Response) -> None:
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


@settings(max_examples=200, deadline=None)
@given(body=BODIES)
def test_bodies_and_what_is_kept_of_them(ask, body):
    answer = ask("POST", "/v1/responses", json.dumps(body).encode())
    check(answer)
    if answer.status_code == 200 and body.get("stream") is not True and answer.json()["store"]:
        path = f"/v1/responses/{answer.json()['id']}"
        assert ask("GET", path, b"").json() == answer.json()
        assert ask("GET", f"{path}/input_items", b"").json()["data"]


@settings(max_examples=100, deadline=None)
@given(
    response_id=st.text(st.characters(exclude_characters="/", exclude_categories=["Cs"]), min_size=1, max_size=20),
    query=st.dictionaries(st.sampled_from(["limit", "after", "order", "stream", "include"]), TEXT | NUMBERS.map(str)),
    rest=st.sampled_from(["", "/input_items", "/cancel"]),
)
def test_ids_and_queries(ask, response_id, query, rest):
    path = f"/v1/responses/{quote(response_id, safe='')}{rest}?{urlencode(query, errors='replace')}"
    for method in ("GET", "DELETE", "POST"):
        check(ask(method, path, b"{}"))
