"""The private authority: what it signs is taken by clients that know it, and by no others."""

from __future__ import annotations

import ipaddress
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from seamount.core.errors import ConfigError
from seamount.security.certificates import make_certificates

NOW = datetime(2027, 1, 31, 12, tzinfo=UTC)


def cert_of(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def verify(ca: Path, cert: Path, name: x509.GeneralName, at: datetime = NOW) -> None:
    policy = PolicyBuilder().store(Store([cert_of(ca)])).time(at)
    policy.build_server_verifier(name).verify(cert_of(cert), [])


def test_a_client_that_knows_the_authority_takes_the_certificate(tmp_path):
    files = make_certificates(tmp_path / "tls", ["models.example", "10.0.0.5"], days=90, now=NOW)
    verify(files.ca, files.cert, x509.DNSName("models.example"))
    verify(files.ca, files.cert, x509.IPAddress(ipaddress.ip_address("10.0.0.5")))
    with pytest.raises(VerificationError):
        verify(files.ca, files.cert, x509.DNSName("other.example"))
    with pytest.raises(VerificationError):
        verify(files.ca, files.cert, x509.DNSName("models.example"), NOW + timedelta(days=91))
    other = make_certificates(tmp_path / "other", ["models.example"], days=90, now=NOW)
    with pytest.raises(VerificationError):
        verify(other.ca, files.cert, x509.DNSName("models.example"))


def test_the_keys_are_their_owners_alone(tmp_path):
    files = make_certificates(tmp_path, ["a"], days=1, now=NOW)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (files.ca_key, files.key, files.ca, files.cert)] == [
        0o600, 0o600, 0o644, 0o644,
    ]  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ca.key", "ca.pem", "server.key", "server.pem"]


def test_the_authority_stays_and_the_servers_certificate_is_new(tmp_path):
    first = make_certificates(tmp_path, ["a.example"], days=1, now=NOW)
    authority, cert = first.ca.read_bytes(), first.cert.read_bytes()
    second = make_certificates(tmp_path, ["b.example"], days=1, now=NOW)
    assert (first.made_authority, second.made_authority) == (True, False)
    assert second.ca.read_bytes() == authority
    assert second.cert.read_bytes() != cert
    verify(second.ca, second.cert, x509.DNSName("b.example"))


@pytest.mark.parametrize("name", ["", "a b", "x" * 300, "http://x", "10.0.0.1:80"])
def test_a_name_that_is_none_is_refused(tmp_path, name):
    with pytest.raises(ConfigError, match="neither"):
        make_certificates(tmp_path, [name], days=1, now=NOW)


def test_a_broken_authority_is_never_replaced(tmp_path):
    files = make_certificates(tmp_path, ["a"], days=1, now=NOW)
    files.ca_key.write_text("gone")
    with pytest.raises(ConfigError, match="authority"):
        make_certificates(tmp_path, ["a"], days=1, now=NOW)
    other = make_certificates(tmp_path / "other", ["a"], days=1, now=NOW)
    files.ca_key.write_bytes(other.ca_key.read_bytes())
    with pytest.raises(ConfigError, match="not the key"):
        make_certificates(tmp_path, ["a"], days=1, now=NOW)
    with pytest.raises(ConfigError, match="expired"):
        make_certificates(tmp_path / "other", ["a"], days=1, now=NOW + timedelta(days=4000))
    files.ca_key.unlink()
    with pytest.raises(ConfigError, match=r"ca\.key"):
        make_certificates(tmp_path, ["a"], days=1, now=NOW)
