"""Grammars over one checkpoint's vocabulary: compiled aside, kept, and followed by each sequence token by token.

Called by `engine`. The work is llguidance's: an Earley parser that makes masks as they are needed, so that compiling
takes milliseconds. It is done in a thread, while the steps of others go on, and first of all in a child process
(`_grammar_sandbox`): what a hostile schema, pattern or grammar would end or stop is the child.

A sequence's `Constraint` follows the tokens that were chosen and never a guess, so preemption, speculation and shared
prefixes need nothing of it; it is no part of the cache.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from torch import Tensor

from seamount.core.errors import BackendError, InvalidRequestError
from seamount.core.sampling import Grammar
from seamount.models.prompt import PromptEncoder
from seamount.models.reasoning import REASONING_TAGS, THINK_CLOSE
from seamount.models.sandbox import SandboxProcess
from seamount.models.tools_syntax import JSON_SPACE

from .grammar_schema import enforceable

CPU_LIMIT_S = 5.0
MEMORY_LIMIT_BYTES = 1 << 30
MAX_COMPILED = 32
# The library's own limits bound a step's pause (7 ms and 1 ms for the two of a step) and a grammar's memory (1 to 2 kB
# for each state).
LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 25_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}
_JSON = {"whitespace_pattern": JSON_SPACE}
_SANDBOX = Path(__file__).with_name("_grammar_sandbox.py")
_MAX_PROBLEM_CHARS = 400
# What the library says that means nothing to a caller, and what to say instead: the problem, and a way out.
_OWN_WORDS = {
    "coerce_one_of": (
        "the keyword 'oneOf' is not supported where a value may fit several of its schemas",
        "Write 'anyOf' instead.",
    ),
    "NoExtensionBias": (
        "a '$ref' or a rule leads back to itself and to nothing else, so that no answer could ever end",
        "Point '$ref' at a schema in '$defs' that says what the value is; to nest it in itself, refer to it from its "
        "'properties' or 'items', or beside another alternative of 'anyOf'.",
    ),
    "circular references with sibling keys": (
        "a '$ref' that leads back to its own schema is not supported beside other keywords",
        "Leave that '$ref' out, or refer to the schema from its 'properties', 'items' or 'anyOf'.",
    ),
}
# In Lark's form the library takes options that would change how tokens are chosen, or not do what they say here.
_RULE_OPTION = re.compile(r"\[[^\[\]]*?\b(stop|max_tokens|temperature)\s*=")


class Constraint:
    """What one sequence may say next.

    Attributes:
        allowed: bool `[V]`: the tokens that may follow; at least one. Not to be changed.
    """

    def __init__(self, compiled: Compiled, *, thinks: bool) -> None:
        self._vocabulary = compiled.vocabulary
        self._matcher = compiled.matcher.deep_copy()
        self._thinks = thinks
        self._first = compiled.first
        self.allowed = compiled.vocabulary.thoughts if thinks else compiled.first

    def accept(self, token_id: int) -> bool:
        """Take the token that was chosen, other than one that ends the sequence; return whether nothing may follow.

        Raises:
            InvalidRequestError: the grammar has grown over its limits, or no token of this vocabulary can continue it.
        """
        if self._thinks:
            if token_id == self._vocabulary.think_close:
                self._thinks = False
                self.allowed = self._first
            return False
        self._matcher.consume_token(token_id)
        if not self._matcher.is_error() and self._matcher.is_stopped():
            return True
        self.allowed = self._vocabulary.mask(self._matcher)
        return False


@dataclass(frozen=True)
class Compiled:
    """A grammar ready for use.

    Attributes:
        matcher: at the beginning; copies of it follow sequences.
        first: bool `[V]`: the tokens that an output may begin with.
    """

    vocabulary: Vocabulary
    matcher: LLMatcher
    first: Tensor


class Grammars:
    """Compiles grammars for one checkpoint and remembers the latest.

    Args:
        encoder: the checkpoint's.
        vocab_size: rows of the output head; may be more than the tokenizer has.
        cpu_limit_s, memory_limit_bytes: of the child, for each grammar.
    """

    def __init__(
        self,
        encoder: PromptEncoder,
        vocab_size: int,
        *,
        cpu_limit_s: float = CPU_LIMIT_S,
        memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
    ) -> None:
        self._encoder = encoder
        self._cpu_limit_s = cpu_limit_s
        self._memory_limit_bytes = memory_limit_bytes
        self._limits = LLParserLimits(**LIMITS)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._known: dict[tuple[str, Grammar], Future[Compiled]] = {}
        # Not with the first grammar: for 129,280 tokens it takes a third of a second, in which nothing else runs.
        self._vocabulary = Vocabulary(encoder, vocab_size)
        self._child: SandboxProcess | None = None  # only the pool's one thread touches it

    def prepare(self, grammar: Grammar, cache_salt: str = "") -> Future[Compiled]:
        """Return the compiled grammar, or the promise of it; known ones are found under the same salt only.

        The future raises InvalidRequestError where the grammar is malformed, cannot be enforced or is too complex, and
        BackendError where the child could not be started.
        """
        future = self._known.pop((cache_salt, grammar), None)
        if future is None or (future.done() and isinstance(future.exception(), BackendError)):
            future = self._pool.submit(self._compile, grammar)
        self._known[cache_salt, grammar] = future
        if len(self._known) > MAX_COMPILED:
            del self._known[next(iter(self._known))]
        return future

    def thinks(self, prompt_token_ids: Sequence[int]) -> bool:
        """Whether the prompt ends inside a reasoning part: of the two tags its last one opens."""
        think_open, think_close = (self._encoder.tokenizer.token_id(tag) for tag in REASONING_TAGS)
        if think_open is None or think_close is None:
            return False
        return next((i == think_open for i in reversed(prompt_token_ids) if i in (think_open, think_close)), False)

    def _compile(self, grammar: Grammar) -> Compiled:
        text = _serialized(grammar)
        self._rehearse(text)
        matcher = LLMatcher(self._vocabulary.tokenizer, text, log_level=0, limits=self._limits)
        if matcher.is_error():
            raise _refused_by_library(matcher.get_error())
        # JSON may stand behind white space, which the grammars that are made for it have none of.
        is_json = grammar.kind in ("json_object", "json_schema")
        self._begin(matcher, grammar.begun.lstrip(" \t\r\n") if is_json else grammar.begun)
        return Compiled(self._vocabulary, matcher, self._vocabulary.mask(matcher))

    def _begin(self, matcher: LLMatcher, begun: str) -> None:
        """Take the beginning that the prompt has already. How its letters are cut into tokens makes no difference."""
        end_s = time.monotonic() + self._cpu_limit_s
        for token_id in self._vocabulary.tokenizer.greedy_tokenize(begun):
            if not matcher.try_consume_tokens([token_id]):
                raise _bad_beginning("The answer's beginning is none of what its shape allows.")
            if time.monotonic() > end_s:
                raise _bad_beginning("The answer's beginning is too long for a shape as complex as this.")
        if begun and matcher.is_stopped():
            raise _bad_beginning("The answer's beginning is all that its shape allows, so nothing can follow it.")

    def _rehearse(self, text: str) -> None:
        """Compile in the child; a grammar that is wrong is refused with the library's words, or better ones."""
        if self._child is None or not self._child.is_usable():
            self._child = self._new_child()
        answer = self._child.ask(json.dumps({"grammar": text}).encode())
        if answer is None:
            self._child.close()
            raise _refused(
                f"compiling it takes over {self._cpu_limit_s:g} s, {self._memory_limit_bytes >> 20} MiB or the stack"
            )
        if answer["error"]:
            raise _refused_by_library(answer["error"])

    def _new_child(self) -> SandboxProcess:
        vocabulary, child = self._vocabulary, SandboxProcess(_SANDBOX)
        order = {
            "tokens": [token.decode("latin-1") for token in vocabulary.tokens],
            "special": vocabulary.special_token_ids,
            "eos": vocabulary.eos_token_id,
            "limits": LIMITS,
            "cpu_s": self._cpu_limit_s,
            "memory": self._memory_limit_bytes,
        }
        if child.ask(json.dumps(order).encode()) is None:
            child.close()
            raise BackendError("The process that checks grammars could not be started.", retry_after=1.0)
        return child


