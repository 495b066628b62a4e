"""Schemas of /v1/chat/completions: the request, the answer, the chunk of a stream."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from seamount.core.errors import InvalidRequestError
from seamount.core.sampling import MAX_LOGPROBS, SamplingParams

from .common import (
    EFFORT,
    IGNORED,
    MAX_INT32,
    REFUSED,
    Effort,
    Refusal,
    SamplingFields,
    TemplateValue,
    Text,
    Usage,
    WireModel,
)
from .structured import RESPONSE_FORMAT, STRUCTURED_OUTPUTS, parse_grammar
from .tools import MAX_TOOLS, Tool, ToolCall, ToolCallDelta, ToolChoice, ToolUse, tool_use

MAX_MESSAGES = 4096
FinishReason = Literal["stop", "length", "tool_calls"]


def _text_only(value: Any) -> Any:
    if value == "text":
        return value
    raise PydanticCustomError("unsupported_part", "only parts of type text are supported; this model reads no images")


class TextPart(WireModel):
    """A piece of a message's text."""

    type: Annotated[Literal["text"], BeforeValidator(_text_only)]
    text: Text


Content = Text | list[TextPart]


class SystemMessage(WireModel):
    """Instructions."""

    role: Literal["system"]
    content: Content
    name: Text | None = None


class DeveloperMessage(WireModel):
    """Instructions, by OpenAI's newer name; templates see the role system."""

    role: Literal["developer"]
    content: Content
    name: Text | None = None


class UserMessage(WireModel):
    """What the user says."""

    role: Literal["user"]
    content: Content
    name: Text | None = None


class AssistantMessage(WireModel):
    """An earlier answer, or the beginning of the one that is asked for, as the last message.

    Its reasoning may come under either of the field's two names. `prefix` is DeepSeek's: the last message is continued,
    or not. What stands below it comes back from clients that send a whole answer as they got it.
    """

    role: Literal["assistant"]
    content: Content | None = None
    name: Text | None = None
    reasoning_content: Text | None = None
    reasoning: Text | None = None
    tool_calls: list[ToolCall] | None = None
    prefix: bool | None = None
    refusal: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None
    provider_specific_fields: IGNORED = None  # LiteLLM's, in what it got


class ToolMessage(WireModel):
    """What a tool returned."""

    role: Literal["tool"]
    content: Content
    tool_call_id: Text
    name: Text | None = None


Message = Annotated[
    SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")
]


class ChatThinking(WireModel):
    """Whether to think before answering."""

    type: Literal["enabled", "disabled", "adaptive", "auto"] = Field(
        description="adaptive and auto leave it to the model, which thinks where it can."
    )
    budget_tokens: Annotated[int, Field(ge=1, le=MAX_INT32)] | None = Field(
        None, description="Without effect: max_tokens bounds reasoning and answer together."
    )


