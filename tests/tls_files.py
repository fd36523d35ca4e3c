"""Certificates and keys for tests, made when asked for, in directories as QEMU's tls-creds objects want them."""

from __future__ import annotations

import datetime
import ipaddress
import os
from collections.abc import Mapping
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

KEY = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff"
CLIENT_NAME = "C=GB,O=A\\, B,CN=client"


class Authority:
    """Somebody who signs certificates."""

    def __init__(self, name: str = "test authority") -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
        self.certificate = (
            _builder(self.name, self.name, self.key, 1)
            .add_extension(x509.BasicConstraints(True, None), True)
            .add_extension(usage, True)
            .sign(self.key, hashes.SHA256())
        )

    def _sign(
        self, key: ec.EllipticCurvePrivateKey, name: x509.Name, days: int, purpose: x509.ObjectIdentifier
    ) -> bytes:
        usage = x509.KeyUsage(True, False, False, False, False, False, False, False, False)
        builder = (
            _builder(name, self.name, key, days)
            .add_extension(x509.BasicConstraints(False, None), True)
            .add_extension(usage, True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), False)
        )
        if purpose == ExtendedKeyUsageOID.SERVER_AUTH:
            address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
            builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost"), address]), False)
        return builder.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def server(self, folder: Path, *, days: int = 1, password: bytes | None = None) -> str:
        """A server's directory, for localhost and 127.0.0.1."""
        return self._directory(folder, "server", {NameOID.COMMON_NAME: "localhost"}, days, password)

    def client(self, folder: Path, *, days: int = 1, certificate: bool = True) -> str:
        """A client's directory; its name is ``CLIENT_NAME``."""
        names = {NameOID.COUNTRY_NAME: "GB", NameOID.ORGANIZATION_NAME: "A, B", NameOID.COMMON_NAME: "client"}
        return self._directory(folder, "client" if certificate else "", names, days, None)

    def _directory(
        self, folder: Path, role: str, names: Mapping[x509.ObjectIdentifier, str], days: int, password: bytes | None
    ) -> str:
        folder.mkdir()
        pem = self.certificate.public_bytes(serialization.Encoding.PEM)
        (folder / "ca-cert.pem").write_bytes(pem)
        if role:
            purpose = ExtendedKeyUsageOID.SERVER_AUTH if role == "server" else ExtendedKeyUsageOID.CLIENT_AUTH
            key = ec.generate_private_key(ec.SECP256R1())
            name = x509.Name([x509.NameAttribute(*each) for each in names.items()])
            (folder / f"{role}-cert.pem").write_bytes(self._sign(key, name, days, purpose))
            hidden = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
            form = serialization.PrivateFormat.PKCS8
            (folder / f"{role}-key.pem").write_bytes(key.private_bytes(serialization.Encoding.PEM, form, hidden))
        return str(folder)


def _builder(name: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: int) -> x509.CertificateBuilder:
    """Valid from before yesterday until in ``days`` days, which may be past."""
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=9))
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def psk(folder: Path, keys: Mapping[str, str] | None = None) -> str:
    """A directory of pre-shared keys."""
    folder.mkdir()
    path = folder / "keys.psk"
    path.write_text("".join(f"{name}:{key}\n" for name, key in (keys or {"alice": KEY, "bob": KEY[::-1]}).items()))
    os.chmod(path, 0o600)
    return str(folder)
