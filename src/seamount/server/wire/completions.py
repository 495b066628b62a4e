"""Schemas of /v1/completions: the request, and the answer, which is also the chunk of a stream."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from seamount.core.errors import InvalidRequestError
from seamount.core.sampling import MAX_LOGPROBS, SamplingParams

from .common import MAX_INT32, MAX_TOKEN_IDS, REFUSED, Refusal, SamplingFields, Usage, WireModel, unicode_text
from .structured import RESPONSE_FORMAT, STRUCTURED_OUTPUTS, parse_grammar

MAX_SEQUENCES = 256
DEFAULT_MAX_TOKENS = 16  # OpenAI's default; the finish reason says "length" when it cut

PromptItem = str | tuple[int, ...]


def _prompts(value: Any) -> tuple[PromptItem, ...]:
    """Read the four forms: text, texts, token ids, lists of token ids."""
    if isinstance(value, str):
        return (unicode_text(value),)
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return tuple(unicode_text(item) for item in value)
        if all(isinstance(item, list) for item in value):
            return tuple(_token_ids(item) for item in value)
        return (_token_ids(value),)
    raise PydanticCustomError(
        "prompt_type", "must be a string, a list of strings, a list of token ids, or a list of lists of token ids"
    )


def _token_ids(value: list[Any]) -> tuple[int, ...]:
    if len(value) > MAX_TOKEN_IDS:
        raise PydanticCustomError("prompt_length", "a list of token ids has at most {most}", {"most": MAX_TOKEN_IDS})
    if value and all(type(item) is int and 0 <= item <= MAX_INT32 for item in value):
        return tuple(value)
    raise PydanticCustomError("prompt_tokens", "a list of token ids must hold integers that are not negative")


_TOKENS_SCHEMA = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0, "maximum": MAX_INT32}}
_PROMPT_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "minItems": 1, "items": {"type": "string"}},
        _TOKENS_SCHEMA,
        {"type": "array", "minItems": 1, "items": _TOKENS_SCHEMA},
    ]
}
Prompts = Annotated[tuple[PromptItem, ...], PlainValidator(_prompts), WithJsonSchema(_PROMPT_SCHEMA)]


class CompletionRequest(SamplingFields):
    """Text to continue as it stands, without a chat template."""

    ignored_names: ClassVar[frozenset[str]] = frozenset({"user"})

    refusals: ClassVar[Mapping[str, Refusal]] = {
        "best_of": Refusal("is not supported: ask for n answers and choose.", (1,)),
        "echo": Refusal("is not supported: join prompt and answer yourself.", (False,)),
        "suffix": Refusal("is not supported: these models do not fill in the middle.", ("",)),
    }

    prompt: Prompts
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS, description="Most probable tokens per position.")
    response_format: RESPONSE_FORMAT = None
    structured_outputs: STRUCTURED_OUTPUTS = None

    best_of: REFUSED = None
    echo: REFUSED = None
    suffix: REFUSED = None

    @property
    def token_limit(self) -> tuple[str, int]:
        """Return the name and value of the limit on output."""
        return "max_tokens", DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens

    def sampling(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """Return the sampling parameters; `defaults` are the checkpoint's recommendations.

        Raises:
            InvalidRequestError: a value is out of range, or two contradict each other.
        """
        if len(self.prompt) * (self.n or 1) > MAX_SEQUENCES:
            raise InvalidRequestError(
                f"{len(self.prompt)} prompts with {self.n or 1} answers each are more than {MAX_SEQUENCES} sequences.",
                hint="Send them in several requests.",
                param="prompt",
            )
        grammar = parse_grammar(self.response_format, self.structured_outputs)
        return self._sampling(defaults, max_tokens=self.token_limit[1], logprobs=self.logprobs, grammar=grammar)


class CompletionLogprobs(WireModel):
    """Log-probabilities, column by column. Tokens of equal text share an entry of `top_logprobs`, as in OpenAI's."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(WireModel):
    """One continuation; those of the first prompt come first."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    stop_reason: str | int | None = None


class CompletionResponse(WireModel):
    """The whole answer, or one event of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
