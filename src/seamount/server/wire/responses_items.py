"""Schemas of items: the messages, reasoning, function calls and results that /v1/responses is asked with and answers.

Used by `wire.responses` and by the modules that translate, stream and store. One set of models both reads and writes,
so that what an answer holds can be sent back as it came, and what was kept can be read again.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AliasChoices, BeforeValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from .common import IGNORED, Text, WireModel

ItemId = Annotated[Text, Field(min_length=1, max_length=128)]
CallId = Annotated[Text, Field(min_length=1, max_length=256)]
Status = Literal["in_progress", "completed", "incomplete"]


def _input_text(value: Any) -> Any:
    if value == "input_text":
        return value
    raise PydanticCustomError(
        "unsupported_part", "only parts of type input_text are supported here; this model reads no images or files"
    )


def _not_encrypted(value: Any) -> Any:
    if value is None:
        return value
    raise PydanticCustomError(
        "unsupported_parameter", "{why}", {"why": "is not supported: send the reasoning's text, as it came from here."}
    )


class InputText(WireModel):
    """A piece of what somebody says, or of what a function returned."""

    type: Annotated[Literal["input_text"], BeforeValidator(_input_text)]
    text: Text
    prompt_cache_breakpoint: IGNORED = None


class OutputText(WireModel):
    """A piece of an answer. Log-probabilities that are sent back are not looked at."""

    type: Literal["output_text"]
    text: Text
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    logprobs: list[Any] | None = None


class ReasoningText(WireModel):
    """A piece of reasoning."""

    type: Literal["reasoning_text"]
    text: Text


class SummaryText(WireModel):
    """A piece of a summary of reasoning. None are made here."""

    type: Literal["summary_text"]
    text: Text


class MessageItem(WireModel):
    """What the user says, or instructions."""

    type: Literal["message"] | None = None
    id: ItemId | None = None
    role: Literal["user", "system", "developer"]
    content: Text | list[InputText]
    status: Status | None = None
    phase: None = None


class OutputMessage(WireModel):
    """What the model said."""

    type: Literal["message"] | None = None
    id: ItemId | None = None
    role: Literal["assistant"]
    content: Text | list[OutputText]
    status: Status | None = None
    phase: Literal["commentary", "final_answer"] | None = None


class ReasoningItem(WireModel):
    """What the model thought before it answered."""

    type: Literal["reasoning"]
    id: ItemId | None = None
    summary: list[SummaryText] = Field(default_factory=list)
    content: list[ReasoningText] | None = None
    encrypted_content: Annotated[Any, AfterValidator(_not_encrypted)] = None
    status: Status | None = None


class FunctionCallItem(WireModel):
    """A call that the model made."""

    type: Literal["function_call"]
    id: ItemId | None = None
    call_id: CallId
    name: Text
    arguments: Text = Field(description="JSON, as the model wrote it.")
    status: Status | None = None
    caller: None = None
    namespace: None = None
    # OpenAI's own client spells the name of this field in two ways.
    async_: Literal[False] | None = Field(None, validation_alias=AliasChoices("async", "async_"))


class FunctionResultItem(WireModel):
    """What a called function returned."""

    type: Literal["function_call_output"]
    id: ItemId | None = None
    call_id: CallId
    output: Text | list[InputText]
    status: Status | None = None
    name: Text | None = None
    caller: None = None
    namespace: None = None


def _kind(item: Any) -> str | None:
    """Return the tag of an item's model. Its brackets keep it out of the parameters that errors name."""
    kind, role = (
        (item.get("type"), item.get("role"))
        if isinstance(item, dict)
        else (getattr(item, "type", None), getattr(item, "role", None))
    )
    if kind is None or kind == "message":
        kind = "answer" if role == "assistant" else "message"
    return f"[{kind}]" if isinstance(kind, str) else None


_WHICH = Discriminator(
    _kind,
    custom_error_type="item_type",
    custom_error_message="must be an item of type message, reasoning, function_call or function_call_output",
)
Item = Annotated[
    Annotated[MessageItem, Tag("[message]")]
    | Annotated[OutputMessage, Tag("[answer]")]
    | Annotated[ReasoningItem, Tag("[reasoning]")]
    | Annotated[FunctionCallItem, Tag("[function_call]")]
    | Annotated[FunctionResultItem, Tag("[function_call_output]")],
    _WHICH,
]
OutputItem = Annotated[
    Annotated[OutputMessage, Tag("[answer]")]
    | Annotated[ReasoningItem, Tag("[reasoning]")]
    | Annotated[FunctionCallItem, Tag("[function_call]")],
    _WHICH,
]


def plain_items(items: list[Any]) -> list[dict[str, Any]]:
    """Return items as they are kept: log-probabilities are left out, being as large as a hundred texts."""
    plain: list[dict[str, Any]] = [item.model_dump(exclude_unset=True) for item in items]
    for item in plain:
        for part in item["content"] if item["type"] == "message" else ():
            if part["type"] == "output_text":
                part["logprobs"] = []
    return plain
