"""What the server needs of a prompt encoder.

`models.prompt.PromptEncoder` is the real one, `engine.fake_encoder.ByteEncoder` the one without files. Encoding is
plain synchronous work; the routes call it in a thread so that a long prompt does not pause other people's streams.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from seamount.models.reasoning import ReasoningParser
from seamount.models.tools import ToolFormat


class Prompt(Protocol):
    """An encoded chat."""

    @property
    def token_ids(self) -> tuple[int, ...]: ...
    @property
    def starts_in_reasoning(self) -> bool: ...


class Encoder(Protocol):
    """Turns prompts into token ids, and answers' text into reasoning and content."""

    @property
    def has_chat_template(self) -> bool: ...
    @property
    def default_sampling(self) -> Mapping[str, Any]: ...
    def encode_text(
        self, text: str, /, *, add_special_tokens: bool = True, limit: int | None = None
    ) -> tuple[int, ...]: ...
    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        limit: int | None = None,
    ) -> Prompt: ...
    def thinking_switches(self, *, on: bool) -> Mapping[str, bool] | None: ...
    def decode(self, token_ids: Sequence[int], /, *, skip_special_tokens: bool = True) -> str: ...
    def token_bytes(self, token_id: int, /) -> bytes: ...
    def reasoning_parser(self, *, starts_in_reasoning: bool) -> ReasoningParser: ...


@runtime_checkable
class ToolEncoder(Encoder, Protocol):
    """An encoder that also knows how its model calls tools, and can begin its answers: `ByteEncoder` does not."""

    @property
    def tool_format(self) -> ToolFormat | None: ...
    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        limit: int | None = None,
        continue_final: bool = False,
    ) -> Prompt: ...
