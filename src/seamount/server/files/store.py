"""Files of tenants in the state database.

Called by the file routes (`files`), and by batches, which read their input and make their output here. A file that is
sent arrives as chunks of whole lines and is seen by nobody until it is complete; what a batch made is its results, as
they lie in the database, and takes no second copy. Everything here blocks: callers use the database's threads. Knows no
HTTP.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from seamount.core.database import Database, Row, Run
from seamount.core.errors import ForbiddenError, InvalidRequestError, NotFoundError

# An upload that has got nothing for so long was given up by a server that is no more.
STALE_UPLOAD_S = 3600
# Of each tenant, uploads that were never completed included.
MAX_FILES = 10_000
# What is kept of a batch after its end, and of whom it was; its output is a file with a lifetime of its own.
BATCH_RETENTION_S = 91 * 86_400
# Rows that are read together from a batch's results, and files that are removed together when their time is over.
_NUM_RESULTS = 32
_NUM_SWEPT = 20
_ID = re.compile(r"[a-z]+[-_][0-9a-f]{31}")
_COLUMNS = "id, tenant, purpose, filename, num_bytes, created_s, expires_s, batch_id, is_failed"
# Of when uploads are stale, and of now.
_IS_OVER = """(state = 'uploading' AND touched_s < ?) OR (state = 'ready' AND expires_s <= ? AND NOT EXISTS (
    SELECT 1 FROM batches WHERE input_file_id = files.id AND ended_s IS NULL))"""
_INSERT = """INSERT INTO files (id, tenant, purpose, filename, state, num_bytes, created_s, touched_s, expires_s,
    batch_id, is_failed) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"""


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """A complete file. Times are Unix seconds.

    Attributes:
        batch_id, is_failed: whose results it holds, those that failed or those that did not; None for one that was
            sent.
    """

    id: str
    tenant: str
    purpose: str
    filename: str
    num_bytes: int
    created_s: int
    expires_s: int
    batch_id: str | None
    is_failed: bool | None


class Lines(NamedTuple):
    """Whole lines of a file, the first one's number counted from 1."""

    first: int
    content: str


