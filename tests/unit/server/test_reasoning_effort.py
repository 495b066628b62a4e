"""`reasoning_effort` and `reasoning.effort`: "none" switches thinking off, where the model can."""

from __future__ import annotations

from typing import Any

import pytest

from seamount.engine.fake import FakeEngine, say
from seamount.engine.fake_encoder import ByteEncoder

CHAT = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}
SURFACES = [
    ("/v1/chat/completions", {**CHAT, "reasoning_effort": "none"}, "reasoning_effort"),
    ("/v1/responses", {"model": "fake", "input": "hi", "reasoning": {"effort": "none"}}, "reasoning.effort"),
]


class Encoder(ByteEncoder):
    """Notes the switches that the template is given."""

    def __init__(self, switches: dict[str, bool] | None) -> None:
        self.switches = switches
        self.seen: list[Any] = []

    def thinking_switches(self, *, on: bool) -> dict[str, bool] | None:
        return None if self.switches is None else dict.fromkeys(self.switches, on)

    def encode_chat(self, messages, *, template_kwargs=None, **more):
        self.seen.append(template_kwargs)
        return super().encode_chat(messages, template_kwargs=None, **more)


@pytest.mark.parametrize(("path", "body", "param"), SURFACES)
async def test_none_is_the_models_own_switch_turned_off(open_app, path, body, param):
    encoder = Encoder({"enable_thinking": True})
    client = await open_app(FakeEngine(say("ok")), encoder)
    answer = await client.post(path, json={**body, "chat_template_kwargs": {"other": 1}})
    assert answer.status_code == 200, answer.text
    assert "x-seamount-ignored" not in answer.headers
    assert encoder.seen == [{"other": 1, "enable_thinking": False}]
    if path == "/v1/responses":
        assert answer.json()["reasoning"]["effort"] == "none"


@pytest.mark.parametrize(("path", "body", "param"), SURFACES)
async def test_a_model_that_does_not_think_needs_no_switch(open_app, path, body, param):
    encoder = Encoder({})
    client = await open_app(FakeEngine(say("ok")), encoder)
    assert (await client.post(path, json=body)).status_code == 200
    assert encoder.seen == [{}]


@pytest.mark.parametrize(("path", "body", "param"), SURFACES)
async def test_where_it_cannot_be_had_it_is_refused_by_name(open_app, path, body, param):
    without = await open_app(FakeEngine(say("ok")), Encoder(None))
    with_one = await open_app(FakeEngine(say("ok")), Encoder({"thinking": True}))
    both = {**body, "chat_template_kwargs": {"thinking": True}}
    for client, asked, words in ((without, body, "cannot be switched off"), (with_one, both, "switch thinking on")):
        answer = await client.post(path, json=asked)
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, param)
        assert words in error["message"]
