"""What clients say of thinking by themselves: `reasoning_effort`, `reasoning.effort`, DeepSeek's `thinking`."""

from __future__ import annotations

from typing import Any

import pytest

from seamount.engine.fake import FakeEngine, say
from seamount.engine.fake_encoder import ByteEncoder

CHAT = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}
RESPONSE = {"model": "fake", "input": "hi"}
CHATS, RESPONSES = "/v1/chat/completions", "/v1/responses"


def asked(effort: str) -> list[tuple[str, dict[str, Any], str]]:
    return [
        (CHATS, {**CHAT, "reasoning_effort": effort}, "reasoning_effort"),
        (RESPONSES, {**RESPONSE, "reasoning": {"effort": effort}}, "reasoning.effort"),
    ]


OFF = [*asked("none"), (CHATS, {**CHAT, "thinking": {"type": "disabled"}}, "thinking")]
ON = (CHATS, {**CHAT, "thinking": {"type": "enabled"}}, "thinking")
LEVELS = [one for effort in ("minimal", "low", "medium", "high", "xhigh", "max") for one in asked(effort)]


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


@pytest.mark.parametrize(("path", "body", "param"), [*OFF, ON])
async def test_it_is_the_models_own_switch(open_app, path, body, param):
    encoder = Encoder({"enable_thinking": True})
    client = await open_app(FakeEngine(say("ok")), encoder)
    answer = await client.post(path, json={**body, "chat_template_kwargs": {"other": 1}})
    assert answer.status_code == 200, answer.text
    assert "x-seamount-ignored" not in answer.headers
    assert encoder.seen == [{"other": 1, "enable_thinking": (path, body, param) == ON}]
    if path == RESPONSES:
        assert answer.json()["reasoning"]["effort"] == "none"


@pytest.mark.parametrize(("path", "body", "param"), LEVELS)
async def test_a_level_switches_thinking_on_and_is_said_to_do_no_more(open_app, path, body, param):
    encoder = Encoder({"enable_thinking": True})
    client = await open_app(FakeEngine(say("ok")), encoder)
    off = {**body, "chat_template_kwargs": {"enable_thinking": False}}  # by whoever knows the model
    for sent, kwargs in ((body, {"enable_thinking": True}), (off, {"enable_thinking": False})):
        answer = await client.post(path, json=sent)
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-seamount-ignored"] == param
        assert encoder.seen.pop() == kwargs
    if path == CHATS:
        disabled = await client.post(path, json={**body, "thinking": {"type": "disabled"}})
        assert disabled.status_code == 200 and encoder.seen.pop() == {"enable_thinking": False}


@pytest.mark.parametrize(("path", "body", "param"), [*OFF, ON, *LEVELS[:2]])
async def test_a_model_that_does_so_anyway_needs_no_switch(open_app, path, body, param):
    encoder = Encoder({})
    client = await open_app(FakeEngine(say("ok")), encoder)
    assert (await client.post(path, json=body)).status_code == 200
    assert encoder.seen == [{}]


@pytest.mark.parametrize(("path", "body", "param"), [*OFF, ON])
async def test_where_it_cannot_be_had_it_is_refused_by_name(open_app, path, body, param):
    is_on = (path, body, param) == ON
    without = await open_app(FakeEngine(say("ok")), Encoder(None))
    with_one = await open_app(FakeEngine(say("ok")), Encoder({"thinking": True}))
    both = {**body, "chat_template_kwargs": {"thinking": not is_on}}
    cannot = "does not think" if is_on else "cannot be switched off"
    for client, sent, words in (
        (without, body, cannot),
        (with_one, both, f"switch thinking {'off' if is_on else 'on'}"),
    ):
        answer = await client.post(path, json=sent)
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, param)
        assert words in error["message"]


@pytest.mark.parametrize(("path", "body", "param"), LEVELS[:2])
async def test_a_level_asks_nothing_of_a_model_without_a_switch(open_app, path, body, param):
    client = await open_app(FakeEngine(say("ok")), Encoder(None))
    answer = await client.post(path, json=body)
    assert (answer.status_code, answer.headers["x-seamount-ignored"]) == (200, param)


async def test_wishes_that_contradict_each_other_or_are_none_are_refused(open_app):
    client = await open_app(FakeEngine(say("ok")), Encoder({"thinking": True}))
    for more, param in (
        ({"reasoning_effort": "none", "thinking": {"type": "enabled"}}, "reasoning_effort"),
        ({"reasoning_effort": "some"}, "reasoning_effort"),
        ({"reasoning_effort": 0.0}, "reasoning_effort"),
        ({"thinking": {"type": "sometimes"}}, "thinking.type"),
        ({"chat_template_kwargs": {"thinking": "no"}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"thinking": True, "enable_thinking": False}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"add_generation_prompt": False}}, "chat_template_kwargs"),
        ({"thinking": True}, "thinking"),
    ):
        answer = await client.post(CHATS, json={**CHAT, **more})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    budget = await client.post(CHATS, json={**CHAT, "thinking": {"type": "enabled", "budget_tokens": 9}})
    assert (budget.status_code, budget.headers["x-seamount-ignored"]) == (200, "thinking.budget_tokens")


@pytest.mark.parametrize("own", ["thinking", "enable_thinking"])
@pytest.mark.parametrize("said", ["thinking", "enable_thinking"])
@pytest.mark.parametrize("on", [True, False])
async def test_template_arguments_may_call_the_switch_by_either_name(open_app, own, said, on):
    encoder = Encoder({own: True})
    client = await open_app(FakeEngine(say("ok")), encoder)
    answer = await client.post(CHATS, json={**CHAT, "chat_template_kwargs": {said: on}})
    assert answer.status_code == 200, answer.text
    assert encoder.seen == [{own: on}]


@pytest.mark.parametrize("kind", ["adaptive", "auto"])
async def test_thinking_may_be_left_to_the_model(open_app, kind):
    encoder = Encoder({"thinking": True})
    client = await open_app(FakeEngine(say("ok")), encoder)
    for more in ({}, {"chat_template_kwargs": {"thinking": None}}):
        answer = await client.post(CHATS, json={**CHAT, "thinking": {"type": kind}, **more})
        assert answer.status_code == 200, answer.text
        assert encoder.seen.pop() == {"thinking": True}
    off = await client.post(CHATS, json={**CHAT, "reasoning_effort": "none", "thinking": {"type": kind}})
    assert off.status_code == 200 and encoder.seen.pop() == {"thinking": False}
