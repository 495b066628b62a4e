"""Text to tokens and back over HTTP: what comes back is what went in, within bounds and permissions."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from seamount.core.errors import QueueFullError
from seamount.core.identity import Limits, Principal
from seamount.engine.fake import FAKE_FACTS, FakeEngine, say
from seamount.engine.fake_encoder import ByteEncoder
from seamount.models.locate import locate_model
from seamount.models.prompt import PromptEncoder
from seamount.models.reasoning import THINK_OPEN
from seamount.server.door.access import Access

HI = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def tiny():
    """The embedded model's tokenizer and template."""
    encoder = PromptEncoder.from_folder(locate_model("seamount-tiny"))
    yield encoder
    encoder.close()


async def tokenize(client: Any, **body: Any) -> dict[str, Any]:
    answer = await client.post("/v1/tokenize", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_a_prompt(open_app):
    client = await open_app(FakeEngine(say("ok")))
    assert await tokenize(client, model="fake", prompt="hé", return_token_strs=True) == {
        "count": 4,
        "max_model_len": 4096,
        "tokens": [256, 104, 195, 169],
        "token_strs": ["<bos>", "h", "\ufffd", "\ufffd"],
    }
    bare = await tokenize(client, prompt="h", add_special_tokens=False)
    assert bare == {"count": 1, "max_model_len": 4096, "tokens": [104], "token_strs": None}
    assert (await tokenize(client, prompt="", add_special_tokens=False))["tokens"] == []


async def test_messages_are_what_a_chat_reads(open_app):
    client = await open_app(FakeEngine(say("ok")))
    for kwargs in (None, {"thinking": True}):
        chat = {"messages": HI, "chat_template_kwargs": kwargs}
        charged = (await client.post("/v1/chat/completions", json={"model": "fake", **chat})).json()["usage"]
        assert (await tokenize(client, **chat))["count"] == charged["prompt_tokens"]
    open_turn = (await tokenize(client, messages=HI))["tokens"]
    assert (await tokenize(client, messages=HI, add_generation_prompt=True))["tokens"] == open_turn
    assert (await tokenize(client, messages=HI, add_generation_prompt=False))["tokens"] == open_turn[:-1]


async def test_the_embedded_models_chats(open_app, tiny):
    client = await open_app(FakeEngine(say("ok"), facts=replace(FAKE_FACTS, vocab_size=tiny.vocab_size)), tiny)

    async def text(**body: Any) -> str:
        tokens = (await tokenize(client, **body))["tokens"]
        return (await client.post("/v1/detokenize", json={"tokens": tokens})).json()["prompt"]

    plain = await text(messages=HI)
    assert plain.endswith(f"<｜User｜>hi<｜Assistant｜>{THINK_OPEN}")
    assert await text(messages=HI, add_generation_prompt=False) == plain.partition("<｜Assistant｜>")[0]
    assert "\nf()" in await text(messages=HI, tools=[TOOL])
    begun = [*HI, {"role": "assistant", "content": "</think>Ho"}]
    assert (await text(messages=begun, chat_template_kwargs={"thinking": False})).endswith("Ho")
    closed = await text(messages=begun, continue_final_message=False)
    assert closed.endswith(f"<｜Assistant｜>{THINK_OPEN}")
    assert (await text(messages=begun, add_generation_prompt=False)).endswith("Ho<｜end▁of▁sentence｜>")


async def test_tokens_become_text_with_their_markers(open_app):
    client = await open_app(FakeEngine())
    answer = await client.post("/v1/detokenize", json={"model": "fake", "tokens": [256, 104, 258, 195, 169, 257]})
    assert answer.json() == {"prompt": f"<bos>h{THINK_OPEN}é<eos>"}
    assert (await client.post("/v1/detokenize", json={"tokens": []})).json() == {"prompt": ""}


@pytest.mark.parametrize(
    ("path", "body", "code", "param"),
    [
        ("/v1/tokenize", {}, "invalid_value", "prompt"),
        ("/v1/tokenize", {"prompt": "x", "messages": HI}, "invalid_value", "prompt"),
        ("/v1/tokenize", {"prompt": 5}, "invalid_value", "prompt"),
        ("/v1/tokenize", {"prompt": "x", "tools": [TOOL]}, "invalid_value", "tools"),
        ("/v1/tokenize", {"prompt": "x", "add_generation_prompt": True}, "invalid_value", "add_generation_prompt"),
        ("/v1/tokenize", {"messages": HI, "add_special_tokens": True}, "invalid_value", "add_special_tokens"),
        (
            "/v1/tokenize",
            {"messages": HI, "add_generation_prompt": True, "continue_final_message": True},
            "invalid_value",
            "continue_final_message",
        ),
        ("/v1/tokenize", {"messages": HI, "continue_final_message": True}, "invalid_value", "messages"),
        ("/v1/tokenize", {"messages": HI, "tools": [TOOL, TOOL]}, "invalid_value", "tools[1].function.name"),
        ("/v1/tokenize", {"messages": HI, "tools": [TOOL]}, "invalid_value", "tools"),
        ("/v1/tokenize", {"prompt": "x", "chat_template": "{{ 1 }}"}, "unknown_parameter", "chat_template"),
        ("/v1/tokenize", {"prompt": "x" * 161}, "context_length_exceeded", None),
        ("/v1/tokenize", {"messages": [{"role": "user", "content": "x" * 200}]}, "context_length_exceeded", None),
        ("/v1/detokenize", {"tokens": [262]}, "invalid_value", "tokens"),
        ("/v1/detokenize", {"tokens": [-1]}, "invalid_value", "tokens[0]"),
        ("/v1/detokenize", {"tokens": [2**31]}, "invalid_value", "tokens[0]"),
        ("/v1/detokenize", {"tokens": "x"}, "invalid_value", "tokens"),
        ("/v1/detokenize", {"tokens": [0] * (2**20 + 1)}, "invalid_value", "tokens"),
        ("/v1/detokenize", {}, "missing_parameter", "tokens"),
    ],
)
async def test_what_cannot_be_done_is_refused(open_app, path, body, code, param):
    client = await open_app(FakeEngine(facts=replace(FAKE_FACTS, max_model_len=20)))
    answer = await client.post(path, json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, code, param)


@pytest.mark.parametrize(("path", "body"), [("/v1/tokenize", {"prompt": "x"}), ("/v1/detokenize", {"tokens": [1]})])
async def test_the_model_must_be_permitted_and_there(open_app, path, body):
    class Other:
        async def authenticate(self, credential: str | None, peer: str | None) -> Principal:
            return Principal(key_id="o", tenant="t", models=("another",))

    client = await open_app(FakeEngine(), access=Access(Other()))
    for named in ({}, {"model": "fake"}):
        answer = await client.post(path, json={**named, **body})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "model_not_permitted")
    open_to_all = await open_app(FakeEngine())
    answer = await open_to_all.post(path, json={"model": "other", **body})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


