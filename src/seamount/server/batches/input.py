"""A batch's input: a request on each line, checked before any is answered.

Pure; called by `job`. A line is OpenAI's: `{"custom_id", "method": "POST", "url", "body"}`. Messages name what
is wrong and never quote the line.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from seamount.core.errors import InvalidRequestError
from seamount.server.door.body import strict_json
from seamount.server.files.store import Lines

from .store import LineError

MAX_LINES = 50_000
MAX_ERRORS = 100
MAX_CUSTOM_ID = 512
_NAMES = ("custom_id", "method", "url", "body")


@dataclass(frozen=True, kw_only=True)
class InputLine:
    """One request.

    Attributes:
        number: of the line in the file, from 1.
        custom_id: the caller's name for it.
        body: what would be sent to the endpoint; not checked any further than for its model.
    """

    number: int
    custom_id: str
    body: dict[str, Any]


def texts(lines: Lines) -> Iterator[tuple[int, str]]:
    """Yield the lines of a chunk that are not blank, each with its number."""
    # Not `splitlines`: JSON strings may hold other line breaks of Unicode.
    for number, text in enumerate(lines.content.split("\n"), lines.first):
        text = text.removeprefix("\ufeff") if number == 1 else text
        if text.strip():
            yield number, text


def read_line(number: int, text: str, *, endpoint: str, model: str) -> InputLine:
    """Return what a line says.

    Raises:
        InvalidRequestError: it is no request that a batch for this endpoint and model can hold.
    """
    try:
        found = strict_json(text)
    except (ValueError, RecursionError) as cause:
        raise InvalidRequestError("This line is not valid JSON.", code="invalid_json_line") from cause
    if not isinstance(found, dict):
        raise InvalidRequestError("This line is no JSON object.", code="invalid_json_line")
    for name in _NAMES:
        if name not in found:
            raise InvalidRequestError(f"{name} is required.", param=name, code="missing_parameter")
    if unknown := next((name for name in found if name not in _NAMES), None):
        name = unknown[:100]
        raise InvalidRequestError(f"Unknown parameter: {name}.", param=name, code="unknown_parameter")
    custom_id, body = found["custom_id"], found["body"]
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_CUSTOM_ID:
        raise InvalidRequestError(f"custom_id must be a string of 1 to {MAX_CUSTOM_ID} characters.", param="custom_id")
    if any("\ud800" <= letter <= "\udfff" for letter in custom_id):
        raise InvalidRequestError("custom_id holds half a character (a lone surrogate).", param="custom_id")
    if found["method"] != "POST":
        raise InvalidRequestError("method must be POST.", param="method", code="invalid_method")
    if found["url"] != endpoint:
        raise InvalidRequestError(f"url must be the batch's endpoint, {endpoint}.", param="url", code="invalid_url")
    if not isinstance(body, dict):
        raise InvalidRequestError("body must be a JSON object.", param="body", code="invalid_value")
    if body.get("stream"):
        raise InvalidRequestError(
            "A batch's answers are not streamed; leave stream out.", param="body.stream", code="unsupported_parameter"
        )
    if body.get("model") != model:
        raise InvalidRequestError(
            "body.model is not the model that is served here.", param="body.model", code="model_not_found"
        )
    return InputLine(number=number, custom_id=custom_id, body=body)


class InputCheck:
    """Checks a whole file, a chunk at a time.

    Attributes:
        num_lines: lines so far that are not blank.
        errors: what was found wrong, the first hundred.
    """

    def __init__(self, *, endpoint: str, model: str) -> None:
        self.num_lines = 0
        self.errors: list[LineError] = []
        self._endpoint = endpoint
        self._model = model
        self._seen: set[bytes] = set()

    def add(self, lines: Lines) -> bool:
        """Check the next chunk; return whether to go on: not when nothing more is to be learned."""
        for number, text in texts(lines):
            self.num_lines += 1
            if self.num_lines > MAX_LINES:
                self.errors.append(LineError("too_many_lines", f"A batch has at most {MAX_LINES} lines.", number))
                return False
            try:
                line = read_line(number, text, endpoint=self._endpoint, model=self._model)
                self._check_new(line.custom_id)
            except InvalidRequestError as error:
                self.errors.append(LineError(error.code, error.message, number, error.param))
            if len(self.errors) >= MAX_ERRORS:
                return False
        return True

    def end(self) -> None:
        """Check what only the whole file shows."""
        if not self.num_lines:
            self.errors.append(LineError("empty_file", "The file holds no request, or is gone."))

    def _check_new(self, custom_id: str) -> None:
        # 16 bytes of each, not the names themselves, which may be long.
        digest = hashlib.blake2b(custom_id.encode(), digest_size=16).digest()
        if digest in self._seen:
            raise InvalidRequestError(
                "Another line has the same custom_id.", param="custom_id", code="duplicate_custom_id"
            )
        self._seen.add(digest)
