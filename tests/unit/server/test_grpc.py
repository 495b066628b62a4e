"""gRPC's requests, answers and errors are the HTTP API's: the same checks, the same words, nothing lost on the way."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from google.protobuf.descriptor import Descriptor

from seamount.core import errors as core
from seamount.core.errors import ConfigError, InvalidRequestError, SeamountError
from seamount.server import rpc
from seamount.server.door import access as access_module
from seamount.server.errors import error_body, validation_error
from seamount.server.rpc import answers, methods
from seamount.server.rpc import seamount_pb2 as pb
from seamount.server.rpc.server import routes
from seamount.server.rpc.status import code_of, metadata, sentence
from seamount.server.rpc.translate import (
    chat_request,
    completion_request,
    detokenize_request,
    embed_request,
    parse,
    tokenize_request,
)
from seamount.server.wire.chat import ChatChunk, ChatRequest, ChatResponse
from seamount.server.wire.completions import CompletionRequest, CompletionResponse
from seamount.server.wire.embeddings import EmbeddingRequest
from seamount.server.wire.tokens import DetokenizeRequest, TokenizeRequest

PROTO = Path(rpc.__file__).with_name("seamount.proto")

# Parameters that HTTP alone has: those that it takes only to refuse or to ignore them, and how an answer is sent.
ONLY_HTTP = {"stream", "stream_options", "user"}
THINKING = {"reasoning_effort", "thinking"}  # other words for a switch in chat_template_kwargs
ONLY_HTTP_CHAT = ONLY_HTTP | THINKING | set(ChatRequest.refusals) | set(ChatRequest.ignored_names)
ONLY_HTTP_TEXT = ONLY_HTTP | set(CompletionRequest.refusals) | set(CompletionRequest.ignored_names)


@pytest.mark.parametrize("option", ["python_out", "pyi_out"])
def test_what_is_generated_is_generated_of_the_proto(option, tmp_path):
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTO.parent}", f"--{option}={tmp_path}", PROTO.name]
    subprocess.run(command, check=True)
    (made,) = tmp_path.iterdir()
    assert made.read_text("utf-8") == PROTO.with_name(made.name).read_text("utf-8"), f"run {' '.join(command)}"


def test_every_method_of_the_proto_is_answered():
    assert set(methods.Seamount(None).methods) == set(methods.SEAMOUNT.methods_by_name)


def test_every_rule_has_its_method():
    found = {
        **routes(methods.SEAMOUNT, methods.Seamount(None).methods),
        **routes(methods.HEALTH, methods.Health(None).methods),
        **routes(methods.REFLECTION, methods.Reflection().methods),
    }
    assert set(found.values()) == {path for path in access_module.RULES if path.startswith(("/seamount.", "/grpc."))}


def test_a_method_without_a_rule_keeps_the_server_from_starting(monkeypatch):
    table = methods.Seamount(None).methods
    rules = {route: rule for route, rule in access_module.RULES.items() if not route.endswith("/StreamChat")}
    monkeypatch.setattr("seamount.server.rpc.server.RULES", rules)
    with pytest.raises(ConfigError, match="no rule: /seamount.v1.Seamount/StreamChat"):
        routes(methods.SEAMOUNT, table)


@pytest.mark.parametrize(
    ("message", "schema", "only_http"),
    [
        (pb.ChatRequest.DESCRIPTOR, ChatRequest, ONLY_HTTP_CHAT),
        (pb.CompletionRequest.DESCRIPTOR, CompletionRequest, ONLY_HTTP_TEXT),
        (pb.EmbedRequest.DESCRIPTOR, EmbeddingRequest, {"encoding_format", "user"}),
        (pb.TokenizeRequest.DESCRIPTOR, TokenizeRequest, set()),
        (pb.DetokenizeRequest.DESCRIPTOR, DetokenizeRequest, set()),
    ],
)
def test_every_parameter_is_there_under_its_name(message: Descriptor, schema, only_http):
    """One that HTTP learns has to be put into the .proto too, or to stand above."""
    assert {field.name for field in message.fields} == set(schema.model_fields) - only_http


SAMPLING = {
    "max_tokens": 7,
    "temperature": 0.5,
    "top_p": 0.25,
    "top_k": -1,
    "min_p": 0.125,
    "n": 2,
    "seed": -(2**63),
    "stop": ["a", "b"],
    "stop_token_ids": [1, 2],
    "presence_penalty": -0.5,
    "frequency_penalty": 1.5,
    "repetition_penalty": 1.25,
    "min_tokens": 0,
    "ignore_eos": True,
    "skip_special_tokens": False,
}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


def test_a_whole_chat_is_the_same_request():
    message = pb.ChatRequest(
        model="m",
        messages=[
            pb.Message(role=pb.ROLE_SYSTEM, content=""),
            pb.Message(role=pb.ROLE_DEVELOPER, content="d", name="n"),
            pb.Message(role=pb.ROLE_USER, content="Wie geht’s?"),
            pb.Message(
                role=pb.ROLE_ASSISTANT,
                reasoning_content="hm",
                tool_calls=[pb.ToolCall(id="1", name="weather", arguments='{"city": "Ulm"}')],
            ),
            pb.Message(role=pb.ROLE_TOOL, content="rain", tool_call_id="1"),
            pb.Message(role=pb.ROLE_ASSISTANT, content="It", prefix=True),
        ],
        tools=[
            pb.Tool(name="weather", description="d", parameters=json.dumps(SCHEMA), strict=True),
            pb.Tool(name="plain"),
        ],
        tool_choice=pb.ToolChoice(function="weather"),
        parallel_tool_calls=False,
        response_format=pb.ResponseFormat(
            json_schema=pb.ResponseFormat.JsonSchema(name="s", schema=json.dumps(SCHEMA), strict=True, description="d")
        ),
        chat_template_kwargs={
            "thinking": pb.TemplateValue(bool_value=False),
            "i": pb.TemplateValue(int_value=3),
            "d": pb.TemplateValue(double_value=0.5),
            "s": pb.TemplateValue(string_value=""),
            "none": pb.TemplateValue(),
        },
        continue_final_message=True,
        add_generation_prompt=False,
        max_completion_tokens=9,
        logit_bias={5: -1.5},
        logprobs=True,
        top_logprobs=3,
        **SAMPLING,
    )
    function = {"name": "weather", "description": "d", "parameters": SCHEMA, "strict": True}
    expected = ChatRequest.model_validate(
        {
            "model": "m",
            "messages": [
                {"role": "system", "content": ""},
                {"role": "developer", "content": "d", "name": "n"},
                {"role": "user", "content": "Wie geht’s?"},
                {
                    "role": "assistant",
                    "reasoning_content": "hm",
                    "tool_calls": [
                        {
                            "id": "1",
                            "type": "function",
                            "function": {"name": "weather", "arguments": '{"city": "Ulm"}'},
                        }
                    ],
                },
                {"role": "tool", "content": "rain", "tool_call_id": "1"},
                {"role": "assistant", "content": "It", "prefix": True},
            ],
            "tools": [{"type": "function", "function": function}, {"type": "function", "function": {"name": "plain"}}],
            "tool_choice": {"type": "function", "function": {"name": "weather"}},
            "parallel_tool_calls": False,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "s", "schema": SCHEMA, "strict": True, "description": "d"},
            },
            "chat_template_kwargs": {"thinking": False, "i": 3, "d": 0.5, "s": "", "none": None},
            "continue_final_message": True,
            "add_generation_prompt": False,
            "max_completion_tokens": 9,
            "logit_bias": {"5": -1.5},
            "logprobs": True,
            "top_logprobs": 3,
            "stream": False,
            **SAMPLING,
        }
    )
    found = chat_request(parse(pb.ChatRequest, message.SerializeToString()), stream=False)
    assert found == expected
    assert found.model_fields_set == expected.model_fields_set


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ([pb.Prompt(text="a")], ["a"]),
        ([pb.Prompt(text="a"), pb.Prompt(text="")], ["a", ""]),
        ([pb.Prompt(token_ids=pb.TokenIds(ids=[1, 2])), pb.Prompt(token_ids=pb.TokenIds(ids=[3]))], [[1, 2], [3]]),
    ],
)
def test_a_whole_completion_is_the_same_request(prompt, expected):
    wanted = {"regex": "[a-z]+"}
    message = pb.CompletionRequest(
        model="m", prompt=prompt, structured_outputs=pb.StructuredOutputs(**wanted), logprobs=0, **SAMPLING
    )
    fields = {"model": "m", "prompt": expected, "structured_outputs": wanted, "logprobs": 0, **SAMPLING}
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    assert completion_request(message, stream=True) == CompletionRequest.model_validate({**fields, **streamed})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([pb.Prompt(text="a"), pb.Prompt(text="b")], ["a", "b"]),
        ([pb.Prompt(token_ids=pb.TokenIds(ids=[1, 2])), pb.Prompt(token_ids=pb.TokenIds(ids=[3]))], [[1, 2], [3]]),
    ],
)
def test_texts_to_embed_are_the_same_request(given, expected):
    message = parse(pb.EmbedRequest, pb.EmbedRequest(model="m", input=given, dimensions=2).SerializeToString())
    assert embed_request(message) == EmbeddingRequest.model_validate({"model": "m", "input": expected, "dimensions": 2})


@pytest.mark.parametrize(
    "given",
    [
        [],
        [pb.Prompt()],
        [pb.Prompt(text="")],
        [pb.Prompt(token_ids=pb.TokenIds())],
        [pb.Prompt(token_ids=pb.TokenIds(ids=[-1]))],
        [pb.Prompt(text="a"), pb.Prompt(token_ids=pb.TokenIds(ids=[1]))],
        [pb.Prompt(text="a")] * 2049,
    ],
    ids=["none", "unset", "empty", "no tokens", "negative", "mixed", "too many"],
)
def test_what_cannot_be_embedded_is_refused(given):
    with pytest.raises(InvalidRequestError) as caught:
        embed_request(pb.EmbedRequest(model="m", input=given))
    assert caught.value.param == "input"


def test_what_is_to_be_tokenized_is_the_same_request():
    whole = pb.TokenizeRequest(
        model="m",
        messages=[pb.Message(role=pb.ROLE_USER, content="hi")],
        return_token_strs=True,
        add_generation_prompt=False,
        continue_final_message=False,
        chat_template_kwargs={"thinking": pb.TemplateValue(bool_value=True)},
        tools=[pb.Tool(name="f")],
    )
    expected = {
        "model": "m",
        "messages": [{"role": "user", "content": "hi"}],
        "return_token_strs": True,
        "add_generation_prompt": False,
        "continue_final_message": False,
        "chat_template_kwargs": {"thinking": True},
        "tools": [{"type": "function", "function": {"name": "f"}}],
    }
    assert tokenize_request(whole) == TokenizeRequest.model_validate(expected)
    text = pb.TokenizeRequest(prompt="", add_special_tokens=False)
    assert tokenize_request(text) == TokenizeRequest(prompt="", add_special_tokens=False)
    assert detokenize_request(pb.DetokenizeRequest(tokens=[5, 6])) == DetokenizeRequest(tokens=[5, 6])
    assert detokenize_request(pb.DetokenizeRequest(model="m")) == DetokenizeRequest(model="m", tokens=[])
    with pytest.raises(InvalidRequestError, match=r"tokens\[1\]"):
        detokenize_request(pb.DetokenizeRequest(tokens=[5, 2**40]))


HI = [pb.Message(role=pb.ROLE_USER, content="hi")]
HI_JSON = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("message", "fields"),
    [
        ({"tool_choice": pb.ToolChoice(mode=pb.ToolChoice.MODE_REQUIRED)}, {"tool_choice": "required"}),
        ({"response_format": pb.ResponseFormat(text={})}, {"response_format": {"type": "text"}}),
        ({"response_format": pb.ResponseFormat(json_object={})}, {"response_format": {"type": "json_object"}}),
        ({"structured_outputs": pb.StructuredOutputs(json="{}")}, {"structured_outputs": {"json": "{}"}}),
        ({"structured_outputs": pb.StructuredOutputs(json_object=True)}, {"structured_outputs": {"json_object": True}}),
        ({"structured_outputs": pb.StructuredOutputs(grammar="g")}, {"structured_outputs": {"grammar": "g"}}),
        (
            {"structured_outputs": pb.StructuredOutputs(choice=pb.StructuredOutputs.Choice(texts=["a", "b"]))},
            {"structured_outputs": {"choice": ["a", "b"]}},
        ),
        ({"structured_outputs": pb.StructuredOutputs()}, {"structured_outputs": {}}),
    ],
)
def test_alternatives_are_told_apart(message, fields):
    found = chat_request(pb.ChatRequest(model="m", messages=HI, **message), stream=False)
    expected = {"model": "m", "messages": HI_JSON, "stream": False, **fields}
    assert found == ChatRequest.model_validate(expected)


def refusal(fields: dict) -> SeamountError:
    """Return what HTTP says of a body."""
    from pydantic import ValidationError

    with pytest.raises(ValidationError) as caught:
        ChatRequest.model_validate(fields)
    return validation_error([{**problem, "loc": ("body", *problem["loc"])} for problem in caught.value.errors()])


@pytest.mark.parametrize(
    ("message", "fields"),
    [
        ({"max_tokens": -1}, {"max_tokens": -1}),
        ({"max_tokens": 2**62}, {"max_tokens": 2**62}),
        ({"n": 2**31}, {"n": 2**31}),
        ({"n": 0}, {"n": 0}),
        ({"temperature": -0.1}, {"temperature": -0.1}),
        ({"temperature": float("nan")}, {"temperature": float("nan")}),
        ({"top_p": float("inf")}, {"top_p": float("inf")}),
        ({"top_logprobs": 21}, {"top_logprobs": 21}),
        ({"stop_token_ids": [-1]}, {"stop_token_ids": [-1]}),
        ({"model": ""}, {"model": None}),
        ({"messages": []}, {"messages": None}),
        ({"messages": [pb.Message(role=pb.ROLE_USER)]}, {"messages": [{"role": "user"}]}),
        ({"messages": [pb.Message(content="x")]}, {"messages": [{"content": "x"}]}),
        (
            {"messages": [pb.Message(role=17, content="x")]},  # none of the enumeration's
            {"messages": [{"role": "17", "content": "x"}]},
        ),
        (
            {"messages": [pb.Message(role=pb.ROLE_USER, content="x", tool_call_id="1")]},
            {"messages": [{"role": "user", "content": "x", "tool_call_id": "1"}]},
        ),
        ({"tool_choice": pb.ToolChoice(mode=9)}, {"tool_choice": "9"}),
        ({"tools": [pb.Tool(name="ä b")]}, {"tools": [{"type": "function", "function": {"name": "ä b"}}]}),
        (
            {"tools": [pb.Tool(name="a", parameters='{"type": 1}')]},
            {"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": 1}}}]},
        ),
        ({"tools": [pb.Tool()]}, {"tools": [{"type": "function", "function": {"name": ""}}]}),
    ],
)
def test_what_may_not_be_is_refused_in_the_same_words(message, fields):
    body = {"model": "m", "messages": HI_JSON, **fields}
    expected = refusal({name: value for name, value in body.items() if value is not None})
    with pytest.raises(InvalidRequestError) as caught:
        chat_request(pb.ChatRequest(**{"model": "m", "messages": HI, **message}), stream=False)
    assert error_body(caught.value) == error_body(expected)
    assert code_of(caught.value) is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [pb.Tool(name="a", parameters="{")]}, "tools[0].function.parameters"),
        (
            {"response_format": pb.ResponseFormat(json_schema=pb.ResponseFormat.JsonSchema(name="s", schema="["))},
            "response_format.json_schema.schema",
        ),
        ({"tools": [pb.Tool(name="a", parameters="[" * 100_000)]}, "tools[0].function.parameters"),
    ],
)
def test_text_that_is_no_json_is_named(fields, param):
    with pytest.raises(InvalidRequestError, match="no JSON") as caught:
        chat_request(pb.ChatRequest(model="m", messages=HI, **fields), stream=False)
    assert caught.value.param == param


def test_bytes_that_are_no_message_and_fields_that_are_not_known_are_refused():
    with pytest.raises(InvalidRequestError, match="cannot be read as seamount.v1.ChatRequest"):
        parse(pb.ChatRequest, b"\xff\xff\xff")
    with pytest.raises(InvalidRequestError, match="cannot be read"):
        parse(pb.ChatRequest, pb.GetModelRequest(model="m").SerializeToString().replace(b"m", b"\xff"))
    deep = pb.ChatRequest(model="m", messages=HI).SerializeToString() + b"\xfa\x3f\x01x"  # field 1023
    with pytest.raises(InvalidRequestError) as caught:
        parse(pb.ChatRequest, deep)
    assert caught.value.code == "unknown_parameter"
    within = pb.ChatRequest(model="m")
    within.messages.add().MergeFromString(HI[0].SerializeToString() + b"\xfa\x3f\x01x")
    with pytest.raises(InvalidRequestError, match="does not know"):
        parse(pb.ChatRequest, within.SerializeToString())


USAGE = {
    "prompt_tokens": 5,
    "completion_tokens": 3,
    "total_tokens": 8,
    "prompt_tokens_details": {"cached_tokens": 2},
    "completion_tokens_details": {"reasoning_tokens": 1},
}
TOP = {"token": "a", "logprob": -0.5, "bytes": [97]}
LOGPROBS = {"content": [{**TOP, "top_logprobs": [TOP, {"token": "b", "logprob": -9999.0, "bytes": [255]}]}]}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def test_whole_answers_lose_nothing():
    message = {"role": "assistant", "content": None, "reasoning_content": "r", "reasoning": "r", "tool_calls": [CALL]}
    choice = {"index": 1, "message": message, "logprobs": LOGPROBS, "finish_reason": "tool_calls", "stop_reason": 0}
    answer = {"id": "i", "created": 4, "model": "m", "choices": [choice], "usage": USAGE}
    found = answers.chat_response(ChatResponse.model_validate(answer))
    assert (found.id, found.created, found.model) == ("i", 4, "m")
    assert found.usage == pb.Usage(prompt_tokens=5, completion_tokens=3, cached_tokens=2, reasoning_tokens=1)
    (got,) = found.choices
    assert (got.index, got.finish_reason) == (1, pb.FINISH_REASON_TOOL_CALLS)
    assert got.WhichOneof("stop_reason") == "stop_token_id"
    assert not got.message.HasField("content")
    assert got.message.reasoning_content == "r"
    assert list(got.message.tool_calls) == [pb.ToolCall(id="c", name="f", arguments="{}")]
    (entry,) = got.logprobs
    assert (entry.token, entry.logprob, entry.token_bytes) == ("a", -0.5, b"a")
    assert [(top.token, top.logprob, top.token_bytes) for top in entry.top_logprobs][1] == ("b", -9999.0, b"\xff")


def test_chunks_lose_nothing():
    delta = {"role": "assistant", "content": "", "tool_calls": [{"index": 2, "function": {"arguments": "{"}}]}
    choice = {"index": 1, "delta": delta, "logprobs": None, "finish_reason": None}
    chunk = {"id": "i", "created": 4, "model": "m", "choices": [choice], "usage": None}
    (got,) = answers.chat_chunk(ChatChunk.model_validate(chunk)).choices
    assert got.delta.HasField("content")
    assert not got.delta.HasField("reasoning_content")
    assert list(got.delta.tool_calls) == [pb.ToolCallDelta(index=2, arguments="{")]
    assert (got.finish_reason, got.WhichOneof("stop_reason")) == (pb.FINISH_REASON_UNSPECIFIED, None)
    columns = {"tokens": ["a"], "token_logprobs": [-1.0], "top_logprobs": [{"a": -1.0, "b": -2.0}], "text_offset": [3]}
    text = {"index": 0, "text": "a", "logprobs": columns, "finish_reason": "stop", "stop_reason": "END"}
    answer = CompletionResponse.model_validate({"id": "i", "created": 4, "model": "m", "choices": [text]})
    found = answers.completion_response(answer)
    assert not found.HasField("usage")
    (got,) = found.choices
    assert (got.text, got.stop_string, got.finish_reason) == ("a", "END", pb.FINISH_REASON_STOP)
    assert (list(got.logprobs.tokens), list(got.logprobs.text_offset)) == (["a"], [3])
    assert dict(got.logprobs.top_logprobs[0].logprobs) == {"a": -1.0, "b": -2.0}


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (core.InvalidRequestError, grpc.StatusCode.INVALID_ARGUMENT),
        (core.ContextTooLongError, grpc.StatusCode.INVALID_ARGUMENT),
        (core.UnauthenticatedError, grpc.StatusCode.UNAUTHENTICATED),
        (core.ForbiddenError, grpc.StatusCode.PERMISSION_DENIED),
        (core.NotFoundError, grpc.StatusCode.NOT_FOUND),
        (core.QuotaError, grpc.StatusCode.RESOURCE_EXHAUSTED),
        (core.QueueFullError, grpc.StatusCode.UNAVAILABLE),
        (core.DrainingError, grpc.StatusCode.UNAVAILABLE),
        (core.WorkerDiedError, grpc.StatusCode.UNAVAILABLE),
        (core.StateUnavailableError, grpc.StatusCode.UNAVAILABLE),
        (core.DeadlineError, grpc.StatusCode.DEADLINE_EXCEEDED),
        (core.EngineError, grpc.StatusCode.INTERNAL),
        (core.BackendError, grpc.StatusCode.INTERNAL),
        (core.IntegrityError, grpc.StatusCode.INTERNAL),
    ],
)
def test_each_error_has_its_status(error, code):
    assert code_of(error("x")) is code


def test_an_error_says_what_http_says_and_when_to_try_again():
    error = core.QueueFullError("Full.", hint="Wait.", retry_after=1.5, param="ä\n")
    assert sentence(error) == "Full. Wait."
    assert metadata(error) == {
        "seamount-code": "queue_full",
        "seamount-param": "\\xe4 ",
        "seamount-hint": "Wait.",
        "retry-after": "2",
        "retry-after-ms": "1500",
        "grpc-retry-pushback-ms": "1500",
    }
    assert metadata(core.QuotaError("x", retry_after=0.25))["retry-after-ms"] == "250"
    assert "grpc-retry-pushback-ms" not in metadata(core.QuotaError("x"))
    assert set(metadata(core.EngineError("x", retry_after=3))) == {"seamount-code"}
