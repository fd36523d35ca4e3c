"""NBD over TLS: our client, other people's, and those who should not come in."""

from __future__ import annotations

import os
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable
from pathlib import Path
from struct import pack

import pytest

from diskwright.core.secrets import Secrets
from diskwright.core.tls import authz, credentials
from diskwright.core.tls.stream import TlsSocket
from diskwright.errors import OptionError, ProtocolError
from diskwright.exports.nbd.tls import ServerTls
from tests.exports.nbd.client import FLUSH, FUA, MIB, READ, WRITE, ZEROES, Client, Medium, serving_image, serving_medium
from tests.own import Diskwright
from tests.peers import libnbd
from tests.peers.process import PeerError, run
from tests.tls_files import CLIENT_NAME, Authority, psk

SIZE = 8 * MIB
PATIENCE = 30.0


class Files:
    """Directories of everybody concerned."""

    def __init__(self, folder: Path) -> None:
        ours, theirs = Authority(), Authority("somebody else")
        self.server = ours.server(folder / "server")
        self.client = ours.client(folder / "client")
        self.nameless = ours.client(folder / "nameless", certificate=False)
        self.expired = ours.client(folder / "expired", days=-1)
        self.stranger = theirs.client(folder / "stranger")
        # One who trusts our server, and has a certificate of somebody else.
        self.forger = theirs.client(folder / "forger")
        (folder / "forger" / "ca-cert.pem").write_bytes((folder / "client" / "ca-cert.pem").read_bytes())
        self.psk = psk(folder / "psk")
        self.wrong_psk = psk(folder / "wrong_psk", {"alice": "11" * 32})


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("tls"))


def made(kind: str, folder: str, endpoint: str, **more: str) -> credentials.Credentials:
    options = {"id": "t", "dir": folder, "endpoint": endpoint, **more}
    return credentials.from_object(f"tls-creds-{kind}", options, Secrets())


def x509(files: Files, **more: object) -> ServerTls:
    return ServerTls(made("x509", files.server, "server"), **more)  # type: ignore[arg-type]


def with_keys(files: Files, **more: object) -> ServerTls:
    return ServerTls(made("psk", files.psk, "server"), **more)  # type: ignore[arg-type]


def secure(
    kind: str, folder: str, *, hostname: str | None = "localhost", **more: str
) -> Callable[[socket.socket], TlsSocket]:
    """What ``Client`` needs to go over TLS."""
    mine = made(kind, folder, "client", **more)

    def begin(sock: socket.socket) -> TlsSocket:
        stream = TlsSocket(sock, mine.terms().context, server_side=False, hostname=hostname)
        stream.handshake(PATIENCE)
        sock.settimeout(PATIENCE)
        return stream

    return begin


def test_every_command_through_tls(files: Files, sock_dir: str) -> None:
    medium = Medium(SIZE)
    with serving_medium(medium, sock_dir, tls=x509(files)) as served:
        for structured in (False, True):
            with Client(served.path, structured=structured, secure=secure("x509", files.client)) as client:
                assert isinstance(client.sock, TlsSocket) and client.sock.object.version() == "TLSv1.3"
                data = os.urandom(3 * MIB)
                assert client.write(1000, data) == 0
                assert client.read(1000, len(data)) == data
                assert client.read(999, 1) == b"\0"
                assert client.ask(WRITE, 0, 10, b"0123456789", FUA).error == 0
                assert client.ask(FLUSH, 0, 0).error == 0
                assert client.ask(ZEROES, 2 * MIB, 4096).error == 0
                assert client.read(2 * MIB - 1000, 1000) == data[2 * MIB - 2000 : 2 * MIB - 1000]
                assert client.ask(READ, SIZE, 1).error == 22
                sent = {client.send(READ, 4096 * n, 4096): 4096 * n for n in range(50)}
                for _ in range(50):
                    cookie, reply = client.receive()
                    at = sent.pop(cookie)
                    assert reply.data == medium.data[at : at + 4096]
                assert client.write(0, bytes(SIZE)) == 0


