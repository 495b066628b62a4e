"""Schemas of /v1/messages and /v1/messages/count_tokens: Anthropic's Messages API, request and answer.

Used by `messages`, `messages.translate` and `messages.blocks`. The format's source is Anthropic's reference, "Create a
Message" and "Count tokens in a Message". As everywhere on this server each parameter is honoured, refused by name, or
listed as ignored. Blocks of an answer are those of a request: what was answered can be sent back as it came.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from seamount.core.sampling import MAX_STOP_LENGTH, MAX_STOP_STRINGS

from .chat import MAX_MESSAGES
from .common import IGNORED, MAX_INT32, REFUSED, Text, WireModel, unicode_text
from .tools import MAX_DESCRIPTION_CHARS, MAX_TOOLS, Name, Parameters

MAX_BLOCKS = 4096  # of one message
StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]

_UNREAD = {
    "image": "images are not supported; this model reads text only",
    "document": "documents are not supported; send their text",
    "search_result": "search results are not supported; send their text",
    "redacted_thinking": "redacted thinking can only be read by whom it came from; leave it out",
}
_REFUSALS = {
    "compaction": "is not supported: ask for a summary, and go on from it.",
    "container": "is not supported: no request leaves this machine.",
    "fallback_credit_token": "is not supported: no other model takes over here.",
    "fallbacks": "is not supported: no other model takes over here.",
    "mcp_servers": "is not supported: no request leaves this machine.",
    "thread": "is not supported: send the whole conversation (Anthropic's tool runner does so with thread=False).",
}
_WITHOUT_EFFECT = (
    "billing_policy",
    "context_management",
    "diagnostics",
    "inference_geo",
    "metadata",
    "service_tier",
    "speed",
    "user_profile_id",
)
_NOTHING: tuple[Any, ...] = (None, [], {}, "")


def _readable(block: Any) -> Any:
    """Say of blocks that cannot be read why, rather than list those that can."""
    kind = block.get("type") if isinstance(block, dict) else None
    if isinstance(kind, str) and kind in _UNREAD:
        raise PydanticCustomError("unsupported_part", _UNREAD[kind])
    return block


def _input(arguments: dict[str, Any]) -> dict[str, Any]:
    """Refuse arguments that no JSON can spell."""
    try:
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    except (ValueError, RecursionError) as cause:
        raise PydanticCustomError("tool_input", "must be JSON, not nested too deeply") from cause
    unicode_text(text)
    return arguments


class TextBlock(WireModel):
    """A piece of text."""

    type: Literal["text"]
    text: Text
    cache_control: IGNORED = None
    citations: Annotated[list[Any], Field(max_length=0)] | None = None


Part = Annotated[TextBlock, BeforeValidator(_readable)]


class ThinkingBlock(WireModel):
    """Reasoning. It is not signed here: the signature is empty, and one that comes back is not looked at."""

    type: Literal["thinking"]
    thinking: Text
    signature: Text | None = None


class DirectCaller(WireModel):
    """The model itself made the call."""

    type: Literal["direct"]


class ToolUseBlock(WireModel):
    """A call of a tool."""

    type: Literal["tool_use"]
    id: Text
    name: Text
    input: Annotated[dict[str, Any], AfterValidator(_input)]
    cache_control: IGNORED = None
    caller: DirectCaller | None = None
    toolset_name: None = None


class ToolResultBlock(WireModel):
    """What a tool returned."""

    type: Literal["tool_result"]
    tool_use_id: Text
    content: Text | Annotated[list[Part], Field(max_length=MAX_BLOCKS)] | None = None
    is_error: bool | None = Field(None, description="The model reads `Error: ` before the content.")
    cache_control: IGNORED = None


UserBlock = Annotated[
    Annotated[TextBlock | ToolResultBlock, Field(discriminator="type")],
    BeforeValidator(_readable),
]
AnswerBlock = Annotated[TextBlock | ThinkingBlock | ToolUseBlock, Field(discriminator="type")]
AssistantBlock = Annotated[AnswerBlock, BeforeValidator(_readable)]


class UserTurn(WireModel):
    """What the user says, and what tools returned."""

    role: Literal["user"]
    content: Text | Annotated[list[UserBlock], Field(max_length=MAX_BLOCKS)]


class AssistantTurn(WireModel):
    """An earlier answer, or the beginning of the one that is asked for, as the last message."""

    role: Literal["assistant"]
    content: Text | Annotated[list[AssistantBlock], Field(max_length=MAX_BLOCKS)]


class SystemTurn(WireModel):
    """Instructions amid the conversation."""

    role: Literal["system"]
    content: Text | Annotated[list[Part], Field(max_length=MAX_BLOCKS)]


Turn = Annotated[UserTurn | AssistantTurn | SystemTurn, Field(discriminator="role")]


def _custom_only(value: Any) -> Any:
    if value is None or value == "custom":
        return value
    raise PydanticCustomError(
        "unsupported_tool",
        "only tools of type custom are supported, those with a name and an input_schema that the caller runs",
    )


class MessageTool(WireModel):
    """A tool that the model may use."""

    type: Annotated[Literal["custom"] | None, BeforeValidator(_custom_only)] = None
    name: Name
    description: Text | None = Field(None, max_length=MAX_DESCRIPTION_CHARS)
    input_schema: Parameters = Field(description="JSON schema of the input object.")
    strict: bool | None = Field(None, description="Refuse a schema that cannot be enforced where a call is forced.")
    eager_input_streaming: bool | None = Field(None, description="Changes nothing: input streams as it is written.")
    defer_loading: Literal[False] | None = None
    allowed_callers: list[Literal["direct"]] | None = Field(None, max_length=1)
    input_examples: IGNORED = None
    cache_control: IGNORED = None


class MessageToolChoice(WireModel):
    """How tools are to be used."""

    type: Literal["auto", "any", "tool", "none"]
    name: Text | None = Field(None, description="Of the tool to use, for type tool.")
    disable_parallel_tool_use: bool | None = Field(None, description="At most one call in an answer.")

    @model_validator(mode="after")
    def _named(self) -> MessageToolChoice:
        if (self.type == "tool") != (self.name is not None):
            raise PydanticCustomError("tool_choice", "a name is given with type tool, and only there")
        return self


class Thinking(WireModel):
    """Whether to reason before answering."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Field(ge=1, le=MAX_INT32)] | None = Field(
        None, description="Without effect: max_tokens bounds reasoning and answer together."
    )
    display: Literal["summarized", "omitted"] | None = Field(
        None, description="summarized shows the reasoning, all of it; omitted leaves its text out."
    )


