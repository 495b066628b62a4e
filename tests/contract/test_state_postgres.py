"""What only PostgreSQL can do: go away, refuse a password, not be there."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from seamount.core.database import Run
from seamount.core.errors import ConfigError, StateUnavailableError
from seamount.core.state import open_state
from seamount.security.certificates import make_certificates

ADD_TENANT = "INSERT INTO tenants (name, created_s) VALUES (?, ?)"
OTHERS = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"


def hang_up(url: str) -> None:
    """Close every other connection to the database, as a restart of PostgreSQL does."""
    database = open_state(url)
    for (pid,) in database.read(lambda run: run(OTHERS)):
        database.read(lambda run, pid=pid: run("SELECT pg_terminate_backend(?)", pid))
    database.close()


def test_a_connection_that_was_lost_while_idle_is_made_again(postgres_url: str):
    database = open_state(postgres_url)
    hang_up(postgres_url)
    assert database.read(lambda run: run("SELECT name FROM tenants")) == []
    hang_up(postgres_url)
    database.write(lambda run: run(ADD_TENANT, "a", 0))
    assert database.read(lambda run: run("SELECT name FROM tenants")) == [("a",)]
    database.close()


def test_a_connection_that_is_lost_amid_a_write_leaves_nothing_and_is_told(postgres_url: str):
    database = open_state(postgres_url)

    def work(run: Run) -> None:
        run(ADD_TENANT, "half", 0)
        hang_up(postgres_url)
        run(ADD_TENANT, "other half", 0)

    with pytest.raises(StateUnavailableError) as caught:
        database.write(work)
    assert caught.value.retry_after
    assert database.read(lambda run: run("SELECT name FROM tenants")) == []
    database.close()


def test_a_wrong_password_is_told_without_it(postgres):
    with pytest.raises(ConfigError, match="28P01") as caught:
        open_state(postgres.url("postgres", password="wrong-secret"))
    assert "wrong-secret" not in str(caught.value)


def test_a_database_that_does_not_exist_is_named(postgres):
    with pytest.raises(ConfigError) as caught:
        open_state(postgres.url("nowhere"))
    assert "nowhere" in caught.value.private


def test_a_server_that_is_not_there_is_told(tmp_path: Path):
    with pytest.raises(StateUnavailableError) as caught:
        open_state(f"postgresql://tester:secret@/x?host={tmp_path}")
    assert "secret" not in str(caught.value)
    with pytest.raises(StateUnavailableError):
        open_state("postgresql://tester@127.0.0.1:1/x")


def test_over_tls_the_server_is_verified(postgres, tmp_path: Path):
    encrypted = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
    verified = {"sslmode": "verify-full", "sslrootcert": str(postgres.tls.ca)}
    for query, tls in (({}, False), ({"sslmode": "require"}, True), (verified, True)):
        database = open_state(postgres.tcp_url("postgres", **query))
        assert database.read(lambda run: run(encrypted)) == [(tls,)]
        database.close()
    stranger = make_certificates(tmp_path, ["127.0.0.1"], days=1, now=datetime.now(UTC))
    with pytest.raises(ConfigError, match="certificate") as caught:
        open_state(postgres.tcp_url("postgres", sslmode="verify-full", sslrootcert=str(stranger.ca)))
    assert "sslrootcert" in caught.value.hint
    with pytest.raises(ConfigError, match="certificate"):  # made for 127.0.0.1, not for this name
        open_state(postgres.tcp_url("postgres", **verified).replace("@127.0.0.1", "@localhost"))
