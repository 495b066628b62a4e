"""One training or evaluation item, and the rule that keeps evaluation items out of training.

Called by every skill in this folder, by `pretraining.corpus` and by `training.evaluate`. It must not know how a
conversation is rendered or tokenised.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

Message = dict[str, Any]
Tool = dict[str, Any]

LANGUAGES = ("en", "zh")
HELD_OUT_ONE_IN = 20


@dataclass(frozen=True, slots=True)
class Item:
    """A conversation in OpenAI's form that ends in the wanted assistant message.

    `key` names the combination that makes the item new (operands, slot values, question and wording) without
    the language, so the same combination is held out in both languages.
    """

    skill: str
    language: str
    messages: tuple[Message, ...]
    tools: tuple[Tool, ...]
    key: str

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The messages before the wanted answer."""
        return self.messages[:-1]

    @property
    def answer(self) -> Message:
        """The wanted assistant message."""
        return self.messages[-1]

    @property
    def held_out(self) -> bool:
        """Whether this combination is kept for evaluation."""
        return is_held_out(self.skill, self.key)


def is_held_out(skill: str, key: str) -> bool:
    """Whether the combination `key` of `skill` is never trained on: one in twenty, by a stable hash."""
    digest = blake2b(f"{skill}\0{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_ONE_IN == 0


def question(skill: str, language: str, key: str, text: str, answer: str, reasoning: str = "") -> Item:
    """An item of one user message and one assistant message, with reasoning where `reasoning` is not empty."""
    reply: Message = {"role": "assistant", "content": answer}
    if reasoning:
        reply["reasoning_content"] = reasoning
    return Item(skill, language, ({"role": "user", "content": text}, reply), (), key)
