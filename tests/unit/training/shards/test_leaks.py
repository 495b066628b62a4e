"""Leaks: what gives an evaluation example away is found, and what all examples of a task share is not."""

import numpy as np
import pytest

from seamount.training.examples.example import Example
from seamount.training.shards import leaks
from seamount.training.shards.dataset import ExampleList

MARKER, SYSTEM = 1, list(range(100, 130))  # a system prompt that every example begins with


def chat(prompt, answer):
    tokens = [MARKER, *SYSTEM, *prompt, MARKER, *answer]
    flags = np.arange(len(tokens)) >= len(tokens) - len(answer)
    return Example(np.array(tokens, dtype=np.int32), flags)


def text(tokens):
    return Example(np.array(tokens, dtype=np.int32), np.arange(len(tokens)) > 0)


def words(seed, count):
    return np.random.default_rng(seed).integers(1000, 50_000, count).tolist()


def found(train, evaluation):
    return [
        (leak.train, leak.evaluation, leak.kind) for leak in leaks.find(ExampleList(train), ExampleList(evaluation))
    ]


TRAIN = [chat(words(seed, 40), words(seed + 500, 10)) for seed in range(100)]


def test_examples_that_share_only_the_wording_of_the_task_are_no_leak():
    evaluation = [chat(words(seed, 40), words(seed + 500, 10)) for seed in range(200, 230)]
    assert found(TRAIN, evaluation) == []
    assert found(TRAIN, evaluation[:1]) == []


def test_the_same_example_is_named():
    assert found(TRAIN, [chat(words(900, 40), [5]), TRAIN[7]]) == [(7, 1, "example")]


def test_the_same_prompt_with_another_answer_is_named():
    assert found(TRAIN, [chat(words(3, 40), [7, 8, 9])]) == [(3, 0, "prompt")]


def test_a_prompt_is_all_that_stands_before_the_last_answer():
    greeting = [50, 51]

    def two_turns(question):
        tokens = [MARKER, *greeting, 60, 61, MARKER, *question, 70]
        flags = np.isin(np.array(tokens), [60, 61, 70])
        return Example(np.array(tokens, dtype=np.int32), flags)

    train = [two_turns([80, seed]) for seed in range(200, 220)]
    assert found(train, [two_turns([80, 999])]) == []
    assert found(train, [two_turns([80, 205])]) == [(5, 0, "example")]


@pytest.mark.parametrize(("kept", "is_leak"), [(38, True), (30, True), (20, False), (12, False)])
def test_long_shared_stretches_are_named_with_their_share(kept, is_leak):
    evaluation = [chat([*words(3, 40)[:kept], *words(901, 42 - kept)], words(902, 4))]
    result = leaks.find(ExampleList(TRAIN), ExampleList(evaluation))
    assert [(leak.train, leak.kind) for leak in result] == ([(3, "overlap")] if is_leak else [])
    if is_leak:
        assert 0.5 <= result[0].share < 1
        assert str(result[0]) == (
            f"evaluation example 1 shares {result[0].share:.0%} of its 13-token stretches with training example 4"
        )


def test_texts_are_compared_by_what_they_share_and_not_by_their_first_token():
    train = [text([0, *words(seed, 200)]) for seed in range(5)]
    part = words(2, 200)[50:150]
    assert found(train, [text([0, *part]), text([0, *words(77, 100)])]) == [(2, 0, "overlap")]


def test_examples_of_fewer_tokens_than_a_stretch_are_compared_whole():
    short = [text([5, 6, 7]), text([5, 6, 8])]
    assert found(short, [text([5, 6, 8]), text([5, 6, 9])]) == [(1, 0, "example")]


def test_a_stretch_that_spans_two_examples_is_none():
    train = [text(words(1, 100)), text(words(2, 100))]
    assert found(train, [text([*words(1, 100)[90:], *words(2, 100)[:10]])]) == []


def test_leaks_are_found_across_blocks_and_named_ten_times_at_most(monkeypatch):
    monkeypatch.setattr(leaks, "_READ_TOKENS", 300)
    train = [*TRAIN[:30], *[chat(words(3, 40), [seed]) for seed in range(30)]]
    result = leaks.find(ExampleList(train), ExampleList([chat(words(3, 40), [999]), TRAIN[29]]))
    assert [(leak.train, leak.kind) for leak in result if leak.evaluation == 1] == [(29, "example")]
    assert [leak.train for leak in result if leak.evaluation == 0] == [3, *range(30, 39)]


def test_nothing_to_compare_is_no_leak():
    assert found([], TRAIN[:3]) == []
    assert found(TRAIN, []) == []


def test_resemblances_do_not_crowd_out_the_same_example(monkeypatch):
    monkeypatch.setattr(leaks, "_MOST_NAMED", 2)
    asked = words(1, 100)
    train = [*(text([*asked[:80], *words(seed, 9)]) for seed in (2, 3)), text(asked)]
    assert found(train, [text(asked)]) == [(0, 0, "overlap"), (2, 0, "example")]
