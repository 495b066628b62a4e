"""A small private authority: certificates for those who have nobody to ask for one.

Called by `seamount cert`, and by `seamount serve` for the names. Keys are ECDSA on P-256, signatures SHA-256, which
every client of today takes. Files are replaced whole, so a server that reads them meanwhile finds the old or the new,
never half.
"""

from __future__ import annotations

import ipaddress
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey, generate_private_key
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from seamount.core.errors import ConfigError

_AUTHORITY_DAYS = 3650
# Clocks differ: what is valid from now on would not be valid yet elsewhere.
_BACKDATED = timedelta(hours=1)


@dataclass(frozen=True)
class CertificateFiles:
    """Where everything is: give `ca` to clients, `cert` and `key` to the server, and `ca_key` to nobody."""

    ca: Path
    ca_key: Path
    cert: Path
    key: Path
    made_authority: bool


def make_certificates(folder: Path, names: Sequence[str], *, days: int, now: datetime) -> CertificateFiles:
    """Make a server's certificate, signed by the folder's authority, which is made when there is none yet.

    Args:
        names: what clients call the server: host names and IP addresses.
        days: how long the server's certificate is valid.

    Raises:
        ConfigError: a name cannot be used, the authority in the folder cannot be read, or a file cannot be written.
    """
    files = CertificateFiles(
        folder / "ca.pem", folder / "ca.key", folder / "server.pem", folder / "server.key",
        made_authority=not (folder / "ca.pem").exists(),
    )  # fmt: skip
    alternatives = [_alternative(name) for name in names]
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if files.made_authority:
            ca_key = generate_private_key(SECP256R1())
            ca = _authority(ca_key, now)
            _write_key(files.ca_key, ca_key)
            _replace(files.ca, ca.public_bytes(Encoding.PEM), 0o644)
        else:
            ca, ca_key = _read_authority(files, now)
        key = generate_private_key(SECP256R1())
        cert = _server(ca, ca_key, key, alternatives, now, timedelta(days=days))
        _write_key(files.key, key)
        _replace(files.cert, cert.public_bytes(Encoding.PEM), 0o644)
    except OSError as cause:
        raise ConfigError(f"{cause.filename or folder} cannot be used: {cause.strerror}.") from cause
    return files


def names_in(cert: Path) -> list[str]:
    """Return the host names and addresses that a certificate file in PEM is for, in its order.

    It is empty where the file names none, or has a form that only OpenSSL reads.
    """
    try:
        found = x509.load_pem_x509_certificate(cert.read_bytes())
        names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (OSError, ValueError, x509.ExtensionNotFound, x509.DuplicateExtension, x509.UnsupportedGeneralNameType):
        return []
    return [str(name.value).lower() for name in names if isinstance(name, x509.DNSName | x509.IPAddress)]


def _authority(key: EllipticCurvePrivateKey, now: datetime) -> x509.Certificate:
    # The number tells two authorities apart, for a client that was given both.
    name = _name(f"Seamount private authority {x509.random_serial_number() % 10**6:06}")
    return (
        _builder(name, name, key, now, timedelta(days=_AUTHORITY_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )


def _server(
    ca: x509.Certificate,
    ca_key: EllipticCurvePrivateKey,
    key: EllipticCurvePrivateKey,
    alternatives: Sequence[x509.GeneralName],
    now: datetime,
    lifetime: timedelta,
) -> x509.Certificate:
    return (
        _builder(_name("Seamount server"), ca.subject, key, now, min(lifetime, ca.not_valid_after_utc - now))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA256())
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: EllipticCurvePrivateKey, now: datetime, lifetime: timedelta
) -> x509.CertificateBuilder:
    return x509.CertificateBuilder(
        issuer_name=issuer,
        subject_name=subject,
        public_key=key.public_key(),
        serial_number=x509.random_serial_number(),
        not_valid_before=now - _BACKDATED,
        not_valid_after=now + lifetime,
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _alternative(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    try:
        if not name or len(name) > 253 or not all(letter.isalnum() or letter in "-.*_" for letter in name):
            raise ValueError
        return x509.DNSName(name.encode("idna").decode("ascii") if not name.isascii() else name)
    except ValueError as cause:
        raise ConfigError(f"{name[:80]!r} is neither a host name nor an IP address.") from cause


def _read_authority(files: CertificateFiles, now: datetime) -> tuple[x509.Certificate, EllipticCurvePrivateKey]:
    try:
        ca = x509.load_pem_x509_certificate(files.ca.read_bytes())
        key = load_pem_private_key(files.ca_key.read_bytes(), password=None)
    except (ValueError, TypeError) as cause:
        raise ConfigError(
            f"The authority in {files.ca.parent} cannot be read.", hint="Name another folder, or take its files away."
        ) from cause
    if not isinstance(key, EllipticCurvePrivateKey) or key.public_key() != ca.public_key():
        raise ConfigError(f"{files.ca_key} is not the key of {files.ca}.", hint="Name another folder.")
    if ca.not_valid_after_utc <= now:
        raise ConfigError(
            f"The authority {files.ca} has expired.", hint="Name another folder, and give clients its ca.pem."
        )
    return ca, key


def _write_key(path: Path, key: EllipticCurvePrivateKey) -> None:
    _replace(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), 0o600)


def _replace(path: Path, data: bytes, mode: int) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # made for its owner alone
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except OSError:
        os.unlink(temporary)
        raise
