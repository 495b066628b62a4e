"""Counting tokens when the database cannot be written, and at the end."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from seamount.core.database import Database
from seamount.core.identity import Principal
from seamount.core.state import open_state
from seamount.security.keys import ApiKeys
from seamount.security.usage import Tokens, UsageLedger, usage_by_day


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = open_state(str(tmp_path / "state.db"), busy_timeout_s=0.05)
    yield opened
    opened.close()


@pytest.fixture
def key_id(database: Database) -> str:
    return ApiKeys(database).add(Principal(key_id=None, tenant="a", is_admin=True))[1].id


@contextmanager
def holding(database: Database) -> Iterator[None]:
    """Hold the database's write lock, as another process would."""
    run = database.read(lambda run: run)
    run("BEGIN IMMEDIATE")
    yield
    run("ROLLBACK")


def total(database: Database) -> Tokens:
    return sum((tokens for days in usage_by_day(database).values() for tokens in days.values()), Tokens())


async def test_what_waits_is_written_at_the_end(database, key_id):
    ledger = UsageLedger(database, flush_s=3600)
    async with ledger.running():
        ledger.add(key_id, Tokens(3, 4))
    assert total(database) == Tokens(3, 4)


async def test_a_database_that_is_locked_loses_no_count_and_is_told_once(database, key_id, tmp_path, caplog):
    ledger = UsageLedger(database)
    ledger.add(key_id, Tokens(1, 2))
    holder = open_state(str(tmp_path / "state.db"))

    with holding(holder):
        await ledger.flush()
        ledger.add(key_id, Tokens(10, 20))
        await ledger.flush()
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "locked" in warnings[0].getMessage()
    assert total(database) == Tokens()
    await ledger.flush()
    assert total(database) == Tokens(11, 22)
    holder.close()


async def test_what_could_never_be_written_is_told_at_the_end(database, caplog):
    ledger = UsageLedger(database, flush_s=3600)
    async with ledger.running():
        ledger.add("a-key-that-was-never-made", Tokens(1, 1))
    assert "is lost" in caplog.text
