"""The server's log: one line per event, as text for people or as JSON for programs, with the request's id.

Set up by `seamount serve`. Whatever a line is made of, it stays one line: control characters are escaped. And no line
holds what callers sent: the program's own messages do not (each names what it logs), and what other libraries and
Python itself would add is cut: texts of exceptions, which quote their input, and details of asyncio's complaints. Other
libraries may warn, and never more: what they say while they are being debugged shows bodies and headers.
"""

from __future__ import annotations

import json
import logging
import time
import traceback
from types import TracebackType
from typing import Any, Literal, TextIO

from .record import current_record

LogFormat = Literal["text", "json"]
_NUM_FRAMES = 8


class _Lines(logging.Formatter):
    """What both formats share: whole messages on one line, and exceptions without their words."""

    def message(self, record: logging.LogRecord) -> str:
        """Return what is said, and where an exception that comes with it arose."""
        text = record.getMessage()
        if record.name == "asyncio":
            text = text.partition("\n")[0]  # the lines below show objects, and with them what those hold
        if record.exc_info and record.exc_info[0] is not None:
            text = f"{text}: {self.formatException(record.exc_info)}"
        return text

    def formatException(
        self,
        ei: tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None],
    ) -> str:
        """Return an exception's kind and where it arose, the innermost place first."""
        kind, _, trace = ei
        frames = traceback.extract_tb(trace)[-_NUM_FRAMES:]
        where = " < ".join(f"{frame.filename}:{frame.lineno} {frame.name}" for frame in reversed(frames))
        return f"{kind.__name__ if kind else 'nothing'} at {where or '(unknown)'}"

    def when(self, record: logging.LogRecord) -> str:
        """Return when, in UTC, to the millisecond."""
        return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z"


class TextLines(_Lines):
    """`TIME LEVEL MESSAGE name=value ... id=REQUEST`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        words = [self.when(record), record.levelname, self.message(record)]
        words += [f"{name}={value}" for name, value in _fields(record).items()]
        if request_id := _request_id(record):
            words.append(f"id={request_id}")
        return "".join(_visible(letter) for letter in " ".join(words))


class JsonLines(_Lines):
    """One JSON object; ASCII only, so that no letter of any script can end a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        found: dict[str, Any] = {
            "time": self.when(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": self.message(record),
        }
        if request_id := _request_id(record):
            found["request_id"] = request_id
        return json.dumps({**found, **_fields(record)})


def set_up_logging(form: LogFormat, level: str, stream: TextIO) -> logging.Handler:
    """Let the process log to a stream, and return the handler; one that this function had added before is replaced.

    Args:
        level: from which level on this program speaks: "debug", "info", "warning" or "error".
    """
    handler = _Handler(stream)
    handler.setFormatter(JsonLines() if form == "json" else TextLines())
    root = logging.getLogger()
    for before in [each for each in root.handlers if isinstance(each, _Handler)]:
        root.removeHandler(before)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger("seamount").setLevel(level.upper())
    return handler


class _Handler(logging.StreamHandler[TextIO]):
    def handleError(self, record: logging.LogRecord) -> None:
        """Lose a line that cannot be written: the library would print the line's parts, and a log may be full."""


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    """Return what was passed as `extra={"fields": ...}`."""
    return getattr(record, "fields", {})


def _request_id(record: logging.LogRecord) -> str:
    current = current_record()
    return current.request_id if current is not None else ""


def _visible(letter: str) -> str:
    return letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii")
