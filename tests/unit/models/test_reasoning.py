"""Reasoning and answer are told apart, however the text is cut."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seamount.models.reasoning import ReasoningParser


def split(pieces: list[str], *, starts_in_reasoning: bool) -> tuple[str, str]:
    parser = ReasoningParser(starts_in_reasoning=starts_in_reasoning)
    deltas = [parser.push(piece) for piece in pieces] + [parser.flush()]
    return "".join(delta.reasoning for delta in deltas), "".join(delta.content for delta in deltas)


CASES = [
    # R1: the prompt opened the tag
    (True, "I think.\n</think>\n\nAnswer.\n", ("I think.", "Answer.\n")),
    (True, "\nI think.</think>Answer", ("I think.", "Answer")),
    (True, "never closed\n", ("never closed\n", "")),
    (True, "<think>\ndoubled</think>x", ("doubled", "x")),
    (True, "</think>only answer", ("", "only answer")),
    (True, "a < b </thin </think> c", ("a < b </thin ", " c")),
    (True, "para one\n\npara two\n\n</think>\n\nx\n\ny", ("para one\n\npara two", "x\n\ny")),
    # the model writes both tags itself
    (False, "<think>\nI think.\n</think>\n\nAnswer", ("I think.", "Answer")),
    (False, "\n<think>x</think>y", ("x", "y")),
    (False, "<think>\n\n</think>\n\nAnswer", ("", "Answer")),
    # no reasoning
    (False, "Just an answer with <think> and </think> in it", ("", "Just an answer with <think> and </think> in it")),
    (False, "\n\n  indented", ("", "\n\n  indented")),
    (False, "<thi", ("", "<thi")),
    (False, "", ("", "")),
    (True, "x</think>a</think>b", ("x", "a</think>b")),
]


@pytest.mark.parametrize(("starts", "text", "expected"), CASES)
def test_whole_and_character_by_character(starts: bool, text: str, expected: tuple[str, str]) -> None:
    assert split([text], starts_in_reasoning=starts) == expected
    assert split(list(text), starts_in_reasoning=starts) == expected


def test_certain_text_is_not_held_back() -> None:
    parser = ReasoningParser(starts_in_reasoning=True)
    assert parser.push("One, ").reasoning == "One, "
    assert parser.push("two <").reasoning == "two "
    assert parser.push("b").reasoning == "<b"
    delta = parser.push("</think>\nyes")
    assert (delta.reasoning, delta.content) == ("", "yes")


PIECES = st.sampled_from(["<think>", "</think>", "<", "</", "think", ">", "\n", " ", "a", "你", "</thin", "<th"])


@given(st.lists(PIECES, max_size=12), st.lists(st.integers(0, 60), max_size=8), st.booleans())
def test_any_cut_gives_the_same_totals(pieces: list[str], cuts: list[int], starts: bool) -> None:
    text = "".join(pieces)
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    parts = [text[a:b] for a, b in pairwise(edges)]
    assert split(parts, starts_in_reasoning=starts) == split([text], starts_in_reasoning=starts)


@given(st.text(alphabet="ab <>/think\n", max_size=40), st.booleans())
def test_nothing_but_tags_and_newlines_is_lost(text: str, starts: bool) -> None:
    reasoning, content = split([text], starts_in_reasoning=starts)
    kept = (reasoning + content).replace("\n", "")
    bare = text.replace("\n", "")
    if "<think>" not in text and "</think>" not in text:
        assert kept == bare
