"""A terminal conversation as data: turns, the messages to send, and what a saved file holds.

Used by `cli.chat`. Pure: knows neither the terminal nor a model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field


@dataclass
class Turn:
    """One question and its answer; `stopped` when the answer was cut short by the person who asked."""

    question: str
    reasoning: str = ""
    content: str = ""
    stopped: bool = False


@dataclass
class Conversation:
    """A system prompt and the turns so far.

    Attributes:
        system: the system prompt; None for none.
        turns: answered turns, oldest first.
        last_question: what `/retry` asks again, kept also when no answer came.
    """

    system: str | None = None
    turns: list[Turn] = field(default_factory=list)
    last_question: str | None = None

    def messages(self, question: str) -> list[dict[str, str]]:
        """Return what to send for a new question. Earlier reasoning is left out, as DeepSeek asks for."""
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns:
            messages.append({"role": "user", "content": turn.question})
            messages.append({"role": "assistant", "content": turn.content})
        messages.append({"role": "user", "content": question})
        return messages

    def add(self, turn: Turn) -> None:
        """Keep a turn. One without an answer is not kept: templates want question and answer in turn."""
        self.last_question = turn.question
        if turn.content:
            self.turns.append(turn)

    def take_back(self) -> str | None:
        """Forget the answer to the last question and return the question; None when there was none."""
        if self.turns and self.turns[-1].question == self.last_question:
            self.turns.pop()
        return self.last_question

    def clear(self) -> None:
        """Forget every turn; the system prompt stays."""
        self.turns.clear()
        self.last_question = None

    def to_json(self) -> str:
        """Return the conversation as OpenAI messages, reasoning included."""
        messages: list[dict[str, str]] = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns:
            messages.append({"role": "user", "content": turn.question})
            answer = {"role": "assistant", "content": turn.content}
            messages.append(answer | ({"reasoning_content": turn.reasoning} if turn.reasoning else {}))
        return json.dumps(messages, ensure_ascii=False, indent=2) + "\n"

    def to_markdown(self) -> str:
        """Return the conversation as a readable document."""
        parts = [f"**System**\n\n{self.system}"] if self.system else []
        for turn in self.turns:
            parts.append(f"**You**\n\n{turn.question}")
            if turn.reasoning:
                quoted = "\n".join(f"> {line}".rstrip() for line in turn.reasoning.splitlines())
                parts.append(f"**Reasoning**\n\n{quoted}")
            parts.append(f"**Answer**\n\n{turn.content}" + ("\n\n(stopped)" if turn.stopped else ""))
        return "\n\n".join(parts) + "\n"