ALL_WITHOUT_ENGINE = [
    ("/v1/tokenize", {"prompt": "x"}),
    ("/v1/detokenize", {"tokens": [1]}),
    ("/v1/messages/count_tokens", {"model": "fake", "messages": HI}),
]


@pytest.mark.parametrize(("path", "body"), ALL_WITHOUT_ENGINE)
async def test_it_counts_as_a_request_of_the_key(open_app, path, body):
    class Limited:
        async def authenticate(self, credential: str | None, peer: str | None) -> Principal:
            return Principal(key_id="l", tenant="t", limits=Limits(requests_per_minute=1))

    client = await open_app(FakeEngine(), access=Access(Limited()))
    first, second = await client.post(path, json=body), await client.post(path, json=body)
    assert (first.status_code, first.headers["x-ratelimit-remaining-requests"]) == (200, "0")
    assert (second.status_code, second.json()["error"]["type"]) == (429, "rate_limit_error")


@pytest.mark.parametrize(("path", "body"), ALL_WITHOUT_ENGINE)
async def test_it_does_not_matter_how_many_wait_for_the_engine(open_app, monkeypatch, path, body):
    def full(*given: Any) -> None:
        raise QueueFullError("Too many wait.")

    client = await open_app(FakeEngine(say("ok")))
    monkeypatch.setattr(client._transport.app.state.service.admission, "check", full)
    assert (await client.post("/v1/chat/completions", json={"model": "fake", "messages": HI})).status_code == 503
    assert (await client.post(path, json=body)).status_code == 200


@given(text=st.text(max_size=200))
def test_any_text_comes_back(tiny, text):
    ids = tiny.encode_text(text, add_special_tokens=False)
    assert tiny.decode(ids, skip_special_tokens=False) == text


@given(text=st.text(st.sampled_from("<>｜|/▁ thinkUserAs\n四é😀\u0301\x00"), max_size=60))
def test_any_text_like_markers_comes_back(tiny, text):
    ids = tiny.encode_text(text, add_special_tokens=False)
    assert tiny.decode(ids, skip_special_tokens=False) == text


@given(text=st.text(max_size=100))
def test_any_text_comes_back_in_bytes(text):
    encoder = ByteEncoder()
    assert encoder.decode(encoder.encode_text(text, add_special_tokens=False), skip_special_tokens=False) == text


def test_how_the_embedded_model_is_made_to_think(tiny):
    assert tiny.thinking_switches(on=True) == {"thinking": True}
    assert tiny.thinking_switches(on=False) == {"thinking": False}


@pytest.mark.parametrize(
    ("template", "has_tag", "on", "off"),
    [
        ("{{ enable_thinking }}", True, {"enable_thinking": True}, {"enable_thinking": False}),
        ("plain", True, {}, None),
        ("plain", False, None, {}),
    ],
)
def test_how_other_models_are_made_to_think(small_checkpoint, tmp_path, template, has_tag, on, off):
    folder = tmp_path / "model"
    shutil.copytree(small_checkpoint, folder)
    (folder / "chat_template.jinja").write_text(template)
    if has_tag:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.add_tokens([THINK_OPEN])
        tokenizer.save(str(folder / "tokenizer.json"))
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 258}))
    encoder = PromptEncoder.from_folder(folder)
    assert (encoder.thinking_switches(on=True), encoder.thinking_switches(on=False)) == (on, off)
