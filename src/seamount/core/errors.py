"""The one tree of errors that Seamount raises on purpose.

Every room raises from here; `server.errors` maps the tree to OpenAI bodies and the CLI prints it. An error says what is
wrong and where (`message`), what to do about it (`hint`) and whether to try again (`retry_after`). Messages never hold
prompts, outputs or credentials.
"""

from __future__ import annotations


class SeamountError(Exception):
    """Base of the tree.

    Attributes:
        code: stable snake_case identifier that a script may match on.
        message: what is wrong and where, one or two sentences.
        hint: what the reader can do now; None when there is nothing to add.
        retry_after: seconds after which the same call may succeed; None when it will not by waiting.
        param: name of the offending request field, where there is one.
        private: what more those may read who run the program, and nobody who asks it over a network.
    """

    code = "internal_error"

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        param: str | None = None,
        private: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.retry_after = retry_after
        self.param = param
        self.private = private
        if code is not None:
            self.code = code

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class ConfigError(SeamountError):
    """A setting, a flag or a checkpoint's description is wrong: nothing starts until a person mends it."""

    code = "config_error"


class CheckpointError(ConfigError):
    """A checkpoint folder cannot be used; the message names the file, and the tensor where one is to blame."""

    code = "checkpoint_error"


class UnsupportedModelError(CheckpointError):
    """The checkpoint is readable but of an architecture or format that this version does not run."""

    code = "unsupported_model"


class RequestError(SeamountError):
    """The caller asked for something that cannot be done as asked."""

    code = "invalid_request"


class InvalidRequestError(RequestError):
    """A field has a wrong type or value, or is not supported."""

    code = "invalid_value"


class ContextTooLongError(RequestError):
    """Prompt plus asked-for output exceed the model's context; the message carries the numbers."""

    code = "context_length_exceeded"


class NotFoundError(RequestError):
    """No such model, route or object."""

    code = "not_found"


class TooLargeError(RequestError):
    """What was sent is larger than may be sent."""

    code = "too_large"


class UnauthenticatedError(RequestError):
    """Nobody vouches for the caller: no credential, or one that is wrong, expired or revoked."""

    code = "invalid_api_key"


class ForbiddenError(RequestError):
    """The caller is known, and may not do this."""

    code = "forbidden"


class QuotaError(SeamountError):
    """The caller has used what it may for now; the machine is not to blame."""

    code = "rate_limit_exceeded"


class CapacityError(SeamountError):
    """Not now: the request is fine and the machine is full."""

    code = "capacity"


class QueueFullError(CapacityError):
    """The waiting queue is at its limit."""

    code = "queue_full"


class OutOfMemoryError(CapacityError):
    """A model or a cache of the asked-for size does not fit into memory."""

    code = "out_of_memory"


class DeadlineError(CapacityError):
    """The time that the caller allows for a request is over, or would be before it could begin."""

    code = "deadline_exceeded"


class DrainingError(CapacityError):
    """The server is stopping and takes no new requests."""

    code = "draining"


class StateUnavailableError(CapacityError):
    """The state database cannot be used now: out of reach, or locked by another ("state_busy")."""

    code = "state_unavailable"


class StateFullError(StateUnavailableError):
    """The state database's disk is full: nothing was half written."""

    code = "state_full"


class StateMismatchError(ConfigError):
    """The state database is of another version of the program than this one."""

    code = "state_mismatch"


class IntegrityError(SeamountError):
    """Bytes are not what their digest or signature says. Nothing below the edge may swallow this."""

    code = "integrity_error"


class EngineError(SeamountError):
    """The engine could not finish a request that it had accepted."""

    code = "engine_error"


class WorkerDiedError(EngineError):
    """The worker process ended while requests were in flight; it is being started again."""

    code = "worker_died"


class BackendError(SeamountError):
    """A foreign component failed; raised from its cause at the boundary."""

    code = "backend_error"


def _tree(root: type[SeamountError]) -> dict[str, type[SeamountError]]:
    found = {root.__name__: root}
    for child in root.__subclasses__():
        found.update(_tree(child))
    return found


ErrorFields = dict[str, str | float | None]


def error_to_fields(error: SeamountError) -> ErrorFields:
    """Return the error as plain fields, for a message between processes or a JSON body."""
    return {
        "kind": type(error).__name__,
        "code": error.code,
        "message": error.message,
        "hint": error.hint,
        "retry_after": error.retry_after,
        "param": error.param,
    }


def error_from_fields(fields: ErrorFields) -> SeamountError:
    """Rebuild an error from `error_to_fields`; an unknown kind becomes the nearest honest one, EngineError."""
    cls = _tree(SeamountError).get(str(fields.get("kind")), EngineError)
    retry_after = fields.get("retry_after")
    return cls(
        str(fields.get("message") or "The engine could not finish the request."),
        hint=_text(fields.get("hint")),
        code=_text(fields.get("code")),
        retry_after=float(retry_after) if isinstance(retry_after, int | float) else None,
        param=_text(fields.get("param")),
    )


def _text(value: str | float | None) -> str | None:
    return None if value is None else str(value)
