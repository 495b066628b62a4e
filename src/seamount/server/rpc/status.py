"""Errors as gRPC tells them: a status code, a sentence, and the rest in trailing metadata.

Used by `door`. Which kind of error it is, the table of `server.errors` says, so that both protocols agree; here stands
only what an HTTP status is called in gRPC.
"""

from __future__ import annotations

import math

import grpc

from seamount.core.errors import DeadlineError, SeamountError
from seamount.server.errors import error_body, status_of

_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
}
_DEFAULT_RETRY_S = 1.0
_MAX_VALUE = 512


def code_of(error: SeamountError) -> grpc.StatusCode:
    """Return an error's status code."""
    if isinstance(error, DeadlineError):
        return grpc.StatusCode.DEADLINE_EXCEEDED
    status = status_of(error)
    return _CODES.get(status, grpc.StatusCode.INTERNAL if status >= 500 else grpc.StatusCode.FAILED_PRECONDITION)


def sentence(error: SeamountError) -> str:
    """Return what is wrong, and what to do about it, in the HTTP API's words."""
    return str(error_body(error)["message"])


def metadata(error: SeamountError) -> dict[str, str]:
    """Return what trailing metadata says of an error.

    A server tells a client that retries when to do so with `grpc-retry-pushback-ms`:
    https://github.com/grpc/proposal/blob/master/A6-client-retries.md#pushback. A key whose quota is used up is told
    with `retry-after-ms`, as over HTTP: to try again is for its owner to decide.
    """
    found = {"seamount-code": error.code}
    if error.param:
        found["seamount-param"] = _ascii(error.param)
    if error.hint:
        found["seamount-hint"] = _ascii(error.hint)
    code = code_of(error)
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED):
        wait_s = _DEFAULT_RETRY_S if error.retry_after is None else max(error.retry_after, 0.0)
        found["retry-after"] = str(math.ceil(wait_s))
        found["retry-after-ms"] = str(math.ceil(wait_s * 1000))
    if code is grpc.StatusCode.UNAVAILABLE:
        found["grpc-retry-pushback-ms"] = found["retry-after-ms"]
    return found


def _ascii(text: str) -> str:
    """Return text as metadata can carry it: printable ASCII."""
    plain = text.encode("ascii", "backslashreplace").decode()
    return "".join(letter if letter.isprintable() else " " for letter in plain)[:_MAX_VALUE]
