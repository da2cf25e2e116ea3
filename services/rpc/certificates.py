"""Certificates for development: a private CA, and one certificate for all services.

`python -m services.rpc.certificates DIR NAME…` (`make certs`) writes what `MIAOTUI_TLS_DIR`
wants. A CA that is in DIR already signs again, so that machines added later are trusted.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
from pathlib import Path
from typing import Annotated

import typer
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from services.rpc.tls import CA, CERTIFICATE, KEY

CA_KEY = "ca.key"
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")


def make_certificates(directory: Path, names: tuple[str, ...] = (), *, days: int = 365) -> None:
    """Writes `ca.crt`, `ca.key`, `tls.crt` and `tls.key` (ECDSA P-256, PEM).

    The certificate is valid for `names` (host names, `*.` wildcards, IP addresses) and this
    machine's own, for clients and servers both. Keys are readable by their owner only.
    Raises `ValueError` where `directory` holds half of a CA.
    """
    directory.mkdir(parents=True, exist_ok=True)
    now = datetime.datetime.now(datetime.UTC)
    ca, ca_key = _authority(directory, now, days)
    key = ec.generate_private_key(ec.SECP256R1())
    alternatives = [_general_name(name) for name in dict.fromkeys((*LOCAL_NAMES, *names))]
    usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    certificate = (
        _builder("miaotui", key.public_key(), ca.subject, now, days)
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False
        )
        .sign(ca_key, hashes.SHA256())
    )
    _write(directory / KEY, _pem(key), secret=True)
    _write(directory / CERTIFICATE, certificate.public_bytes(serialization.Encoding.PEM))


def _authority(
    directory: Path, now: datetime.datetime, days: int
) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    paths = directory / CA, directory / CA_KEY
    there = [path for path in paths if path.exists()]
    if len(there) == 1:
        raise ValueError(f"{directory} has {there[0].name} but not the other half of the CA")
    if there:
        kept = serialization.load_pem_private_key(paths[1].read_bytes(), None)
        if not isinstance(kept, ec.EllipticCurvePrivateKey):
            raise ValueError(f"{paths[1]} is not a key for elliptic curves")
        return x509.load_pem_x509_certificate(paths[0].read_bytes()), kept
    key = ec.generate_private_key(ec.SECP256R1())
    name = "Miaotui development CA"
    usage = x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=True,
        crl_sign=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
    ca = (
        _builder(name, key.public_key(), _name(name), now, 10 * days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    _write(paths[1], _pem(key), secret=True)
    _write(paths[0], ca.public_bytes(serialization.Encoding.PEM))
    return ca, key


def _builder(
    subject: str,
    key: ec.EllipticCurvePublicKey,
    issuer: x509.Name,
    now: datetime.datetime,
    days: int,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(_name(subject))
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        # Clocks of machines differ; a certificate must be valid at once on all of them.
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _write(path: Path, data: bytes, *, secret: bool = False) -> None:
    """Replaces a file whole: a service may read it at any moment."""
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if secret else 0o644)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
    new.replace(path)


def _command(
    directory: Annotated[Path, typer.Argument(help="Where the files go")],
    names: Annotated[
        list[str] | None, typer.Argument(help="Host names and addresses besides this machine's")
    ] = None,
    days: Annotated[int, typer.Option(min=1, help="How long the certificate is valid")] = 365,
) -> None:
    """A private CA and one certificate for all services, for development."""
    make_certificates(directory, tuple(names or ()), days=days)
    typer.echo(f"{directory}: start every service with MIAOTUI_TLS_DIR={directory.resolve()}")


if __name__ == "__main__":
    typer.run(_command)
