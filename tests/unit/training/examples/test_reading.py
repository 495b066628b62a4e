"""Every kind of file gives its records, and what is broken in one is told in its place."""

from __future__ import annotations

import gzip
import json
import os
import socket
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from seamount.core.errors import ConfigError
from seamount.training.examples import lines, reading
from seamount.training.examples.reading import read_records, sources_of
from seamount.training.examples.record import Record, RecordError

ROWS: list[dict[str, Any]] = [
    {"id": 1, "messages": [{"role": "user", "content": 'a "quoted", 你好\nline'}]},
    {"id": 2, "messages": [{"role": "assistant", "content": "😀 [1, {2}]"}]},
]


def values(path: Any) -> list[Any]:
    """Values of records; of errors the reason."""
    return [item.value if isinstance(item, Record) else item.reason for item in read_records(path)]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["lines", "lines-in-json", "array", "pretty", "bom", "crlf"])
def test_json_in_all_its_layouts(tmp_path: Path, kind: str, packed: bool) -> None:
    each = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    text = {
        "array": json.dumps(ROWS),
        "pretty": "\n " + json.dumps(ROWS, indent=4, ensure_ascii=False) + "\n\n",
        "bom": "\ufeff" + each,
        "crlf": each.replace("\n", "\r\n") + "\r\n\r\n",
    }.get(kind, each)
    path = tmp_path / ("d.json" if kind in ("array", "pretty", "lines-in-json") else "d.jsonl")
    content = text.encode()
    if packed:
        path = path.with_name(f"{path.name}.gz")
        content = gzip.compress(content)
    path.write_bytes(content)
    found = list(read_records(path))
    assert [item.value for item in found if isinstance(item, Record)] == ROWS
    assert [item.row for item in found] == [1, 2]
    assert found[1].where.startswith(str(path))


def test_a_long_array_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"n": n, "text": "é" * (n % 40), "deep": [[n], {"a": '\\"]'}]} for n in range(300)]
    path = tmp_path / "d.json"
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    blocks = lines.blocks_of
    for size in (1, 7, 64, 1000):
        monkeypatch.setattr(reading, "blocks_of", lambda path, size=size: blocks(path, size))
        assert values(path) == rows


def test_numbers_at_the_edge_of_a_block_stay_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "d.json"
    path.write_text("[12345, 6]")
    blocks = lines.blocks_of
    for size in range(1, 8):
        monkeypatch.setattr(reading, "blocks_of", lambda path, size=size: blocks(path, size))
        assert values(path) == ["is no object but a number"] * 2


@pytest.mark.parametrize(
    ("content", "reasons"),
    [
        (b"", ["is not JSON"]),
        (b"[", ["is not JSON: Expecting value at character 1; what follows"]),
        (b'[{"a": 1}', ["", "is followed by neither comma"]),
        (b'[{"a": 1} {"a": 2}]', ["", "is followed by neither comma"]),
        (b'[{"a": 1}, {"a": tru}]', ["", "is not JSON"]),
        (b'[{"a": 1}, {"a": NaN}]', ["", "NaN is no JSON number"]),
        (b'[{"a": 1}, 5, null]', ["", "but a number", "but null"]),
        (b'[{"a": "\xff"}]', ["byte 8 of the file is 0xff"]),
        (b"[]", []),
        (b"[" * 100_000, ["nested too deeply"]),
    ],
)
def test_broken_arrays(tmp_path: Path, content: bytes, reasons: list[str]) -> None:
    path = tmp_path / "d.json"
    path.write_bytes(content)
    if not content:
        assert values(path) == []
        return
    found = list(read_records(path))
    assert len(found) == len(reasons)
    for item, reason in zip(found, reasons, strict=True):
        assert isinstance(item, RecordError) == bool(reason)
        if isinstance(item, RecordError):
            assert reason in item.reason


def test_broken_lines_are_told_and_the_others_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "MAX_RECORD_BYTES", 500)
    path = tmp_path / "d.jsonl"
    bad = [b'{"a": ', b"[1]", b'{"a": Infinity}', b'{"a": "\\ud800"}', b'{"a": "' + b"x" * 5000 + b'"}', b'"\xe4"']
    bad.append(b"[" * 400)
    path.write_bytes(b"\n".join([b'{"a": 1}', *bad, b'{"a": 2}']))
    found = list(read_records(path))
    assert [item.value["a"] for item in found if isinstance(item, Record)] == [1, 2]
    told = [item for item in found if isinstance(item, RecordError)]
    assert [error.row for error in told] == [2, 3, 4, 5, 6, 7, 8]
    assert told[0].where == f"{path}:2"
    offset = path.read_bytes().index(b"\xe4")
    for error, reason in zip(
        told,
        ["not JSON", "but a list", "Infinity", "half a character", "longer than", f"byte {offset} of", "not JSON"],
        strict=True,
    ):
        assert reason in error.reason


