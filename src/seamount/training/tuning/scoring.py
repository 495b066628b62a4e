"""Exact match of a model's answers to held-out examples: what "before" and "after" of a run compare.

Called by `pipeline`, by distillation's, and by `seamount eval --data`. An answer is what stands behind the reasoning,
if any; JSON is compared as JSON. It must not know how tokens are generated.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from seamount.core.sampling import SamplingParams
from seamount.models.config import ModelConfig
from seamount.models.locate import locate_model
from seamount.training.evaluate import Encoder, Generated
from seamount.training.examples.example import Example
from seamount.training.shards.dataset import Dataset

_THINK_END = "</think>"
_SPARE_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Question:
    """A held-out example: the prompt, and the answer that was wanted, both as tokens."""

    prompt: tuple[int, ...]
    wanted: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Score:
    """How many answers were right."""

    num_right: int
    num_items: int

    @property
    def accuracy(self) -> float:
        """Share of right answers, 0 to 1."""
        return self.num_right / self.num_items if self.num_items else 0.0


class Generator(Protocol):
    """What continues prompts, with a count of those that are done; `engine.llm.LLM` is one."""

    def generate(
        self,
        prompts: list[list[int]],
        sampling: list[SamplingParams],
        *,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Sequence[Generated]: ...


def questions(data: Dataset, most: int) -> list[Question]:
    """At most so many questions of a data set, spread over it evenly; of each the last trained stretch is wanted."""
    chosen = np.linspace(0, len(data) - 1, min(most, len(data))).round().astype(int)
    return [_question(data.example(int(index))) for index in chosen]


def _question(example: Example) -> Question:
    trained = np.flatnonzero(example.trained)
    end = int(trained[-1]) + 1
    gaps = np.flatnonzero(np.diff(trained) > 1)
    start = int(trained[gaps[-1] + 1] if len(gaps) else trained[0])
    tokens = example.token_ids.tolist()
    return Question(tuple(tokens[:start]), tuple(tokens[start:end]))


def score(
    generator: Generator,
    encoder: Encoder,
    asked: Sequence[Question],
    *,
    context: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> Score:
    """Answer all questions greedily, and count the right answers.

    Args:
        context: tokens that the generator takes, prompt and answer together.
    """
    answers = generator.generate(
        [list(question.prompt) for question in asked],
        [SamplingParams(max_tokens=min(_room(q), context) - len(q.prompt), temperature=0.0) for q in asked],
        on_progress=on_progress,
    )
    num_right = sum(
        same_answer(
            encoder.decode(answer.token_ids, skip_special_tokens=False),
            encoder.decode(question.wanted, skip_special_tokens=False),
        )
        for question, answer in zip(asked, answers, strict=True)
    )
    return Score(num_right, len(asked))


def _room(question: Question) -> int:
    """Tokens for the question, the wanted answer, and one that is a little longer."""
    return len(question.prompt) + len(question.wanted) + _SPARE_TOKENS


def score_model(
    model: str,
    adapter: Path | None,
    asked: Sequence[Question],
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> Score:
    """As `score`, by an engine that is loaded for it and gone afterwards.

    Args:
        model, adapter: name of an embedded model or a folder, and a folder or None.
    """
    from seamount.engine.llm import LLM

    most = ModelConfig.from_folder(locate_model(model)).max_position
    context = min(max((_room(question) for question in asked), default=_SPARE_TOKENS), most)
    # The engine computes with threads of its own, and leaves torch one; training goes on with those that it had.
    threads = torch.get_num_threads()
    llm = LLM(model, max_model_len=context, adapter=None if adapter is None else str(adapter))
    try:
        return score(llm, llm.prompt_encoder, asked, context=context, on_progress=on_progress)
    finally:
        del llm
        gc.collect()
        torch.set_num_threads(threads)


def same_answer(text: str, wanted: str) -> bool:
    """Whether a raw answer says what the wanted one says, behind the reasoning; JSON in any spelling is the same."""
    first, second = (_final(part) for part in (text, wanted))
    if first == second:
        return True
    try:
        return json.dumps(json.loads(first), sort_keys=True) == json.dumps(json.loads(second), sort_keys=True)
    except ValueError:
        return False


def _final(text: str) -> str:
    return text.rpartition(_THINK_END)[2].strip()
