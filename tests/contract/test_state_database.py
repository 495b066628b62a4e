"""What the state database promises, over both kinds: all or nothing, typed errors, versions."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from seamount.core.database import Database, Run
from seamount.core.errors import SeamountError, StateMismatchError, StateUnavailableError
from seamount.core.migrations import MIGRATIONS, Migration, migrate
from seamount.core.state import connect_state, open_state

ADD_TENANT = "INSERT INTO tenants (name, created_s) VALUES (?, ?)"

# Rows as each version would hold them, by version: what later versions must keep. A new step adds its own.
ROWS: dict[int, tuple[tuple[str, tuple[str | int | None, ...]], ...]] = {
    1: (
        (ADD_TENANT, ("bank", 1)),
        (
            """INSERT INTO api_keys (id, digest, tenant, label, is_admin, models, routes, requests_per_minute,
            tokens_per_minute, max_concurrent, priority, created_s, expires_s, revoked_s)
            VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)""",
            ("k", "d", "bank", "Prüfung 一", 0, '["m"]', None, 5, None, None, 0, 1, 2, None),
        ),
        (
            "INSERT INTO usage (key_id, day, num_prompt_tokens, num_generated_tokens) VALUES (?, ?, ?, ?)",
            ("k", "2027-01-31", 2**50, 7),
        ),
    ),
    2: (
        (
            """INSERT INTO responses (id, tenant, key_id, model, created_s, expires_s, items, response)
            VALUES (?, ?, ?, ?, ?, ?, ?, ?)""",
            ("resp_0", "bank", None, "m", 1, 2, '["一"]', "{}"),
        ),
    ),
    3: (
        (
            """INSERT INTO files (id, tenant, purpose, filename, state, num_bytes, created_s, touched_s, expires_s)
            VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)""",
            ("file-0", "bank", "batch", "一.jsonl", "ready", 3, 1, 1, 2),
        ),
        (
            "INSERT INTO file_chunks (file_id, number, first_line, content) VALUES (?, ?, ?, ?)",
            ("file-0", 0, 1, "{}\n"),
        ),
        (
            """INSERT INTO batches (id, tenant, endpoint, model, input_file_id, output_lifetime_s, status, num_total,
            num_completed, num_failed, completed_bytes, failed_bytes, created_s, expires_s)
            VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)""",
            ("batch_0", "bank", "/v1/completions", "m", "file-0", 60, "in_progress", 1, 1, 0, 3, 0, 1, 2),
        ),
        (
            "INSERT INTO batch_results (batch_id, line, is_failed, content) VALUES (?, ?, ?, ?)",
            ("batch_0", 1, 0, "{}\n"),
        ),
    ),
    4: (("INSERT INTO response_totals (tenant, num_bytes) VALUES (?, ?)", ("club", 7)),),
}
TABLES = (
    "seamount_migrations", "tenants", "api_keys", "usage", "responses", "files", "file_chunks", "batches",
    "batch_results", "response_totals",
)  # fmt: skip


def tenants(database: Database) -> list[str]:
    return [name for (name,) in database.read(lambda run: run("SELECT name FROM tenants ORDER BY name"))]


def add_tenant(database: Database, name: str) -> None:
    database.write(lambda run: run(ADD_TENANT, name, 0))


def columns(database: Database) -> dict[str, list[str]]:
    """Return the columns of every table, sorted: a migrated table may have them in another order than a new one."""

    def of(run: Run, table: str) -> list[str]:
        if ".db" in database.name:
            return sorted(row[1] for row in run(f"PRAGMA table_info({table})"))
        rows = run("SELECT column_name FROM information_schema.columns WHERE table_name = ?", table)
        return sorted(name for (name,) in rows)

    return {table: database.read(lambda run, table=table: of(run, table)) for table in TABLES}


def test_values_come_back_as_they_were(open_one):
    database = open_one()
    for number, name in enumerate(("Ärzte 一二三", "it's; DROP TABLE tenants --", "?%s", "x" * 10_000)):
        database.write(lambda run, name=name, number=number: run(ADD_TENANT, name, 2**53 + number))
    rows = database.read(lambda run: run("SELECT created_s, name FROM tenants ORDER BY created_s"))
    assert [number - 2**53 for number, _ in rows] == [0, 1, 2, 3]
    assert [name for _, name in rows][:3] == ["Ärzte 一二三", "it's; DROP TABLE tenants --", "?%s"]
    assert database.read(lambda run: run("SELECT expires_s FROM api_keys WHERE id = ?", "none")) == []


def test_what_one_process_writes_another_reads(open_one):
    first, second = open_one(), open_one()
    add_tenant(first, "a")
    assert tenants(second) == ["a"]
    add_tenant(second, "b")
    assert tenants(first) == ["a", "b"]


def test_a_write_that_fails_leaves_nothing(open_one):
    database = open_one()

    def broken(run: Run) -> None:
        run(ADD_TENANT, "half", 0)
        run("INSERT INTO usage (key_id, day, num_prompt_tokens, num_generated_tokens) VALUES (?, ?, 0, 0)", "no", "d")

    with pytest.raises(SeamountError) as caught:
        database.write(broken)
    assert caught.value.code == "state_failed"

    def changed_its_mind(run: Run) -> None:
        run(ADD_TENANT, "half", 0)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        database.write(changed_its_mind)
    assert tenants(database) == []
    add_tenant(database, "whole")
    assert tenants(database) == ["whole"]


def test_writers_side_by_side_lose_nothing(open_one):
    databases = [open_one(busy_timeout_s=60), open_one(busy_timeout_s=60)]
    add_tenant(databases[0], "n")

    def count(number: int) -> None:
        databases[number % 2].write(lambda run: run("UPDATE tenants SET created_s = created_s + 1 WHERE name = ?", "n"))

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(count, range(200)))
    assert databases[0].read(lambda run: run("SELECT created_s FROM tenants")) == [(200,)]


def test_a_lock_that_another_holds_is_told_and_passes(open_one):
    holder, waiting = open_one(), open_one(busy_timeout_s=0.05)
    holds, release = threading.Event(), threading.Event()

    def hold(run: Run) -> None:
        run(ADD_TENANT, "same", 0)
        holds.set()
        release.wait(60)

    with ThreadPoolExecutor(1) as threads:
        held = threads.submit(holder.write, hold)
        assert holds.wait(60)
        assert tenants(waiting) == []  # reading goes on
        with pytest.raises(StateUnavailableError) as caught:
            add_tenant(waiting, "same")
        release.set()
        held.result()
    assert caught.value.code == "state_busy"
    assert caught.value.retry_after
    add_tenant(waiting, "other")
    assert tenants(waiting) == ["other", "same"]


KILLED = """
import sys
from seamount.core.state import open_state
def work(run):
    run("INSERT INTO tenants (name, created_s) VALUES (?, ?)", "half", 0)
    print("written", flush=True)
    sys.stdin.read()
