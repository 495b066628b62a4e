"""Every parameter is honoured, refused or named as ignored; nothing is coerced or silently dropped."""

from __future__ import annotations

import typing

import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsBase as CompletionParams
from pydantic import ValidationError

from seamount.core.errors import InvalidRequestError
from seamount.server.errors import validation_error
from seamount.server.wire.chat import ChatRequest
from seamount.server.wire.completions import MAX_SEQUENCES, CompletionRequest

USER = [{"role": "user", "content": "hi"}]


def chat(**fields) -> ChatRequest:
    return ChatRequest(**{"model": "m", "messages": USER, **fields})


def problem(make) -> InvalidRequestError:
    with pytest.raises(ValidationError) as caught:
        make()
    errors = [{**error, "loc": ("body", *error["loc"])} for error in caught.value.errors()]
    return validation_error(errors)


@pytest.mark.parametrize(("schema", "params"), [(ChatRequest, ChatParams), (CompletionRequest, CompletionParams)])
def test_every_parameter_of_the_official_client_is_known(schema, params):
    assert set(typing.get_type_hints(params)) - set(schema.model_fields) == set()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("functions", [{"name": "f"}]),
        ("function_call", "auto"),
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "x", "format": "wav"}),
        ("prediction", {"type": "content", "content": "x"}),
        ("verbosity", "low"),
        ("web_search_options", {"x": 1}),
        ("web_search_options", {}),
        ("prediction", ""),
    ],
)
def test_what_is_not_supported_is_refused_by_name(name, value):
    error = problem(lambda: chat(**{name: value}))
    assert (error.param, error.code) == (name, "unsupported_parameter")
    assert error.message.startswith(f"{name} is not supported")


@pytest.mark.parametrize(
    ("name", "value"),
    [("best_of", 3), ("best_of", True), ("echo", True), ("echo", 0), ("suffix", "end"), ("suffix", False)],
)
def test_completions_refuse_by_name(name, value):
    error = problem(lambda: CompletionRequest(model="m", prompt="x", **{name: value}))
    assert (error.param, error.code) == (name, "unsupported_parameter")


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": None},
        {"tools": []},
        {"tool_choice": "none"},
        {"response_format": {"type": "text"}},
        {"modalities": ["text"]},
        {"logprobs": False},
    ],
)
def test_asking_for_what_happens_anyway_is_fine(fields):
    assert chat(**fields).ignored() == []


def test_the_neutral_values_of_completions_are_fine():
    body = CompletionRequest(model="m", prompt="x", best_of=1, echo=False, suffix="")
    assert body.ignored() == []


def test_ignored_parameters_are_listed():
    options = {"include_obfuscation": True}
    body = chat(user="u", metadata={"a": "b"}, store=0, service_tier=None, stream=True, stream_options=options)
    assert body.ignored() == ["metadata", "store", "user", "stream_options.include_obfuscation"]


def test_stream_options_without_a_stream_are_refused():
    assert problem(lambda: chat(stream_options={"include_usage": True})).param == "stream_options"


def test_an_unknown_parameter_is_named():
    error = problem(lambda: chat(temprature=1))
    assert (error.param, error.code, error.message) == (
        "temprature",
        "unknown_parameter",
        "Unknown parameter: temprature.",
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", True),
        ("max_tokens", "5"),
        ("max_tokens", 1.0),
        ("max_tokens", 2**31),
        ("max_completion_tokens", -1),
        ("n", 0),
        ("n", 129),
        ("n", True),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "1"),
        ("temperature", True),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_logprobs", 21),
        ("seed", 2**63),
        ("seed", 1.5),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("repetition_penalty", 0),
        ("min_p", -0.1),
        ("top_k", -2),
        ("min_tokens", 2**31),
        ("stop_token_ids", [2**31]),
        ("stop_token_ids", [1.0]),
        ("ignore_eos", 1),
        ("stream", "true"),
        ("logprobs", 5),
        ("chat_template_kwargs", {"x": {"nested": 1}}),
        ("chat_template_kwargs", [1]),
        ("stream_options", {"include_usage": 1}),
        ("logit_bias", {"5": "x"}),
        ("messages", []),
        ("model", 5),
    ],
)
def test_wrong_values_are_refused_and_named(name, value):
    assert problem(lambda: chat(**{name: value})).param.startswith(name)


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user"}, "messages[0].content"),
        ({"role": "user", "content": 5}, "messages[0].content"),
        ({"role": "user", "content": None}, "messages[0].content"),
        ({"role": "robot", "content": "x"}, "messages[0]"),
        ({"content": "x"}, "messages[0]"),
        ({"role": "tool", "content": "x"}, "messages[0].tool_call_id"),
        ({"role": "user", "content": "x", "color": 1}, "messages[0].color"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0].text"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "messages[0].content[0]"),
    ],
)
def test_wrong_messages_are_named(message, param):
    assert problem(lambda: chat(messages=[message])).param.startswith(param)