@pytest.mark.parametrize("driver", ["raw", "qcow2"])
def test_large_reads_of_files_go_through_tls_too(files: Files, sock_dir: str, tmp_path: Path, driver: str) -> None:
    """Where plain sockets get bytes from the file itself."""
    data = bytearray(SIZE)
    data[MIB : 3 * MIB] = random.Random(1).randbytes(2 * MIB)
    (tmp_path / "raw").write_bytes(data)
    image = str(tmp_path / "image")
    run("qemu-img", "convert", "-f", "raw", "-O", driver, str(tmp_path / "raw"), image)
    with serving_image(image, driver, sock_dir, tls=x509(files)) as served:
        for structured in (False, True):
            with Client(served.path, structured=structured, secure=secure("x509", files.client)) as client:
                assert client.read(0, SIZE) == data
                assert client.read(MIB + 1, MIB) == data[MIB + 1 : 2 * MIB + 1]


@pytest.mark.parametrize("kind", ["x509", "psk"])
def test_other_peoples_clients(files: Files, sock_dir: str, tmp_path: Path, kind: str) -> None:
    contents = random.Random(2).randbytes(SIZE)
    image, copy = str(tmp_path / "image"), str(tmp_path / "copy")
    Path(image).write_bytes(contents)
    tls = x509(files) if kind == "x509" else with_keys(files)
    with serving_image(image, "raw", sock_dir, tls=tls) as served:
        if kind == "x509":
            obj = f"tls-creds-x509,id=t,dir={files.client},endpoint=client"
            uri = f"nbds+unix://localhost/?socket={served.path}&tls-certificates={files.client}"
            nbdkit = [f"tls-certificates={files.client}", "tls-verify=false"]
        else:
            obj = f"tls-creds-psk,id=t,dir={files.psk},endpoint=client,username=alice"
            uri = f"nbds+unix://alice@/?socket={served.path}&tls-psk-file={files.psk}/keys.psk"
            nbdkit = [f"tls-psk={files.psk}/keys.psk", "tls-username=alice"]
        options = f"driver=nbd,server.type=unix,server.path={served.path},tls-creds=t,tls-hostname=localhost"
        run("qemu-img", "convert", "--object", obj, "--image-opts", options, "-O", "raw", copy)
        assert Path(copy).read_bytes() == contents
        os.unlink(copy)
        libnbd.copy(uri, copy)
        assert Path(copy).read_bytes() == contents
        listed = run(
            "qemu-nbd", "--list", "-k", served.path, "--object", obj, "--tls-creds=t", "--tls-hostname=localhost"
        )
        assert f"size:  {SIZE}\n" in listed.stdout
        assert libnbd.info_json(uri)["TLS"] is True
        printed = libnbd.run_snippet(
            uri,
            'h.pwrite(b"x" * 70000, 5); print(h.pread(70000, 5) == b"x" * 70000); h.flush(); h.shutdown()',
            before="h.set_uri_allow_local_file(True)",
        )
        assert printed == "True\n"
        through = ["-U", "-", "--exit-with-parent", "nbd", f"socket={served.path}", "tls=require", *nbdkit]
        done = run("nbdkit", *through, "--run", f"nbdcopy $uri {copy}")
        assert done.returncode == 0
    assert Path(copy).read_bytes()[:5] == contents[:5] and Path(copy).read_bytes()[5:70005] == b"x" * 70000


def test_those_without_the_right_certificate_stay_outside(files: Files, sock_dir: str) -> None:
    with serving_medium(Medium(SIZE), sock_dir, tls=x509(files)) as served:
        for folder in (files.nameless, files.forger):
            # In TLS 1.3 a client learns of the refusal only after it has finished its part.
            with pytest.raises((ProtocolError, OSError, EOFError)):
                Client(served.path, secure=secure("x509", folder))
        for folder, hostname in ((files.stranger, "localhost"), (files.client, "elsewhere")):
            with pytest.raises(ProtocolError, match="certificate was not accepted"):
                Client(served.path, secure=secure("x509", folder, hostname=hostname))
        expired = secure("x509", files.expired, **{"sanity-check": "off"})
        with pytest.raises((ProtocolError, OSError, EOFError)):
            Client(served.path, secure=expired)
        for folder in (files.nameless, files.stranger):
            with pytest.raises(PeerError):
                run(
                    "qemu-nbd", "--list", "-k", served.path, "--tls-creds=t", "--tls-hostname=localhost",
                    "--object", f"tls-creds-x509,id=t,dir={folder},endpoint=client",
                )  # fmt: skip
        with pytest.raises(AssertionError, match="0x80000005"):
            Client(served.path)  # plain
        with Client(served.path, secure=secure("x509", files.client)) as client:
            assert client.read(0, 512) == bytes(512)


