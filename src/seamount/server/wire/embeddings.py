"""Schemas of /v1/embeddings."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from .common import IGNORED, MAX_INT32, MAX_TOKEN_IDS, Text, WireModel, unicode_text

MAX_INPUTS = 2048  # OpenAI's limit

InputItem = str | tuple[int, ...]


def _inputs(value: Any) -> tuple[InputItem, ...]:
    """Read the four forms: text, texts, token ids, lists of token ids."""
    if isinstance(value, str):
        return (_text(value, ""),)
    if not isinstance(value, list) or not value:
        raise PydanticCustomError(
            "input_type", "must be a string, a list of strings, a list of token ids, or a list of lists of token ids"
        )
    if type(value[0]) is int:
        return (_token_ids(value, ""),)
    if len(value) > MAX_INPUTS:
        raise PydanticCustomError(
            "input_length",
            "has {count} entries; at most {most} are allowed in one request",
            {"count": len(value), "most": MAX_INPUTS},
        )
    if isinstance(value[0], str):
        return tuple(_text(item, f"entry {place} ") for place, item in enumerate(value))
    return tuple(_token_ids(item, f"entry {place} ") for place, item in enumerate(value))


def _text(value: Any, which: str) -> str:
    if not isinstance(value, str):
        raise PydanticCustomError("input_text", "{which}must be a string, as the first entry is", {"which": which})
    if not value:
        raise PydanticCustomError("input_empty", "{which}must not be empty", {"which": which})
    return unicode_text(value)


def _token_ids(value: Any, which: str) -> tuple[int, ...]:
    if isinstance(value, list) and len(value) > MAX_TOKEN_IDS:
        raise PydanticCustomError(
            "input_tokens", "{which}must have at most {most} token ids", {"which": which, "most": MAX_TOKEN_IDS}
        )
    if isinstance(value, list) and value and all(type(item) is int and 0 <= item <= MAX_INT32 for item in value):
        return tuple(value)
    raise PydanticCustomError(
        "input_tokens", "{which}must be a list of token ids: integers that are not negative", {"which": which}
    )


_TEXT_SCHEMA: dict[str, Any] = {"type": "string", "minLength": 1}
_TOKENS_SCHEMA = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0, "maximum": MAX_INT32}}
_INPUT_SCHEMA: dict[str, Any] = {
    "anyOf": [
        _TEXT_SCHEMA,
        {"type": "array", "minItems": 1, "maxItems": MAX_INPUTS, "items": _TEXT_SCHEMA},
        _TOKENS_SCHEMA,
        {"type": "array", "minItems": 1, "maxItems": MAX_INPUTS, "items": _TOKENS_SCHEMA},
    ]
}
Inputs = Annotated[tuple[InputItem, ...], PlainValidator(_inputs), WithJsonSchema(_INPUT_SCHEMA)]


class EmbeddingRequest(WireModel):
    """Texts to embed. Only a model that is made for embeddings takes them; nothing is ever cut off."""

    model: Text = Field(max_length=512, description="A name that /v1/models lists.")
    input: Inputs = Field(
        description="Text, token ids, or a list of either. Text gets the special tokens that the model's tokenizer "
        "adds; token ids are taken as they are."
    )
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="float, the default: a list of numbers. base64: the same as float32, little-endian."
    )
    dimensions: int | None = Field(
        None, ge=1, le=MAX_INT32, description="Leading numbers to keep, where the model was trained for that."
    )
    user: IGNORED = None

    def ignored(self) -> list[str]:
        """Return the names of given parameters that have no effect."""
        return ["user"] if self.user not in (None, "") else []


class EmbeddingItem(WireModel):
    """The embedding of one input."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(WireModel):
    """Tokens that the inputs took; embeddings take none."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingResponse(WireModel):
    """All embeddings, in the order of the inputs."""

    object: Literal["list"] = "list"
    data: list[EmbeddingItem]
    model: str
    usage: EmbeddingUsage
