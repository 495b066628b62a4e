"""How the next token is chosen: `SamplingParams` and `Grammar`, validated once, where a request is made.

Used by callers of `LLM`, by the server's wire schemas and by the engine's sampler. Names and meanings follow the
field's (OpenAI where it has the parameter, vLLM where only engines have it).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from .errors import InvalidRequestError

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256
MAX_STOP_TOKEN_IDS = 1024
MAX_LOGIT_BIAS = 1024
MAX_N = 128
MAX_SEED = 2**63 - 1
MAX_GRAMMAR_CHARS = 2**17

GrammarKind = Literal["json_object", "json_schema", "regex", "ebnf"]


@dataclass(frozen=True)
class Grammar:
    """What the output must look like, enforced token by token.

    Attributes:
        kind: `json_object` (any JSON object), `json_schema`, `regex` (Rust's syntax, over the whole output), or `ebnf`
            (a context-free grammar in Lark's form, whose first rule is `start`; `<name>` is a special token).
        text: the schema, pattern or grammar; empty for `json_object`. Whether it is well-formed is not looked at here.
        begun: the beginning of what it says, which the prompt ends with: the output goes on from there.

    Raises:
        InvalidRequestError: the kind is unknown, or the text is missing, too long or no Unicode.
    """

    kind: GrammarKind
    text: str = ""
    begun: str = ""

    def __post_init__(self) -> None:
        if self.kind not in get_args(GrammarKind):
            raise _bad("grammar", f"must be of one of the kinds {', '.join(get_args(GrammarKind))}")
        if not isinstance(self.text, str):
            raise _bad("grammar", f"must be text, not {type(self.text).__name__}")
        if (self.kind == "json_object") != (not self.text):
            raise _bad("grammar", "of kind json_object takes no text" if self.text else f"of kind {self.kind} is empty")
        if len(self.text) > MAX_GRAMMAR_CHARS:
            raise _bad("grammar", f"has {len(self.text)} characters; at most {MAX_GRAMMAR_CHARS} are allowed")
        if any("\ud800" <= letter <= "\udfff" for letter in self.text + self.begun):
            raise _bad("grammar", "holds half a character (a lone surrogate)")


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Immutable sampling parameters of one request.

    Attributes:
        max_tokens: most tokens to generate; None means up to the model's context.
        min_tokens: end-of-sequence and stop tokens cannot be chosen before this many.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_p: keep the smallest set of tokens whose probability reaches this; 1 keeps all.
        top_k: keep this many most probable tokens; 0 keeps all.
        min_p: drop tokens below this share of the most probable one's probability.
        seed: makes sampling repeatable whatever else is in the batch; None draws a fresh seed per request.
        n: independent continuations of one prompt.
        stop: strings that end the output; the string itself is cut off. They may span tokens.
        stop_token_ids: token ids that end the output, beside the checkpoint's own.
        ignore_eos: go on past the checkpoint's end-of-sequence tokens (for benchmarks).
        presence_penalty, frequency_penalty: OpenAI's, over generated tokens only, in [-2, 2].
        repetition_penalty: the CTRL penalty, over prompt and generated tokens; 1 is off.
        logit_bias: added to a token's logit before anything else, in [-100, 100]; `grammar` has the last word.
        logprobs: report this many most probable tokens beside each chosen one (log-softmax of the raw logits);
            0 reports the chosen token alone; None reports nothing. They know nothing of `grammar`.
        grammar: what the output must look like; None leaves it free. It says where the output may end, and once nothing
            may follow the output ends, `min_tokens` and `ignore_eos` notwithstanding; `stop`, `stop_token_ids` and
            `max_tokens` may cut it short. Where the prompt ends inside a reasoning part, it begins behind the tag that
            closes it.

    Raises:
        InvalidRequestError: a value is out of range; `param` names the field.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else _tuple("stop", self.stop))
        object.__setattr__(self, "stop_token_ids", _tuple("stop_token_ids", self.stop_token_ids))
        if not isinstance(self.logit_bias, Mapping):
            raise _bad("logit_bias", "must map token ids to numbers")
        _check_int("max_tokens", self.max_tokens, 1, 2**31 - 1, optional=True)
        _check_int("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise _bad("min_tokens", f"is {self.min_tokens}, more than max_tokens ({self.max_tokens})")
        _check_float("temperature", self.temperature, 0.0, 100.0)
        _check_float("top_p", self.top_p, 0.0, 1.0, above=True)
        _check_int("top_k", self.top_k, 0, 2**31 - 1)
        _check_float("min_p", self.min_p, 0.0, 1.0)
        _check_int("seed", self.seed, -MAX_SEED - 1, MAX_SEED, optional=True)
        _check_int("n", self.n, 1, MAX_N)
        _check_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_float("repetition_penalty", self.repetition_penalty, 0.0, 10.0, above=True)
        _check_int("logprobs", self.logprobs, 0, MAX_LOGPROBS, optional=True)
        if len(self.stop) > MAX_STOP_STRINGS:
            raise _bad("stop", f"has {len(self.stop)} strings; at most {MAX_STOP_STRINGS} are allowed")
        for text in self.stop:
            if not isinstance(text, str) or not text or len(text) > MAX_STOP_LENGTH:
                raise _bad("stop", f"must hold non-empty strings of at most {MAX_STOP_LENGTH} characters")
            if any("\ud800" <= letter <= "\udfff" for letter in text):
                raise _bad("stop", "holds half a character (a lone surrogate)")
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise _bad(
                "stop_token_ids", f"has {len(self.stop_token_ids)} entries; at most {MAX_STOP_TOKEN_IDS} are allowed"
            )
        for token_id in self.stop_token_ids:
            _check_int("stop_token_ids", token_id, 0, 2**31 - 1)
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise _bad("logit_bias", f"has {len(self.logit_bias)} entries; at most {MAX_LOGIT_BIAS} are allowed")
        for token_id, bias in self.logit_bias.items():
            _check_int("logit_bias", token_id, 0, 2**31 - 1)
            _check_float("logit_bias", bias, -100.0, 100.0)
        if self.grammar is not None and not isinstance(self.grammar, Grammar):
            raise _bad("grammar", f"must be a Grammar, not {type(self.grammar).__name__}")

    @property
    def greedy(self) -> bool:
        """True when the most probable token is always taken."""
        return self.temperature == 0.0


def _bad(name: str, problem: str) -> InvalidRequestError:
    return InvalidRequestError(f"{name} {problem}.", param=name)


def _tuple(name: str, values: Iterable[Any]) -> tuple[Any, ...]:
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise _bad(name, f"must be a list, not {type(values).__name__}")
    return tuple(values)


def _check_int(name: str, value: int | None, low: int, high: int, *, optional: bool = False) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise _bad(name, f"must be an integer, not {type(value).__name__}")
    if not low <= value <= high:
        raise _bad(name, f"is {value}; it must lie in [{low}, {high}]")


def _check_float(name: str, value: float, low: float, high: float, *, above: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _bad(name, f"must be a number, not {type(value).__name__}")
    # A NaN lies in no range.
    if not low <= value <= high or (above and value == low):
        raise _bad(name, f"is {value}; it must lie in {'(' if above else '['}{low}, {high}]")
