"""Schemas of /v1/responses: the request, and the response object, whole or in a stream's events.

Called by `responses`. As in `wire.common`, every parameter of OpenAI's API is honoured, refused by name, or ignored
because no answer depends on it; others are unknown. `wire.responses_items` has the items.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from seamount.core.errors import InvalidRequestError
from seamount.core.sampling import MAX_LOGPROBS

from .chat import MAX_MESSAGES
from .common import (
    EFFORT,
    IGNORED,
    MAX_INT32,
    REFUSED,
    Effort,
    ErrorObject,
    TemplateValue,
    Text,
    WireModel,
    unicode_text,
)
from .responses_items import Item, OutputItem
from .tools import MAX_TOOLS, FunctionDefinition

MAX_ITEMS = MAX_MESSAGES - 1  # each becomes a message at most, and instructions are one more
LOGPROBS = "message.output_text.logprobs"
_MAX_METADATA = 16
_MAX_METADATA_KEY = 64
_MAX_METADATA_VALUE = 512

ResponseId = Annotated[Text, Field(min_length=1, max_length=128)]
ResponseStatus = Literal["in_progress", "completed", "incomplete", "failed"]


def _only(why: str, *allowed: Any) -> AfterValidator:
    """Refuse all values of a parameter but these, which ask for what happens anyway; `why` ends the sentence."""

    def check(value: Any) -> Any:
        if value is None or _is_one_of(value, allowed):
            return value
        raise PydanticCustomError("unsupported_parameter", "{why}", {"why": why})

    return AfterValidator(check)


def _is_one_of(value: Any, values: tuple[Any, ...]) -> bool:
    """Compare by type too: Python holds 0, 0.0 and False equal, and they are different wishes."""
    return any(type(value) is type(known) and value == known for known in values)


def _listed(value: Any) -> Any:
    """Read text as what it is short for: one message of the user's."""
    return [{"type": "message", "role": "user", "content": value}] if isinstance(value, str) else value


def _function_only(tool: Any) -> Any:
    """Refuse tools of other kinds by their kind, before anything that they lack as functions."""
    kind = tool.get("type") if isinstance(tool, dict) else "function"
    if isinstance(kind, str) and kind != "function":
        raise PydanticCustomError(
            "unsupported_tool", "only tools of type function are supported: nothing else can be called from here"
        )
    return tool


def _plain_json(value: dict[str, Any] | None) -> dict[str, Any] | None:
    """Refuse what could not be sent back: the answer repeats what it was asked with."""
    try:
        unicode_text(json.dumps(value, ensure_ascii=False, allow_nan=False))
    except (RecursionError, ValueError) as cause:
        raise PydanticCustomError("no_json", "must be JSON, without NaN, and not nested too deeply") from cause
    return value


