"""What both completion schemas share: strictness, sampling fields, refused and ignored parameters, usage.

Used by `wire.chat` and `wire.completions`. Every parameter of OpenAI's API is in exactly one of three classes:
honoured, refused (400, naming it), or ignored because no answer depends on it (listed in the header
`x-seamount-ignored`). Anything else is unknown, and refused too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    ValidationInfo,
    field_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError

from seamount.core.errors import InvalidRequestError
from seamount.core.sampling import MAX_N, MAX_STOP_STRINGS, Grammar, SamplingParams

MAX_INT32 = 2**31 - 1
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
EFFORT = (
    "'none' switches thinking off, and is refused where that cannot be. Every other level switches it on, where there "
    "is a switch; which level it is changes nothing."
)
MAX_TOKEN_IDS = 2**20  # in one list; no model's context holds more


def unicode_text(text: str) -> str:
    """Refuse lone surrogates, which JSON can spell and UTF-8 cannot: nothing behind the wire can take them."""
    try:
        text.encode()
    except UnicodeEncodeError as cause:
        raise PydanticCustomError("string_unicode", "must be valid Unicode") from cause
    return text


Text = Annotated[str, AfterValidator(unicode_text)]
TokenId = Annotated[int, Field(ge=0, le=MAX_INT32)]
# What a switch of a chat template can be.
TemplateValue = bool | Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | float | Text | None

# Values of an ignored parameter that ask for nothing, so that nobody misses their effect.
_NOTHING: tuple[Any, ...] = (None, [], {}, "", False)


def _fail_fast(schema: Any) -> None:
    for part in schema.values() if isinstance(schema, dict) else schema:
        if isinstance(part, dict | list | tuple):
            _fail_fast(part)
    if isinstance(schema, dict) and schema.get("type") in ("list", "dict"):
        schema["fail_fast"] = True


class WireModel(BaseModel):
    """Strict: no coercion of types, no unknown fields, no NaN. A list or mapping is read up to its first error: one is
    told, and a million of them would be a gigabyte.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Return pydantic's schema, its lists and mappings made to end at their first error."""
        schema = handler(source)
        _fail_fast(schema)
        return schema


IGNORED = Annotated[Any, Field(description="Accepted without effect; listed in the header x-seamount-ignored.")]
REFUSED = Annotated[Any, Field(description="Not supported: any value that asks for something is refused.")]


class Refusal(NamedTuple):
    """Why a parameter is refused.

    Attributes:
        why: ends the sentence that the parameter's name begins.
        allowed: values, beside null, that ask for what happens anyway.
    """

    why: str
    allowed: tuple[Any, ...] = ()


class StreamOptions(WireModel):
    """How to stream."""

    include_usage: bool | None = Field(None, description="Send a last chunk with usage and no choices.")
    include_obfuscation: IGNORED = None


class SamplingFields(WireModel):
    """Parameters of both endpoints that decide how tokens are chosen."""

    ignored_names: ClassVar[frozenset[str]]
    refusals: ClassVar[Mapping[str, Refusal]]

    model: Text = Field(max_length=512, description="A name that /v1/models lists.")
    max_tokens: int | None = Field(None, ge=1, le=MAX_INT32, description="Most tokens to generate.")
    temperature: float | None = Field(None, ge=0, le=100, description="0 always takes the most probable token.")
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1, le=MAX_N, description="Answers per prompt.")
    stop: Text | Annotated[list[Text], Field(max_length=MAX_STOP_STRINGS)] | None = Field(
        None, description=f"At most {MAX_STOP_STRINGS} strings that end the answer."
    )
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1, description="Makes the answer repeatable.")
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[Text, float] | None = Field(None, description="Token id to what is added to its logit.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: IGNORED = None

    top_k: int | None = Field(None, ge=-1, le=MAX_INT32, description="0 or -1 keeps all tokens.")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    min_tokens: int | None = Field(None, ge=0, le=MAX_INT32)
    stop_token_ids: list[TokenId] | None = Field(None, max_length=256)
    ignore_eos: bool | None = Field(None, description="Go on past end-of-sequence tokens.")
    skip_special_tokens: bool | None = Field(None, description="Leave special tokens out of text; true by default.")

    @field_validator("*")
    @classmethod
    def _refuse(cls, value: Any, info: ValidationInfo) -> Any:
        refusal = cls.refusals.get(info.field_name or "")
        if refusal is None or value is None or _is_one_of(value, refusal.allowed):
            return value
        raise PydanticCustomError("unsupported_parameter", "{why}", {"why": refusal.why})

    @field_validator("stream_options")
    @classmethod
    def _only_for_streams(cls, value: StreamOptions | None, info: ValidationInfo) -> StreamOptions | None:
        if value is not None and not info.data.get("stream"):
            raise PydanticCustomError("stream_options", "is for streams only; set stream to true or leave it out")
        return value

    def ignored(self) -> list[str]:
        """Return the names of given parameters that have no effect."""
        given = [name for name in sorted(self.ignored_names) if not _is_one_of(getattr(self, name), _NOTHING)]
        options = self.stream_options
        if options is not None and not _is_one_of(options.include_obfuscation, _NOTHING):
            given.append("stream_options.include_obfuscation")
        return given

    @property
    def wants_usage(self) -> bool:
        """True when a stream shall end with usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def _sampling(
        self,
        defaults: Mapping[str, Any],
        *,
        max_tokens: int | None,
        logprobs: int | None,
        grammar: Grammar | None = None,
    ) -> SamplingParams:
        """Join what was given, what the checkpoint recommends (`defaults`) and the API's own defaults.

        Raises:
            InvalidRequestError: a value is out of range, or two contradict each other.
        """
        fields: dict[str, Any] = {name: defaults[name] for name in _RECOMMENDED if name in defaults}
        fields.update({name: value for name in _PLAIN if (value := getattr(self, name)) is not None})
        fields["top_k"] = max(fields.get("top_k", 0), 0)
        if self.stop is not None:
            fields["stop"] = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if self.logit_bias:
            fields["logit_bias"] = {_token_id(key): value for key, value in self.logit_bias.items()}
        return SamplingParams(max_tokens=max_tokens, logprobs=logprobs, grammar=grammar, **fields)


# What a checkpoint's generation_config.json may recommend.
_RECOMMENDED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_PLAIN = (
    *_RECOMMENDED,
    "n",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "min_tokens",
    "stop_token_ids",
    "ignore_eos",
)


def _is_one_of(value: Any, values: tuple[Any, ...]) -> bool:
    """Compare by type too: Python holds 0, 0.0 and False equal, and they are different wishes."""
    return any(type(value) is type(known) and value == known for known in values)


def _token_id(key: str) -> int:
    if not key.isascii() or not key.isdigit() or len(key) > 10:
        raise InvalidRequestError("logit_bias must have token ids as keys.", param="logit_bias")
    return int(key)


class PromptTokensDetails(WireModel):
    """Where the prompt's tokens came from."""

    cached_tokens: int


class CompletionTokensDetails(WireModel):
    """What the answer's tokens were."""

    reasoning_tokens: int


class Usage(WireModel):
    """Tokens that a request took."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None
    completion_tokens_details: CompletionTokensDetails | None = None


class ErrorObject(BaseModel):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer that is no success."""

    error: ErrorObject