class Vocabulary:
    """A checkpoint's tokens as the grammar library sees them; it calls this object to encode what a grammar forces.

    Attributes:
        tokens: the bytes of each token; none for ids without token.
        special_token_ids: tokens that are no text: a grammar can only name them.
        eos_token_id: the first of those that end a sequence; None makes the library add one of its own.
        thoughts: bool `[V]`: what may be said before the answer: all but the end.
        think_close: the token that ends the reasoning, where there is one.
    """

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, encoder: PromptEncoder, vocab_size: int) -> None:
        self._encode = encoder.tokenizer.encode_inside
        self._vocab_size = vocab_size
        self._eos_token_ids = [token_id for token_id in encoder.eos_token_ids if token_id < vocab_size]
        self.tokens = [encoder.token_bytes(token_id) for token_id in range(vocab_size)]
        self.special_token_ids = sorted({*encoder.tokenizer.marker_ids, *self._eos_token_ids})
        self.eos_token_id = self._eos_token_ids[0] if self._eos_token_ids else None
        self.think_close = encoder.tokenizer.token_id(THINK_CLOSE)
        self.thoughts = torch.ones(vocab_size, dtype=torch.bool)
        self.thoughts[self._eos_token_ids] = False
        # The library asks for these attributes and the call, not for its own class.
        self.tokenizer = LLTokenizer(cast(Any, self))

    def __call__(self, text: str) -> list[int]:
        """Return the tokens that the model would be shown for a text in the middle of another."""
        token_ids = self._encode(text)
        spelled = b"".join(self.tokens[token_id] for token_id in token_ids)
        # A tokenizer may change a text (normal forms, unknown characters); a grammar's letters must stay.
        return token_ids if spelled == text.encode() else self.tokenizer.greedy_tokenize(text)

    def mask(self, matcher: LLMatcher) -> Tensor:
        """Return bool `[V]`: the tokens that may follow.

        Raises:
            InvalidRequestError: as for `Constraint.accept`.
        """
        bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        if matcher.is_error():
            raise InvalidRequestError(
                f"The answer stopped, since its grammar is too complex to go on: {_first_line(matcher.get_error())}.",
                hint="Simplify it: fewer alternatives, smaller bounds on lengths.",
                code="grammar_too_complex",
            )
        if matcher.is_stopped():
            raise _dead_end()
        allowed = (
            torch.from_numpy(np.unpackbits(bits, bitorder="little", count=len(self.tokens))[: self._vocab_size]) != 0
        )
        if self._eos_token_ids:
            allowed[self._eos_token_ids] = bool(allowed[self._eos_token_ids[0]])
        if not allowed.any():  # but the library's own end, where the model has none
            raise _dead_end()
        return allowed


