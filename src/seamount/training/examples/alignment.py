"""What the model has to write behind a prompt for a turn to come out: `own_completion`, `made_completion`.

Called by `rendering`. Templates are written for serving: they may drop reasoning from a finished turn, open it
otherwise than the prompt does, or leave words out. So a template's own text is taken only where it says what the turn
says; else the turn is put together from the prompt's opening and the template's ending; and what cannot be had is an
error, never something else. Pure functions over text; knows no tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from seamount.models.messages import begin_answer
from seamount.models.reasoning import THINK_CLOSE, THINK_OPEN, ReasoningParser
from seamount.models.tools import ToolFormat

# Stands for a turn's words where a template shows what it puts round them; no text that is Unicode's own holds it.
STAND_IN = "\U0010fffc\U0010fffb\U0010fffc"


class AlignmentError(Exception):
    """A turn cannot be written behind its prompt. The text says why, for a person."""


@dataclass(frozen=True, slots=True)
class Turn:
    """An assistant's turn and the texts that the template makes round it.

    Attributes:
        message: the turn, disarmed.
        prompt: the conversation before it, as serving asks for it.
        ends: texts of the tokens that end an answer.
    """

    message: Mapping[str, Any]
    prompt: str
    ends: Sequence[str]

    @property
    def reasoning(self) -> str:
        """What it reasons."""
        return self.message.get("reasoning_content") or ""

    @property
    def content(self) -> str:
        """What it says."""
        return self.message.get("content") or ""

    @property
    def starts_in_reasoning(self) -> bool:
        """Whether the prompt opens the reasoning."""
        return self.prompt.rstrip().endswith(THINK_OPEN)


def own_completion(turn: Turn, whole: str) -> str | None:
    """Return what the template itself writes behind the prompt, end included; None where it writes the turn otherwise.

    Args:
        whole: the conversation with the turn.
    """
    if not whole.startswith(turn.prompt):
        return None
    completion = _to_end(whole[len(turn.prompt) :], turn.ends)
    return completion if completion and _missing(turn, completion) is None else None


def made_completion(turn: Turn, stand_in: str, bare: str, calls: ToolFormat | None, *, writes_tags: bool) -> str:
    """Return what the model has to write behind the prompt, put together.

    Args:
        stand_in: the conversation with `STAND_IN` in the turn's place.
        bare: the conversation with the turn, its reasoning left out.
        calls: how the model writes tool calls, for templates that leave them out or do not end them.
        writes_tags: the model opens its reasoning by itself, since the template never does.

    Raises:
        AlignmentError: the template leaves no place for what the turn says, or does not end it.
    """
    opening, found, rest = stand_in.partition(STAND_IN)
    end = _to_end(rest, turn.ends)
    if not found or end is None:
        raise AlignmentError("cannot be found in what the chat template makes of it, or not the token that ends it")
    if turn.reasoning and not turn.starts_in_reasoning and not writes_tags:
        raise AlignmentError("has reasoning, and the model's chat template has no place for it here")
    problem = "is written by the chat template behind another opening than its prompt has"
    endings = [bare[len(opening) :]] if bare.startswith(opening) else []
    if turn.message.get("tool_calls") and calls is not None:
        endings.append(turn.content + _written(calls, turn.message["tool_calls"]) + end)
    for ending in endings:
        if turn.starts_in_reasoning:
            text = begin_answer(turn.prompt, {"reasoning_content": turn.reasoning, "content": ending})[0]
            completion = text[len(turn.prompt) :]
        elif turn.reasoning:
            completion = f"{THINK_OPEN}\n{turn.reasoning}\n{THINK_CLOSE}\n\n{ending}"
        elif opening == turn.prompt:
            completion = ending
        else:
            continue
        cut = _to_end(completion, turn.ends)
        missing = "is not ended by the chat template" if cut is None else _missing(turn, cut)
        if cut is not None and missing is None:
            return cut
        problem = missing or problem
    raise AlignmentError(problem)


def _written(calls: ToolFormat, made: Sequence[Mapping[str, Any]]) -> str:
    """Write calls as the model does."""
    texts = []
    for call in made:
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        texts.append("".join((*calls.before_name, name, *calls.after_name, text, *calls.after_arguments)))
    if len(texts) > 1 and not calls.several:
        raise AlignmentError("makes several tool calls, and this model makes one at a time")
    return "".join((*calls.first, calls.between.join(texts), *calls.last))


def _to_end(completion: str, ends: Sequence[str]) -> str | None:
    """Return the text up to and with the first token that ends an answer; None without one."""
    places = [(completion.find(end), end) for end in ends]
    place, end = min(((place, end) for place, end in places if place >= 0), default=(-1, ""))
    return None if place < 0 else completion[: place + len(end)]


def _missing(turn: Turn, completion: str) -> str | None:
    """Say which of the turn's words the completion lacks, read as a server reads it; None where it has all."""
    end = next(end for end in turn.ends if completion.endswith(end))
    parser = ReasoningParser(starts_in_reasoning=turn.starts_in_reasoning)
    first, last = parser.push(completion.removesuffix(end)), parser.flush()
    reasoning, content = first.reasoning + last.reasoning, first.content + last.content
    if reasoning.strip() != turn.reasoning.strip():
        return "has reasoning that the chat template does not write as it is"
    said, calls = turn.content.strip(), turn.message.get("tool_calls") or []
    if not calls and content.strip() != said:
        return "has words that the chat template does not write as they are"
    if calls and not content.strip().startswith(said):
        return "has words beside its tool calls, which the chat template leaves out"
    rest = content.strip()[len(said) :]
    for call in calls:
        _, found, rest = rest.partition(call["function"]["name"])
        if not found:
            return "has tool calls that the chat template leaves out"
    return None
