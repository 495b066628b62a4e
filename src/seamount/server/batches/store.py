"""Batches of tenants in the state database: who asked for what, how far it is, who works on it, and the answers.

Called by the batch routes (`batches`), by `runner`, which claims batches for this server, and by `job`,
which works on one. Several servers may share the database: a batch belongs to the server that holds its lease, and
whatever that server writes of it is written only while it does. Everything here blocks: callers use the database's
threads. Knows no HTTP.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, cast

from seamount.core.database import Database, Row, Run
from seamount.core.errors import InvalidRequestError, NotFoundError, QuotaError
from seamount.server.files.store import FileStore, add_results, as_id, new_id, place_of
from seamount.server.wire.batches import BatchEndpoint, BatchStatus

# OpenAI's only completion window.
WINDOW_S = 86_400
# Of each tenant, and not ended.
MAX_OPEN = 100
_OPEN_RETRY_S = 60.0
End = Literal["completed", "failed", "expired", "cancelled"]


class LineError(NamedTuple):
    """Why a batch failed; `line` counts from 1 and is None where no line is to blame."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class Tokens(NamedTuple):
    """What answers took; `cached` are of the input's tokens, `reasoning` of the output's."""

    input: int = 0
    cached: int = 0
    output: int = 0
    reasoning: int = 0


