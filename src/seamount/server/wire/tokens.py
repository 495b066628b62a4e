"""Schemas of /v1/tokenize and /v1/detokenize, in the shape that vLLM gave them. Used by `tokens`."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from seamount.core.errors import InvalidRequestError

from .chat import MAX_MESSAGES, ChatRequest, Message
from .common import MAX_TOKEN_IDS, TemplateValue, Text, TokenId, WireModel
from .tools import MAX_TOOLS, Tool

_ONLY_FOR_MESSAGES = ("add_generation_prompt", "continue_final_message", "chat_template_kwargs", "tools")


class TokenizeRequest(WireModel):
    """A text, or a chat, whose tokens are asked for: either `prompt` or `messages` is given."""

    model: Text | None = Field(None, max_length=512, description="A name that /v1/models lists; may be left out.")
    prompt: Text | None = None
    add_special_tokens: bool | None = Field(
        None,
        description="Put the beginning-of-sequence token in front of a prompt where the model does; true by default.",
    )
    return_token_strs: bool | None = Field(None, description="Return each token's text too.")

    messages: list[Message] | None = Field(None, min_length=1, max_length=MAX_MESSAGES)
    add_generation_prompt: bool | None = Field(
        None, description="Open the assistant's turn behind the messages; true by default."
    )
    continue_final_message: bool | None = Field(None, description="As in /v1/chat/completions.")
    chat_template_kwargs: dict[Text, TemplateValue] | None = Field(None, max_length=32)
    tools: list[Tool] | None = Field(None, max_length=MAX_TOOLS)

    def check(self) -> None:
        """Check that the fields go together.

        Raises:
            InvalidRequestError: they do not.
        """
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequestError("Either prompt or messages must be given.", param="prompt")
        for name in _ONLY_FOR_MESSAGES:
            if self.messages is None and getattr(self, name) is not None:
                raise InvalidRequestError(f"{name} is for messages, not for a prompt.", param=name)
        if self.messages is not None and self.add_special_tokens:
            raise InvalidRequestError(
                "add_special_tokens is for a prompt: the chat template writes those of messages.",
                param="add_special_tokens",
            )
        if self.add_generation_prompt and self.continue_final_message:
            raise InvalidRequestError(
                "add_generation_prompt and continue_final_message cannot both be true.", param="continue_final_message"
            )

    def chat(self, model: str) -> ChatRequest:
        """Return the chat whose prompt is asked for."""
        fields: dict[str, Any] = {"model": model, "messages": self.messages}
        kwargs = dict(self.chat_template_kwargs or {})
        continues = self.continue_final_message
        if self.add_generation_prompt is False and not continues:
            kwargs["add_generation_prompt"] = continues = False
        fields |= {"chat_template_kwargs": kwargs or None, "continue_final_message": continues, "tools": self.tools}
        return ChatRequest(**{name: value for name, value in fields.items() if value is not None})


class Tokenized(WireModel):
    """The tokens. `token_strs` is null unless asked for; half a character in it is U+FFFD."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeRequest(WireModel):
    """Tokens whose text is asked for."""

    model: Text | None = Field(None, max_length=512, description="A name that /v1/models lists; may be left out.")
    tokens: Annotated[list[TokenId], Field(max_length=MAX_TOKEN_IDS)]


class Detokenized(WireModel):
    """The text, special tokens included."""

    prompt: str