class ChatRequest(SamplingFields):
    """A chat to continue."""

    ignored_names: ClassVar[frozenset[str]] = frozenset(
        {
            "metadata",
            "moderation",
            "prompt_cache_key",
            "prompt_cache_options",
            "prompt_cache_retention",
            "safety_identifier",
            "service_tier",
            "store",
            "user",
        }
    )

    refusals: ClassVar[Mapping[str, Refusal]] = {
        "functions": Refusal("is not supported: it is deprecated.", ([],)),
        "function_call": Refusal("is not supported: it is deprecated.", ("none",)),
        "modalities": Refusal("is not supported, other than ['text'].", (["text"],)),
        "audio": Refusal("is not supported: this model neither hears nor speaks."),
        "prediction": Refusal("is not supported."),
        "verbosity": Refusal("is not supported: ask for it in the prompt."),
        "web_search_options": Refusal("is not supported: no request leaves this machine."),
    }

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_INT32, description="As max_tokens; it wins.")
    logprobs: bool | None = Field(None, description="Report log-probabilities of the answer's tokens.")
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS, description="Most probable tokens per position.")
    chat_template_kwargs: dict[Text, TemplateValue] | None = Field(
        None, max_length=32, description="Switches of the model's chat template, for instance thinking."
    )

    reasoning_effort: Effort | None = Field(None, description=EFFORT)
    thinking: ChatThinking | None = Field(None, description="DeepSeek's switch. Refused where the model has none.")

    tools: list[Tool] | None = Field(None, max_length=MAX_TOOLS, description="Functions that the model may call.")
    tool_choice: ToolChoice | None = Field(
        None, description="auto lets the model choose; required, or a function, makes it call; none forbids it."
    )
    parallel_tool_calls: bool | None = Field(None, description="Allow several calls in one answer; true by default.")
    response_format: RESPONSE_FORMAT = None
    structured_outputs: STRUCTURED_OUTPUTS = None
    continue_final_message: bool | None = Field(
        None,
        description="Continue the last message, where it is the assistant's; done by default where it calls no tool.",
    )
    add_generation_prompt: bool | None = Field(
        None, description="false is for a last message that is continued, and changes nothing there."
    )

    metadata: IGNORED = None
    moderation: IGNORED = None
    prompt_cache_key: IGNORED = None
    prompt_cache_options: IGNORED = None
    prompt_cache_retention: IGNORED = None
    safety_identifier: IGNORED = None
    service_tier: IGNORED = None
    store: IGNORED = None

    functions: REFUSED = None
    function_call: REFUSED = None
    modalities: REFUSED = None
    audio: REFUSED = None
    prediction: REFUSED = None
    verbosity: REFUSED = None
    web_search_options: REFUSED = None

    @property
    def token_limit(self) -> tuple[str, int] | None:
        """Return the name and value of the given limit on output."""
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return None if self.max_tokens is None else ("max_tokens", self.max_tokens)

    def sampling(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """Return the sampling parameters; `defaults` are the checkpoint's recommendations.

        Raises:
            InvalidRequestError: a value is out of range, or two contradict each other.
        """
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequestError("top_logprobs needs logprobs to be true.", param="top_logprobs")
        if "add_generation_prompt" in (self.chat_template_kwargs or {}):  # an answer always begins behind one
            raise InvalidRequestError(
                "The template argument 'add_generation_prompt' cannot be set.", param="chat_template_kwargs"
            )
        count = (self.top_logprobs or 0) if self.logprobs else None
        limit = self.token_limit
        grammar = parse_grammar(self.response_format, self.structured_outputs)
        return self._sampling(defaults, max_tokens=limit[1] if limit else None, logprobs=count, grammar=grammar)

    def tool_use(self) -> ToolUse | None:
        """Return what the model may do with tools; None where it may call nothing.

        Raises:
            InvalidRequestError: two tools have one name, or the choice is of a tool that is not there.
        """
        return tool_use(self.tools, self.tool_choice, parallel=self.parallel_tool_calls)

    def ignored(self) -> list[str]:
        """Return the names of given parameters that have no effect."""
        given = super().ignored()
        if self.reasoning_effort not in (None, "none"):
            given.append("reasoning_effort")
        if self.thinking is not None and self.thinking.budget_tokens is not None:
            given.append("thinking.budget_tokens")
        forced = self.tool_choice not in (None, "auto", "none")
        if any(tool.function.strict for tool in self.tools or ()) and not forced:
            given.append("tools.function.strict")
        return given

    @property
    def continues(self) -> bool | None:
        """Whether the last message is the beginning of the answer; None where the request leaves it open.

        Raises:
            InvalidRequestError: its parameters contradict each other, or the message.
        """
        last = self.messages[-1]
        prefix = last.prefix if isinstance(last, AssistantMessage) else None
        asked = self.continue_final_message if self.continue_final_message is not None else prefix
        may = isinstance(last, AssistantMessage) and not last.tool_calls and len(self.messages) > 1
        if asked and not may:
            raise InvalidRequestError(
                "Only a last message that is the assistant's, follows another and calls no tool can be continued.",
                param="messages",
            )
        if self.add_generation_prompt is False and (asked is False or not may):
            raise InvalidRequestError(
                "add_generation_prompt can only be false where the last message is continued.",
                param="add_generation_prompt",
            )
        return asked if asked is not None or may else False

    def template_messages(self) -> list[dict[str, Any]]:
        """Return the messages as chat templates read them: text joined, reasoning under one name."""
        return [_template_message(message) for message in self.messages]


def _template_message(message: Message) -> dict[str, Any]:
    plain: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role}
    plain["content"] = _text(message.content)
    if message.name is not None:
        plain["name"] = message.name
    if isinstance(message, ToolMessage):
        plain["tool_call_id"] = message.tool_call_id
    if isinstance(message, AssistantMessage):
        reasoning = message.reasoning_content or message.reasoning
        if reasoning:
            plain["reasoning_content"] = reasoning
        if message.tool_calls:
            plain["tool_calls"] = [call.model_dump() for call in message.tool_calls]
    return plain


def _text(content: Content | None) -> str | None:
    """Join the parts of a message: a line each, as the field does."""
    return "\n".join(part.text for part in content) if isinstance(content, list) else content


class TopLogprob(WireModel):
    """A token that could have stood at a position."""

    token: str
    logprob: float
    bytes: list[int]


class ContentLogprob(TopLogprob):
    """The token that stands at a position, and the most probable ones."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(WireModel):
    """Log-probabilities of all generated tokens, reasoning included."""

    content: list[ContentLogprob]
    refusal: None = None


class ChatMessage(WireModel):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCall] | None = None
    refusal: None = None


class ChatChoice(WireModel):
    """One answer of `n`."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: str | int | None = None


class ChatResponse(WireModel):
    """The whole answer."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(WireModel):
    """What a chunk adds to an answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(WireModel):
    """A chunk's part of one answer."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None = None


class ChatChunk(WireModel):
    """One event of a streamed answer."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
