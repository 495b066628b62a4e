"""Texts of prompts and turns become tokens, several turns to an example where they fit: `plan`, `join`.

Called by `rendering`. A turn is learned within a later one's prompt only if that prompt's tokens begin with its own
prompt's and then with the ones that the model would have written. Knows no templates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from seamount.models.tokenizer import TextTokenizer

from .alignment import Turn
from .example import Example


@dataclass(frozen=True, slots=True)
class Stretch:
    """A turn within a prompt: what stands before it, behind the one before; and its words."""

    number: int
    before: str
    words: str


@dataclass(frozen=True, slots=True)
class Plan:
    """An example that is to be: a prompt, turns that are learned within it, and the turn behind it."""

    number: int
    prompt: str
    words: str
    literals: dict[str, str]
    within: tuple[Stretch, ...] = ()

    def texts(self) -> tuple[list[str], list[str]]:
        """Return what is encoded as a beginning, and what in the middle of a text."""
        starts = [self.prompt, *(stretch.before for stretch in self.within[:1])]
        insides = [text for stretch in self.within for text in (stretch.before, stretch.words)][1:]
        return starts, [*insides, self.words]


def plan(
    turns: Mapping[int, Turn], completions: Mapping[int, str], numbers: Sequence[int], literals: dict[str, str]
) -> list[Plan]:
    """Return the fewest examples in which each of these turns is learned once, the one with the last turn first."""
    plans = []
    left = list(numbers)
    while left:
        last = left.pop()
        prompt = turns[last].prompt
        within: list[Stretch] = []
        at = 0
        for number in left:
            start = len(turns[number].prompt)
            words = completions[number]
            if start >= at and prompt.startswith(turns[number].prompt) and prompt.startswith(words, start):
                within.append(Stretch(number, prompt[at:start], words))
                at = start + len(words)
        plans.append(Plan(last, prompt, completions[last], literals, tuple(within)))
        left = [number for number in left if number not in {stretch.number for stretch in within}]
    return plans


def join(plans: Sequence[Plan], tokenizer: TextTokenizer) -> list[tuple[Example, list[int]]]:
    """Return each plan's example, and the turns that its prompt's tokens did not let it learn after all.

    Raises:
        InvalidRequestError: the tokenizer cannot write a text.
    """
    texts = [each.texts() for each in plans]
    starts = iter(
        tokenizer.encode_many(
            [(t, p.literals) for p, (begun, _) in zip(plans, texts, strict=True) for t in begun], inside=False
        )
    )
    insides = iter(
        tokenizer.encode_many(
            [(t, p.literals) for p, (_, inner) in zip(plans, texts, strict=True) for t in inner], inside=True
        )
    )
    found = []
    for each in plans:
        prompt = next(starts)
        spans: list[tuple[int, int]] = []
        unlearned: list[int] = []
        at = 0
        for place, stretch in enumerate(each.within):
            before = next(insides) if place else next(starts)
            words = next(insides)
            start = at + len(before)
            end = start + len(words)
            if unlearned or prompt[at:start] != before or prompt[start:end] != words:
                unlearned.append(stretch.number)
                continue
            spans.append((start, end))
            at = end
        words = next(insides)
        spans.append((len(prompt), len(prompt) + len(words)))
        found.append((example_of((*prompt, *words), spans), unlearned))
    return found


def example_of(token_ids: Sequence[int], spans: Sequence[tuple[int, int]]) -> Example:
    """Return the example of these tokens in which these stretches are learned, but never its first token."""
    trained = np.zeros(len(token_ids), dtype=np.bool_)
    for start, end in spans:
        trained[max(start, 1) : end] = True
    return Example(np.array(token_ids, dtype=np.int32), trained)