class FileStore:
    """The files of one database.

    Args:
        max_tenant_bytes: that one tenant's files may take, and the results of its batches.
    """

    def __init__(self, database: Database, max_tenant_bytes: int, clock: Callable[[], float] = time.time) -> None:
        self.database = database
        self._max_tenant_bytes = max_tenant_bytes
        self._clock = clock

    def new_file_id(self) -> str:
        """Return an id that no file has."""
        return new_id("file-", self._clock())

    def begin(self, file_id: str, tenant: str, purpose: str) -> None:
        """Begin a file that is sent. Nobody sees it before `complete`.

        Raises:
            ForbiddenError: the tenant has as many files, or bytes, as it may.
        """
        now_s = int(self._clock())

        def work(run: Run) -> None:
            if run("SELECT COUNT(*) FROM files WHERE tenant = ?", tenant)[0][0] >= MAX_FILES:
                raise _no_room(f"This tenant keeps {MAX_FILES} files, as many as it may.")
            self.check_room(run, tenant)
            run(_INSERT, file_id, tenant, purpose, "", "uploading", 0, now_s, now_s, now_s, None, None)

        self.database.write(work)

    def append(self, file_id: str, first_number: int, chunks: Sequence[Lines]) -> None:
        """Add chunks to a file that is not complete, the first one with this number, counted from 0.

        Raises:
            ForbiddenError: the tenant has as many bytes as it may.
            NotFoundError: it took so long that it was removed.
        """
        num_bytes = sum(len(chunk.content.encode()) for chunk in chunks)
        now_s = int(self._clock())

        def work(run: Run) -> None:
            rows = run(
                """UPDATE files SET num_bytes = num_bytes + ?, touched_s = ? WHERE id = ? AND state = 'uploading'
                RETURNING tenant""",
                num_bytes,
                now_s,
                file_id,
            )
            if not rows:
                raise NotFoundError("The upload took so long that it was given up.", hint="Send the file again.")
            self.check_room(run, rows[0][0])
            for number, chunk in enumerate(chunks, first_number):
                run(
                    "INSERT INTO file_chunks (file_id, number, first_line, content) VALUES (?, ?, ?, ?)",
                    file_id,
                    number,
                    chunk.first,
                    chunk.content,
                )

        self.database.write(work)

    def complete(self, file_id: str, filename: str, lifetime_s: int) -> StoredFile:
        """Let a file be seen that has arrived whole.

        Raises:
            NotFoundError: it took so long that it was removed.
        """
        now_s = int(self._clock())

        def work(run: Run) -> list[Row]:
            return run(
                f"""UPDATE files SET state = 'ready', filename = ?, created_s = ?, expires_s = ?
                WHERE id = ? AND state = 'uploading' RETURNING {_COLUMNS}""",
                filename,
                now_s,
                now_s + lifetime_s,
                file_id,
            )

        rows = self.database.write(work)
        if not rows:
            raise NotFoundError("The upload took so long that it was given up.", hint="Send the file again.")
        return _file(rows[0])

    def discard(self, file_id: str) -> None:
        """Leave nothing of a file that did not arrive whole."""
        self.database.write(lambda run: run("DELETE FROM files WHERE id = ? AND state = 'uploading'", file_id))

    def get(self, tenant: str, file_id: str) -> StoredFile:
        """Return a file.

        Raises:
            NotFoundError: the tenant has none of that id.
        """
        return self.database.read(lambda run: self._get(run, tenant, file_id))

    def page(
        self, tenant: str, *, purpose: str | None, after: str | None, limit: int, newest_first: bool
    ) -> list[StoredFile]:
        """Return up to `limit` files by the time of their making, beginning behind the one of the id `after`.

        Raises:
            InvalidRequestError: there is no file of that id.
        """
        order, sign = ("DESC", "<") if newest_first else ("ASC", ">")

        def work(run: Run) -> list[Row]:
            where = "tenant = ? AND state = 'ready' AND expires_s > ?"
            values: list[str | int] = [tenant, int(self._clock())]
            if purpose is not None:
                where, values = f"{where} AND purpose = ?", [*values, purpose]
            if after is not None:
                where = f"{where} AND (created_s, id) {sign} (?, ?)"
                values = [*values, *place_of(run, "files", tenant, after)]
            return run(
                f"SELECT {_COLUMNS} FROM files WHERE {where} ORDER BY created_s {order}, id {order} LIMIT ?",
                *values,
                limit,
            )

        return [_file(row) for row in self.database.read(work)]

    def delete(self, tenant: str, file_id: str) -> None:
        """Remove a file, whole.

        Raises:
            NotFoundError: the tenant has none of that id.
            InvalidRequestError: a batch that has not ended reads it.
        """

        def work(run: Run) -> None:
            file = self.hold(run, tenant, file_id)
            used = run("SELECT id FROM batches WHERE input_file_id = ? AND ended_s IS NULL LIMIT 1", file_id)
            if used:
                raise InvalidRequestError(
                    f"The batch {used[0][0]} still reads this file.",
                    hint="Cancel the batch, or wait for its end.",
                    param="file_id",
                    code="file_in_use",
                )
            _remove(file, run)

        self.database.write(work)

    def lines(self, file_id: str, number: int) -> Lines | None:
        """Return the chunk of this number, from 0, of a file that was sent; None behind the last one."""
        rows = self.database.read(
            lambda run: run(
                "SELECT first_line, content FROM file_chunks WHERE file_id = ? AND number = ?", file_id, number
            )
        )
        return Lines(*rows[0]) if rows else None

    def content(self, file: StoredFile, place: int) -> tuple[str, int] | None:
        """Return the next part of a file's content and the place behind it; the first place is 0, None is the end."""
        if file.batch_id is None:
            lines = self.lines(file.id, place)
            return None if lines is None else (lines.content, place + 1)
        rows = self.database.read(
            lambda run: run(
                """SELECT line, content FROM batch_results WHERE batch_id = ? AND is_failed = ? AND line > ?
                ORDER BY line LIMIT ?""",
                file.batch_id,
                int(bool(file.is_failed)),
                place,
                _NUM_RESULTS,
            )
        )
        return ("".join(content for _, content in rows), rows[-1][0]) if rows else None

    def sweep(self) -> int:
        """Remove some of what nobody may see any more, and return how much: 0 when nothing is left to remove."""
        now_s = int(self._clock())
        over = self.database.read(
            lambda run: run(
                f"SELECT {_COLUMNS} FROM files WHERE {_IS_OVER} LIMIT ?",
                now_s - STALE_UPLOAD_S,
                now_s,
                _NUM_SWEPT,
            )
        )
        for row in over:
            self.database.write(partial(_remove_over, _file(row), now_s))
        gone = self.database.write(
            lambda run: run("DELETE FROM batches WHERE ended_s < ? RETURNING id", now_s - BATCH_RETENTION_S)
        )
        return len(over) + len(gone)

    def hold(self, run: Run, tenant: str, file_id: str) -> StoredFile:
        """Return a file, in a transaction that writes, before whose end nobody else removes it or begins to read it.

        Raises:
            NotFoundError: the tenant has none of that id.
        """
        _lock(run, as_id(file_id))
        return self._get(run, tenant, file_id)

    def check_room(self, run: Run, tenant: str) -> None:
        """Check, in a transaction, that a tenant has no more bytes than it may.

        Raises:
            ForbiddenError: it has.
        """
        files = run("SELECT SUM(num_bytes) FROM files WHERE tenant = ?", tenant)[0][0]
        results = run(
            "SELECT SUM(completed_bytes + failed_bytes) FROM batches WHERE tenant = ? AND ended_s IS NULL", tenant
        )[0][0]
        if int(files or 0) + int(results or 0) > self._max_tenant_bytes:
            raise _no_room(f"This tenant's files take more than the {self._max_tenant_bytes} bytes that they may.")

    def _get(self, run: Run, tenant: str, file_id: str) -> StoredFile:
        rows = run(
            f"SELECT {_COLUMNS} FROM files WHERE id = ? AND tenant = ? AND state = 'ready' AND expires_s > ?",
            as_id(file_id),
            tenant,
            int(self._clock()),
        )
        if not rows:
            raise NotFoundError("There is no file of that id.", hint="/v1/files lists them.", param="file_id")
        return _file(rows[0])


