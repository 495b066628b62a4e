"""/v1/files: what is taken, what is refused, and that nothing is left of what did not arrive whole."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from seamount.core.database import Database
from seamount.core.errors import StateFullError, StateUnavailableError
from seamount.core.state import open_state
from seamount.engine.fake import FakeEngine
from seamount.server.files import upload as files_upload
from seamount.server.files.store import FileStore

BATCH = {"purpose": "batch"}


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Database]:
    database = open_state(str(tmp_path / "state.db"))
    yield database
    database.close()


def num_rows(state: Database) -> int:
    return sum(
        state.read(lambda run, table=table: run(f"SELECT COUNT(*) FROM {table}"))[0][0]
        for table in ("files", "file_chunks")
    )


def sent(content: bytes, name: str | None = "in.jsonl") -> dict[str, tuple[str | None, bytes]]:
    return {"file": (name, content)}


async def test_a_file_is_sent_described_read_and_deleted(state, open_app, monkeypatch):
    monkeypatch.setattr(files_upload, "_CHUNK_BYTES", 100)
    monkeypatch.setattr(files_upload, "_WRITE_BYTES", 300)
    content = "".join(f'{{"n": {n}, "一": "\\u0000"}}\r\n' for n in range(500)).encode() + b"no end"
    client = await open_app(FakeEngine(), state=state)
    made = await client.post("/v1/files", data=BATCH, files=sent(content, 'a"b\\c\n一.jsonl'))
    assert made.status_code == 200, made.text
    file = made.json()
    assert file["bytes"] == len(content)
    assert (file["object"], file["purpose"], file["status"]) == ("file", "batch", "processed")
    assert "\n" not in file["filename"]
    assert file["expires_at"] == file["created_at"] + 30 * 86_400
    assert (await client.get(f"/v1/files/{file['id']}")).json() == file
    answer = await client.get(f"/v1/files/{file['id']}/content")
    assert answer.content == content
    assert answer.headers["content-disposition"] == "attachment"
    assert (await client.get("/v1/files")).json()["data"] == [file]
    assert (await client.get("/v1/files?purpose=batch_output")).json()["data"] == []
    gone = await client.delete(f"/v1/files/{file['id']}")
    assert gone.json() == {"id": file["id"], "object": "file", "deleted": True}
    for answer in (
        await client.delete(f"/v1/files/{file['id']}"),
        await client.get(f"/v1/files/{file['id']}/content"),
        await client.get("/v1/files/%00"),
    ):
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
    assert num_rows(state) == 0


async def test_the_fields_may_come_in_any_order_and_name_the_lifetime(state, open_app):
    client = await open_app(FakeEngine(), state=state)
    files = [
        ("file", ("f", b"{}")),
        ("expires_after[seconds]", (None, "3600")),
        ("purpose", (None, "batch")),
        ("expires_after[anchor]", (None, "created_at")),
    ]
    file = (await client.post("/v1/files", files=files)).json()
    assert file["expires_at"] == file["created_at"] + 3600


@pytest.mark.parametrize(
    ("fields", "content", "param", "code"),
    [
        ({"purpose": "fine-tune"}, b"{}", "purpose", "invalid_value"),
        ({}, b"{}", "purpose", "missing_parameter"),
        ({"purpose": ["batch", "batch"]}, b"{}", "purpose", "duplicate_parameter"),
        ({**BATCH, "extra": "x"}, b"{}", "extra", "unknown_parameter"),
        ({**BATCH, "expires_after[anchor]": "now"}, b"{}", "expires_after.anchor", "invalid_value"),
        ({**BATCH, "expires_after[seconds]": "3600"}, b"{}", "expires_after.anchor", "invalid_value"),
        ({**BATCH, "expires_after[anchor]": "created_at"}, b"{}", "expires_after.seconds", "invalid_value"),
        (
            {**BATCH, "expires_after[anchor]": "created_at", "expires_after[seconds]": "7776001"},
            b"{}",
            "expires_after.seconds",
            "invalid_value",
        ),
        ({"purpose": "x" * 5000}, b"{}", "purpose", "invalid_value"),
        (BATCH, b"", "file", "empty_file"),
        (BATCH, b"\xff", "file", "invalid_encoding"),
    ],
)
async def test_a_wrong_form_is_told_and_leaves_nothing(state, open_app, fields, content, param, code):
    client = await open_app(FakeEngine(), state=state)
    answer = await client.post("/v1/files", data=fields, files=sent(content))
    assert answer.status_code == 400, answer.text
    assert (answer.json()["error"]["param"], answer.json()["error"]["code"]) == (param, code)
    assert num_rows(state) == 0


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("application/json", b"{}"),
        ("multipart/form-data", b"--x--\r\n"),
        ("multipart/form-data; boundary=x", b""),
        ("multipart/form-data; boundary=x", b"nonsense"),
        ("multipart/form-data; boundary=x", b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\n{}\n'),
        ("multipart/form-data; boundary=x", b"--x\r\nA: " + b"b" * 5000 + b"\r\n\r\n"),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n' * 30 + b"--x--\r\n",
        ),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--x--',
        ),
    ],
)
async def test_what_is_no_such_form_is_refused(state, open_app, kind, body):
    client = await open_app(FakeEngine(), state=state)
    answer = await client.post("/v1/files", content=body, headers={"content-type": kind})
    assert answer.status_code == 400, answer.text
    assert num_rows(state) == 0


async def test_a_file_has_a_limit_of_its_own(state, open_app, monkeypatch):
    monkeypatch.setattr(files_upload, "_WRITE_BYTES", 1000)
    monkeypatch.setattr(files_upload, "_CHUNK_BYTES", 1000)
    client = await open_app(FakeEngine(), state=state, max_body_bytes=1024, max_file_bytes=200_000)
    line = b'{"n": "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"}\n'
    assert (await client.post("/v1/files", data=BATCH, files=sent(line * (200_000 // len(line))))).status_code == 200
    before = num_rows(state)
    slightly = await client.post("/v1/files", data=BATCH, files=sent(line * (200_000 // len(line) + 1)))
    assert (slightly.status_code, slightly.json()["error"]["code"]) == (413, "file_too_large")
    announced = await client.post("/v1/files", data=BATCH, files=sent(line * 10_000))
    assert (announced.status_code, announced.json()["error"]["code"]) == (413, "body_too_large")
    too_long = await client.post("/v1/files", data=BATCH, files=sent(b"x" * 1025))
    assert (too_long.status_code, too_long.json()["error"]["code"]) == (400, "line_too_long")

    async def unannounced() -> AsyncIterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\n'
        for _ in range(10_000):
            yield line

    kind = {"content-type": "multipart/form-data; boundary=x"}
    answer = await client.post("/v1/files", content=unannounced(), headers=kind)
    assert answer.status_code == 413
    assert num_rows(state) == before
    other = await client.post("/v1/completions", json={"model": "fake", "prompt": "x" * 2000})
    assert other.status_code == 413


@pytest.mark.parametrize(
    ("error", "status"),
    [(StateFullError("The disk is full."), 507), (StateUnavailableError("It is gone."), 503)],
)
@pytest.mark.parametrize("when", ["begin", "append", "complete"])
async def test_a_database_that_cannot_keep_it_is_told_and_leaves_nothing(
    state, open_app, monkeypatch, error, status, when
):
    def fail(self: FileStore, *values: object) -> None:
        raise error

    client = await open_app(FakeEngine(), state=state)
    with monkeypatch.context() as patch:
        patch.setattr(FileStore, when, fail)
        answer = await client.post("/v1/files", data=BATCH, files=sent(b"{}\n"))
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, error.code)
    assert num_rows(state) == 0
    assert (await client.post("/v1/files", data=BATCH, files=sent(b"{}\n"))).status_code == 200


async def test_without_a_database_nothing_is_kept(open_app):
    client = await open_app(FakeEngine())
    for answer in (
        await client.post("/v1/files", data=BATCH, files=sent(b"{}")),
        await client.get("/v1/files"),
        await client.get("/v1/files/file-0/content"),
        await client.get("/v1/batches"),
        await client.post("/v1/batches/batch_0/cancel"),
    ):
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "nothing_kept")


async def test_numbers_of_a_page_are_bounded(state, open_app):
    client = await open_app(FakeEngine(), state=state)
    for path in ("files?limit=0", "files?limit=10001", "files?after=x", "files?purpose=%00", "batches?limit=101"):
        answer = await client.get(f"/v1/{path}")
        assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error"), path