open_state(sys.argv[1]).write(work)
"""


def test_a_writer_that_is_killed_leaves_nothing(open_one, location):
    database = open_one(busy_timeout_s=60)
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, location], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout.readline() == "written\n"
        process.kill()
    assert tenants(database) == []
    add_tenant(database, "half")
    assert tenants(database) == ["half"]


def test_every_version_has_rows_to_be_kept():
    assert sorted(ROWS) == list(range(1, len(MIGRATIONS) + 1))


@pytest.mark.parametrize("version", range(len(MIGRATIONS) + 1))
def test_every_earlier_version_becomes_this_one_and_keeps_its_rows(location, open_one, version):
    earlier = connect_state(location)
    migrate(earlier, MIGRATIONS[:version])
    rows = [row for number in range(1, version + 1) for row in ROWS[number]]
    for statement, values in rows:
        earlier.write(lambda run, statement=statement, values=values: run(statement, *values))
    earlier.close()
    database = open_one()
    assert {table for table, names in columns(database).items() if not names} == set()
    taken = database.read(lambda run: run("SELECT version, name FROM seamount_migrations ORDER BY version"))
    assert taken == [(number, step.name) for number, step in enumerate(MIGRATIONS, 1)]
    assert tenants(database) == (["bank"] if version else [])
    used = database.read(lambda run: run("SELECT num_prompt_tokens FROM usage"))
    assert used == ([(2**50,)] if version else [])
    # Of the response that is in ROWS, step 4 counts the characters.
    totals = dict(database.read(lambda run: run("SELECT tenant, num_bytes FROM response_totals")))
    assert totals == ({} if version < 2 else {"bank": 7} if version < 4 else {"club": 7})
    assert columns(open_one()) == columns(database)  # opening again changes nothing


def test_a_database_that_is_newer_than_the_program_is_refused_and_left_alone(location, open_one):
    database = open_one()
    newer = (*MIGRATIONS, Migration("later", ("CREATE TABLE later (a BIGINT)",)))
    migrate(database, newer)
    with pytest.raises(StateMismatchError, match=f"version {len(newer)}") as caught:
        open_state(location)
    assert caught.value.hint
    assert database.read(lambda run: run("SELECT a FROM later")) == []


def test_a_step_that_was_changed_after_its_release_is_refused(location, open_one):
    open_one().write(lambda run: run("UPDATE seamount_migrations SET digest = ? WHERE version = 1", "another"))
    with pytest.raises(StateMismatchError, match="step 1"):
        open_state(location)


def test_a_migration_that_fails_leaves_nothing_of_any_step(location):
    broken = (*MIGRATIONS, Migration("broken", ("CREATE TABLE extra (a BIGINT)", "CREATE NONSENSE")))
    database = connect_state(location)
    with pytest.raises(SeamountError):
        migrate(database, broken)
    with pytest.raises(SeamountError):
        database.read(lambda run: run("SELECT version FROM seamount_migrations"))
    migrate(database)
    with pytest.raises(SeamountError):
        database.read(lambda run: run("SELECT a FROM extra"))
    assert tenants(database) == []
    database.close()


def test_processes_that_start_at_once_migrate_once(location):
    def start(number: int) -> None:
        database = open_state(location, busy_timeout_s=60)
        add_tenant(database, f"t{number}")
        database.close()

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(start, range(6)))
    database = open_state(location)
    assert tenants(database) == [f"t{number}" for number in range(6)]
    assert len(database.read(lambda run: run("SELECT version FROM seamount_migrations"))) == len(MIGRATIONS)
    database.close()


async def test_calls_from_an_event_loop_run_in_threads(open_one):
    database = open_one()
    await database.call(lambda: add_tenant(database, "a"))
    assert await database.call(lambda: (tenants(database), threading.current_thread().name.startswith("state"))) == (
        ["a"],
        True,
    )


def test_closing_twice_is_closing(open_one):
    database = open_one()
    database.close()
    database.close()


async def test_who_looks_something_up_waits_for_nobody_who_writes(open_one):
    database, other = open_one(busy_timeout_s=60), open_one()
    add_tenant(database, "a")
    touch = "UPDATE tenants SET created_s = created_s + 1 WHERE name = ?"
    is_held, go = threading.Event(), threading.Event()

    def hold(run: Run) -> None:
        run(touch, "a")
        is_held.set()
        go.wait()

    holding = asyncio.create_task(other.call(lambda: other.write(hold)))
    try:
        await asyncio.to_thread(is_held.wait)
        writers = [
            asyncio.create_task(database.call(lambda: database.write(lambda run: run(touch, "a")))) for _ in range(20)
        ]
        async with asyncio.timeout(30):
            for _ in range(20):
                assert await database.look_up(lambda: tenants(database)) == ["a"]
        assert not any(writer.done() for writer in writers)
    finally:
        go.set()
    await asyncio.gather(holding, *writers)
    assert database.read(lambda run: run("SELECT created_s FROM tenants")) == [(21,)]
