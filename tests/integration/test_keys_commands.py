"""`seamount init`, `keys` and `cert` as people and scripts use them, and what they open at a server."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from datetime import UTC, datetime
from pathlib import Path

import pytest

from seamount.cli.main import main
from seamount.cli.serve import greeting, notices
from seamount.cli.wire import make_access
from seamount.core.settings import ServerConfig
from seamount.core.state import open_state
from seamount.engine.fake import FakeEngine, say
from seamount.security.certificates import make_certificates
from seamount.security.keys import ApiKeys


@pytest.fixture
def database(tmp_path: Path) -> str:
    return str(tmp_path / "keys.db")


def run_json(capsys: pytest.CaptureFixture[str], *words: str) -> object:
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_first_administrator_is_made_once_and_the_key_alone_is_on_stdout(database, capsys):
    assert main(["init", "--database", database]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("sm-")
    assert len(shown.out.split()) == 1
    assert "shown this once" in shown.err
    assert shown.out.strip() not in shown.err
    assert main(["init", "--database", database]) == 2
    assert "has an administrator already" in capsys.readouterr().err


def test_without_an_administrator_there_are_no_other_keys(database, capsys):
    open_state(database).close()
    assert main(["keys", "add", "--database", database]) == 2
    assert capsys.readouterr().err.endswith("hint: Run `seamount init` first.\n")
    assert main(["keys", "list", "--database", database]) == 0
    assert "seamount init" in capsys.readouterr().out
    assert run_json(capsys, "keys", "list", "--database", database) == []


@pytest.mark.parametrize("words", [["add"], ["list"], ["list", "--json"], ["revoke", "aB3dE5fG7h"]])
def test_a_database_that_is_not_there_is_named_and_not_made(tmp_path, database, capsys, monkeypatch, words):
    assert main(["keys", *words, "--database", database]) == 2
    shown = capsys.readouterr()
    assert f"There is no state database {database}." in shown.err
    assert "hint: `seamount init` makes it" in shown.err
    assert shown.out == ""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert main(["keys", *words]) == 2
    assert f"{tmp_path}/data/seamount/state.db" in (told := capsys.readouterr().err)
    assert "`seamount init`" in told
    assert list(tmp_path.iterdir()) == []


def test_init_makes_no_folder_where_it_was_told_another(tmp_path, capsys):
    assert main(["init", "--database", str(tmp_path / "wrong" / "s.db")]) == 2
    assert f"{tmp_path}/wrong is no folder" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("time", "seconds"), [("1s", 1), ("30m", 1800), ("12h", 43_200), ("90d", 7_776_000), ("2w", 1_209_600)]
)
def test_lifetimes_have_the_usual_units(database, capsys, time, seconds):
    run_json(capsys, "init", "--database", database)
    added = run_json(capsys, "keys", "add", "--database", database, "--expires-in", time)
    lived = datetime.fromisoformat(added["expires"]) - datetime.fromisoformat(added["created"])
    assert lived.total_seconds() == seconds


def test_scripts_get_every_field(database, capsys):
    made = run_json(capsys, "init", "--database", database)
    assert made["key"].startswith(f"sm-{made['id']}-")
    words = "--tenant bank --label desk --model m --model n --route /v1/completions --expires-in 90d --priority -1"
    limits = "--requests-per-minute 5 --tokens-per-minute 6 --max-concurrent 7"
    added = run_json(capsys, "keys", "add", "--database", database, *words.split(), *limits.split())
    key = added.pop("key")
    listed = {one["id"]: one for one in run_json(capsys, "keys", "list", "--database", database)}
    assert listed == {made["id"]: listed[made["id"]], added["id"]: added}
    assert (added["tenant"], added["label"], added["state"], added["is_admin"]) == ("bank", "desk", "active", False)
    assert (added["models"], added["routes"]) == (["m", "n"], ["/v1/completions"])
    assert (added["requests_per_minute"], added["tokens_per_minute"], added["max_concurrent"]) == (5, 6, 7)
    assert (added["priority"], added["usage"], added["revoked"]) == (-1, {}, None)
    assert added["created"] < added["expires"]
    assert key not in json.dumps(listed)
    revoked = run_json(capsys, "keys", "revoke", key, "--database", database)  # by the leaked key itself
    assert (revoked["id"], revoked["state"]) == (added["id"], "revoked")
    assert main(["keys", "revoke", added["id"], "--database", database]) == 0
    assert f"{added['id']} of bank opens nothing since {revoked['revoked']}" in capsys.readouterr().out


def test_whoever_revokes_the_last_administrator_is_told(database, capsys):
    first = run_json(capsys, "init", "--database", database)["id"]
    second = run_json(capsys, "keys", "add", "--admin", "--database", database)["id"]
    plain = run_json(capsys, "keys", "add", "--database", database)["id"]
    told = []
    for key_id in (plain, first, second):
        assert main(["keys", "revoke", key_id, "--database", database]) == 0
        told.append("last administrator" in capsys.readouterr().err)
    assert told == [False, False, True]


def test_people_get_a_table_without_secrets(database, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")  # of a terminal: in a pipe nothing is folded
    run_json(capsys, "init", "--database", database)
    assert main(["keys", "add", "--database", database, "--tenant", "bank", "--label", "[red]desk " + "x" * 99]) == 0
    key = capsys.readouterr().out.strip()
    assert main(["keys", "list", "--database", database]) == 0
    table = capsys.readouterr().out
    assert "[red]desk " + "x" * 99 in table
    assert "all models, all routes" in table
    assert key[3:13] in table
    assert key[14:] not in table


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["add", "--route", "/v1/chat"], "No route that asks for a key is called '/v1/chat'."),
        (["add", "--route", "/healthz"], "No route that asks for a key is called '/healthz'."),
        (["add", "--tenant", "a b"], "A tenant cannot be called 'a b'."),
        (["add", "--admin", "--model", "m"], "An administrator may use everything"),
        (["add", "--expires-in", "soon"], "'soon' is no time such as 30m, 12h or 90d"),
        (["add", "--expires-in", "0d"], "A key lives at least a second"),
        (["add", "--priority", "9"], "The priority is 9"),
        (["add", "--requests-per-minute", "0"], "requests_per_minute is 0"),
        (["revoke", "nobody"], "There is no key of that id."),
    ],
)
def test_what_is_wrong_is_told_and_changes_nothing(database, capsys, words, told):
    run_json(capsys, "init", "--database", database)
    assert main(["keys", *words, "--database", database]) == 2
    assert told in capsys.readouterr().err
    assert len(run_json(capsys, "keys", "list", "--database", database)) == 1


def test_the_database_may_be_named_in_the_environment(database, capsys, monkeypatch):
    monkeypatch.setenv("SEAMOUNT_SERVER__DATABASE", database)
    made = run_json(capsys, "init")
    assert made["database"] == database
    assert len(run_json(capsys, "keys", "list")) == 1


def test_a_url_that_is_none_is_told_without_its_password(capsys):
    assert main(["keys", "list", "--database", "mysql://u:secret@h/x"]) == 2
    assert "postgresql://" in (shown := capsys.readouterr().err)
    assert "secret" not in shown


def test_certificates_are_made_and_said_what_for(tmp_path, capsys):
    folder = tmp_path / "tls"
    assert main(["cert", str(folder), "--name", "models.example"]) == 0
    shown = capsys.readouterr().out
    assert f"--tls-cert {folder}/server.pem --tls-key {folder}/server.key" in shown
    assert "https://models.example:8000" in shown
    again = run_json(capsys, "cert", str(folder))
    assert again["made_authority"] is False
    assert main(["cert", str(folder), "--days", "0"]) == 2


def test_a_server_without_an_administrator_stays_on_loopback(database, capsys):
    assert main(["serve", "/no/such/folder", "--host", "0.0.0.0", "--port", "0", "--database", database]) == 2
    shown = capsys.readouterr().err
    assert "There is no administrator yet" in shown
    assert "hint: Run `seamount init` first" in shown


def test_the_operator_is_told_who_can_reach_the_server():
    assert "no administrator" in notices(ServerConfig(), has_administrator=False)[0]
    assert notices(ServerConfig(), has_administrator=True) == []
    assert "without TLS" in notices(ServerConfig(host="0.0.0.0"), has_administrator=True)[0]
    secure = ServerConfig(host="0.0.0.0", tls_cert="c", tls_key="k")
    assert notices(secure, has_administrator=True) == []
    assert "Authorization" in greeting("http://x", "m", asks_for_key=True)
    assert "Authorization" not in greeting("http://x", "m")


@pytest.mark.parametrize(
    ("names", "beside", "call"),
    [
        (["box", "127.0.0.1"], True, "curl --cacert '{}/my tls/ca.pem' https://127.0.0.1:8000/v1/"),
        (["*.example", "models.example"], True, "curl --cacert '{}/my tls/ca.pem' https://models.example:8000/v1/"),
        (["::1"], False, "curl https://[::1]:8000/v1/"),
    ],
)
def test_the_call_of_the_greeting_trusts_the_certificate_by_a_name_that_it_has(tmp_path, names, beside, call):
    files = make_certificates(tmp_path / "my tls", names, days=1, now=datetime.now(UTC))
    if not beside:
        files.ca.unlink()
    assert call.format(tmp_path) in greeting("https://127.0.0.1:8000", "m", tls_cert=files.cert)
    files.cert.write_text("of a form that is not read here")
    assert "https://127.0.0.1:8000/v1/" in greeting("https://127.0.0.1:8000", "m", tls_cert=files.cert)


def status(url: str, key: str | None = None) -> int:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_serve_asks_for_keys_once_there_is_an_administrator(small_checkpoint, database, capsys):
    key = run_json(capsys, "init", "--database", database)["key"]
    words = ["serve", str(small_checkpoint), "--port", "0", "--database", database]
    process = subprocess.Popen(
        [sys.executable, "-m", "seamount", *words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    with process:
        try:
            base = next(line.split()[-1] for line in process.stdout if "API base" in line)
            assert (status(f"{base}/models"), status(f"{base}/models", key)) == (401, 200)
            made = run_json(capsys, "keys", "add", "--database", database)
            assert status(f"{base}/models", made["key"]) == 200
            run_json(capsys, "keys", "revoke", made["id"], "--database", database)
            assert status(f"{base}/models", made["key"]) == 401
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate()
    assert process.returncode == 0


async def test_the_terminal_chat_uses_its_key_and_trusts_the_private_authority(serve, tmp_path, capsys, monkeypatch):
    state = open_state(str(tmp_path / "state.db"))
    key, _ = ApiKeys(state).add_first_administrator(tenant="admin", label="")
    files = make_certificates(tmp_path / "tls", ["127.0.0.1"], days=1, now=datetime.now(UTC))
    running = await serve(
        FakeEngine(say("Vier.")), access=make_access(state), tls_cert=files.cert, tls_key=files.key
    )  # fmt: skip
    words = ["chat", "--url", running.url]
    monkeypatch.setattr("sys.stdin", io.StringIO("2+2?\n"))
    assert await asyncio.to_thread(main, words) == 1
    told = capsys.readouterr().err
    assert f"error: The certificate of {running.url}/v1/ is not trusted: " in told
    assert "hint: Set SEAMOUNT_CLIENT__TLS_CA" in told
    monkeypatch.setenv("SEAMOUNT_CLIENT__TLS_CA", str(files.ca))
    assert await asyncio.to_thread(main, words) == 2
    assert "hint: Set SEAMOUNT_CLIENT__API_KEY" in capsys.readouterr().err
    monkeypatch.setenv("SEAMOUNT_CLIENT__API_KEY", key)
    assert await asyncio.to_thread(main, words) == 0
    assert "Vier." in capsys.readouterr().out
    assert await asyncio.to_thread(main, ["chat", "--url", running.url.replace("127.0.0.1", "localhost")]) == 1
    assert "a name or an address that the certificate is for" in capsys.readouterr().err
    monkeypatch.setenv("SEAMOUNT_CLIENT__TLS_CA", str(files.key))
    assert await asyncio.to_thread(main, words) == 2
    assert "cannot be read" in capsys.readouterr().err
    running.server.stop()
    await running.task
    state.close()