def test_a_server_that_asks_for_no_certificate(files: Files, sock_dir: str) -> None:
    tls = ServerTls(made("x509", files.server, "server", **{"verify-peer": "off"}))
    with (
        serving_medium(Medium(SIZE), sock_dir, tls=tls) as served,
        Client(served.path, secure=secure("x509", files.nameless)) as client,
    ):
        assert client.read(0, 10) == bytes(10)


def test_optional_tls(files: Files, sock_dir: str) -> None:
    with serving_medium(Medium(SIZE), sock_dir, tls=x509(files, required=False)) as served:
        with Client(served.path) as plain, Client(served.path, secure=secure("x509", files.client)) as secured:
            assert plain.write(0, b"abc") == 0
            assert secured.read(0, 3) == b"abc"
        assert libnbd.info_json(served.uri)["TLS"] is False


def test_tls_where_there_is_none(files: Files, sock_dir: str) -> None:
    with serving_medium(Medium(SIZE), sock_dir) as served, pytest.raises(AssertionError, match="0x80000002"):
        Client(served.path, secure=secure("x509", files.client))


@pytest.mark.parametrize("versions", ["NORMAL:-VERS-TLS1.3", "NORMAL"])
def test_keys(files: Files, sock_dir: str, versions: str) -> None:
    medium = Medium(SIZE)
    tls = ServerTls(made("psk", files.psk, "server", priority=versions))
    with serving_medium(medium, sock_dir, tls=tls) as served:
        for name in ("alice", "bob"):
            with Client(served.path, secure=secure("psk", files.psk, username=name)) as client:
                assert client.write(0, name.encode()) == 0
                assert client.read(0, len(name)) == name.encode()
        with pytest.raises((ProtocolError, OSError, EOFError)):
            Client(served.path, secure=secure("psk", files.wrong_psk, username="alice"))
        with pytest.raises(ProtocolError):
            Client(served.path, secure=secure("x509", files.client))  # there is no certificate to check
        uri = f"nbds+unix://alice@/?socket={served.path}&tls-psk-file="
        with pytest.raises(PeerError):
            libnbd.info_json(f"{uri}{files.wrong_psk}/keys.psk")
        assert libnbd.info_json(f"{uri}{files.psk}/keys.psk")["TLS"] is True


def test_a_server_with_a_certificate_cannot_pose_as_one_with_the_key(files: Files, sock_dir: str) -> None:
    with serving_medium(Medium(SIZE), sock_dir, tls=x509(files)) as served, pytest.raises(ProtocolError):
        Client(served.path, secure=secure("psk", files.psk, username="alice"))


def test_keys_are_looked_up_anew_for_each_client(files: Files, sock_dir: str, tmp_path: Path) -> None:
    folder = psk(tmp_path / "keys", {"alice": "22" * 16})
    mine = secure("psk", psk(tmp_path / "mine", {"carol": "33" * 32}), username="carol")
    tls = ServerTls(made("psk", folder, "server"))
    with serving_medium(Medium(SIZE), sock_dir, tls=tls) as served:
        with pytest.raises((ProtocolError, OSError, EOFError)):
            Client(served.path, secure=mine)
        with open(os.path.join(folder, "keys.psk"), "a") as file:
            file.write("carol:" + "33" * 32 + "\n")
        with Client(served.path, secure=mine) as client:
            assert client.read(0, 1) == b"\0"


