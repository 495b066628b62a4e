"""A PostgreSQL cluster of the tests' own, in a temporary folder, and a fresh database in it for each test."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from urllib.parse import quote, urlencode

import pytest

from seamount.core.database import Database
from seamount.core.state import open_state
from seamount.security.certificates import CertificateFiles, make_certificates

PASSWORD = "a password: with/signs?"


@dataclass(frozen=True)
class Cluster:
    """A running PostgreSQL: a socket in `folder`, and TLS on loopback with a certificate of `tls.ca`."""

    folder: Path
    port: int
    tls: CertificateFiles

    def url(self, name: str, *, password: str = PASSWORD) -> str:
        where = quote(str(self.folder), safe="")
        return f"postgresql://tester:{quote(password, safe='')}@:{self.port}/{name}?host={where}"

    def tcp_url(self, name: str, **query: str) -> str:
        return f"postgresql://tester:{quote(PASSWORD, safe='')}@127.0.0.1:{self.port}/{name}?{urlencode(query)}"


def _program(name: str) -> str | None:
    places = [str(path) for path in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(places))


@pytest.fixture(scope="session")
def postgres() -> Iterator[Cluster]:
    """The cluster; PostgreSQL refuses to run as root, so root lends it to the user that Debian's package made."""
    initdb, pg_ctl = _program("initdb"), _program("pg_ctl")
    if initdb is None or pg_ctl is None:
        pytest.skip("PostgreSQL is not installed: apt install postgresql")
    owner = None
    if os.geteuid() == 0:
        try:
            owner = pwd.getpwnam("postgres")
        except KeyError:
            pytest.skip("PostgreSQL does not run as root, and there is no user postgres")

    def command(*words: str) -> None:
        # The server keeps what it inherits, so a pipe would never end: its words go to files.
        with (folder / "output").open("ab") as output:
            who = {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []} if owner else {}
            done = subprocess.run(
                words, check=False, cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output, **who
            )
        if done.returncode:
            raise RuntimeError(f"{words[0]} failed: {(folder / 'output').read_text()}")

    # Not in pytest's own folder, which only the tests' user may enter; and sockets need short paths.
    folder = Path(tempfile.mkdtemp(prefix="seamount-pg-"))
    try:
        (folder / "password").write_text(PASSWORD, encoding="utf-8")
        tls = make_certificates(folder / "tls", ["127.0.0.1"], days=1, now=datetime.now(UTC))
        if owner:
            for path in (folder, folder / "password", tls.cert.parent, tls.cert, tls.key):
                os.chown(path, owner.pw_uid, owner.pw_gid)
        data = str(folder / "data")
        command(
            initdb, "-D", data, "-U", "tester", "--auth=scram-sha-256", f"--pwfile={folder / 'password'}",
            "--no-sync", "--encoding=UTF8", "--no-locale",
        )  # fmt: skip
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        options = (
            f"-k {folder} -p {port} -c listen_addresses=127.0.0.1 -c fsync=off -c ssl=on -c ssl_cert_file={tls.cert} "
            f"-c ssl_key_file={tls.key}"
        )
        command(pg_ctl, "-D", data, "-w", "-t", "120", "-l", str(folder / "log"), "-o", options, "start")
        try:
            yield Cluster(folder, port, tls)
        finally:
            command(pg_ctl, "-D", data, "-w", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder)


_numbers = count(1)


@pytest.fixture
def postgres_url(postgres: Cluster) -> str:
    """The URL of an empty database."""
    import pg8000.dbapi

    name = f"state_{next(_numbers)}"
    connection = pg8000.dbapi.connect(
        "tester", password=PASSWORD, database="postgres", unix_sock=f"{postgres.folder}/.s.PGSQL.{postgres.port}"
    )
    connection.autocommit = True
    connection.cursor().execute(f"CREATE DATABASE {name}")
    connection.close()
    return postgres.url(name)


@pytest.fixture(params=["sqlite", "postgres"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a state database may be made, of each kind."""
    if request.param == "sqlite":
        return str(tmp_path / "state.db")
    return request.getfixturevalue("postgres_url")


Open = Callable[..., Database]


@pytest.fixture
def open_one(location: str) -> Iterator[Open]:
    """Return `open_one(**options)`: opens the database once more, as another process would. All are closed."""
    opened: list[Database] = []

    def start(**options: float) -> Database:
        opened.append(open_state(location, **options))
        return opened[-1]

    yield start
    for database in opened:
        database.close()