def _serialized(grammar: Grammar) -> str:
    """Return the grammar as the library reads it. Never the caller's text itself, which could pose as that form."""
    if grammar.kind == "json_object":
        return _json_grammar({"type": "object"})
    if grammar.kind == "json_schema":
        return _json_grammar(enforceable(_parsed(grammar.text)))
    if grammar.kind == "regex":
        return str(LLMatcher.grammar_from_regex(grammar.text))
    if "::=" in grammar.text:
        raise _refused(
            "it is not in Lark's form", hint="Write 'start: ...', with rules in lower and terminals in upper case."
        )
    option = _RULE_OPTION.search(grammar.text)
    if option is not None:
        raise _refused(f"the rule option {option[1]!r} is not supported")
    return json.dumps({"grammars": [{"lark_grammar": grammar.text}]})


def _json_grammar(schema: Any) -> str:
    if schema is False:
        raise _refused("the schema false allows nothing")
    # A copy with the library's own options: the caller's schema has no such keyword, or it would have been refused.
    whole = {**({} if schema is True else schema), "x-guidance": _JSON}
    return json.dumps({"grammars": [{"json_schema": whole}]})


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as cause:
        raise _refused("the schema is no JSON") from cause


def _dead_end() -> InvalidRequestError:
    return InvalidRequestError(
        "The answer stopped, since no token of this model can continue it as its grammar asks.", code="grammar_dead_end"
    )


def _bad_beginning(problem: str) -> InvalidRequestError:
    return InvalidRequestError(
        problem,
        hint="Begin it otherwise, or leave the last message out; continue_final_message false makes it a part of the "
        "conversation.",
        param="messages",
    )


def _refused_by_library(problem: str) -> InvalidRequestError:
    for words, (own, hint) in _OWN_WORDS.items():
        if words in problem:
            return _refused(own, hint=hint)
    return _refused(problem)


def _refused(problem: str, *, hint: str | None = None) -> InvalidRequestError:
    return InvalidRequestError(
        f"The grammar cannot be used: {_first_line(problem)}.", hint=hint, code="invalid_grammar"
    )


def _first_line(problem: str) -> str:
    return " ".join(problem.split())[:_MAX_PROBLEM_CHARS].rstrip(".")