def test_authorization(files: Files, sock_dir: str) -> None:
    def allowed(tls: ServerTls, way: Callable[[socket.socket], TlsSocket]) -> bool:
        with serving_medium(Medium(SIZE), sock_dir, tls=tls) as served:
            try:
                with Client(served.path, secure=way) as client:
                    return client.read(0, 1) == b"\0"
            except (OSError, EOFError):
                return False

    client = secure("x509", files.client)
    simple = {"id": "a", "identity": CLIENT_NAME}
    assert allowed(x509(files, allows=authz.from_object("authz-simple", simple)), client)
    assert not allowed(x509(files, allows=authz.from_object("authz-simple", {**simple, "identity": "CN=x"})), client)
    rules = {"id": "a", "rules.0.match": "*,CN=client", "rules.0.policy": "allow", "rules.0.format": "glob"}
    assert allowed(x509(files, allows=authz.from_object("authz-list", rules)), client)
    names = authz.from_object("authz-simple", {"id": "a", "identity": "bob"})
    for name in ("alice", "bob"):
        way = secure("psk", files.psk, username=name)
        assert allowed(with_keys(files, allows=names), way) == (name == "bob")
    anybody = made("x509", files.server, "server", **{"verify-peer": "off"})
    with pytest.raises(OptionError, match="verify-peer=on"):
        ServerTls(anybody, allows=names)
    with pytest.raises(OptionError, match="keep nobody out"):
        x509(files, required=False, allows=names)
    with pytest.raises(OptionError, match="server endpoint"):
        ServerTls(made("x509", files.client, "client"))


# -- those who break it ------------------------------------------------------------------------------

GREETED = pack(">I", 3)
STARTTLS = pack(">QII", 0x49484156454F5054, 5, 0)


def at_tls(path: str) -> socket.socket:
    """A connection whose server waits for the first bytes of TLS."""
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(PATIENCE)
    sock.connect(path)
    assert len(sock.recv(18, socket.MSG_WAITALL)) == 18
    sock.sendall(GREETED + STARTTLS)
    assert sock.recv(20, socket.MSG_WAITALL)[12:16] == b"\0\0\0\1"
    return sock


def hung_up(sock: socket.socket) -> bool:
    try:
        while sock.recv(4096):
            pass
    except ConnectionError:
        pass
    return True


def hello(folder: str) -> bytes:
    """The first bytes of a client's TLS."""
    out = ssl.MemoryBIO()
    context = made("x509", folder, "client").terms().context
    tls = context.wrap_bio(ssl.MemoryBIO(), out, server_hostname="localhost")
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    return out.read()


