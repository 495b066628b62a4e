"""A whole conversation that the chat template renders in parts: what training needs beside `PromptEncoder.encode_chat`.

Made by `models.prompt`, used by `training.examples`. A part is the conversation up to a message, either as the prompt
that asks for the next answer or as it stands. Text is guarded as in a prompt: markers that people or models wrote are
letters. Knows nothing of losses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from seamount.core.errors import SeamountError

from .template import ChatTemplate


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages as the template reads them, disarmed.

    Attributes:
        template: what renders them.
        messages: checked, in the template's dialect, their markers swapped.
        literals: the swapped characters and what they stand for; see `TextTokenizer.encode_guarded`.
        fill: the template's variables for some messages and arguments.
    """

    template: ChatTemplate
    messages: list[dict[str, Any]]
    literals: dict[str, str]
    fill: Callable[..., dict[str, Any]]

    def view(
        self,
        num_messages: int,
        *,
        prompted: bool,
        last: Mapping[str, Any] | None = None,
        switches: Mapping[str, bool] | None = None,
    ) -> dict[str, Any]:
        """Return what the template renders for the first `num_messages`.

        Args:
            prompted: ask for the next answer, as serving does.
            last: stands behind them.
            switches: the template's arguments, as of `PromptEncoder.thinking_switches`.
        """
        shown = self.messages[:num_messages] + ([dict(last)] if last is not None else [])
        return self.fill(shown, extra={"add_generation_prompt": prompted, **(switches or {})})


def render_views(views: Sequence[tuple[Conversation, Mapping[str, Any]]]) -> list[str | SeamountError]:
    """Return the text of each view of a conversation, or why there is none; few messages to the template's process.

    Raises:
        CheckpointError: a template does not compile.
        CapacityError: other renders take too long to end.
    """
    found: list[str | SeamountError] = [""] * len(views)
    for template in {id(chat.template): chat.template for chat, _ in views}.values():
        places = [place for place, (chat, _) in enumerate(views) if chat.template is template]
        for place, text in zip(places, template.render_many([views[place][1] for place in places]), strict=True):
            found[place] = text
    return found
