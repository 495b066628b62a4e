"""Sampling parameters refuse what is out of range and name the field."""

from __future__ import annotations

import math

import pytest

from seamount.core.errors import InvalidRequestError
from seamount.core.sampling import MAX_GRAMMAR_CHARS, Grammar, SamplingParams


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", True),
        ("max_tokens", 1.5),
        ("max_tokens", 2**40),
        ("min_tokens", -1),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", 1.1),
        ("seed", 2**63),
        ("n", 0),
        ("n", 1000),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("repetition_penalty", 0.0),
        ("logprobs", 21),
        ("stop", ("",)),
        ("stop", ("a",) * 17),
        ("stop", ("x" * 300,)),
        ("stop_token_ids", (-1,)),
        ("stop", ("half \ud800",)),
        ("grammar", "[ab]"),
        ("stop", None),
        ("stop", 5),
        ("stop_token_ids", None),
        ("stop_token_ids", tuple(range(1025))),
        ("temperature", 10**400),
        ("logit_bias", None),
        ("logit_bias", [1]),
        ("logit_bias", {1: 101.0}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", dict.fromkeys(range(1025), 0.0)),
    ],
)
def test_out_of_range_names_the_field(field: str, value: object) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**{field: value})
    assert caught.value.param == field


def test_min_tokens_beyond_max_tokens_is_refused() -> None:
    with pytest.raises(InvalidRequestError):
        SamplingParams(min_tokens=5, max_tokens=4)


def test_one_stop_string_may_be_given_bare() -> None:
    assert SamplingParams(stop="END").stop == ("END",)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("yaml", "a"),
        ("regex", ""),
        ("json_schema", ""),
        ("json_object", "{}"),
        ("regex", 5),
        ("ebnf", "half \ud800"),
        ("regex", "a" * (MAX_GRAMMAR_CHARS + 1)),
    ],
)
def test_grammars_are_bounded(kind, text) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        Grammar(kind, text)
    assert caught.value.param == "grammar"
