"""What both completion routes need to write an answer: ids, JSON without unset fields, error events, log-probabilities.

Used by `chat` and `completions`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Literal

from fastapi import Response
from pydantic import BaseModel

from seamount.core.errors import EngineError, SeamountError
from seamount.core.requests import FinishReason

from .errors import error_body, log_failure, log_private
from .streaming import event
from .wire.common import SamplingFields

# JSON has no infinity; this is OpenAI's word for "impossible".
_MIN_LOGPROB = -9999.0


def to_json(model: BaseModel) -> str:
    """Return the model's JSON; fields that were never set are left out, those set to None are null."""
    return model.model_dump_json(exclude_unset=True)


def json_response(model: BaseModel, headers: dict[str, str]) -> Response:
    """Return a whole answer."""
    return Response(to_json(model), media_type="application/json", headers=headers)


def ignored_header(body: SamplingFields) -> dict[str, str]:
    """Return the header that names parameters without effect."""
    names = body.ignored()
    return {"x-seamount-ignored": ", ".join(names)} if names else {}


def error_event(envelope: dict[str, Any]) -> Callable[[Exception], str]:
    """Return what turns a failure midway into the stream's last event, which carries the stream's constant fields."""

    def make(error: Exception) -> str:
        return event(json.dumps({**envelope, "choices": [], "error": error_body(typed(error))}))

    return make


def typed(error: Exception) -> SeamountError:
    """Return what a client is told of a failure; one that nobody foresaw is logged, and told without its words."""
    if isinstance(error, SeamountError):
        log_private(error)
        return error
    log_failure(error)
    return EngineError("The server failed on this request; its log says where.", code="internal_error")


def finish_reason(reason: FinishReason | None) -> Literal["stop", "length"] | None:
    """Return the wire's word; the service raises for the engine's other reasons."""
    return reason if reason in ("stop", "length") else None


def floor_logprob(logprob: float) -> float:
    """Return a log-probability that JSON can hold."""
    return max(logprob, _MIN_LOGPROB)
