"""Log lines: one per event in both forms, with what belongs in them, and without what must not be there."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterator

import pytest

from seamount.core.identity import Principal
from seamount.server.telemetry.logs import set_up_logging
from seamount.server.telemetry.record import Record, known_method, recording

CANARY = "canary-7f3a"
ours = logging.getLogger("seamount.server.test")


@pytest.fixture
def log() -> Iterator[Callable[..., io.StringIO]]:
    """`log(form, level)` sets logging up and returns the stream; all is as before afterwards."""
    root, own = logging.getLogger(), logging.getLogger("seamount")
    before = (root.level, own.level, list(root.handlers))

    def start(form: str, level: str = "info") -> io.StringIO:
        stream = io.StringIO()
        set_up_logging(form, level, stream)
        return stream

    yield start
    root.setLevel(before[0])
    own.setLevel(before[1])
    root.handlers[:] = before[2]


def record(**known: object) -> Record:
    return Record(request_id="r-1", method="POST", **known)


def test_a_json_line_has_the_fields_that_programs_read(log):
    stream = log("json")
    with recording(record()):
        ours.info("hello %s", "there", extra={"fields": {"status": 200, "tenant": "bank"}})
    line = json.loads(stream.getvalue())
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "info",
        "logger": "seamount.server.test",
        "message": "hello there",
        "request_id": "r-1",
        "status": 200,
        "tenant": "bank",
    }


def test_a_text_line_says_the_same(log):
    stream = log("text")
    with recording(record()):
        ours.info("hello", extra={"fields": {"status": 200, "tenant": "bank"}})
    assert stream.getvalue().partition(" ")[2] == "INFO hello status=200 tenant=bank id=r-1\n"


@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.parametrize("letter", ["\n", "\r", "\x1b[2J", "\0", "\x85", "\u2028", "\u2029", "\ud800", "\x7f"])
def test_nothing_breaks_a_line_or_reaches_a_terminal(log, form, letter):
    stream = log(form)
    ours.warning("a%sb", letter, extra={"fields": {"x": f"c{letter}d"}})
    text = stream.getvalue()
    assert text.count("\n") == 1 and len(text.splitlines()) == 1
    assert text[:-1].isprintable() or form == "json"
    text.encode("utf-8")
    if form == "json":
        assert json.loads(text)["message"] == f"a{letter}b"


@pytest.mark.parametrize("form", ["text", "json"])
def test_an_exception_is_told_by_kind_and_place_without_its_words(log, form):
    stream = log(form)
    try:
        int(CANARY)
    except ValueError:
        ours.exception("it failed")
    text = stream.getvalue()
    assert "it failed: ValueError at " in text and "test_logs.py" in text
    assert CANARY not in text and len(text.splitlines()) == 1


def test_asyncios_complaints_are_told_without_the_objects_that_they_show(log):
    stream = log("text")
    logging.getLogger("asyncio").error("Task exception was never retrieved\nfuture: <Task %s>", CANARY)
    assert "Task exception was never retrieved" in stream.getvalue()
    assert CANARY not in stream.getvalue()


def test_other_libraries_may_only_warn_whatever_the_level(log):
    stream = log("text", "debug")
    logging.getLogger("httpx").info(CANARY)
    logging.getLogger("multipart.multipart").debug(CANARY)
    ours.debug("mine")
    assert CANARY not in stream.getvalue() and "mine" in stream.getvalue()


def test_a_second_set_up_replaces_the_first(log):
    first, second = log("text"), log("json", "warning")
    ours.info("not said")
    ours.warning("said")
    assert first.getvalue() == "" and second.getvalue().count("said") == 1


def test_a_stream_that_cannot_be_written_ends_nothing(log, capfd):
    log("text").close()
    ours.warning("lost")
    assert capfd.readouterr().err == ""


def test_what_a_record_says_of_a_request():
    who = Principal(key_id="k", tenant="bank")
    done = record(route="/v1/completions", principal=who, status=200, begin_ns=10**9, end_ns=10**9 + 34_600_000)
    done.num_requests, done.num_prompt_tokens, done.num_generated_tokens = 1, 12, 6
    assert done.fields() == {
        "method": "POST",
        "route": "/v1/completions",
        "status": 200,
        "duration_ms": 35,
        "tenant": "bank",
        "key_id": "k",
        "prompt_tokens": 12,
        "completion_tokens": 6,
    }
    assert record(status=404, begin_ns=0).fields() == {"method": "POST", "status": 404, "duration_ms": 0}


def test_methods_that_callers_make_up_are_not_repeated():
    assert [known_method(method) for method in ("GET", "get", CANARY)] == ["GET", "other", "other"]
