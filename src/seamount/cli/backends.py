"""Where the terminal chat gets its answers from: the protocol, and the model in this process.

Made by `cli.wire`, used by `cli.chat`, which cannot tell this backend from the one in `cli.remote`.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from seamount.core.errors import InvalidRequestError, RequestError
from seamount.core.sampling import SamplingParams

if TYPE_CHECKING:
    from seamount.engine.llm import LLM, Delta

_T = TypeVar("_T")
# What the switch is called in the templates of DeepSeek and of Qwen; a template refuses a name that it does not read.
_SWITCHES = ("thinking", "enable_thinking")


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What an answer grew by; `num_tokens` is 0 where the source counts at the end only."""

    reasoning: str = ""
    content: str = ""
    num_tokens: int = 0
    finish_reason: str | None = None


class ChatBackend(Protocol):
    """Answers conversations.

    Attributes:
        name: the model's name, for the screen.
    """

    @property
    def name(self) -> str: ...

    def stream(
        self, messages: Sequence[Mapping[str, str]], sampling: Mapping[str, Any], think: bool | None
    ) -> Generator[Piece, None, None]:
        """Yield the answer as it comes; closing the generator stops the work.

        Args:
            sampling: only the parameters that the person chose; for the others the model's recommendation holds.
            think: whether to reason before the answer; None leaves it to the model's template.

        Raises:
            SeamountError: no answer, or it broke off.
            KeyboardInterrupt: Ctrl-C; the answer is stopped and the backend is ready for the next one.
        """
        ...


class LocalBackend:
    """A model in this process."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self.name = llm.facts.name

    def stream(
        self, messages: Sequence[Mapping[str, str]], sampling: Mapping[str, Any], think: bool | None
    ) -> Generator[Piece, None, None]:
        """See `ChatBackend.stream`."""
        recommended = self._llm.prompt_encoder.default_sampling
        params = SamplingParams(**{**recommended, **sampling})

        def ask(template_kwargs: Mapping[str, bool]) -> Iterator[Delta]:
            return self._llm.stream_chat(messages, params, chat_template_kwargs=template_kwargs)

        for delta in interrupted_between(with_switch(ask, think)):
            yield Piece(
                reasoning=delta.reasoning,
                content=delta.content,
                num_tokens=len(delta.token_ids),
                finish_reason=delta.finish_reason,
            )


def with_switch(ask: Callable[[Mapping[str, bool]], Iterator[_T]], think: bool | None) -> Iterator[_T]:
    """Ask with the template's switch for reasoning, under the first of its names that the template has.

    Raises:
        InvalidRequestError: there is no such switch.
    """
    if think is None:
        yield from ask({})
        return
    for name in _SWITCHES:
        try:
            yield from ask({name: think})
            return
        except RequestError as error:
            if error.param != "chat_template_kwargs":
                raise
    raise InvalidRequestError(
        "This model's chat template has no switch for reasoning.", hint="/think default unsets it."
    )


def interrupted_between(items: Iterator[_T]) -> Generator[_T, None, None]:
    """Yield the items; Ctrl-C waits for the engine's step to end, so that the engine stays whole. A second does not."""
    pressed = False

    def note(signum: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    ended = object()
    while True:
        before = signal.signal(signal.SIGINT, note)
        try:
            item = next(items, ended)
        finally:
            signal.signal(signal.SIGINT, before)
        if pressed:
            raise KeyboardInterrupt
        if item is ended:
            return
        yield item  # type: ignore[misc]
