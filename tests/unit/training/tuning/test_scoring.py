"""What counts as the right answer, and which stretch of an example was asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from seamount.training.examples.example import Example
from seamount.training.shards.dataset import ExampleList
from seamount.training.tuning.scoring import Question, questions, same_answer, score, score_model


@pytest.mark.parametrize(
    ("text", "wanted", "right"),
    [
        ("42", "42", True),
        (" 42\n", "42", True),
        ("17 + 25</think>42", "other steps</think>42", True),
        ("42</think>41", "</think>42", False),
        ('{"a": 1, "b": 2}', '{"b":2,"a":1}', True),
        ('{"a": 1}', '{"a": 1.0}', False),
        ('{"a": true}', '{"a": 1}', False),
        ("2024-03-03", "2024-3-3", False),
        ("", "42", False),
    ],
)
def test_answers_are_compared_behind_the_reasoning(text: str, wanted: str, right: bool) -> None:
    assert same_answer(text, wanted) is right


def test_the_last_trained_stretch_is_what_was_asked_for() -> None:
    trained = np.array([False, True, True, False, False, True, True, True, False])
    (asked,) = questions(ExampleList([Example(np.arange(9, dtype=np.int32), trained)]), 10)
    assert asked.prompt == (0, 1, 2, 3, 4)
    assert asked.wanted == (5, 6, 7)


def test_questions_are_spread_over_the_data() -> None:
    rows = [Example(np.array([index, index], np.int32), np.array([False, True])) for index in range(100)]
    assert [asked.wanted[0] for asked in questions(ExampleList(rows), 5)] == [0, 25, 50, 74, 99]
    assert len(questions(ExampleList(rows), 1000)) == 100


def test_training_goes_on_with_its_own_threads_after_an_engine_has_answered() -> None:
    # A resumed run scores nothing before it: with other threads than the first it would come to other weights.
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        asked = questions(ExampleList([Example(np.array([0, 5, 6], np.int32), np.array([False, False, True]))]), 1)
        assert score_model("seamount-tiny", None, asked).num_items == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


class Parrot:
    """Continues every prompt with its own last token."""

    def generate(self, prompts: list[list[int]], sampling: object, *, on_progress: object = None) -> list[Parrot]:
        return [Parrot().saying(prompt[-1:]) for prompt in prompts]

    def saying(self, tokens: list[int]) -> Parrot:
        self.token_ids = tokens
        return self

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = True) -> str:
        return " ".join(map(str, token_ids))

    def encode_chat(self, *_: object, **__: object) -> object:
        raise NotImplementedError


def test_right_answers_are_counted() -> None:
    rows = [(1, 1), (2, 2), (3, 4)]
    data = ExampleList([Example(np.array(row, np.int32), np.array([False, True])) for row in rows])
    found = score(Parrot(), Parrot(), questions(data, 10), context=100)
    assert (found.num_right, found.num_items) == (2, 3)
    assert found.accuracy == pytest.approx(2 / 3)


def test_each_question_gets_room_for_its_own_answer_within_the_context() -> None:
    asked = [Question((1,) * 50, (2,) * 3), Question((1,) * 5, (2,) * 90)]
    seen: list[int | None] = []

    class Counting(Parrot):
        def generate(self, prompts: Any, sampling: Any, *, on_progress: object = None) -> list[Parrot]:
            seen.extend(one.max_tokens for one in sampling)
            return super().generate(prompts, sampling)

    score(Counting(), Counting(), asked, context=110)
    assert seen == [3 + 32, 105]
    assert score_model("seamount-tiny", None, asked).num_items == 2
