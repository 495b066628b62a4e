"""Exact-match evaluation of a model on held-out items of the skills, by skill and language.

Called by `seamount eval` with a real `LLM`, and by the training loop, which generates in its own way and
uses `score` alone. It must not know how tokens are generated.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rich.table import Table

from seamount.core.errors import InvalidRequestError
from seamount.core.sampling import SamplingParams
from seamount.training.pretraining.bpe import CALL_BEGIN, CALL_END, CALL_SEPARATOR, CALLS_BEGIN, EOS, PAD, THINK_END
from seamount.training.skills import LANGUAGES, SKILLS, Item, draw, random_of

EVALUATION_SEED = 20250101
MAX_ANSWER_TOKENS = 256
_MAX_FAILURES_KEPT = 3


class Generated(Protocol):
    """A finished continuation; `core.requests.Completion` is one."""

    @property
    def token_ids(self) -> Sequence[int]: ...


class Generator(Protocol):
    """What continues prompts; `engine.llm.LLM` is one."""

    def generate(self, prompts: list[list[int]], sampling: SamplingParams) -> Sequence[Generated]: ...


class Rendered(Protocol):
    """An encoded conversation; `models.prompt.EncodedPrompt` is one."""

    @property
    def token_ids(self) -> Sequence[int]: ...


class Encoder(Protocol):
    """What turns conversations to token ids and back; `models.prompt.PromptEncoder` is one."""

    def encode_chat(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        template_kwargs: dict[str, Any] | None = None,
    ) -> Rendered: ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str: ...


@dataclass(frozen=True, slots=True)
class Answer:
    """A model's output taken apart; `calls` are pairs of function name and arguments as JSON text."""

    reasoning: str
    content: str
    calls: tuple[tuple[str, str], ...]


def parse(text: str, *, thinking: bool = True) -> Answer:
    """Take apart the raw text (special tokens kept) that follows a generation prompt.

    With `thinking` the prompt ends inside the reasoning; output that never leaves it has no content and no
    calls.
    """
    text = text.split(EOS, 1)[0].replace(PAD, "")
    reasoning = ""
    if thinking:
        reasoning, _, text = text.partition(THINK_END)
    content, _, rest = text.partition(CALLS_BEGIN)
    calls = []
    for piece in rest.split(CALL_BEGIN)[1:]:
        name, _, arguments = piece.partition(CALL_END)[0].partition(CALL_SEPARATOR)
        calls.append((name.strip(), arguments.strip()))
    return Answer(reasoning.strip(), content.strip(), tuple(calls))


def score(item: Item, text: str, *, thinking: bool = True) -> bool:
    """Whether the raw output `text` is the wanted answer to `item`.

    Content must be equal; JSON content and the arguments of calls are compared as JSON, with their order of
    keys and their types. With thinking off, arithmetic shows its steps in the content and its last line
    counts.
    """
    answer = parse(text, thinking=thinking)
    wanted_calls = item.answer.get("tool_calls") or ()
    if wanted_calls or answer.calls:
        wanted = [(call["function"]["name"], call["function"]["arguments"]) for call in wanted_calls]
        return (
            not answer.content
            and len(wanted) == len(answer.calls)
            and all(
                name == wanted_name and _same_json(arguments, wanted_arguments)
                for (name, arguments), (wanted_name, wanted_arguments) in zip(answer.calls, wanted, strict=True)
            )
        )
    content, expected = answer.content, str(item.answer["content"]).strip()
    if item.skill == "extraction":
        return _same_json(content, expected)
    if item.skill == "arithmetic" and not thinking:
        content = content.rsplit("\n", 1)[-1].strip()
    return content == expected


def _same_json(text: str, wanted: str) -> bool:
    try:
        value = json.loads(text)
    except ValueError:
        return False
    # Written again, so that 7, 7.0, "7" and true stay different while blanks between tokens do not matter.
    return json.dumps(value) == json.dumps(json.loads(wanted))


def held_out_items(skill: str, language: str, num_items: int, seed: int = EVALUATION_SEED) -> list[Item]:
    """`num_items` different held-out combinations, fewer where the skill has no more; the same for the same seed."""
    rng = random_of("held-out", skill, language, seed)
    found: dict[str, Item] = {}
    misses = 0
    while len(found) < num_items and misses < 200:
        item = draw(rng, skill, language, held_out=True)
        misses = misses + 1 if item.key in found else 0
        found.setdefault(item.key, item)
    return list(found.values())


@dataclass(frozen=True, slots=True)
class Failure:
    """One wrong answer, to be looked at."""

    skill: str
    language: str
    question: str
    wanted: str
    output: str


@dataclass(frozen=True, slots=True)
class Cell:
    """The score of one skill in one language."""

    skill: str
    language: str
    num_right: int
    num_items: int

    @property
    def share(self) -> float:
        """Right answers per item, 0 to 1."""
        return self.num_right / self.num_items if self.num_items else 0.0


