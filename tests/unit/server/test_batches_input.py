"""A batch's lines before they are answered, and how a file is cut into them."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seamount.core.errors import InvalidRequestError
from seamount.server.batches import input as batches_input
from seamount.server.batches.input import InputCheck, read_line, texts
from seamount.server.files import upload as files_upload
from seamount.server.files.store import Lines
from seamount.server.files.upload import LineCutter

ENDPOINT = "/v1/completions"
GOOD = {"custom_id": "a", "method": "POST", "url": ENDPOINT, "body": {"model": "m", "prompt": "hi"}}


def check(*lines: str) -> list[tuple[int | None, str, str | None]]:
    found = InputCheck(endpoint=ENDPOINT, model="m")
    for number, line in enumerate(lines, 1):
        if not found.add(Lines(number, line + "\n")):
            break
    found.end()
    return [(error.line, error.code, error.param) for error in found.errors]


def changed(**other: object) -> str:
    return json.dumps({**GOOD, **other})


def test_a_good_line_is_read_whole():
    line = read_line(7, changed(custom_id="\U0001f40d 一"), endpoint=ENDPOINT, model="m")
    assert (line.number, line.custom_id, line.body) == (7, "\U0001f40d 一", GOOD["body"])
    assert check(changed(), "", "  \r", changed(custom_id="b") + "\r") == []


@pytest.mark.parametrize(
    ("text", "code", "param"),
    [
        ("{", "invalid_json_line", None),
        ("[" * 100_000, "invalid_json_line", None),
        ("1" * 5000, "number_too_long", None),
        ('{"custom_id": "a", "body": {"seed": -' + "1" * 5000 + "}}", "number_too_long", None),
        ("[1]", "invalid_json_line", None),
        ("null", "invalid_json_line", None),
        ('{"custom_id": "a", "custom_id": "b"}', "duplicate_parameter", "custom_id"),
        (json.dumps({k: v for k, v in GOOD.items() if k != "body"}), "missing_parameter", "body"),
        (changed(extra=1), "unknown_parameter", "extra"),
        (changed(custom_id=7), "invalid_value", "custom_id"),
        (changed(custom_id="a\ud800"), "invalid_value", "custom_id"),
        (changed(custom_id=""), "invalid_value", "custom_id"),
        (changed(custom_id="x" * 513), "invalid_value", "custom_id"),
        (changed(method="GET"), "invalid_method", "method"),
        (changed(url="/v1/chat/completions"), "invalid_url", "url"),
        (changed(body="x"), "invalid_value", "body"),
        (changed(body={"model": "m", "stream": True}), "unsupported_parameter", "body.stream"),
        (changed(body={"prompt": "hi"}), "model_not_found", "body.model"),
        (changed(body={"model": "n"}), "model_not_found", "body.model"),
    ],
)
def test_a_bad_line_is_told_by_its_number(text, code, param):
    assert check(changed(custom_id="first"), "", text) == [(3, code, param)]


def test_what_is_wrong_is_told_without_quoting_it():
    with pytest.raises(InvalidRequestError) as caught:
        read_line(1, changed(url="https://secret/"), endpoint=ENDPOINT, model="m")
    assert "secret" not in str(caught.value)


def test_a_custom_id_stands_once():
    assert check(changed(), changed(custom_id="b"), changed()) == [(3, "duplicate_custom_id", "custom_id")]


def test_lines_and_errors_are_bounded(monkeypatch):
    assert check("", " ") == [(None, "empty_file", None)]
    monkeypatch.setattr(batches_input, "MAX_LINES", 2)
    assert check(changed(), changed(custom_id="b")) == []
    assert check(changed(), changed(custom_id="b"), changed(custom_id="c"), "{") == [(3, "too_many_lines", None)]
    monkeypatch.setattr(batches_input, "MAX_ERRORS", 3)
    monkeypatch.setattr(batches_input, "MAX_LINES", 50)
    assert [line for line, _, _ in check(*["{"] * 10)] == [1, 2, 3]


def test_line_breaks_of_unicode_are_no_ends_of_lines():
    assert list(texts(Lines(1, "\ufeffa\u2028b\x85c\n\nd"))) == [(1, "a\u2028b\x85c"), (3, "d")]
    assert list(texts(Lines(4, "\ufeffa"))) == [(4, "\ufeffa")]


@given(
    text=st.text(st.sampled_from("ab一\n\r"), max_size=200),
    cuts=st.lists(st.integers(0, 400), max_size=20),
    chunk=st.integers(1, 50),
)
def test_a_file_is_the_same_however_it_arrives(text, cuts, chunk):
    data = text.encode()
    places = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files_upload, "_CHUNK_BYTES", chunk)
        cutter = LineCutter(10_000)
        found = [lines for begin, end in pairwise(places) for lines in cutter.add(data[begin:end])]
        found += cutter.end()
    assert "".join(lines.content for lines in found) == text
    line = 1
    for lines in found:
        assert lines.first == line
        line += lines.content.count("\n")
    assert all(lines.content.endswith("\n") for lines in found[:-1])


@pytest.mark.parametrize(
    ("data", "told", "code"),
    [
        (b"a\nb\n\xff\n", "Line 3 of the file is not UTF-8", "invalid_encoding"),
        (b"a\n\xe4\xb8", "Line 2 of the file is not UTF-8", "invalid_encoding"),
        (b"a\nb\0\nc", "Line 2 of the file holds a null", "invalid_encoding"),
        (b"a\n" + b"b" * 300_000, "Line 2 of the file is longer than 100000 bytes", "line_too_long"),
    ],
)
def test_what_is_no_text_is_told_by_its_line(data, told, code):
    cutter = LineCutter(100_000)
    with pytest.raises(InvalidRequestError, match=told) as caught:
        list(cutter.add(data))
        cutter.end()
    assert caught.value.code == code


def test_a_long_line_is_a_chunk_of_its_own(monkeypatch):
    monkeypatch.setattr(files_upload, "_CHUNK_BYTES", 10)
    cutter = LineCutter(1000)
    data = b"short\n" + b"x" * 500 + b"\nend\n"
    found = [lines for start in range(0, len(data), 7) for lines in cutter.add(data[start : start + 7])]
    found += cutter.end()
    assert "".join(lines.content for lines in found).encode() == data
    assert found[0] == Lines(1, "short\n")
    assert found[1].content.startswith("x" * 500 + "\n")