def test_images_are_refused_in_words():
    parts = [{"type": "text", "text": "what is this?"}, {"type": "image_url", "image_url": {"url": "data:,"}}]
    assert "images" in problem(lambda: chat(messages=[{"role": "user", "content": parts}])).message


def test_messages_become_what_templates_read():
    body = chat(
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "Li"},
            {"role": "assistant", "content": "c", "reasoning": "r1"},
            {"role": "assistant", "content": "d", "reasoning_content": "r2"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
            },
            {"role": "tool", "content": "42", "tool_call_id": "1"},
        ]
    )
    assert body.template_messages() == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "a\nb", "name": "Li"},
        {"role": "assistant", "content": "c", "reasoning_content": "r1"},
        {"role": "assistant", "content": "d", "reasoning_content": "r2"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
        },
        {"role": "tool", "content": "42", "tool_call_id": "1"},
    ]


def test_defaults_are_the_apis_else_the_checkpoints_else_the_callers():
    plain = chat().sampling({})
    assert (plain.temperature, plain.top_p, plain.max_tokens, plain.logprobs, plain.top_k) == (1.0, 1.0, None, None, 0)
    recommended = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "repetition_penalty": 1.1}
    advised = chat(top_p=0.5, top_k=-1).sampling(recommended)
    assert (advised.temperature, advised.top_p, advised.top_k, advised.repetition_penalty) == (0.6, 0.5, 0, 1.1)


def test_logprobs_of_chat():
    assert chat(logprobs=True).sampling({}).logprobs == 0
    assert chat(logprobs=True, top_logprobs=20).sampling({}).logprobs == 20
    with pytest.raises(InvalidRequestError) as caught:
        chat(top_logprobs=3).sampling({})
    assert caught.value.param == "top_logprobs"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logit_bias": {"x": 1.0}}, "logit_bias"),
        ({"logit_bias": {"-1": 1.0}}, "logit_bias"),
        ({"logit_bias": {"1": 101.0}}, "logit_bias"),
        ({"logit_bias": {str(i): 1.0 for i in range(1025)}}, "logit_bias"),
        ({"stop": [""]}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": "x" * 257}, "stop"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
    ],
)
def test_contradictions_are_refused_and_named(fields, param):
    with pytest.raises(InvalidRequestError) as caught:
        chat(**fields).sampling({})
    assert caught.value.param == param


@pytest.mark.parametrize("count", [17, 500_000])
def test_too_many_stops_are_one_problem(count):
    with pytest.raises(ValidationError) as caught:
        chat(stop=[1] * count)
    assert caught.value.error_count() <= 2
    assert problem(lambda: chat(stop=["x"] * count)).param == "stop"


@pytest.mark.parametrize("prompt", [5, None, [], {}, [1, "a"], [[]], [[1], "a"], [-1], [True], [2**31], [1.0], [None]])
def test_wrong_prompts_are_refused(prompt):
    assert problem(lambda: CompletionRequest(model="m", prompt=prompt)).param == "prompt"


def test_too_many_sequences_are_refused():
    body = CompletionRequest(model="m", prompt=["x"] * MAX_SEQUENCES, n=2)
    with pytest.raises(InvalidRequestError) as caught:
        body.sampling({})
    assert caught.value.param == "prompt"
