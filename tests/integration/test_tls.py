"""TLS at a real server: its version, its certificate, and a change of it while running."""

from __future__ import annotations

import asyncio
import logging
import ssl
from datetime import UTC, datetime
from pathlib import Path

import httpx
import openai
import pytest
from cryptography.hazmat.primitives import serialization

from seamount.core.errors import ConfigError
from seamount.core.settings import ServerConfig
from seamount.engine.fake import FakeEngine, say
from seamount.security.certificates import CertificateFiles, make_certificates
from seamount.server.door.tls import server_context

NAMES = ("localhost", "127.0.0.1")


def make(folder: Path) -> CertificateFiles:
    return make_certificates(folder, NAMES, days=30, now=datetime.now(UTC))


def settings(files: CertificateFiles) -> dict[str, Path]:
    return {"tls_cert": files.cert, "tls_key": files.key}


async def shown(port: int, files: CertificateFiles, name: str | None) -> bytes:
    """Return the certificate that the server shows, in DER; a client that gives no name is one that uses an address."""
    trust = ssl.create_default_context(cafile=files.ca)
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trust, server_hostname=name or "127.0.0.1")
    found = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    await writer.wait_closed()
    return found


def der(path: Path) -> bytes:
    return ssl.PEM_cert_to_DER_cert(path.read_text("ascii"))


async def test_the_official_client_talks_to_it_over_tls(serve, tmp_path):
    files = make(tmp_path)
    running = await serve(FakeEngine(say("Vier.")), **settings(files))
    assert running.url.startswith("https://127.0.0.1:")
    trust = ssl.create_default_context(cafile=files.ca)
    async with (
        httpx.AsyncClient(verify=trust) as http,
        openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="none", http_client=http) as api,
    ):
        whole = await api.chat.completions.create(model="fake", messages=[{"role": "user", "content": "x"}])
    assert whole.choices[0].message.content == "Vier."


async def test_nothing_older_than_tls_1_3_and_nothing_unencrypted_is_answered(serve, tmp_path):
    files = make(tmp_path)
    running = await serve(FakeEngine(), **settings(files))
    old = ssl.create_default_context(cafile=files.ca)
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises((ssl.SSLError, ConnectionResetError)):
        await asyncio.open_connection("127.0.0.1", running.port, ssl=old)
    async with httpx.AsyncClient() as http:
        with pytest.raises(httpx.TransportError):
            await http.get(f"http://127.0.0.1:{running.port}/healthz")
    assert await shown(running.port, files, None) == der(files.cert)


@pytest.mark.parametrize("name", [None, "localhost"])
async def test_a_new_certificate_is_shown_from_the_next_connection_on(serve, tmp_path, name):
    files = make(tmp_path)
    running = await serve(FakeEngine(), **settings(files))
    first = der(files.cert)
    trust = ssl.create_default_context(cafile=files.ca)
    async with httpx.AsyncClient(verify=trust, base_url=running.url) as kept:
        assert (await kept.get("/healthz")).status_code == 200
        assert await shown(running.port, files, name) == first
        make(tmp_path)
        assert await shown(running.port, files, name) == der(files.cert) != first
        assert (await kept.get("/healthz")).status_code == 200


async def test_a_broken_certificate_leaves_the_last_good_one(serve, tmp_path, caplog):
    files = make(tmp_path)
    running = await serve(FakeEngine(), **settings(files))
    first, key = der(files.cert), files.key.read_bytes()
    caplog.set_level(logging.INFO)
    files.key.write_bytes(make(tmp_path / "other").key.read_bytes())
    assert await shown(running.port, files, None) == first
    assert await shown(running.port, files, None) == first
    assert caplog.text.count("stays as it was") == 1
    files.key.unlink()
    assert await shown(running.port, files, None) == first
    files.key.write_bytes(key)
    assert await shown(running.port, files, None) == first
    assert "was read again" in caplog.text


def test_files_that_do_not_work_are_told_by_name(tmp_path):
    one, other = make(tmp_path / "one"), make(tmp_path / "other")
    (tmp_path / "text").write_text("no PEM")

    def problem(cert: Path | None, key: Path | None) -> ConfigError:
        with pytest.raises(ConfigError) as caught:
            server_context(ServerConfig(tls_cert=cert, tls_key=key))
        return caught.value

    assert "seamount cert" in problem(one.cert, None).hint
    assert "seamount cert" in problem(None, one.key).hint
    assert "nowhere.pem cannot be read: No such file" in str(problem(tmp_path / "nowhere.pem", one.key))
    assert "nowhere.key cannot be read" in str(problem(one.cert, tmp_path / "nowhere.key"))
    assert "is not that of the certificate" in str(problem(one.cert, other.key))
    assert "no certificate and key in PEM" in str(problem(tmp_path / "text", one.key))
    assert "no certificate and key in PEM" in str(problem(one.cert, tmp_path / "text"))
    assert server_context(ServerConfig()) is None


def test_a_key_with_a_passphrase_is_told_and_nobody_is_asked_for_it(tmp_path):
    files = make(tmp_path)
    key = serialization.load_pem_private_key(files.key.read_bytes(), password=None)
    files.key.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    with pytest.raises(ConfigError, match="passphrase"):
        server_context(ServerConfig(tls_cert=files.cert, tls_key=files.key))