class JsonFormat(WireModel):
    """The answer is JSON of this schema, enforced token by token."""

    type: Literal["json_schema"]
    # Named as on the wire; pydantic's own `schema` is an old method that nothing here calls.
    json_schema: dict[str, Any] = Field(alias="schema")


class OutputConfig(WireModel):
    """What the answer is to be like."""

    effort: IGNORED = None
    task_budget: IGNORED = None
    format: JsonFormat | None = None


class CountRequest(WireModel):
    """A conversation whose tokens are counted."""

    model: Text = Field(max_length=512, description="A name that /v1/models lists.")
    messages: list[Turn] = Field(min_length=1, max_length=MAX_MESSAGES)
    system: Text | Annotated[list[Part], Field(max_length=MAX_BLOCKS)] | None = None
    tools: list[MessageTool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: MessageToolChoice | None = None
    thinking: Thinking | None = Field(None, description="Without it the model reasons as its template has it.")
    output_config: OutputConfig | None = None
    output_format: JsonFormat | None = Field(None, description="The older name of output_config.format.")

    billing_policy: IGNORED = None
    cache_control: IGNORED = None
    context_management: IGNORED = None
    diagnostics: IGNORED = None
    inference_geo: IGNORED = None
    metadata: IGNORED = None
    service_tier: IGNORED = None
    speed: IGNORED = None
    user_profile_id: IGNORED = None

    compaction: REFUSED = None
    container: REFUSED = None
    fallback_credit_token: REFUSED = None
    fallbacks: REFUSED = None
    mcp_servers: REFUSED = None
    thread: REFUSED = None

    @field_validator(*_REFUSALS)
    @classmethod
    def _refuse(cls, value: Any, info: ValidationInfo) -> Any:
        if value in _NOTHING:
            return None
        raise PydanticCustomError("unsupported_parameter", "{why}", {"why": _REFUSALS[info.field_name or ""]})

    @property
    def answer_format(self) -> JsonFormat | None:
        """The shape of the answer, under either name."""
        return (self.output_config and self.output_config.format) or self.output_format

    def ignored(self) -> list[str]:
        """Return the names of given parameters that have no effect."""
        given = [name for name in _WITHOUT_EFFECT if getattr(self, name) not in _NOTHING]
        for name in ("effort", "task_budget") if self.output_config is not None else ():
            if getattr(self.output_config, name) not in _NOTHING:
                given.append(f"output_config.{name}")
        if self.thinking is not None and self.thinking.budget_tokens is not None:
            given.append("thinking.budget_tokens")
        tools = self.tools or ()
        if any(tool.input_examples not in _NOTHING for tool in tools):
            given.append("tools.input_examples")
        if any(tool.strict for tool in tools) and (self.tool_choice is None or self.tool_choice.type == "auto"):
            given.append("tools.strict")
        if any(getattr(part, "cache_control", None) not in _NOTHING for part in (self, *tools, *self._blocks())):
            given.append("cache_control")
        return sorted(given)

    def _blocks(self) -> list[BaseModel]:
        found: list[BaseModel] = []
        for content in (self.system, *(turn.content for turn in self.messages)):
            for block in content if isinstance(content, list) else ():
                found.append(block)
                if isinstance(block, ToolResultBlock) and isinstance(block.content, list):
                    found += block.content
        return found


class MessageRequest(CountRequest):
    """A conversation to continue."""

    max_tokens: int = Field(
        ge=1, le=MAX_INT32, description="Most tokens to generate; lowered to what the model's context leaves."
    )
    stop_sequences: (
        Annotated[
            list[Annotated[Text, Field(min_length=1, max_length=MAX_STOP_LENGTH)]], Field(max_length=MAX_STOP_STRINGS)
        ]
        | None
    ) = None
    stream: bool | None = None
    temperature: float | None = Field(None, ge=0, le=100, description="0 always takes the most probable token.")
    top_k: int | None = Field(None, ge=0, le=MAX_INT32)
    top_p: float | None = Field(None, gt=0, le=1)


class OutputTokensDetails(WireModel):
    """What the answer's tokens were."""

    thinking_tokens: int


class MessageUsage(WireModel):
    """Tokens that a request took; those of the prompt that were found in the cache are counted apart."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: OutputTokensDetails


class Message(WireModel):
    """The whole answer."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[AnswerBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage


class TokenCount(WireModel):
    """How many tokens the conversation has."""

    input_tokens: int


class MessageErrorObject(BaseModel):
    """Anthropic's error object."""

    type: str
    message: str


class MessageErrorBody(BaseModel):
    """The body of every answer of these routes that is no success."""

    type: Literal["error"]
    error: MessageErrorObject
    request_id: str | None
