"""The one table from errors to HTTP: status, body, retry headers. Bodies are OpenAI's, below /v1/messages Anthropic's.

Used by the app's exception handlers, by the middleware and by streams that fail midway. A body holds the error's own
words and never what the caller sent: prompts stay out of errors and logs.
"""

from __future__ import annotations

import logging
import math
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from seamount.core import errors as core

from .telemetry.record import current_record

_log = logging.getLogger(__name__)

_INVALID = "invalid_request_error"
_SERVER = "server_error"
_BUSY = "service_unavailable"

# The first row whose class fits wins, so children stand before their parents.
_STATUS: tuple[tuple[type[core.SeamountError], int, str], ...] = (
    (core.NotFoundError, 404, _INVALID),
    (core.UnauthenticatedError, 401, _INVALID),
    (core.ForbiddenError, 403, "permission_error"),
    (core.TooLargeError, 413, _INVALID),
    (core.RequestError, 400, _INVALID),
    (core.QuotaError, 429, "rate_limit_error"),
    (core.StateFullError, 507, _SERVER),
    # The caller set the time: whoever asks again with the same one wastes what is computed until then.
    (core.DeadlineError, 504, _SERVER),
    (core.CapacityError, 503, _BUSY),
    (core.WorkerDiedError, 503, _BUSY),
    (core.BackendError, 502, _SERVER),
    (core.SeamountError, 500, _SERVER),
)

