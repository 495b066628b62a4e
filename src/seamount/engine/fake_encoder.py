"""A prompt encoder without files: one token per byte, and DeepSeek's chat form in plain words.

Used with `FakeEngine`. It has the face of `models.prompt.PromptEncoder` and must not know a checkpoint.
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from seamount.core.errors import ContextTooLongError, InvalidRequestError
from seamount.models.reasoning import REASONING_TAGS, THINK_CLOSE, THINK_OPEN, ReasoningParser

_BOS, _EOS, _THINK_START, _THINK_END, _USER, _ASSISTANT = range(256, 262)
_SPECIAL = {
    _BOS: "<bos>",
    _EOS: "<eos>",
    _THINK_START: THINK_OPEN,
    _THINK_END: THINK_CLOSE,
    _USER: "<user>",
    _ASSISTANT: "<assistant>",
}
_VISIBLE = (_THINK_START, _THINK_END)


class Detokenizing(Protocol):
    """Turns tokens into text as they come."""

    def push(self, token_ids: Sequence[int], /) -> str:
        """Return the text that became certain."""
        ...

    def flush(self) -> str:
        """Return what was held back."""
        ...


class Text(Protocol):
    """What `FakeEngine` needs to know of a vocabulary: `ByteEncoder` and `models.prompt.PromptEncoder` have it."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...
    def token_text(self, token_id: int, /) -> str: ...
    def detokenizer(self, *, skip_special_tokens: bool = True) -> Detokenizing: ...


@dataclass(frozen=True)
class FakePrompt:
    """An encoded chat."""

    token_ids: tuple[int, ...]
    text: str
    starts_in_reasoning: bool


class ByteEncoder:
    """UTF-8 bytes are tokens 0 to 255; six special tokens follow. `thinking: true` starts the answer in reasoning."""

    vocab_size = 262
    eos_token_ids = (_EOS,)
    bos_token_id = _BOS
    has_chat_template = True
    template_source = "built-in bytes"
    default_sampling: Mapping[str, float | int] = {}

    def encode_text(self, text: str, *, add_special_tokens: bool = True, limit: int | None = None) -> tuple[int, ...]:
        """Return the bytes of the text, thinking marks as tokens of their own; `limit` as in `PromptEncoder`."""
        if not isinstance(text, str):
            raise InvalidRequestError("A prompt must be text or token ids.", param="prompt")
        _check_length(text, limit, param="prompt")
        ids = [_BOS] if add_special_tokens else []
        rest = text
        while rest:
            marks = [(rest.find(mark), mark) for mark in REASONING_TAGS if mark in rest]
            at, mark = min(marks, default=(len(rest), ""))
            ids.extend(rest[:at].encode())
            if mark:
                ids.append(_THINK_START if mark == THINK_OPEN else _THINK_END)
            rest = rest[at + len(mark) :]
        return tuple(ids)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        limit: int | None = None,
    ) -> FakePrompt:
        """Return `<bos>` and, per message, `role: content`, then the mark where the assistant begins."""
        if not isinstance(messages, Sequence) or not all(isinstance(m, Mapping) and "role" in m for m in messages):
            raise InvalidRequestError("messages must be a list of objects with role and content.", param="messages")
        text = "".join(f"{message['role']}: {message.get('content') or ''}\n" for message in messages)
        _check_length(text, limit, param="messages")
        thinking = bool((template_kwargs or {}).get("thinking"))
        ids = (_BOS, *self.encode_text(text, add_special_tokens=False))
        if not (template_kwargs or {}).get("add_generation_prompt", True):
            return FakePrompt(ids, text, False)
        return FakePrompt((*ids, _ASSISTANT) + (_THINK_START,) * thinking, text, thinking)

    def thinking_switches(self, *, on: bool) -> dict[str, bool]:
        """Return the arguments that switch reasoning on or off."""
        return {"thinking": on}

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of whole sequences of tokens."""
        detokenizer = self.detokenizer(skip_special_tokens=skip_special_tokens)
        return detokenizer.push(token_ids) + detokenizer.flush()

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one token."""
        return bytes([token_id]) if token_id < 256 else _SPECIAL[token_id].encode()

    def token_text(self, token_id: int) -> str:
        """Return the text of one token; part of a character gives U+FFFD."""
        return self.token_bytes(token_id).decode(errors="replace")

    def detokenizer(self, *, skip_special_tokens: bool = True) -> _ByteDetokenizer:
        """Return a fresh incremental detokenizer."""
        return _ByteDetokenizer(skip_special_tokens)

    def reasoning_parser(self, *, starts_in_reasoning: bool) -> ReasoningParser:
        """Return a fresh splitter of reasoning and content."""
        return ReasoningParser(starts_in_reasoning=starts_in_reasoning)


def _check_length(text: str, limit: int | None, *, param: str) -> None:
    # A mark's letters count as one token here, so this is a lower bound as in the real encoder.
    count = len(text.encode()) - sum((len(mark) - 1) * text.count(mark) for mark in REASONING_TAGS)
    if limit is not None and count > limit:
        raise ContextTooLongError(
            f"The prompt has at least {count} tokens; the context holds {limit}.",
            hint="Shorten the prompt.",
            param=param,
        )


class _ByteDetokenizer:
    def __init__(self, skip_special_tokens: bool) -> None:
        self._skip = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_ids: Sequence[int]) -> str:
        return "".join(self._one(token_id) for token_id in token_ids)

    def _one(self, token_id: int) -> str:
        if token_id < 256:
            return self._utf8.decode(bytes([token_id]))
        cut = self.flush()
        return cut if self._skip and token_id not in _VISIBLE else cut + _SPECIAL[token_id]

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)
