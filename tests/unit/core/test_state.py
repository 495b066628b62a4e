"""Where the state database is said to be; and that released migrations stay as they are."""

from __future__ import annotations

import ssl

import pytest

from seamount.core.database_postgres import _typed, postgres_options, shown
from seamount.core.errors import BackendError, ConfigError, IntegrityError, SeamountError, StateUnavailableError
from seamount.core.migrations import MIGRATIONS
from seamount.core.state import connect_state

# Of each released step. A line is added with a step, and never changed.
RELEASED = (
    ("keys", "a85e2ef55ae5e61fe5b78ff74baabb4efa266d48beb8e67a7407f12b30d5c7ed"),
    ("responses", "8087a1c5ae304a72a9f89d37a56690eadb2eeeb13eb9dec1958d29ac83652f8b"),
    ("batches", "9e779dcd6a7d5652f18895283652de3d65747d8a48e67601763c46dfe0acf612"),
    ("bounds", "02472804fbae7aa923bcde0bce99524fb18f5ec98720f36912d6f48762ddc3fa"),
)


def test_released_steps_are_as_they_were():
    assert tuple((step.name, step.digest) for step in MIGRATIONS) == RELEASED


def test_a_url_is_read_as_postgresqls_own_clients_read_it():
    options = postgres_options("postgresql://us%40er:p%3A%2Fw@db.example:6000/state")
    tls = options.pop("ssl_context")
    assert options == {
        "user": "us@er",
        "password": "p:/w",
        "host": "db.example",
        "port": 6000,
        "database": "state",
        "unix_sock": None,
    }
    assert tls.verify_mode is ssl.CERT_REQUIRED
    assert tls.check_hostname
    assert shown(options) == "state at db.example:6000"


def test_only_connections_on_this_machine_are_plain_unasked():
    assert postgres_options("postgresql://u@127.0.0.1/x")["ssl_context"] is False
    assert postgres_options("postgresql://u@/x?host=/run/pg")["ssl_context"] is False
    assert postgres_options("postgresql://u@/x?host=/run/pg")["unix_sock"] == "/run/pg/.s.PGSQL.5432"
    assert postgres_options("postgres://u@10.0.0.1/x?sslmode=disable")["ssl_context"] is False
    assert postgres_options("postgresql://u@127.0.0.1/x?sslmode=verify-full")["ssl_context"]
    unverified = postgres_options("postgresql://u@10.0.0.1/x?sslmode=require")["ssl_context"]
    assert unverified.verify_mode is ssl.CERT_NONE
    assert postgres_options("postgresql://u@h")["database"] == "u"


@pytest.mark.parametrize(
    "location",
    [
        "postgresql://:secret@h/x",
        "postgresql://h/x",
        "postgresql://u:secret@h:port/x",
        "postgresql://u:secret@[h/x",
        "postgresql://u:secret@h/x?sslmode=maybe",
        "postgresql://u:secret@h/x?sslrootcert=/no/such/file",
        "postgresql://u:secret@h/x?options=-c",
        "postgresql://u:secret@h/x?broken",
        "mysql://u:secret@h/x",
        "sqlite:///secret",
    ],
)
def test_a_wrong_location_is_told_without_its_password(location):
    with pytest.raises(ConfigError) as caught:
        connect_state(location)
    assert caught.value.hint or "sslrootcert" in caught.value.message
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("sqlstate", "kind", "code"),
    [
        ("53100", StateUnavailableError, "state_full"),
        ("53300", StateUnavailableError, "state_unavailable"),
        ("55P03", StateUnavailableError, "state_busy"),
        ("57014", StateUnavailableError, "state_busy"),
        ("57P01", StateUnavailableError, "state_unavailable"),
        ("08006", StateUnavailableError, "state_unavailable"),
        ("28000", ConfigError, "config_error"),
        ("XX001", IntegrityError, "state_corrupt"),
        ("23505", BackendError, "state_failed"),
    ],
)
def test_postgresqls_codes_become_typed_errors_without_its_words(
    sqlstate: str, kind: type[SeamountError], code: str
) -> None:
    error = _typed(Exception({"C": sqlstate, "M": "Key (label)=(private) exists"}), "x")
    assert isinstance(error, kind)
    assert error.code == code
    assert "private" not in str(error)