# What the framework answers by itself: status to (type, code, message).
_FRAMEWORK: dict[int, tuple[str, str, str]] = {
    400: (_INVALID, "invalid_body", "The body could not be read as JSON."),
    403: ("permission_error", "forbidden", "This is not permitted."),
    404: (_INVALID, "not_found", "There is no such route."),
    405: (_INVALID, "method_not_allowed", "This route does not answer that method."),
    408: (_INVALID, "body_too_slow", "The body came too slowly, or not to its end."),
    413: (_INVALID, "body_too_large", "The body is too large."),
    415: (_INVALID, "unsupported_encoding", "The body is compressed, which this server does not read."),
    503: (_BUSY, "draining", "The server is stopping and takes no new requests."),
    500: (_SERVER, "internal_error", "The server failed on this request; its log says where."),
}
# Anthropic's words for a status, and the path below which they are used.
_ANTHROPIC: dict[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_ANTHROPIC_PATH = "/v1/messages"
# Problems whose own words name classes of this program.
_NO_OBJECT = ("model_type", "model_attributes_type", "dict_type")
_DEFAULT_RETRY_S = 1.0
_MAX_MESSAGE = 600


class ClientGoneError(Exception):
    """The client closed the connection; there is nobody to answer."""


def status_of(error: core.SeamountError) -> int:
    """Return the HTTP status of a typed error."""
    return _row(error)[0]


def error_body(error: core.SeamountError) -> dict[str, Any]:
    """Return OpenAI's error object for a typed error, its hint appended to the message."""
    message = f"{error.message} {error.hint}" if error.hint else error.message
    _, kind = _row(error)
    return _body(message, kind, error.code, error.param)


def anthropic_body(error: core.SeamountError) -> dict[str, Any]:
    """Return Anthropic's whole body for a typed error."""
    status, _ = _row(error)
    return _anthropic_body(status, error_body(error))


class ErrorResponse(JSONResponse):
    """An answer that is no success, in the form of the API that was asked.

    Whoever refuses a request, be it before there is a route, makes one of these and need not know the form: the path
    decides, when the answer is sent.
    """

    def __init__(self, status: int, error: dict[str, Any], headers: Mapping[str, str]) -> None:
        super().__init__({"error": error}, status, headers)
        self._error = error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it, and note its code in the request's record."""
        record = current_record()
        if record is not None:
            record.refuse(self._error["code"])
        if f"{scope['path']}/".startswith(f"{_ANTHROPIC_PATH}/"):
            body = _anthropic_body(self.status_code, self._error)
            self.body = self.render(body)
            self.headers["content-length"] = str(len(self.body))
            self.headers["request-id"] = body["request_id"] or ""
        await super().__call__(scope, receive, send)


def error_response(error: core.SeamountError) -> ErrorResponse:
    """Return the whole answer for a typed error.

    Official clients retry every 5xx unless told otherwise: `x-should-retry` tells them whether waiting helps.
    """
    log_private(error)
    status, _ = _row(error)
    headers: dict[str, str] = {}
    if status in (429, 503):
        wait_s = _DEFAULT_RETRY_S if error.retry_after is None else max(error.retry_after, 0.0)
        headers = {"retry-after": str(math.ceil(wait_s)), "retry-after-ms": str(math.ceil(wait_s * 1000))}
    if status == 401:  # https://www.rfc-editor.org/rfc/rfc6750#section-3
        headers["www-authenticate"] = 'Bearer realm="seamount", error="invalid_token"'
    if status == 413:
        headers["connection"] = "close"  # the rest of the body is not read
    if status >= 500:
        headers["x-should-retry"] = "true" if status == 503 else "false"
    return ErrorResponse(status, error_body(error), headers)


def framework_response(
    status: int, *, message: str | None = None, headers: Mapping[str, str] | None = None
) -> Response:
    """Return an error that has no typed error behind it: routing, framing, an unforeseen failure."""
    kind, code, default = _FRAMEWORK.get(status, _FRAMEWORK[500] if status >= 500 else _FRAMEWORK[400])
    more = {"x-should-retry": "false"} if status >= 500 else {}
    return ErrorResponse(status, _body(message or default, kind, code, None), {**more, **(headers or {})})


def install(app: FastAPI) -> None:
    """Give the app handlers for every error that a route can end in."""
    app.add_exception_handler(core.SeamountError, _on_seamount)
    app.add_exception_handler(RequestValidationError, _on_validation)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(ClientGoneError, _on_gone)


def validation_error(problems: Sequence[Mapping[str, Any]]) -> core.InvalidRequestError:
    """Turn pydantic's list of problems into one error that names one field and says what is wrong with it."""
    problem = _most_telling(problems)
    kind = problem["type"]
    if kind == "json_invalid":
        return core.InvalidRequestError(
            f"The body is not valid JSON (near character {problem['loc'][-1]}).", code="invalid_json"
        )
    param = _param(problem["loc"])
    if not param:
        return core.InvalidRequestError(
            "The body must be a JSON object, sent as application/json.", code="invalid_body"
        )
    if kind == "extra_forbidden":
        return core.InvalidRequestError(f"Unknown parameter: {param}.", param=param, code="unknown_parameter")
    if kind == "missing":
        return core.InvalidRequestError(f"{param} is required.", param=param, code="missing_parameter")
    if kind == "unsupported_parameter":
        return core.InvalidRequestError(f"{param} {problem['msg']}", param=param, code="unsupported_parameter")
    words = "Input should be an object" if kind in _NO_OBJECT else problem["msg"]
    return core.InvalidRequestError(f"{param}: {words}."[:_MAX_MESSAGE], param=param)


def log_private(error: core.SeamountError) -> None:
    """Log what of an error only those who run the server may read."""
    if error.private:
        _log.warning("%s: %s (%s)", error.code, error.message, error.private)


def log_failure(error: BaseException) -> None:
    """Log where an unforeseen error arose, without its words: those may hold what a caller sent."""
    frames = traceback.extract_tb(error.__traceback__)
    where = " < ".join(f"{frame.filename}:{frame.lineno} {frame.name}" for frame in reversed(frames[-8:]))
    _log.error("Unforeseen %s at %s", type(error).__name__, where)


def _row(error: core.SeamountError) -> tuple[int, str]:
    return next((status, kind) for cls, status, kind in _STATUS if isinstance(error, cls))


def _body(message: str, kind: str, code: str, param: str | None) -> dict[str, Any]:
    # A name that the caller made up may hold lone surrogates, which no answer can.
    message = message.encode(errors="replace").decode()
    param = param and param.encode(errors="replace").decode()
    return {"message": message, "type": kind, "param": param, "code": code}


def _anthropic_body(status: int, error: Mapping[str, Any]) -> dict[str, Any]:
    kind = _ANTHROPIC.get(status, "invalid_request_error" if status < 500 else "api_error")
    message = error["message"]
    if error["code"] == core.ContextTooLongError.code:
        message = f"prompt is too long: {message}"  # by these words clients know to shorten the conversation
    record = current_record()
    request_id = record.request_id if record else None
    return {"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id}


def _most_telling(problems: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """A union reports each of its arms; the arm that got furthest is the one that the caller meant."""
    field = _names(problems[0]["loc"])[:4]
    same_field = [p for p in problems if _names(p["loc"])[: len(field)] == field]
    return max(same_field, key=lambda p: (len(p["loc"]), not p["type"].endswith("_type")))


# pydantic puts the arm of a union into a location: these are no field names below the first level.
_ARMS = {
    *("str", "int", "float", "bool", "dict"),
    *("system", "developer", "user", "assistant", "tool"),
    *("NamedToolChoice", "ResponseToolChoice"),
}


def _names(location: Sequence[str | int]) -> list[str | int]:
    """Return a location without the arms of unions."""
    return [
        part
        for depth, part in enumerate(location)
        if isinstance(part, int) or depth < 2 or (part not in _ARMS and "[" not in part)
    ]


def _param(location: Sequence[str | int]) -> str:
    """Return `messages[0].content` for ("body", "messages", 0, "user", "content", "str")."""
    path = ""
    for part in _names(location)[1:]:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path[:200]


async def _on_seamount(request: Request, error: Exception) -> Response:
    return error_response(error) if isinstance(error, core.SeamountError) else framework_response(500)


async def _on_validation(request: Request, error: Exception) -> Response:
    if not isinstance(error, RequestValidationError):
        return framework_response(500)
    return error_response(validation_error(error.errors()))


async def _on_http(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        return framework_response(500)
    if isinstance(error.__cause__, core.SeamountError):  # raised by us while the framework read the body
        return error_response(error.__cause__)
    return framework_response(error.status_code, headers=error.headers)


async def _on_gone(request: Request, error: Exception) -> Response:
    # nginx's number for "the client closed the request"; only logs ever see it.
    return Response(status_code=499)