class LineResult(NamedTuple):
    """What is kept of a line.

    Attributes:
        line: its number in the file, from 1.
        content: one line of text with its end.
        tokens: what its answer took; none where it was answered with an error.
    """

    line: int
    content: str
    tokens: Tokens = Tokens()


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A batch as it stands in the database; the fields are the columns. Times are Unix seconds.

    Attributes:
        key_id: of the key in whose name it runs; None where no key was asked for.
        output_lifetime_s: seconds that its output is kept.
        completed_bytes, failed_bytes: of the results.
        input_tokens, cached_tokens, output_tokens, reasoning_tokens: of all answers; None where the batch was made
            before they were counted.
    """

    id: str
    tenant: str
    key_id: str | None
    endpoint: BatchEndpoint
    model: str
    input_file_id: str
    metadata: dict[str, str] | None
    output_lifetime_s: int
    status: BatchStatus
    errors: tuple[LineError, ...]
    num_total: int
    num_completed: int
    num_failed: int
    completed_bytes: int
    failed_bytes: int
    input_tokens: int | None
    cached_tokens: int | None
    output_tokens: int | None
    reasoning_tokens: int | None
    output_file_id: str | None
    error_file_id: str | None
    created_s: int
    expires_s: int
    in_progress_s: int | None
    finalizing_s: int | None
    completed_s: int | None
    failed_s: int | None
    expired_s: int | None
    cancelling_s: int | None
    cancelled_s: int | None


_NAMES = tuple(field.name for field in fields(Batch))
_COLUMNS = ", ".join(_NAMES)


class LeaseLostError(Exception):
    """Another server works on the batch, or it has ended: what was to be written is not."""


class BatchStore:
    """The batches of one database.

    Args:
        files: where their input lies, and their output is made.
    """

    def __init__(self, database: Database, files: FileStore, clock: Callable[[], float] = time.time) -> None:
        self.database = database
        self.files = files
        self.clock = clock

    def add(
        self,
        *,
        tenant: str,
        key_id: str | None,
        endpoint: str,
        model: str,
        input_file_id: str,
        metadata: dict[str, str] | None,
        output_lifetime_s: int,
    ) -> Batch:
        """Take a batch.

        Raises:
            NotFoundError: the tenant has no such file.
            InvalidRequestError: the file is none that was sent for a batch.
            QuotaError: the tenant has as many batches open as it may.
            ForbiddenError: the tenant's files take as much as they may.
        """
        now_s = int(self.clock())
        batch_id = new_id("batch_", self.clock())

        def work(run: Run) -> Row:
            file = self.files.hold(run, tenant, input_file_id)
            if file.purpose != "batch":
                raise InvalidRequestError(
                    f"The file's purpose is {file.purpose}; a batch reads one of purpose batch.", param="input_file_id"
                )
            open_now = run("SELECT COUNT(*) FROM batches WHERE tenant = ? AND ended_s IS NULL", tenant)[0][0]
            if open_now >= MAX_OPEN:
                raise QuotaError(
                    f"This tenant has {open_now} batches that have not ended, as many as it may.",
                    code="too_many_batches",
                    retry_after=_OPEN_RETRY_S,
                )
            self.files.check_room(run, tenant)
            return run(
                f"""INSERT INTO batches (id, tenant, key_id, endpoint, model, input_file_id, metadata,
                output_lifetime_s, status, num_total, num_completed, num_failed, completed_bytes, failed_bytes,
                input_tokens, cached_tokens, output_tokens, reasoning_tokens, created_s, expires_s)
                VALUES (?, ?, ?, ?, ?, ?, ?, ?, 'validating', 0, 0, 0, 0, 0, 0, 0, 0, 0, ?, ?)
                RETURNING {_COLUMNS}""",
                batch_id,
                tenant,
                key_id,
                endpoint,
                model,
                input_file_id,
                None if metadata is None else json.dumps(metadata),
                output_lifetime_s,
                now_s,
                now_s + WINDOW_S,
            )[0]

        return _batch(self.database.write(work))

    def get(self, tenant: str, batch_id: str) -> Batch:
        """Return a batch.

        Raises:
            NotFoundError: the tenant has none of that id.
        """
        return self.database.read(lambda run: _get(run, tenant, batch_id))

    def page(self, tenant: str, *, after: str | None, limit: int) -> list[Batch]:
        """Return up to `limit` batches, the newest first, beginning behind the one of the id `after`.

        Raises:
            InvalidRequestError: there is no batch of that id.
        """

        def work(run: Run) -> list[Row]:
            where, values = "tenant = ?", [tenant]
            place = place_of(run, "batches", tenant, after) if after is not None else ()
            if place:
                where = f"{where} AND (created_s, id) < (?, ?)"
            return run(
                f"SELECT {_COLUMNS} FROM batches WHERE {where} ORDER BY created_s DESC, id DESC LIMIT ?",
                *values,
                *place,
                limit,
            )

        return [_batch(row) for row in self.database.read(work)]

    def ask_to_cancel(self, tenant: str, batch_id: str) -> Batch:
        """Note that a batch is to be cancelled, and return it; who works on it, or claims it next, ends it.

        Raises:
            NotFoundError: the tenant has none of that id.
            InvalidRequestError: it has ended.
        """

        def work(run: Run) -> Batch:
            run(
                """UPDATE batches SET status = 'cancelling', cancelling_s = ? WHERE id = ? AND tenant = ?
                AND status IN ('validating', 'in_progress')""",
                int(self.clock()),
                as_id(batch_id),
                tenant,
            )
            batch = _get(run, tenant, batch_id)
            if batch.status not in ("cancelling", "cancelled"):
                raise InvalidRequestError(f"The batch cannot be cancelled any more: it is {batch.status}.")
            return batch

        return self.database.write(work)

    def claim(self, owner: str, until_s: int, *, model: str, busy_tenants: Collection[str]) -> Batch | None:
        """Take the lease of the batch that has waited longest; None where none does.

        Of two who ask at once one gets it, the other one the next. Batches that are to be cancelled or whose time is
        over, and those whose lines are to be checked, come whatever `busy_tenants` says; all but the first two need a
        server of their model.

        Args:
            owner: names the server.
            until_s: when the lease ends unless it is renewed.
            busy_tenants: whose lines are not to be answered beside those that are.
        """
        now_s = int(self.clock())
        is_free = "ended_s IS NULL AND (lease_owner IS NULL OR lease_until_s < ?)"
        tenants = f"tenant NOT IN ({', '.join('?' * len(busy_tenants))})" if busy_tenants else "1 = 1"
        is_ours = f"""(status = 'cancelling' OR expires_s <= ?
            OR (model = ? AND (status = 'validating' OR {tenants})))"""
        rows = self.database.write(
            lambda run: run(
                f"""UPDATE batches SET lease_owner = ?, lease_until_s = ? WHERE id = (
                    SELECT id FROM batches WHERE {is_free} AND {is_ours} ORDER BY created_s, id LIMIT 1)
                AND {is_free} RETURNING {_COLUMNS}""",
                owner,
                until_s,
                now_s,
                now_s,
                model,
                *busy_tenants,
                now_s,
            )
        )
        return _batch(rows[0]) if rows else None

    def renew(self, owner: str, batch_ids: Collection[str], until_s: int) -> dict[str, BatchStatus]:
        """Renew leases; return the status of each batch that is still the owner's."""
        if not batch_ids:
            return {}
        rows = self.database.write(
            lambda run: run(
                f"""UPDATE batches SET lease_until_s = ? WHERE lease_owner = ? AND ended_s IS NULL
                AND id IN ({", ".join("?" * len(batch_ids))}) RETURNING id, status""",
                until_s,
                owner,
                *batch_ids,
            )
        )
        return {batch_id: cast(BatchStatus, status) for batch_id, status in rows}

    def release(self, owner: str, batch_id: str | None = None) -> None:
        """Give up the lease of a batch, or, without one, every lease: another server may go on at once."""
        which, values = ("id = ?", [batch_id]) if batch_id is not None else ("1 = 1", [])
        self.database.write(
            lambda run: run(
                f"UPDATE batches SET lease_owner = NULL WHERE lease_owner = ? AND ended_s IS NULL AND {which}",
                owner,
                *values,
            )
        )

    def start(self, owner: str, batch_id: str, num_total: int) -> BatchStatus:
        """Note that a batch's lines were checked; return the status, which is another one if it is to be cancelled.

        Raises:
            LeaseLostError: it is not the owner's.
        """

        def work(run: Run) -> list[Row]:
            return run(
                """UPDATE batches SET num_total = ?, in_progress_s = ?,
                status = CASE WHEN status = 'validating' THEN 'in_progress' ELSE status END
                WHERE id = ? AND lease_owner = ? AND ended_s IS NULL RETURNING status""",
                num_total,
                int(self.clock()),
                batch_id,
                owner,
            )

        return _status(self.database.write(work))

    def answered(self, batch_id: str, first: int, last: int) -> set[int]:
        """Return which of these lines have a result."""
        rows = self.database.read(
            lambda run: run(
                "SELECT line FROM batch_results WHERE batch_id = ? AND line BETWEEN ? AND ?", batch_id, first, last
            )
        )
        return {line for (line,) in rows}

    def keep(self, owner: str, batch_id: str, results: Sequence[LineResult], *, is_failed: bool) -> BatchStatus:
        """Keep the results of lines, all or none, and return the batch's status; a line that has one keeps it.

        What is new is counted with it, in one transaction: so the counts are those of the lines that are kept.

        Raises:
            LeaseLostError: the batch is not the owner's.
        """

        def work(run: Run) -> list[Row]:
            added = [
                result
                for result in results
                if run(
                    """INSERT INTO batch_results (batch_id, line, is_failed, content) VALUES (?, ?, ?, ?)
                    ON CONFLICT (batch_id, line) DO NOTHING RETURNING line""",
                    batch_id,
                    result.line,
                    int(is_failed),
                    result.content,
                )
            ]
            num, num_bytes = ("num_failed", "failed_bytes") if is_failed else ("num_completed", "completed_bytes")
            rows = run(
                f"""UPDATE batches SET {num} = {num} + ?, {num_bytes} = {num_bytes} + ?,
                input_tokens = input_tokens + ?, cached_tokens = cached_tokens + ?,
                output_tokens = output_tokens + ?, reasoning_tokens = reasoning_tokens + ?
                WHERE id = ? AND lease_owner = ? AND ended_s IS NULL RETURNING status""",
                len(added),
                sum(len(result.content.encode()) for result in added),
                *(sum(counts) for counts in zip(Tokens(), *(result.tokens for result in added), strict=True)),
                batch_id,
                owner,
            )
            _status(rows)
            return rows

        return _status(self.database.write(work))

    def end(self, owner: str, batch_id: str, status: End, errors: Sequence[LineError] = ()) -> Batch:
        """End a batch, its output made of the results that there are, in one step; return it.

        Raises:
            LeaseLostError: it is not the owner's.
        """
        now_s = int(self.clock())

        def work(run: Run) -> Row:
            rows = run(
                f"""UPDATE batches SET status = ?, {status}_s = ?, ended_s = ?, errors = ?, lease_owner = NULL,
                finalizing_s = CASE WHEN ? = 'completed' THEN ? ELSE finalizing_s END
                WHERE id = ? AND lease_owner = ? AND ended_s IS NULL RETURNING {_COLUMNS}""",
                status,
                now_s,
                now_s,
                json.dumps(errors) if errors else None,
                status,
                now_s,
                batch_id,
                owner,
            )
            if not rows:
                raise LeaseLostError
            batch = _batch(rows[0])
            for column, is_failed, count, num_bytes in (
                ("output_file_id", False, batch.num_completed, batch.completed_bytes),
                ("error_file_id", True, batch.num_failed, batch.failed_bytes),
            ):
                if count:
                    file_id = add_results(
                        run, batch.id, batch.tenant, is_failed=is_failed, num_bytes=num_bytes, now_s=self.clock(),
                        lifetime_s=batch.output_lifetime_s,
                    )  # fmt: skip
                    run(f"UPDATE batches SET {column} = ? WHERE id = ?", file_id, batch.id)
            return run(f"SELECT {_COLUMNS} FROM batches WHERE id = ?", batch.id)[0]

        return _batch(self.database.write(work))


def _get(run: Run, tenant: str, batch_id: str) -> Batch:
    rows = run(f"SELECT {_COLUMNS} FROM batches WHERE id = ? AND tenant = ?", as_id(batch_id), tenant)
    if not rows:
        raise NotFoundError("There is no batch of that id.", hint="/v1/batches lists them.", param="batch_id")
    return _batch(rows[0])


def _batch(row: Row) -> Batch:
    """Return the batch of one row of `_COLUMNS`."""
    found: dict[str, Any] = dict(zip(_NAMES, row, strict=True))
    found["metadata"] = None if found["metadata"] is None else json.loads(found["metadata"])
    found["errors"] = tuple(LineError(*error) for error in json.loads(found["errors"] or "[]"))
    return Batch(**found)


def _status(rows: Sequence[Row]) -> BatchStatus:
    if not rows:
        raise LeaseLostError
    return cast(BatchStatus, rows[0][0])