def test_an_archive_that_is_cut_off_is_told(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl.gz"
    whole = gzip.compress("\n".join(json.dumps({"n": n, "t": str(n) * 50}) for n in range(3000)).encode())
    path.write_bytes(whole[: len(whole) // 2])
    found = list(read_records(path))
    assert isinstance(found[-1], RecordError)
    assert "cannot be unpacked" in found[-1].reason
    assert all(isinstance(item, Record) for item in found[:-1])
    for name in ("d.json.gz", "e.jsonl.gz", "f.csv.gz"):
        (tmp_path / name).write_bytes(b"no archive")
        (error,) = read_records(tmp_path / name)
        assert isinstance(error, RecordError)


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.csv"])
def test_utf_16_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"a": 1}', encoding="utf-16")
    (error,) = read_records(tmp_path / name)
    assert isinstance(error, RecordError)
    assert "UTF-16" in error.reason


def test_tables(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text('prompt,completion\r\n"a ""b"", c","line 1\nline 2"\r\n\r\n你,好\r\n')
    expected = [{"prompt": 'a "b", c', "completion": "line 1\nline 2"}, {"prompt": "你", "completion": "好"}]
    assert values(path) == expected
    assert [item.where for item in read_records(path)] == [f"{path}:2", f"{path}:5"]
    tabbed = tmp_path / "d.tsv"
    tabbed.write_text("prompt\tcompletion\na\tb, c\n")
    assert values(tabbed) == [{"prompt": "a", "completion": "b, c"}]
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "d.parquet")
    assert values(tmp_path / "d.parquet") == ROWS


@pytest.mark.parametrize(
    ("content", "reasons"),
    [
        (b"", []),
        (b"a,b\n", []),
        (b"a,a\n1,2\n", ["names a column twice"]),
        (b"a,\n1,2\n", ["names a column with nothing"]),
        (b"a,b\n1\n1,2,3\n1,2\n", ["has 1 cells", "has 3 cells", ""]),
        (b'a,b\n"1,2\n3,4\n', ["no row of the table"]),
        (b"a,b\n1,\xff\n1,2\n", ["byte 6 of the file is 0xff", ""]),
        (b'a,b\n"1\n\xff\n",2\n1,2\n', ["byte 7 of the file is 0xff", ""]),
    ],
)
def test_broken_tables(tmp_path: Path, content: bytes, reasons: list[str]) -> None:
    path = tmp_path / "d.csv"
    path.write_bytes(content)
    found = list(read_records(path))
    assert [isinstance(item, RecordError) for item in found] == [bool(reason) for reason in reasons]
    for item, reason in zip(found, reasons, strict=True):
        if isinstance(item, RecordError):
            assert reason in item.reason


def test_a_broken_parquet_file_is_told(tmp_path: Path) -> None:
    path = tmp_path / "d.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(ROWS * 5000), path, compression="none")
    whole = path.read_bytes()
    path.write_bytes(whole[:-200])
    (error,) = read_records(path)
    assert isinstance(error, RecordError)
    path.write_bytes(b"PAR1")
    (error,) = read_records(path)
    assert isinstance(error, RecordError)


def test_several_files_and_folders(tmp_path: Path) -> None:
    for name, row in (("b.jsonl", {"n": 2}), ("a.json", {"n": 1})):
        (tmp_path / name).write_text(json.dumps(row))
    assert values(tmp_path) == [{"n": 1}, {"n": 2}]
    assert values([tmp_path / "b.jsonl", str(tmp_path / "a.json")]) == [{"n": 2}, {"n": 1}]


def test_a_folder_is_read_with_all_that_is_in_it(tmp_path: Path) -> None:
    top = tmp_path / "top"
    names = ["a/2.jsonl", "a/b/1.jsonl.gz", "c.json", ".hidden.jsonl", ".git/x.jsonl", "a/.notes.txt"]
    for name in names:
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps({"n": name}).encode()
        (top / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "d.jsonl").write_text('{"n": "elsewhere"}')
    (top / "a" / "up").symlink_to(top)
    (top / "z").symlink_to(tmp_path / "elsewhere")
    (top / "c2.json").symlink_to(tmp_path / "elsewhere" / "d.jsonl")
    assert [value["n"] for value in values(top)] == ["a/2.jsonl", "a/b/1.jsonl.gz", "c.json", "elsewhere", "elsewhere"]


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("README.md", "is of an unknown kind"),
        ("sub/data", "is of an unknown kind"),
        ("gone.jsonl", "a link to a file that does not exist"),
        ("loop.jsonl", "cannot be read"),
        ("pipe.jsonl", "is no file but a pipe"),
        ("socket.jsonl", "is no file but a pipe, a socket"),
        ("device.jsonl", "is no file but a pipe, a socket or a device"),
    ],
)
def test_nothing_in_a_folder_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, problem: str
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    (tmp_path / "d.jsonl").write_text("{}")
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    links = {"gone.jsonl": "nothing", "loop.jsonl": "loop.jsonl", "device.jsonl": "/dev/zero"}
    with socket.socket(socket.AF_UNIX) as server:
        if name in links:
            path.symlink_to(links[name])
        elif name == "pipe.jsonl":
            os.mkfifo(path)
        elif name == "socket.jsonl":
            server.bind(name)
        else:
            path.write_text("{}")
        for source in (tmp_path, path):
            with pytest.raises(ConfigError, match=problem) as caught:
                sources_of(source)
            assert str(path) in caught.value.message


@pytest.mark.parametrize(
    ("source", "problem"), [("nothing.jsonl", "no file"), ("notes.txt", "unknown kind"), ("empty", "no data files")]
)
def test_what_is_no_data_is_refused(tmp_path: Path, source: str, problem: str) -> None:
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=problem):
        list(read_records(tmp_path / source))


@pytest.mark.parametrize("source", ["", " ", ["d.jsonl", ""]])
def test_an_empty_name_is_not_this_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.jsonl").write_text("{}")
    with pytest.raises(ConfigError, match="empty name"):
        sources_of(source)


@pytest.mark.parametrize("source", [5, None, {"text": "x"}, b"x"])
def test_what_is_no_source_is_refused(source: Any) -> None:
    with pytest.raises(ConfigError, match="cannot be"):
        list(read_records(source))
