"""What a request says of the model's thinking, as switches of its chat template.

Used by `chat.tools` and `messages.translate`. There are three ways to say it, and clients use them unasked: OpenAI's
`reasoning_effort`, DeepSeek's `thinking`, and `chat_template_kwargs`. A model thinks or does not, so of a level no more
is left than that thinking was not switched off.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from seamount.core.errors import InvalidRequestError
from seamount.server.encoder import Encoder
from seamount.server.wire.chat import ChatRequest


def template_kwargs(body: ChatRequest, encoder: Encoder) -> Mapping[str, Any] | None:
    """Return the chat template's arguments, with the switches that the request's other words stand for.

    A level of effort gives way to whatever says more: it is sent by clients that know nothing of the model.

    Raises:
        InvalidRequestError: the model cannot be switched so, or the request contradicts itself.
    """
    given, effort = body.chat_template_kwargs, body.reasoning_effort
    kind = body.thinking.type if body.thinking is not None else None
    if effort == "none" and kind == "enabled":
        raise InvalidRequestError("reasoning_effort is 'none', and thinking is enabled.", param="reasoning_effort")
    if kind is None and effort != "none":
        return given if effort is None else {**(encoder.thinking_switches(on=True) or {}), **(given or {})}
    param, on = ("reasoning_effort", False) if kind is None else ("thinking", kind == "enabled")
    switches = thinking_switches(encoder, on=on, param=param)
    kwargs = {**(given or {}), **switches}
    if any(kwargs[name] != value for name, value in (given or {}).items()):
        said = "reasoning_effort is 'none'" if kind is None else f"thinking is {kind}"
        raise InvalidRequestError(
            f"{said}, and chat_template_kwargs switch thinking {'off' if on else 'on'}.", param=param
        )
    return kwargs


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
