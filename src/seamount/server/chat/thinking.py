"""What a request says of the model's thinking, as switches of its chat template.

Used by `chat.tools` and `messages.translate`. There are three ways to say it, and clients use them unasked: OpenAI's
`reasoning_effort`, DeepSeek's `thinking`, and `chat_template_kwargs`. A model thinks or does not, so of a level no more
is left than that thinking was not switched off.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from seamount.core.errors import InvalidRequestError
from seamount.server.encoder import Encoder
from seamount.server.wire.chat import ChatRequest

_NAMES = ("thinking", "enable_thinking")  # of the switch, in chat templates


def template_kwargs(body: ChatRequest, encoder: Encoder) -> dict[str, Any]:
    """Return the chat template's arguments, with the switches that the request's other words stand for.

    `chat_template_kwargs` may call the switch by either of its usual names, whichever the model's template has. A level
    of effort gives way to whatever says more: it is sent by clients that know nothing of the model.

    Raises:
        InvalidRequestError: the model cannot be switched so, or the request contradicts itself.
    """
    given = dict(body.chat_template_kwargs or {})
    asked = [(name, given.pop(name)) for name in _NAMES if name in given]
    kind = body.thinking.type if body.thinking is not None else None
    wishes: list[_Wish] = []
    if body.reasoning_effort == "none":
        wishes.append(_Wish("reasoning_effort", "reasoning_effort is 'none'", False))
    if kind in ("enabled", "disabled"):
        wishes.append(_Wish("thinking", f"thinking is {kind}", kind == "enabled"))
    wishes += [_of_argument(name, value) for name, value in asked if value is not None]
    if not wishes:
        leaves_it = body.reasoning_effort is not None or kind is not None
        switches = (encoder.thinking_switches(on=True) or {}) if leaves_it else {}
    else:
        first = wishes[0]
        other = next((wish for wish in wishes if wish.on != first.on), None)
        if other is not None:
            raise InvalidRequestError(f"{first.words}, and {other.words}.", param=first.param)
        switches = thinking_switches(encoder, on=first.on, param=first.param)
    return {**given, **switches}


class _Wish(NamedTuple):
    """Thinking on or off, the field that says so, and what it says."""

    param: str
    words: str
    on: bool


def _of_argument(name: str, value: Any) -> _Wish:
    if not isinstance(value, bool):
        raise InvalidRequestError(f"chat_template_kwargs.{name} must be true or false.", param="chat_template_kwargs")
    return _Wish("chat_template_kwargs", f"chat_template_kwargs switch thinking {'on' if value else 'off'}", value)


def thinking_switches(encoder: Encoder, *, on: bool, param: str) -> dict[str, bool]:
    """Return the template's arguments with which the model thinks, or does not; none where it does so anyway.

    Args:
        param: the request's field that asks for it.

    Raises:
        InvalidRequestError: it cannot be had.
    """
    switches = encoder.thinking_switches(on=on)
    if switches is None:
        raise InvalidRequestError(
            "This model does not think before it answers." if on else "This model's thinking cannot be switched off.",
            hint=f"Leave {param} out.",
            param=param,
        )
    return dict(switches)
