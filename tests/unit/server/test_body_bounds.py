"""What a small body can make of itself: it is bounded before it is made, and whoever sent it is counted."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seamount.core.errors import InvalidRequestError, UnauthenticatedError
from seamount.core.identity import Limits, Principal
from seamount.engine.fake import FakeEngine, say
from seamount.server.door import body as door_body
from seamount.server.door.access import Access
from seamount.server.door.body import strict_json
from seamount.server.rpc import seamount_pb2 as pb
from seamount.server.rpc import translate
from seamount.server.wire import bounds
from seamount.server.wire.bounds import MAX_NAMES, MAX_PARTS, MAX_VALUES, is_too_complex

JSON = {"content-type": "application/json"}
CHATS = "/v1/chat/completions"
CHAT = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}
RESPONSE = {"model": "fake", "input": "hi"}
MESSAGE = {"model": "fake", "max_tokens": 3}
MANY = 20_000


def user(content: Any) -> dict[str, Any]:
    return {**CHAT, "messages": [{"role": "user", "content": content}]}


def tool(parameters: dict[str, Any]) -> dict[str, Any]:
    return {**CHAT, "tools": [{"type": "function", "function": {"name": "f", "parameters": parameters}}]}


def numbered(value: Any) -> dict[str, Any]:
    return {str(number): value for number in range(MANY)}


# Name: path, body, what the error says: of its first wrong part, or of a bound.
BODIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "stop": (CHATS, {**CHAT, "stop": [1] * MANY}, "stop[0]"),
    "stop, all of them right": (CHATS, {**CHAT, "stop": ["a"] * MANY}, "at most 16 items"),
    "content": (CHATS, user([1] * MANY), "messages[0].content[0]"),
    "content, all of it right": (CHATS, user([{"type": "text", "text": "a"}] * MANY), "context"),
    "messages": (CHATS, {**CHAT, "messages": [{"role": "user", "content": "a"}] * MANY}, "at most 4096 items"),
    "wrong messages": (CHATS, {**CHAT, "messages": [{}] * MANY}, "messages[0]"),
    "calls": (CHATS, {**CHAT, "messages": [{"role": "assistant", "tool_calls": [1] * MANY}]}, "tool_calls[0]"),
    "biases": (CHATS, {**CHAT, "logit_bias": numbered("")}, f"more than {MAX_NAMES} names"),
    "switches": (CHATS, {**CHAT, "chat_template_kwargs": numbered([])}, f"more than {MAX_NAMES} names"),
    "unknown names": (CHATS, CHAT | numbered(1), f"more than {MAX_NAMES} names"),
    "a tool's properties": (CHATS, tool({"properties": numbered({})}), f"more than {MAX_NAMES} names"),
    "lists, ignored": (CHATS, {**CHAT, "metadata": [[]] * (MAX_PARTS + 1)}, f"more than {MAX_PARTS} objects"),
    "objects, ignored": (CHATS, {**CHAT, "metadata": [{"a": 1}] * (MAX_PARTS // 2)}, f"more than {MAX_PARTS} objects"),
    "a schema in a text": (
        CHATS,
        {**CHAT, "structured_outputs": {"json": "[" + "[]," * MAX_PARTS + "[]]"}},
        f"more than {MAX_PARTS} objects",
    ),
    "arguments in a text": (
        CHATS,
        {
            **CHAT,
            "messages": [
                *CHAT["messages"],
                {
                    "role": "assistant",
                    "tool_calls": [
                        {"id": "a", "type": "function", "function": {"name": "f", "arguments": "[]" * (MAX_PARTS + 1)}}
                    ],
                },
            ],
        },
        f"more than {MAX_PARTS} objects",
    ),
    "prompts": ("/v1/completions", {"model": "fake", "prompt": ["x", *[1] * MANY]}, "prompt"),
    "token ids": ("/v1/completions", {"model": "fake", "prompt": [1] * (2**20 + 1)}, "at most 1048576"),
    "inputs": ("/v1/embeddings", {"model": "fake", "input": [""] + [[-1]] * MANY}, "at most 2048"),
    "input token ids": ("/v1/embeddings", {"model": "fake", "input": [[1] * (2**20 + 1)]}, "at most 1048576"),
    "items": ("/v1/responses", {**RESPONSE, "input": [{}] * MANY}, "input[0]"),
    "metadata": ("/v1/responses", {**RESPONSE, "metadata": numbered(1)}, f"more than {MAX_NAMES} names"),
    "turns": ("/v1/messages", {**MESSAGE, "messages": [{}] * MANY}, "messages[0]"),
    "blocks": ("/v1/messages", {**MESSAGE, "messages": [{"role": "user", "content": [1] * MANY}]}, "content[0]"),
    "tokens": ("/v1/detokenize", {"model": "fake", "tokens": [5] * (2**20 + 1)}, "at most 1048576"),
    "wrong tokens": ("/v1/detokenize", {"model": "fake", "tokens": [-5] * MANY}, "tokens[0]"),
}


@pytest.mark.parametrize("name", BODIES)
async def test_a_body_of_many_wrong_parts_makes_few_errors(open_app, monkeypatch, name):
    path, body, words = BODIES[name]
    nums_problems = []
    told = door_body.validation_error

    def count(problems):
        nums_problems.append(len(problems))
        return told(problems)

    monkeypatch.setattr(door_body, "validation_error", count)
    client = await open_app(FakeEngine(say("ok")))
    answer = await client.post(path, content=json.dumps(body), headers=JSON)
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]
    assert sum(nums_problems) <= 12


@pytest.mark.parametrize("value", ["1", '""'])
async def test_a_list_of_millions_is_refused_before_it_is_read(value):
    assert strict_json("[" + ",".join([value] * (MAX_VALUES + 1)) + "]") == [json.loads(value)] * (MAX_VALUES + 1)
    with pytest.raises(InvalidRequestError, match="values"):
        strict_json("[" + ",".join([value] * (MAX_VALUES + 2)) + "]")


async def test_unknown_names_are_told_one_by_one_up_to_the_bound(open_app):
    client = await open_app(FakeEngine(say("ok")))
    body = {**CHAT, **{f"k{number}": number for number in range(MAX_NAMES - len(CHAT))}}
    answer = await client.post(CHATS, json=body)
    assert answer.json()["error"]["code"] == "unknown_parameter"


async def test_a_large_body_that_is_right_is_answered(open_app):
    client = await open_app(FakeEngine(say("ok")))
    said = 'He said: "[{,:\\' * 60_000
    body = {"model": "fake", "prompt": said}
    answer = await client.post("/v1/tokenize", json=body)
    assert answer.status_code == 400  # it was read, and is longer than the context
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    ids = {"model": "fake", "tokens": [97] * 100_000}
    assert (await client.post("/v1/detokenize", json=ids)).json() == {"prompt": "a" * 100_000}


def num_parts(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + len(value) + sum(map(num_parts, value.values()))
    return 1 + sum(map(num_parts, value)) if isinstance(value, list) else 0


VALUES = st.recursive(
    st.none() | st.integers() | st.text('ab"\\[]{},:一\ud800', max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text('a"\\{:', max_size=4), inner, max_size=4),
    max_leaves=30,
)


@given(value=VALUES, ascii_only=st.booleans())
def test_parts_are_counted_exactly(value, ascii_only):
    text = json.dumps(value, ensure_ascii=ascii_only)
    count = num_parts(value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bounds, "MAX_PARTS", count)
        assert not is_too_complex(text)
        patch.setattr(bounds, "MAX_PARTS", max(count - 1, 0))
        assert is_too_complex(text) is (count > 0)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_no_encoding_hides_parts(encoding):
    right, wrong = json.dumps({"a": "∢" * 5}, ensure_ascii=False), "[" + "[]," * MAX_PARTS + "[]]"
    assert strict_json(right.encode(encoding)) == {"a": "∢" * 5}
    with pytest.raises(InvalidRequestError, match="more than"):
        strict_json(wrong.encode(encoding))


MANY_CALLS = pb.Message(role=pb.ROLE_ASSISTANT, tool_calls=[pb.ToolCall()] * (MAX_NAMES // 2 + 1))


@pytest.mark.parametrize(
    ("read", "message", "param"),
    [
        (translate.chat_request, pb.ChatRequest(messages=[pb.Message()] * 4097), "messages"),
        (translate.chat_request, pb.ChatRequest(messages=[MANY_CALLS] * 2), "tool_calls"),
        (translate.chat_request, pb.ChatRequest(tools=[pb.Tool()] * (MAX_NAMES + 1)), "tools"),
        (translate.chat_request, pb.ChatRequest(logit_bias=dict.fromkeys(range(MAX_NAMES + 1), 1.0)), "logit_bias"),
        (translate.completion_request, pb.CompletionRequest(prompt=[pb.Prompt()] * (MAX_NAMES + 1)), "prompt"),
        (translate.detokenize_request, pb.DetokenizeRequest(tokens=[1] * (2**20 + 1)), "tokens"),
    ],
)
def test_a_message_of_many_parts_is_refused_before_they_are_looked_at(monkeypatch, read, message, param):
    monkeypatch.setattr(translate, "_CONVERT", {"messages": translate._messages})
    monkeypatch.setattr(translate, "_message", None)
    monkeypatch.setattr(translate, "validated", None)
    more = {} if read is translate.detokenize_request else {"stream": False}
    with pytest.raises(InvalidRequestError) as caught:
        read(message, **more)
    assert (caught.value.param, caught.value.code) == (param, "body_too_complex")


class OneKey:
    """An authenticator for whom everybody has the same key, of two requests a minute."""

    async def authenticate(self, credential: str | None, peer: str | None) -> Principal:
        return Principal(key_id="k", tenant="t", limits=Limits(requests_per_minute=2))

    async def ended(self, key_ids: Collection[str]) -> dict[str, UnauthenticatedError]:
        return {}


WRONG: list[tuple[str, dict[str, Any]]] = [
    (CHATS, {"json": {**CHAT, "stop": 1}}),
    (CHATS, {"content": "{", "headers": JSON}),
    (CHATS, {"content": "{}", "headers": {"content-type": "text/plain"}}),
    (CHATS, {"content": ""}),
    (CHATS, {"json": {**CHAT, "stop": ["a"] * 200_000}}),
    (CHATS, {"json": {**CHAT, "tool_choice": "required"}}),
    ("/v1/messages", {"json": {**MESSAGE, "messages": []}}),
    ("/v1/messages", {"json": {**MESSAGE, "messages": CHAT["messages"], "tool_choice": {"type": "any"}}}),
    ("/v1/detokenize", {"json": {"model": "fake", "tokens": [-1]}}),
]


@pytest.mark.parametrize(("path", "sent"), WRONG)
async def test_what_is_refused_counts_as_a_request_of_its_key(open_app, path, sent):
    client = await open_app(FakeEngine(say("ok")), access=Access(OneKey()))
    statuses = [(await client.post(path, **sent)).status_code for _ in range(3)]
    assert statuses == [400, 400, 429]
    right = await client.post(CHATS, json=CHAT)
    assert right.status_code == 429 and "retry-after" in right.headers


async def test_who_may_ask_no_more_has_no_large_body_read(open_app, monkeypatch):
    client = await open_app(FakeEngine(say("ok")), access=Access(OneKey()))
    for _ in range(2):
        assert (await client.post(CHATS, json=CHAT)).status_code == 200
    monkeypatch.setattr(door_body, "strict_json", None)
    large = await client.post(CHATS, json={**CHAT, "stop": ["a"] * 200_000})
    assert large.status_code == 429


async def test_refusals_are_counted_by_their_code_once(open_app):
    client = await open_app(FakeEngine(say("ok")))
    await client.post(CHATS, json={**CHAT, "stop": 1})
    await client.post(CHATS, json={**CHAT, "stop": [""]})
    await client.post(CHATS, json={**CHAT, "model": "other"})
    await client.post(CHATS, json={**CHAT, "made_up": 1})
    await client.get("/nowhere")
    text = (await client.get("/metrics")).text
    found = {
        line.split('code="')[1].split('"')[0]: float(line.rsplit(" ", 1)[1])
        for line in text.splitlines()
        if line.startswith("seamount:request_failures_total{")
    }
    assert found == {"invalid_value": 2, "model_not_found": 1, "unknown_parameter": 1, "not_found": 1}


@pytest.mark.parametrize("coding", ["gzip", "br", "GZIP, identity"])
async def test_a_compressed_body_is_refused_by_name(open_app, coding):
    client = await open_app(FakeEngine(say("ok")))
    headers = {**JSON, "content-encoding": coding}
    answer = await client.post(CHATS, content=b"\x1f\x8b\x08", headers=headers)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (415, "unsupported_encoding")
    assert coding.lower() in error["message"]
    plain = await client.post(CHATS, json=CHAT, headers={"content-encoding": "identity"})
    assert plain.status_code == 200


async def test_no_message_names_a_class_of_this_program(open_app):
    client = await open_app(FakeEngine(say("ok")))
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}
    for more in ({"tool_choice": "allowed_tools"}, {"tool_choice": allowed}, {"messages": [1]}, {"stream_options": 1}):
        answer = await client.post(CHATS, json={**CHAT, **more})
        assert answer.status_code == 400
        for name in ("NamedToolChoice", "Message", "StreamOptions", "instance of"):
            assert name not in answer.json()["error"]["message"]