@dataclass(frozen=True, slots=True)
class Report:
    """Scores by skill and language, and a few wrong answers of each."""

    model: str
    thinking: bool
    cells: tuple[Cell, ...]
    failures: tuple[Failure, ...]

    @property
    def overall(self) -> Cell:
        """All items together."""
        right = sum(cell.num_right for cell in self.cells)
        return Cell("all", "all", right, sum(cell.num_items for cell in self.cells))

    def table(self) -> Table:
        """The scores as a table for a terminal: a row for each skill, a column for each language."""
        languages = list(dict.fromkeys(cell.language for cell in self.cells))
        table = Table(title=f"{self.model}: exact match on held-out items")
        table.add_column("skill")
        for language in languages:
            table.add_column(language, justify="right")
        by_place = {(cell.skill, cell.language): cell for cell in self.cells}
        for skill in dict.fromkeys(cell.skill for cell in self.cells):
            row = [_shown(by_place[skill, language]) for language in languages if (skill, language) in by_place]
            table.add_row(skill, *row)
        table.add_section()
        totals = []
        for language in languages:
            cells = [cell for cell in self.cells if cell.language == language]
            total = Cell("all", language, sum(c.num_right for c in cells), sum(c.num_items for c in cells))
            totals.append(_shown(total))
        table.add_row("all", *totals)
        table.caption = f"overall {_shown(self.overall)}"
        return table

    def to_json(self) -> str:
        """The report as JSON text: counts and shares for each cell and overall, and the kept wrong answers."""
        cells = [
            {
                "skill": cell.skill,
                "language": cell.language,
                "num_right": cell.num_right,
                "num_items": cell.num_items,
                "share": round(cell.share, 4),
            }
            for cell in (*self.cells, self.overall)
        ]
        failures = [
            {name: getattr(failure, name) for name in ("skill", "language", "question", "wanted", "output")}
            for failure in self.failures
        ]
        report = {"model": self.model, "thinking": self.thinking, "cells": cells, "failures": failures}
        return json.dumps(report, ensure_ascii=False, indent=2)


def evaluate(
    llm: Generator,
    encoder: Encoder,
    *,
    model: str = "seamount-tiny",
    skills: Iterable[str] | None = None,
    languages: Iterable[str] = LANGUAGES,
    num_items: int = 50,
    seed: int = EVALUATION_SEED,
    thinking: bool = True,
    progress: Callable[[Cell], None] | None = None,
) -> Report:
    """Ask `llm` greedily for `num_items` held-out items of each skill and language and score the answers.

    One batch for each skill and language; `progress` gets each score as it comes.

    Raises:
        InvalidRequestError: an unknown skill or language.
    """
    skills = tuple(SKILLS if skills is None else skills)
    languages = tuple(languages)
    _check_known("skill", skills, SKILLS)
    _check_known("language", languages, LANGUAGES)
    sampling = SamplingParams(temperature=0.0, max_tokens=MAX_ANSWER_TOKENS)
    cells: list[Cell] = []
    failures: list[Failure] = []
    for skill in skills:
        for language in languages:
            items = held_out_items(skill, language, num_items, seed)
            prompts = [
                list(
                    encoder.encode_chat(
                        item.prompt, tools=item.tools or None, template_kwargs={"thinking": thinking}
                    ).token_ids
                )
                for item in items
            ]
            outputs = [
                encoder.decode(result.token_ids, skip_special_tokens=False)
                for result in llm.generate(prompts, sampling)
            ]
            pairs = list(zip(items, outputs, strict=True))
            wrong = [pair for pair in pairs if not score(*pair, thinking=thinking)]
            failures.extend(_failure(*pair) for pair in wrong[:_MAX_FAILURES_KEPT])
            cells.append(Cell(skill, language, len(items) - len(wrong), len(items)))
            if progress is not None:
                progress(cells[-1])
    return Report(model, thinking, tuple(cells), tuple(failures))


def _check_known(what: str, names: Sequence[str], known: Iterable[str]) -> None:
    if unknown := [name for name in names if name not in known]:
        raise InvalidRequestError(f"There is no {what} {unknown[0]!r}.", hint=f"Known: {', '.join(known)}.", param=what)


def _failure(item: Item, output: str) -> Failure:
    question = next(m["content"] for m in reversed(item.messages) if m["role"] == "user")
    wanted = item.answer.get("content") or json.dumps(item.answer.get("tool_calls"), ensure_ascii=False)
    return Failure(item.skill, item.language, question, wanted, output)


def _shown(cell: Cell) -> str:
    return f"{100 * cell.share:.1f} % ({cell.num_right}/{cell.num_items})"
