"""The codec carries every message unchanged and turns foreign bytes into one typed error."""

from __future__ import annotations

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seamount.core.errors import (
    BackendError,
    ContextTooLongError,
    EngineError,
    error_from_fields,
    error_to_fields,
)
from seamount.core.requests import Chunk, PositionLogprobs, Request, TokenLogprob
from seamount.core.sampling import Grammar, SamplingParams
from seamount.engine.messages import CODEC, Abort, Stepped, Submit

logprob = st.builds(TokenLogprob, st.integers(0, 2**31), st.floats(-100, 0), st.text(max_size=5))
chunk = st.builds(
    Chunk,
    request_id=st.text(max_size=5),
    token_ids=st.lists(st.integers(0, 2**31)).map(tuple),
    text=st.text(),
    logprobs=st.lists(st.builds(PositionLogprobs, logprob, st.lists(logprob, max_size=2).map(tuple)), max_size=2).map(
        tuple
    ),
    finish_reason=st.sampled_from([None, "stop", "length"]),
    stop_reason=st.one_of(st.none(), st.text(max_size=3), st.integers(0, 9)),
)


@given(st.lists(chunk, max_size=3).map(tuple))
def test_chunks_arrive_as_sent(chunks) -> None:
    from seamount.core.requests import EngineStats

    message = Stepped(chunks, EngineStats(num_running=3))
    assert CODEC.decode(CODEC.encode(message)) == message


def test_requests_arrive_as_sent() -> None:
    grammar = Grammar("regex", "a+")
    sampling = SamplingParams(stop=("a", "b"), logit_bias={5: -1.5}, seed=-(2**63), max_tokens=4, grammar=grammar)
    message = Submit(Request(id="x", prompt_token_ids=(1, 2, 3), sampling=sampling))
    assert CODEC.decode(CODEC.encode(message)) == message


@given(st.binary(max_size=200))
def test_random_bytes_end_in_a_typed_error(data: bytes) -> None:
    with pytest.raises(BackendError):
        CODEC.decode(data)


@pytest.mark.parametrize(
    "body",
    [
        ["Abort", [5]],
        ["Abort", []],
        ["Abort", ["a", "b"]],
        ["Exec", ["a"]],
        ["Submit", [["id", [1], ["not", "sampling"], True]]],
        {"Abort": 1},
        ["Stepped", [[], [0] * 3]],
    ],
)
def test_a_message_of_the_wrong_form_is_refused(body) -> None:
    with pytest.raises(BackendError):
        CODEC.decode(msgpack.packb(body))


def test_only_listed_types_are_sent() -> None:
    with pytest.raises(TypeError):
        CODEC.encode(SamplingParams())
    assert CODEC.decode(CODEC.encode(Abort("a"))) == Abort("a")


def test_an_error_survives_the_trip_between_processes() -> None:
    error = ContextTooLongError("too long", hint="shorten", param="prompt")
    back = error_from_fields(error_to_fields(error))
    assert type(back) is ContextTooLongError
    assert (back.message, back.hint, back.param, back.code) == (
        "too long",
        "shorten",
        "prompt",
        "context_length_exceeded",
    )
    assert type(error_from_fields({"kind": "NoSuchError", "code": "c", "message": "m"})) is EngineError