class ResponseTool(FunctionDefinition):
    """A function that the model may call."""

    type: Literal["function"]

    @field_validator("parameters")
    @classmethod
    def _sendable(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        return _plain_json(value)


class ResponseToolChoice(WireModel):
    """Makes the model call one function."""

    type: Literal["function"]
    name: Text


class TextConfig(WireModel):
    """What the answer's text looks like."""

    format: Annotated[dict[str, Any] | None, AfterValidator(_plain_json)] = Field(
        None,
        description="{'type': 'text'}, {'type': 'json_object'}, or {'type': 'json_schema', 'name', 'schema', "
        "'strict'}. A schema is always enforced; keywords that cannot be are refused.",
    )
    verbosity: Annotated[REFUSED, _only("is not supported: ask for it in the prompt.", "medium")] = None


class ReasoningConfig(WireModel):
    """How to think."""

    effort: Effort | None = Field(None, description=EFFORT)
    summary: Annotated[
        REFUSED, _only("is not supported: the reasoning itself is sent, and nothing writes summaries.", "auto")
    ] = None
    generate_summary: Annotated[REFUSED, _only("is not supported.", "auto")] = None


class ResponseStreamOptions(WireModel):
    """How to stream."""

    include_obfuscation: IGNORED = None


Include = Literal[
    "message.output_text.logprobs",
    # Reasoning comes as text, which can be sent back; the rest belongs to tools that nobody can ask for here.
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]


_Items = Annotated[list[Item], Field(min_length=1, max_length=MAX_ITEMS)]


class ResponsesRequest(WireModel):
    """What to answer: items, and perhaps an earlier response, with its whole conversation, before them."""

    ignored_names: ClassVar[tuple[str, ...]] = (
        "max_tool_calls",
        "moderation",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "user",
    )

    model: Text = Field(max_length=512, description="A name that /v1/models lists.")
    input: Annotated[_Items, BeforeValidator(_listed, json_schema_input_type=str | _Items)] = Field(
        description="Text of the user's, or items."
    )
    instructions: Text | None = Field(None, description="What comes before all items. Not kept for the next response.")
    previous_response_id: ResponseId | None = Field(
        None, description="A kept response: its conversation, answer included, comes before the input."
    )
    store: bool | None = Field(None, description="Keep the response; true by default where responses are kept.")
    metadata: dict[Text, Text] | None = Field(
        None, max_length=_MAX_METADATA, description="Repeated in the response, and kept with it."
    )
    max_output_tokens: int | None = Field(None, ge=1, le=MAX_INT32, description="Most tokens to generate.")
    temperature: float | None = Field(None, ge=0, le=100, description="0 always takes the most probable token.")
    top_p: float | None = Field(None, gt=0, le=1)
    top_logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description=f"Most probable tokens per position; needs include {LOGPROBS}."
    )
    include: list[Include] | None = Field(None, max_length=16, description="What to send beside the answer.")
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    tools: list[Annotated[ResponseTool, BeforeValidator(_function_only)]] | None = Field(
        None, max_length=MAX_TOOLS, description="Functions that may be called."
    )
    tool_choice: Literal["none", "auto", "required"] | ResponseToolChoice | None = Field(
        None, description="auto lets the model choose; required, or a function, makes it call; none forbids it."
    )
    parallel_tool_calls: bool | None = Field(None, description="Allow several calls in one answer; true by default.")
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    chat_template_kwargs: dict[Text, TemplateValue] | None = Field(
        None, max_length=32, description="Switches of the model's chat template, for instance thinking."
    )

    max_tool_calls: IGNORED = None
    moderation: IGNORED = None
    prompt_cache_key: IGNORED = None
    prompt_cache_options: IGNORED = None
    prompt_cache_retention: IGNORED = None
    safety_identifier: IGNORED = None
    service_tier: IGNORED = None
    user: IGNORED = None

    background: Annotated[REFUSED, _only("is not supported: no response is made in the background.", False)] = None
    context_management: Annotated[REFUSED, _only("is not supported: nothing is dropped unsaid.", [])] = None
    conversation: Annotated[REFUSED, _only("is not supported: use previous_response_id.")] = None
    prompt: Annotated[REFUSED, _only("is not supported: no templates of prompts are kept here.")] = None
    truncation: Annotated[REFUSED, _only("is not supported: nothing is dropped unsaid.", "disabled")] = None

    @field_validator("metadata")
    @classmethod
    def _short(cls, value: dict[str, str] | None) -> dict[str, str] | None:
        for key, text in (value or {}).items():
            if len(key) > _MAX_METADATA_KEY or len(text) > _MAX_METADATA_VALUE:
                raise PydanticCustomError(
                    "metadata", f"a key has at most {_MAX_METADATA_KEY} characters, a value {_MAX_METADATA_VALUE}"
                )
        return value

    @field_validator("stream_options")
    @classmethod
    def _only_for_streams(
        cls, value: ResponseStreamOptions | None, info: ValidationInfo
    ) -> ResponseStreamOptions | None:
        if value is not None and not info.data.get("stream"):
            raise PydanticCustomError("stream_options", "is for streams only; set stream to true or leave it out")
        return value

    @property
    def num_logprobs(self) -> int | None:
        """How many probable tokens to report beside each one of the text; None for no report.

        Raises:
            InvalidRequestError: they are asked for by number only.
        """
        if LOGPROBS in (self.include or ()):
            return self.top_logprobs or 0
        if self.top_logprobs:
            raise InvalidRequestError(f"top_logprobs needs include to have {LOGPROBS}.", param="top_logprobs")
        return None

    def ignored(self) -> list[str]:
        """Return the names of given parameters that have no effect."""
        given = [name for name in self.ignored_names if not _is_one_of(getattr(self, name), _NOTHING)]
        given += [f"include.{name}" for name in sorted(set(self.include or ()) - {LOGPROBS})]
        if self.reasoning is not None and (self.reasoning.summary or self.reasoning.generate_summary):
            given.append("reasoning.summary")
        if self.reasoning is not None and self.reasoning.effort not in (None, "none"):
            given.append("reasoning.effort")
        options = self.stream_options
        if options is not None and not _is_one_of(options.include_obfuscation, _NOTHING):
            given.append("stream_options.include_obfuscation")
        if any(tool.strict for tool in self.tools or ()) and self.tool_choice in (None, "auto", "none"):
            given.append("tools.strict")
        return given


# Values of an ignored parameter that ask for nothing, so that nobody misses their effect.
_NOTHING: tuple[Any, ...] = (None, [], {}, "", False)


class InputTokensDetails(WireModel):
    """Where the prompt's tokens came from."""

    cached_tokens: int


class OutputTokensDetails(WireModel):
    """What the answer's tokens were."""

    reasoning_tokens: int


class ResponseUsage(WireModel):
    """Tokens that a response took."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class IncompleteDetails(WireModel):
    """Why an answer ended before its end."""

    reason: Literal["max_output_tokens"]


class ResponseObject(WireModel):
    """A response, as far as it has come.

    Attributes:
        store: it is kept, or will be at its end.
        store_error: why it could not be kept in the end, although it was to be.
    """

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: ResponseStatus
    completed_at: int | None
    background: Literal[False] = False
    error: ErrorObject | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: ReasoningConfig
    store: bool
    store_error: ErrorObject | None = None
    temperature: float
    text: TextConfig
    tool_choice: Literal["none", "auto", "required"] | ResponseToolChoice
    tools: list[ResponseTool]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None


class ItemList(WireModel):
    """A page of a conversation's items."""

    object: Literal["list"] = "list"
    data: list[Item]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedResponse(WireModel):
    """What is left of a deleted response."""

    id: str
    object: Literal["response"] = "response"
    deleted: Literal[True] = True