def test_garbage_and_cuts_in_the_handshake(files: Files, sock_dir: str) -> None:
    """Each loses its own connection; somebody who is connected all the while notices nothing."""
    whole = hello(files.client)
    rng = random.Random(3)
    pieces = [
        b"",
        b"\x16",
        whole[: len(whole) // 2],
        whole,
        whole[:-1] + b"\xff",
        b"GET / HTTP/1.0\r\n\r\n",
        bytes(5000),
    ]
    for _ in range(20):
        damaged = bytearray(whole)
        for _ in range(rng.randrange(1, 20)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        pieces.append(bytes(damaged))
    with (
        serving_medium(Medium(SIZE), sock_dir, tls=x509(files)) as served,
        Client(served.path, secure=secure("x509", files.client)) as good,
    ):
        for data in pieces:
            with at_tls(served.path) as sock:
                sock.sendall(data)
                sock.shutdown(socket.SHUT_WR)
                assert hung_up(sock)
            assert good.read(0, 4096) == bytes(4096)


def test_garbage_after_the_handshake(files: Files, sock_dir: str) -> None:
    """What was not encrypted with the agreed keys is never taken for a request."""
    medium = Medium(SIZE)
    with serving_medium(medium, sock_dir, tls=x509(files)) as served:
        for data in (pack(">IHHQQI", 0x25609513, 0, 1, 1, 0, 4) + b"evil", b"\x17\x03\x03\0\x20" + os.urandom(32)):
            with Client(served.path, secure=secure("x509", files.client)) as client:
                client._raw.sendall(data)
                assert hung_up(client._raw)
    assert medium.data[:4] == bytes(4)


def test_plain_options_smuggled_before_tls(files: Files, sock_dir: str) -> None:
    with (
        serving_medium(Medium(SIZE), sock_dir, tls=x509(files)) as served,
        socket.socket(socket.AF_UNIX) as sock,
    ):
        sock.settimeout(PATIENCE)
        sock.connect(served.path)
        sock.sendall(GREETED + STARTTLS + pack(">QII", 0x49484156454F5054, 3, 0))
        said = b""
        try:
            while piece := sock.recv(4096):
                said += piece
        except ConnectionError:
            pass
        assert said == b"NBDMAGICIHAVEOPT\0\3"


def test_who_idles_in_the_handshake_is_dropped(files: Files, sock_dir: str) -> None:
    with serving_medium(Medium(SIZE), sock_dir, tls=x509(files), handshake_timeout=0.3) as served:
        with at_tls(served.path) as silent:
            assert hung_up(silent)
        with at_tls(served.path) as slow:
            data = hello(files.client)
            begun = time.monotonic()
            try:
                for byte in data:
                    slow.sendall(bytes([byte]))
                    time.sleep(0.01)
                    assert time.monotonic() - begun < PATIENCE
            except OSError:
                pass
            assert hung_up(slow)


def test_many_connections_at_once(files: Files, sock_dir: str) -> None:
    """With certificates and with none too many; each writes and reads its own part."""
    count, share = 16, SIZE // 16
    failed: list[BaseException] = []

    def work(number: int) -> None:
        rng, base = random.Random(number), number * share
        try:
            with Client(served.path, structured=True, secure=ways[number % 2]) as client:
                for _ in range(10):
                    data = rng.randbytes(rng.choice((10, 4096, 100_000)))
                    at = base + rng.randrange(share - len(data))
                    assert client.write(at, data) == 0
                    assert client.read(at, len(data)) == data
        except BaseException as error:
            failed.append(error)

    ways = [secure("x509", files.client), secure("x509", files.client, priority="NORMAL:-VERS-TLS1.3")]
    with serving_medium(Medium(SIZE), sock_dir, tls=x509(files)) as served:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failed


def test_closing_serves_what_has_arrived(files: Files, sock_dir: str) -> None:
    medium = Medium(SIZE)
    with (
        serving_medium(medium, sock_dir, tls=x509(files)) as served,
        Client(served.path, secure=secure("x509", files.client)) as client,
    ):
        assert client.read(0, 1) == b"\0"
        cookies = {client.send(WRITE, n * 512, 512, bytes([n]) * 512) for n in range(100)}
        served.server.close()
        for _ in range(100):
            cookie, reply = client.receive()
            cookies.remove(cookie)
            assert reply.error == 0
        assert client.sock.recv(1) == b""  # and a farewell
    assert all(medium.data[n * 512] == n for n in range(100))


def test_replies_while_requests_arrive(files: Files, sock_dir: str) -> None:
    """Workers answer while the connection's own thread receives: both use one TLS connection."""
    medium = Medium(SIZE)
    medium.data[:] = random.Random(5).randbytes(SIZE)
    medium.cold = True  # every read goes to a worker
    with (
        serving_medium(medium, sock_dir, tls=x509(files)) as served,
        Client(served.path, structured=True, secure=secure("x509", files.client)) as client,
    ):
        wanted: dict[int, int] = {}
        for n in range(600):
            at = (n * 7919 * 512) % (SIZE - 65536)
            wanted[client.send(READ, at, 8192)] = at
            if len(wanted) == 30:
                cookie, reply = client.receive()
                at = wanted.pop(cookie)
                assert reply.data == medium.data[at : at + 8192]
        while wanted:
            cookie, reply = client.receive()
            at = wanted.pop(cookie)
            assert reply.data == medium.data[at : at + 8192]


def test_diskwright_serve(files: Files, sock_dir: str, tmp_path: Path) -> None:
    """The same through its own command line."""
    image = tmp_path / "image"
    image.write_bytes(b"\5" * MIB)
    path = os.path.join(sock_dir, "s")
    obj = f"tls-creds-x509,id=t,dir={files.server},endpoint=server"
    words = ("serve", "-f", "raw", "--socket", path, "--object", obj, "--tls-creds", "t", str(image))
    with Diskwright(*words) as server:
        assert f"nbds+unix:///?socket={path}" in server.wait_line("Serving")
        with Client(path, secure=secure("x509", files.client)) as client:
            assert client.read(0, 100) == b"\5" * 100
        with pytest.raises(AssertionError, match="0x80000005"):
            Client(path)
        server.signal()
        assert server.end() == 0
    for more in (("--tls-authz", "t"), ("--tls-optional",), ("--tls-creds", "none")):
        with Diskwright("serve", "-f", "raw", "--socket", path, *more, str(image)) as server:
            assert server.end() == 1
            assert "TLS" in server.errors[0] or "--tls-creds" in server.errors[0]
