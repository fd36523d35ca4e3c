"""TLS credentials, who may come in, and the socket: without NBD."""

from __future__ import annotations

import json
import os
import random
import socket
import ssl
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from diskwright.core.secrets import Secrets
from diskwright.core.tls import authz, credentials
from diskwright.core.tls.credentials import Credentials
from diskwright.core.tls.stream import TlsSocket
from diskwright.errors import OptionError, ProtocolError
from tests.tls_files import CLIENT_NAME, KEY, Authority, psk

PATIENCE = 30.0


def made(kind: str, folder: str | Path, endpoint: str, secrets: Secrets | None = None, **more: str) -> Credentials:
    options = {"id": "t", "dir": str(folder), "endpoint": endpoint, **{k.replace("_", "-"): v for k, v in more.items()}}
    return credentials.from_object(f"tls-creds-{kind}", options, secrets or Secrets())


def together(server: Credentials, client: Credentials, hostname: str | None = "localhost") -> tuple[str | None, str]:
    """A handshake and some data both ways; who the server says the client is, and the TLS version."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(PATIENCE)
        theirs.settimeout(PATIENCE)
        terms = server.terms()
        near = TlsSocket(ours, terms.context, server_side=True)
        failed: list[BaseException] = []

        def serve() -> None:
            try:
                near.handshake(PATIENCE)
                while data := near.recv(100_000):
                    near.sendmsg([data[:1], data[1:]])
                near.finish()
            except BaseException as error:
                failed.append(error)
                ours.close()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            far = TlsSocket(theirs, client.terms().context, server_side=False, hostname=hostname)
            far.handshake(PATIENCE)
            for size in (1, 1000, 16384, 16385, 50_000):  # fits into a socket's buffer
                data = random.Random(size).randbytes(size)
                far.sendall(data)
                back = bytearray()
                while len(back) < size:
                    piece = far.recv(size - len(back))
                    if not piece:
                        break
                    back += piece
                assert failed or back == data
                if failed:
                    raise failed[0]
            version = str(far.object.version())
            identity = terms.identity(near.object)
            far.finish()
            theirs.shutdown(socket.SHUT_WR)
        finally:
            thread.join()
        if failed:
            raise failed[0]
        return identity, version


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    authority = Authority()
    authority.server(folder / "server")
    authority.client(folder / "client")
    authority.server(folder / "locked", password=b"open sesame")
    authority.server(folder / "old", days=-1)
    psk(folder / "psk")
    return folder


@pytest.mark.parametrize(
    "priority, version",
    [
        ("", "TLSv1.3"),
        ("NORMAL", "TLSv1.3"),
        ("@SYSTEM", "TLSv1.3"),
        ("PFS", "TLSv1.3"),
        ("NORMAL:-VERS-TLS1.3", "TLSv1.2"),
        ("NORMAL:-VERS-ALL:+VERS-TLS1.2", "TLSv1.2"),
        ("NORMAL:!VERS-TLS1.2:+ECDHE-PSK", "TLSv1.3"),
    ],
)
def test_certificates_and_priorities(folders: Path, priority: str, version: str) -> None:
    more = {"priority": priority} if priority else {}
    server, client = made("x509", folders / "server", "server", **more), made("x509", folders / "client", "client")
    assert server.proves_peer and client.needs_hostname and not server.needs_hostname
    assert together(server, client) == (CLIENT_NAME, version)
    assert together(server, client, "127.0.0.1") == (CLIENT_NAME, version)


def test_keys(folders: Path) -> None:
    server, client = made("psk", folders / "psk", "server"), made("psk", folders / "psk", "client", username="bob")
    for _ in range(3):
        assert together(server, client, None) == ("bob", "TLSv1.2")
    both = made("psk", folders / "psk", "client", username="alice", priority="NORMAL:+DHE-PSK:+ECDHE-PSK")
    assert together(server, both, None)[0] == "alice"


def test_many_keys_are_used_and_forgotten(folders: Path) -> None:
    """Callbacks live as long as their contexts, and no longer matter after them."""
    server, client = made("psk", folders / "psk", "server"), made("psk", folders / "psk", "client", username="bob")
    terms = [server.terms() for _ in range(100)]
    del terms
    assert together(server, client, None)[0] == "bob"


def test_a_wrong_key_and_an_unknown_name(folders: Path, tmp_path: Path) -> None:
    server = made("psk", folders / "psk", "server")
    wrong = psk(tmp_path / "wrong", {"alice": KEY[:-2] + "00", "carol": KEY})
    for name in ("alice", "carol"):
        with pytest.raises((ProtocolError, OSError)):
            together(server, made("psk", wrong, "client", username=name), None)


@pytest.mark.parametrize(
    "text, match",
    [
        ("alice:xyz\n", "not hexadecimal"),
        ("alice:\n", "0 bytes, not 1 to 64"),
        ("alice:" + "ab" * 65 + "\n", "65 bytes, not 1 to 64"),
        ("alice\n", "Username alice not found"),
        ("", "Username alice not found"),
        ("alicea:ab\n", "Username alice not found"),
    ],
)
def test_files_of_keys_that_are_wrong(tmp_path: Path, text: str, match: str) -> None:
    (tmp_path / "keys.psk").write_text(text)
    with pytest.raises(OptionError, match=match):
        made("psk", tmp_path, "client", username="alice")


def test_a_key_behind_a_passphrase(folders: Path) -> None:
    secrets = Secrets({"s": b"open sesame", "wrong": b"open barley"})
    server = made("x509", folders / "locked", "server", secrets, passwordid="s")
    assert together(server, made("x509", folders / "client", "client"))[0] == CLIENT_NAME
    for more in ({}, {"passwordid": "wrong"}):
        with pytest.raises(OptionError, match="Cannot load certificate"):
            made("x509", folders / "locked", "server", secrets, **more)
    with pytest.raises(OptionError, match="No secret with id 'none'"):
        made("x509", folders / "locked", "server", secrets, passwordid="none")


def test_certificates_that_are_wrong(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="has expired"):
        made("x509", folders / "old", "server")
    made("x509", folders / "old", "server", sanity_check="off")
    for name, text, match in (
        ("ca-cert.pem", b"rubbish", "Unable to import certificates"),
        ("ca-cert.pem", (folders / "server" / "server-cert.pem").read_bytes(), "not one of an authority"),
        ("server-key.pem", (folders / "client" / "client-key.pem").read_bytes(), "Cannot load certificate"),
        ("ca-crl.pem", b"rubbish", "Cannot load certificates"),
    ):
        folder = tmp_path / f"{name}-{len(text)}"
        folder.mkdir()
        for file in (folders / "server").iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        (folder / name).write_bytes(text)
        with pytest.raises(OptionError, match=match):
            made("x509", folder, "server")


def test_a_revoked_client(tmp_path: Path) -> None:
    import datetime

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization

    authority = Authority()
    server, client = authority.server(tmp_path / "server"), authority.client(tmp_path / "client")
    certificate = x509.load_pem_x509_certificate(Path(client, "client-cert.pem").read_bytes())
    now = datetime.datetime.now(datetime.UTC)
    for revoked in (False, True):
        crl = x509.CertificateRevocationListBuilder().issuer_name(authority.name)
        crl = crl.last_update(now).next_update(now + datetime.timedelta(days=1))
        if revoked:
            entry = x509.RevokedCertificateBuilder().serial_number(certificate.serial_number)
            crl = crl.add_revoked_certificate(entry.revocation_date(now).build())
        signed = crl.sign(authority.key, hashes.SHA256())
        Path(server, "ca-crl.pem").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
        pair = made("x509", server, "server"), made("x509", client, "client")
        if revoked:
            with pytest.raises((ProtocolError, OSError)):
                together(*pair)
        else:
            assert together(*pair)[0] == CLIENT_NAME


@pytest.mark.parametrize(
    "priority, match",
    [
        ("PERFORMANCE", "'PERFORMANCE' is not known"),
        ("NORMAL:+CIPHER-ALL", r"'\+CIPHER-ALL' has no counterpart"),
        ("NORMAL:+VERS-TLS1.0", "VERS-TLS1.0' has no counterpart"),
        ("NORMAL:%COMPAT", "%COMPAT"),
        ("NORMAL:-VERS-ALL", "leaves no version"),
        (":NORMAL", "'' is not known"),
    ],
)
def test_priorities_that_cannot_be_had_are_named(folders: Path, priority: str, match: str) -> None:
    for kind, folder in (("x509", "server"), ("psk", "psk")):
        with pytest.raises(OptionError, match=match):
            made(kind, folders / folder, "server", priority=priority)


def test_a_peer_that_is_silent_runs_out_of_time(folders: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        stream = TlsSocket(ours, made("x509", folders / "server", "server").terms().context, server_side=True)
        with pytest.raises(TimeoutError):
            stream.handshake(0.05)
        theirs.close()
        stream = TlsSocket(ours, made("x509", folders / "server", "server").terms().context, server_side=True)
        with pytest.raises(ProtocolError, match="hung up"):
            stream.handshake(PATIENCE)


def test_sending_never_waits_where_it_must_not(folders: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        stream = TlsSocket(ours, made("x509", folders / "server", "server").terms().context, server_side=True)
        with pytest.raises(BlockingIOError):
            stream.send(b"x", socket.MSG_DONTWAIT)


def test_nothing_of_tls_is_loaded_unasked() -> None:
    """``ssl`` takes long to load; who does without must not pay for it."""
    code = (
        "import sys, diskwright.exports.nbd, diskwright.cli.commands.nbd, diskwright.cli.commands.serve; "
        "print([name for name in ('ssl', 'cryptography') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=_environment())
    assert done.stdout == "[]\n"


def _environment() -> dict[str, str]:
    from tests.cli.run import environment

    return environment()


# -- who may come in ---------------------------------------------------------------------------------


def test_lists_decide_by_the_first_rule_that_fits() -> None:
    allows = authz.from_object(
        "authz-list",
        {
            "id": "a", "policy": "deny",
            "rules.0.match": "CN=bob", "rules.0.policy": "deny",
            "rules.1.match": "CN=*", "rules.1.policy": "allow", "rules.1.format": "glob",
            "rules.2.match": "O=*", "rules.2.policy": "allow", "rules.2.format": "exact",
        },
    )  # fmt: skip
    assert [allows(name) for name in ("CN=bob", "CN=al", "O=x", "O=*", "", "xCN=al")] == [
        False, True, False, True, False, False,
    ]  # fmt: skip
    assert authz.from_object("authz-list", {"id": "a", "policy": "allow"})("anybody")
    assert not authz.from_object("authz-list", {"id": "a"})("anybody")


@pytest.mark.parametrize(
    "kind, options",
    [
        ("authz-simple", {}),
        ("authz-simple", {"identity": "a", "rules": "b"}),
        ("authz-list", {"policy": "maybe"}),
        ("authz-list", {"rules.1.match": "a", "rules.1.policy": "allow"}),
        ("authz-list", {"rules.0.match": "a"}),
        ("authz-list", {"rules.0.policy": "allow"}),
        ("authz-list", {"rules.0.match": "a", "rules.0.policy": "perhaps"}),
        ("authz-list", {"rules.0.match": "a", "rules.0.policy": "allow", "rules.0.format": "regex"}),
        ("authz-list", {"rules.x.match": "a"}),
        ("authz-list-file", {}),
        ("authz-list-file", {"filename": "/nonexistent/file"}),
    ],
)
def test_wrong_rules(kind: str, options: dict[str, str]) -> None:
    with pytest.raises(OptionError):
        authz.from_object(kind, {"id": "a", **options})


def test_a_list_in_a_file_follows_it(tmp_path: Path) -> None:
    path = tmp_path / "rules"

    def put(text: str) -> None:
        (tmp_path / "new").write_text(text)
        os.replace(tmp_path / "new", path)

    put(json.dumps({"policy": "deny", "rules": [{"match": "bob", "policy": "allow"}]}))
    follows = authz.from_object("authz-list-file", {"id": "a", "filename": str(path)})
    keeps = authz.from_object("authz-list-file", {"id": "a", "filename": str(path), "refresh": "off"})
    assert follows("bob") and keeps("bob") and not follows("al")
    put(json.dumps({"rules": [{"match": "al", "policy": "allow", "format": "glob"}]}))
    assert follows("al") and not follows("bob") and keeps("bob")
    for wrong in ("no json", "[]", '{"rules": 1}', '{"rules": [1]}', '{"policy": "maybe"}'):
        put(wrong)
        assert not follows("al") and not follows("bob")
        with pytest.raises(OptionError):
            authz.from_object("authz-list-file", {"id": "a", "filename": str(path)})
    path.unlink()
    assert not follows("al")
    put(json.dumps({"policy": "allow"}))
    assert follows("al")


def test_reasons_are_for_people(folders: Path, tmp_path: Path) -> None:
    stranger = Authority("another").client(tmp_path / "stranger")
    with pytest.raises(ProtocolError) as caught:
        together(made("x509", folders / "server", "server"), made("x509", stranger, "client"))
    assert "handshake failed" in str(caught.value) and not isinstance(caught.value, ssl.SSLError)
