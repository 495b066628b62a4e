"""What is known of one request while it is answered: who asked, for which route, how many tokens, and when what began.

Opened by `door.middleware.Edge`; the door adds who came, `metrics.RequestTimer` what the engine did. Read at the end
for the log's line (`logs`), the metrics and the span (`tracing`). Holds numbers, names that the server knows and the
request's id: never anything that was asked or answered, nor what a caller made up.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from seamount.core.identity import Principal
from seamount.core.requests import FinishReason, Request

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


@dataclass(kw_only=True)
class Record:
    """One request. Times are Unix nanoseconds.

    Attributes:
        request_id: as in the answer's x-request-id.
        method: see `known_method`.
        traceparent: the header of that name, as it came; "" where there is none or several.
        route: the router's spelling of where it goes; None where it goes nowhere, or was refused before that was asked.
        status: of the answer; 0 while there is none.
        error: code of what it failed with, was rejected for or refused; "" for none.
        is_refused: it was answered with that error without being counted as failed or rejected.
        model, request: of the first of its requests to the engine; "" and None where it made none.
        num_requests: requests to the engine.
        events: what happened when; of each name the first.
    """

    request_id: str
    method: str
    traceparent: str = ""
    begin_ns: int = field(default_factory=time.time_ns)
    end_ns: int = 0
    route: str | None = None
    principal: Principal | None = None
    status: int = 0
    error: str = ""
    is_refused: bool = False
    model: str = ""
    request: Request | None = None
    num_requests: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_generated_tokens: int = 0
    finish_reasons: list[FinishReason] = field(default_factory=list)
    events: dict[str, int] = field(default_factory=dict)

    def happened(self, event: str) -> None:
        """Note when something first happened."""
        self.events.setdefault(event, time.time_ns())

    def refuse(self, code: str) -> None:
        """Note the error that it is answered with, unless it has failed or been rejected, which told more."""
        if not self.error:
            self.error, self.is_refused = code, True

    def begin_request(self, model: str, request: Request) -> None:
        """Note a request to the engine."""
        self.num_requests += 1
        if self.request is None:
            self.model, self.request = model, request
        self.happened("queued")

    def fields(self) -> dict[str, str | int]:
        """Return what a log line says of it, beside its id; what is not known is left out."""
        who = self.principal
        found: dict[str, str | int | None] = {
            "method": self.method,
            "route": self.route,
            "status": self.status,
            "duration_ms": round((self.end_ns - self.begin_ns) / 1e6),
            "tenant": who.tenant if who else None,
            "key_id": who.key_id if who else None,
            "error": self.error or None,
        }
        if self.num_requests:
            found["prompt_tokens"] = self.num_prompt_tokens
            found["completion_tokens"] = self.num_generated_tokens
        return {name: value for name, value in found.items() if value is not None}


def known_method(method: str) -> str:
    """Return an HTTP method as it is, and "other" for one that a caller made up."""
    return method if method in _METHODS else "other"


_record: ContextVar[Record | None] = ContextVar("seamount_record", default=None)


def current_record() -> Record | None:
    """Return the record of the request that this task works for; None where nobody keeps one."""
    return _record.get()


@contextmanager
def recording(record: Record) -> Iterator[None]:
    """Let everything inside, and tasks begun inside, be noted in this record."""
    token = _record.set(record)
    try:
        yield
    finally:
        _record.reset(token)