def add_results(
    run: Run, batch_id: str, tenant: str, *, is_failed: bool, num_bytes: int, now_s: float, lifetime_s: int
) -> str:
    """Make a file, in a transaction, of a batch's results that failed, or of those that did not; return its id."""
    file_id, made_s = new_id("file-", now_s), int(now_s)
    name = f"{batch_id}_{'error' if is_failed else 'output'}.jsonl"
    run(
        _INSERT, file_id, tenant, "batch_output", name, "ready", num_bytes, made_s, made_s, made_s + lifetime_s,
        batch_id, int(is_failed),
    )  # fmt: skip
    return file_id


def new_id(prefix: str, now_s: float) -> str:
    """Return an id that nobody can guess, and that sorts behind those made a millisecond before."""
    return f"{prefix}{int(now_s * 1000):011x}{secrets.token_hex(10)}"


def as_id(text: str) -> str:
    """Return an id as it is, and for whatever cannot be one what names nothing: no database sees made-up text."""
    return text if _ID.fullmatch(text) else ""


def place_of(run: Run, table: str, tenant: str, after: str) -> tuple[int, str]:
    """Return, in a transaction, what the rows behind this one are found by.

    Raises:
        InvalidRequestError: the tenant has no such row.
    """
    rows = run(f"SELECT created_s, id FROM {table} WHERE id = ? AND tenant = ?", as_id(after), tenant)
    if not rows:
        raise InvalidRequestError("There is nothing of the id that `after` names.", param="after")
    return rows[0][0], rows[0][1]


def _lock(run: Run, file_id: str) -> None:
    """Keep others from changing a file's row until the transaction ends; what is read next is read after them."""
    run("UPDATE files SET touched_s = touched_s WHERE id = ?", file_id)


def _remove_over(file: StoredFile, now_s: int, run: Run) -> None:
    """Remove a file whose time is over, unless it was completed, or a batch began to read it, since that was seen."""
    _lock(run, file.id)
    if run(f"SELECT id FROM files WHERE id = ? AND ({_IS_OVER})", file.id, now_s - STALE_UPLOAD_S, now_s):
        _remove(file, run)


def _remove(file: StoredFile, run: Run) -> None:
    if file.batch_id is not None:
        run("DELETE FROM batch_results WHERE batch_id = ? AND is_failed = ?", file.batch_id, int(bool(file.is_failed)))
    run("DELETE FROM files WHERE id = ?", file.id)


def _file(row: Row) -> StoredFile:
    """Return the file of one row of `_COLUMNS`."""
    file_id, tenant, purpose, filename, num_bytes, created_s, expires_s, batch_id, is_failed = row
    return StoredFile(
        id=file_id,
        tenant=tenant,
        purpose=purpose,
        filename=filename,
        num_bytes=num_bytes,
        created_s=created_s,
        expires_s=expires_s,
        batch_id=batch_id,
        is_failed=None if is_failed is None else bool(is_failed),
    )


def _no_room(message: str) -> ForbiddenError:
    return ForbiddenError(message, hint="Delete files that are no longer needed.", code="storage_limit_exceeded")
