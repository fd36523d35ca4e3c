"""qemu-nbd's command line: wrong usages and lists compared with the real program's, options tried with real clients."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from struct import pack

import pytest

from tests.cli.nbd_server import OURS, REAL, Running, free_port, run
from tests.cli.run import TIMEOUT, Result, diskwright, environment, make, needs_qemu, needs_same_texts
from tests.exports.nbd.client import Client
from tests.peers import libnbd, nbdkit
from tests.peers.process import run as run_peer
from tests.peers.qemu_nbd import QemuNbd
from tests.tls_files import Authority, psk

pytestmark = needs_qemu

MIB = 1 << 20


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images that tests only read: a raw one, a qcow2 one with a snapshot and a bitmap; and keys."""
    folder = tmp_path_factory.mktemp("nbd")
    make(
        folder,
        "qemu-img create -f raw a.raw 1M",
        "qemu-img create -f qcow2 a.qcow2 1M",
        "qemu-io -f qcow2 -c write~-P~7~0~64k a.qcow2",
        "qemu-img snapshot -c sn a.qcow2",
        "qemu-img bitmap --add a.qcow2 bm",
        "qemu-io -f qcow2 -c write~-P~8~0~128k a.qcow2",
    )
    psk(folder / "psk")
    (folder / "empty").mkdir()
    Authority().server(folder / "server")
    return folder


def ours(*words: str, cwd: Path) -> Result:
    """Runs ours within this process, as qemu-nbd."""
    from diskwright.cli import faces

    faces.put_on("qemu-nbd")
    try:
        found = diskwright(*words, cwd=cwd)
    finally:
        faces.put_on("diskwright")
    return found


def same(*words: str, cwd: Path, code: int = 1) -> None:
    theirs = run(REAL, *words, cwd=cwd)
    assert theirs.code == code, theirs
    assert ours(*words, cwd=cwd) == theirs


NOWHERE = "/nonexistent/folder/s"
SOCKET = "SOCKET"
"""Stands for a socket's path in a folder of the test's own: for what goes wrong only once it listens."""
HERE = ("-k", SOCKET)
RAW = ("-f", "raw", "a.raw")
SERVER_KEYS = "tls-creds-psk,id=x,dir=psk,endpoint=server"
CLIENT_KEYS = "tls-creds-psk,id=x,dir=psk,endpoint=client,username=alice"

WRONG = [
    (),
    ("a.raw", "b"),
    ("--nope", "a.raw"),
    ("--nope=1", "a.raw"),
    ("-P", "1", "a.raw"),
    ("-tP", "a.raw"),
    ("-p",),
    ("-t", "-e"),
    ("--shared",),
    ("--fork=yes", "a.raw"),
    *[(f"--{letters}",) for letters in ("p", "t", "d", "l", "b", "f", "c", "v", "o", "e", "a", "s", "x")],
    ("-c", "/dev/nbd0"),
    ("-d",),
    ("-d", "/dev/nbd0", "a.raw"),
    ("-v",),
    ("-p", "x", *RAW),
    ("-p", "10a", *RAW),
    ("-k", "relative", *RAW),
    ("-k", "", *RAW),
    ("-k", "/" + "d" * 120, *RAW),
    ("-k", NOWHERE, *RAW),
    ("-k", NOWHERE, "missing"),
    ("-b", "1.2.3.4", *RAW),
    *[("-e", number, *RAW) for number in ("-1", "x", "", "0x", "08", "99999999999", "1 ")],
    *[("-e", number, "-k", NOWHERE, *RAW) for number in ("0", "0x10", "010", " 3", "+4")],
    *[("-o", number, *RAW) for number in ("x", "", "1M", "18446744073709551616")],
    *[("-o", number, "-k", NOWHERE, *RAW) for number in ("-5", "07", "0x10")],
    ("-o", "2000000", *HERE, *RAW),
    ("--cache", "foo", *RAW),
    ("-n", "--cache", "none", *RAW),
    ("--cache", "none", "-n", *RAW),
    ("--aio", "foo", *RAW),
    ("--aio", "threads", "--aio", "native", *RAW),
    ("--discard", "foo", *RAW),
    ("--discard=unmap", "--discard=ignore", *RAW),
    ("--detect-zeroes", "foo", *RAW),
    ("--detect-zeroes=unmap", *RAW),
    ("--detect-zeroes=unmap", "--discard=unmap", *RAW),
    ("--discard=unmap", "--detect-zeroes=unmap", "-k", NOWHERE, *RAW),
    ("--discard=on", "--aio=native", "-n", "-k", NOWHERE, *RAW),
    ("-x", "a" * 4097, *RAW),
    ("-D", "d" * 4097, *RAW),
    ("-x", "a" * 4096, "-D", "d" * 4096, "-k", NOWHERE, *RAW),
    ("-f", "foo", "a.raw", *HERE),
    ("-f", "", "a.raw", *HERE),
    ("-f", "qcow2", "missing", *HERE),
    ("missing", *HERE),
    ("-r", "missing", *HERE),
    ("--image-opts", "-f", "raw", "a.raw"),
    ("--image-opts", "a.raw", *HERE),
    ("--image-opts", "driver=raw,file.filename=missing", *HERE),
    ("-l", "foo", *HERE, *RAW),
    ("-l", "foo", "a.qcow2", *HERE),
    ("-l", "", "a.qcow2", *HERE),
    ("-l", "snapshot.name=foo", "a.qcow2", *HERE),
    ("-l", "snapshot.id=1,snapshot.name=foo", "a.qcow2", *HERE),
    ("-B", "foo", "-f", "qcow2", "a.qcow2", *HERE),
    ("-B", "foo", *HERE, *RAW),
    ("--pid-file=/nonexistent/folder/p", *HERE, *RAW),
    ("-d", "/nonexistent/nbd0"),
    ("-L", "a.raw"),
    ("-d", "/dev/nbd0", "-L"),
    *[
        ("-L", *words)
        for words in (
            ("-B", "x"), ("-f", "raw"), ("-o", "1"), ("-D", "d"), ("-x", "e"), ("-A",), ("-l", "x"), ("-n",),
            ("-x", ""),
            ("-c", "/dev/nbd0"), ("--aio=threads",), ("--discard=on",), ("--cache=none",), ("--fork",),
        )
    ],
    ("-L", "-k", NOWHERE),
    ("-L", "-k", NOWHERE, "-t", "-r", "-s", "-e", "3", "-v"),
    ("-L", "-b", "127.0.0.1", "-p", "1"),
    ("-L", "-p", "x"),
    ("--object", "secret", *RAW),
    ("--object", "foo,id=a", *RAW),
    ("--object", "secret,id=a,data=b", "--object", "secret,id=a,data=c", *RAW),
    ("--object", '{"qom-type": "secret", "id": "s", "data": "x"}', "missing", *HERE),
    ("--object", "authz-simple,id=y", *RAW),
    ("--object", "authz-simple,id=y,identity=a,foo=b", *RAW),
    ("--object", "authz-list,id=y,policy=foo", *RAW),
    ("--object", "authz-list,id=y,foo=foo", *RAW),
    ("--tls-creds", "x", *RAW),
    ("--tls-creds", "x", "--object", "secret,id=x,data=k", *RAW),
    ("--tls-authz", "x", *RAW),
    ("--tls-authz", "x", "-L"),
    ("--tls-hostname", "h", *RAW),
    ("--tls-hostname", "h", "-L"),
    ("--tls-creds", "x", "--tls-hostname", "h", "--object", SERVER_KEYS, *RAW),
    ("--tls-creds", "x", "-c", "/dev/nbd0", *RAW),
    ("--tls-creds", "x", "--object", SERVER_KEYS, "-L"),
    ("--tls-creds", "x", "--object", CLIENT_KEYS, *RAW),
    ("--tls-creds", "x", "--object", CLIENT_KEYS, "-L", "-k", NOWHERE),
    *[
        ("--tls-creds", "x", "--object", f"tls-creds-{words}", *RAW)
        for words in (
            "x509,id=x,endpoint=server", "psk,id=x,endpoint=server", "x509,id=x,dir=empty,endpoint=foo",
            "x509,id=x,dir=empty,endpoint=server", "psk,id=x,dir=empty,endpoint=server", "psk,id=x,dir=psk",
            "x509,id=x,dir=empty,foo=bar", "x509,id=x,dir=server",
        )
    ],
]  # fmt: skip


@needs_same_texts
@pytest.mark.parametrize("words", WRONG, ids=lambda words: " ".join(words)[:70].replace("/", "|") or "nothing")
def test_wrong_usages(images: Path, sock_dir: str, words: tuple[str, ...]) -> None:
    same(*(os.path.join(sock_dir, "n") if word == SOCKET else word for word in words), cwd=images)


@needs_same_texts
def test_a_missing_device(images: Path) -> None:
    """Compared as processes: they go to the background first."""
    words = ("-c", "/nonexistent/nbd0", "-k", str(images / "device"), *RAW)
    assert run(OURS, *words, cwd=images) == run(REAL, *words, cwd=images)


def test_help_and_version(images: Path) -> None:
    for word in ("-h", "--help", "--hel"):
        found = ours(word, "x", cwd=images)
        assert found.code == 0 and found.out.startswith("Usage: qemu-nbd [OPTIONS] FILE\n") and not found.err
    assert ours("-tV", cwd=images).out.startswith("qemu-nbd ")
    assert diskwright("nbd", "--help", cwd=images).out.startswith("Usage: diskwright nbd [OPTIONS] FILE\n")
    assert "secret" in ours("--object", "help", cwd=images).out
    theirs, mine = run(REAL, "--help", cwd=images).out, ours("--help", cwd=images).out
    options = {word.split("=")[0].rstrip(",") for word in theirs.split() if word.startswith("--")}
    missing = {option for option in options if option not in mine}
    assert missing == {"--selinux-label"}


# -- lists -------------------------------------------------------------------------------------------

GREETING = b"NBDMAGICIHAVEOPT\0\3"
ACK, UNSUP, POLICY, INVALID, TLS_REQD, UNKNOWN = 1, *((1 << 31) + n for n in (1, 2, 3, 5, 6))


def reply(option: int, kind: int, data: bytes = b"") -> bytes:
    return pack(">QIII", 0x3E889045565A9, option, kind, len(data)) + data


def server(name: str, text: str = "") -> bytes:
    return reply(3, 2, pack(">I", len(name)) + name.encode() + text.encode())


def info(size: int, flags: int) -> bytes:
    return reply(6, 3, pack(">HQH", 0, size, flags))


BLOCKS = reply(6, 3, pack(">HIII", 3, 512, 4096, 1 << 25))
STRUCTURED, PLAIN = reply(8, ACK), reply(8, UNSUP)

CONVERSATIONS = {
    "silent": [b""],
    "another protocol": [b"garbage" * 5],
    "unknown kind": [b"NBDMAGICgarbage1" + bytes(200)],
    "half a greeting": [GREETING[:9]],
    "junk for a reply": [GREETING, b"junk" * 10],
    "no exports": [GREETING, STRUCTURED, reply(3, ACK)],
    "no lists": [GREETING, PLAIN, reply(3, UNSUP)],
    "denied": [GREETING, PLAIN, reply(3, POLICY, b"go away")],
    "invalid": [GREETING, PLAIN, reply(3, INVALID)],
    "tls required": [GREETING, PLAIN, reply(3, TLS_REQD, b"not like this")],
    "tls required, tersely": [GREETING, reply(8, TLS_REQD), reply(3, TLS_REQD)],
    "unknown error": [GREETING, PLAIN, reply(3, (1 << 31) + 77, b"what")],
    "oldstyle": [b"NBDMAGIC" + pack(">QQI", 0x00420281861253, 1 << 20, 1) + bytes(124)],
    "gone meanwhile": [GREETING, PLAIN, server("a", "hello") + reply(3, ACK), reply(6, UNKNOWN, b"nope")],
    "no details": [
        GREETING, PLAIN, server("a", "hello") + server("b") + reply(3, ACK), reply(6, UNSUP), reply(6, UNSUP),
    ],
    "two": [
        GREETING, PLAIN, server("a", "hello") + server("b") + reply(3, ACK),
        info(1000, 1) + reply(6, ACK), info(0, 0xFFFF) + BLOCKS + reply(6, ACK),
    ],
    "contexts": [
        GREETING, STRUCTURED, server("a") + server("b") + reply(3, ACK),
        info(1000, 1) + reply(6, ACK), reply(9, 4, b"\0\0\0\1x:y") + reply(9, 4, b"\0\0\0\2z:") + reply(9, ACK),
        info(5, 1) + reply(6, ACK), reply(9, ACK),
    ],
    "no contexts": [GREETING, STRUCTURED, server("a") + reply(3, ACK), info(1000, 1) + reply(6, ACK), reply(9, UNSUP)],
}  # fmt: skip

OTHER_WORDS = {"unknown error", "junk for a reply", "half a greeting"}
"""Where only the exit code is compared: ours tell more."""


class Script:
    """Says to each option the next piece that answers it; when there is none left, the last again; and to an option
    that no piece answers, the next piece."""

    def __init__(self, pieces: list[bytes]) -> None:
        self._left = pieces[1:]
        self._last: dict[int, bytes] = {}

    def answer(self, number: int) -> bytes | None:
        fitting = [piece for piece in self._left if piece[8:12] == pack(">I", number)]
        if not fitting and number in self._last:
            return self._last[number]
        if not self._left:
            return None
        piece = (fitting or self._left)[0]
        self._left.remove(piece)
        self._last[number] = piece
        return piece


@contextlib.contextmanager
def scripted(folder: str, pieces: list[bytes]) -> Iterator[str]:
    """A server of one client that keeps to a script."""
    path = os.path.join(folder, "scripted")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        listener.settimeout(TIMEOUT)

        def serve() -> None:
            client, _ = listener.accept()
            client.settimeout(TIMEOUT)
            script = Script(pieces)
            with client, contextlib.suppress(OSError):
                client.sendall(pieces[0])
                if len(pieces) > 1:
                    client.recv(4, socket.MSG_WAITALL)  # its flags
                    while len(header := client.recv(16, socket.MSG_WAITALL)) == 16:
                        client.recv(int.from_bytes(header[12:], "big"), socket.MSG_WAITALL)
                        answer = script.answer(int.from_bytes(header[8:12], "big"))
                        if answer is None:
                            break
                        client.sendall(answer)
                client.shutdown(socket.SHUT_WR)
                while client.recv(4096):
                    pass

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield path
        finally:
            thread.join()
    os.unlink(path)


@needs_same_texts
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_lists_of_all_kinds_of_servers(images: Path, sock_dir: str, name: str) -> None:
    with scripted(sock_dir, CONVERSATIONS[name]) as path:
        theirs = run(REAL, "-L", "-k", path, cwd=images)
    with scripted(sock_dir, CONVERSATIONS[name]) as path:
        mine = ours("-L", "-k", path, cwd=images)
    if name == "no lists":
        # The real one calls that no exports, which it cannot know.
        assert theirs.code == 0 and mine.code == 1 and "does not support" in mine.err
    elif name in OTHER_WORDS:
        assert (mine.code, mine.out, bool(mine.err)) == (theirs.code, theirs.out, bool(theirs.err))
    else:
        assert mine == theirs


@needs_same_texts
@pytest.mark.parametrize("options", [(), ("--mask-handshake=0",), ("-o",), ("-n", "-e", "x")], ids=str)
def test_lists_of_nbdkit(images: Path, options: tuple[str, ...]) -> None:
    with nbdkit.serve(*options, "memory", "64k") as peer:
        theirs = run(REAL, "-L", "-k", peer.socket, cwd=images)
        assert ours("-L", "-k", peer.socket, cwd=images) == theirs
    assert theirs.code == 0 or options == ("--mask-handshake=0",)


@needs_same_texts
def test_lists_of_qemu_nbd_and_of_ours(images: Path, sock_dir: str) -> None:
    """Both list the same of the same server; and of the same export on either server, but for the flags, where ours
    allows more."""
    words = ("-f", "qcow2", "-r", "-A", "-B", "bm", "-D", "some text", "-x", "näme", "a.qcow2")
    image = str(images / "a.qcow2")
    with QemuNbd(image, "qcow2", export="e", read_only=True, arguments=("-A", "-B", "bm", "-D", "text")) as peer:
        theirs = run(REAL, "-L", "-k", peer.socket, cwd=images)
        assert theirs.code == 0 and "qemu:dirty-bitmap:bm" in theirs.out
        assert ours("-L", "-k", peer.socket, cwd=images) == theirs
    with Running("-t", *words[:-1], image, folder=sock_dir) as server:
        theirs = run(REAL, "-L", "-k", server.socket, cwd=images)
        assert ours("-L", "-k", server.socket, cwd=images) == theirs
        assert " export: 'näme'\n  description: some text\n  size:  1048576\n  flags: 0x4" in theirs.out
        assert "  available meta contexts: 3\n   base:allocation\n   qemu:allocation-depth\n" in theirs.out
        assert server.running()
        assert server.stop() == 0


# -- serving -----------------------------------------------------------------------------------------


def io(uri: str, *commands: str) -> str:
    words = [word for command in commands for word in ("-c", command)]
    return run_peer("qemu-io", "-f", "raw", *words, uri).stdout


@pytest.fixture
def raw(tmp_path: Path) -> str:
    path = tmp_path / "r.raw"
    path.write_bytes(b"\x11" * MIB)
    return str(path)


def test_ends_after_the_last_client(raw: str, sock_dir: str, images: Path) -> None:
    with Running("-f", "raw", raw, folder=sock_dir) as server:
        assert ours("-L", "-k", server.socket, cwd=images).code == 0
        with socket.socket(socket.AF_UNIX) as curious:
            curious.connect(server.socket)
        time.sleep(0.05)
        assert server.running()  # nobody has chosen an export yet
        assert "pattern" not in io(server.uri, "write -P 5 0 64k", "read -P 5 0 64k").lower()
        assert server.ends() == 0
        assert not os.path.exists(server.socket)
    assert Path(raw).read_bytes() == b"\5" * 65536 + b"\x11" * (MIB - 65536)


def test_persistent(raw: str, sock_dir: str) -> None:
    with Running("-t", "-f", "raw", raw, folder=sock_dir) as server:
        for _ in range(3):
            io(server.uri, "read -P 0x11 0 64k")
        assert server.running()
        assert server.stop(signal.SIGINT) == 0
        assert not os.path.exists(server.socket)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_cleanly_with_a_client_in_the_midst(sock_dir: str, tmp_path: Path, number: int) -> None:
    image = str(tmp_path / "q.qcow2")
    make(tmp_path, f"qemu-img create -f qcow2 {image} 4M")
    with Running("-f", "qcow2", image, folder=sock_dir) as server:
        with Client(server.socket) as client:
            assert client.write(0, b"\7" * MIB) == 0
            assert server.stop(number) == 0
        make(tmp_path, f"qemu-img check {image}", f"qemu-io -f qcow2 -c read~-P~7~0~1M {image}")


def test_more_clients_than_allowed_wait_for_their_turn(raw: str, sock_dir: str) -> None:
    with Running("-t", "-e", "2", "-f", "raw", raw, folder=sock_dir) as server:
        first, second = Client(server.socket), Client(server.socket)
        with socket.socket(socket.AF_UNIX) as third:
            third.settimeout(0.2)
            third.connect(server.socket)
            with pytest.raises(TimeoutError):
                third.recv(1)
            assert first.read(0, 1) == second.read(0, 1) == b"\x11"
            first.close()
            third.settimeout(TIMEOUT)
            assert third.recv(8, socket.MSG_WAITALL) == b"NBDMAGIC"
        second.close()
        with Client(server.socket) as client:
            assert client.read(0, 1) == b"\x11"


def test_unlimited_clients_are_told_so(raw: str, sock_dir: str) -> None:
    for shared, multi in (("0", True), ("4", True), ("1", False)):
        with Running("-e", shared, "-f", "raw", raw, folder=sock_dir) as server:
            with contextlib.ExitStack() as stack:
                for _ in range(5 if shared == "0" else int(shared)):
                    client = stack.enter_context(Client(server.socket))
                    assert client.read(0, 1) == b"\x11" and bool(client.flags & 1 << 8) == multi
                assert server.running()
            assert server.ends() == 0
        os.unlink(os.path.join(sock_dir, "pid"))


def test_read_only(raw: str, sock_dir: str) -> None:
    with Running("-r", "-f", "raw", raw, folder=sock_dir) as server, Client(server.socket) as client:
        assert client.flags & 2 and client.write(0, b"x") == 1


def test_offset(raw: str, sock_dir: str) -> None:
    with Running("-o", "1000", "-f", "raw", raw, folder=sock_dir) as server, Client(server.socket) as client:
        assert client.size == MIB - 1000
        assert client.write(0, b"begin") == 0 and client.write(MIB - 1004, b"end!") == 0
    assert Path(raw).read_bytes() == b"\x11" * 1000 + b"begin" + b"\x11" * (MIB - 1009) + b"end!"


def test_offset_into_a_formatted_image(images: Path, sock_dir: str) -> None:
    image = str(images / "a.qcow2")
    with Running("-r", "-o", "65536", "-f", "qcow2", image, folder=sock_dir) as server, Client(server.socket) as client:
        assert client.size == MIB - 65536
        assert client.read(0, 65536) == b"\x08" * 65536 and client.read(65536, 100) == bytes(100)


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_temporary_overlay(raw: str, sock_dir: str, tmp_path: Path, fmt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    image = str(tmp_path / "image")
    make(tmp_path, f"qemu-img convert -f raw -O {fmt} {raw} {image}")
    before = Path(image).read_bytes()
    overlays = tmp_path / "overlays"
    overlays.mkdir()
    monkeypatch.setenv("TMPDIR", str(overlays))
    with Running("-s", "-t", "-f", fmt, image, folder=sock_dir) as server:
        io(server.uri, "write -P 5 64k 64k", "flush")
        io(server.uri, "read -P 5 64k 64k", "read -P 0x11 0 64k", "write -z 0 4k", "read -P 0 0 4k")
        assert not list(overlays.iterdir())  # it is open, and has no name
        assert server.stop() == 0
    assert Path(image).read_bytes() == before


@pytest.mark.parametrize("which", ["sn", "1", "snapshot.name=sn", "snapshot.id=1,snapshot.name=sn"])
def test_snapshots(images: Path, sock_dir: str, which: str) -> None:
    words = ("-l", which, "-f", "qcow2", str(images / "a.qcow2"))
    with Running(*words, folder=sock_dir) as server, Client(server.socket) as client:
        assert client.flags & 2
        assert client.read(0, 65536) == b"\x07" * 65536 and client.read(65536, 512) == bytes(512)


def test_names_descriptions_bitmaps_and_depth(images: Path, sock_dir: str) -> None:
    words = ("-A", "-B", "bm", "-x", "disk", "-D", "what it is", "-f", "qcow2", "-r", str(images / "a.qcow2"))
    with Running("-t", *words, folder=sock_dir) as server:
        uri = f"nbd+unix:///disk?socket={server.socket}"
        (export,) = libnbd.info_json(uri)["exports"]
        assert (export["export-name"], export["description"]) == ("disk", "what it is")
        assert export["contexts"] == ["base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:bm"]
        found = libnbd.map_json(uri, "qemu:dirty-bitmap:bm")
        assert [(each["length"], each["type"]) for each in found] == [(131072, 1), (MIB - 131072, 0)]
        assert [each["type"] for each in libnbd.map_json(uri, "qemu:allocation-depth")] == [1, 0]


def blocks(path: str) -> int:
    return os.stat(path).st_blocks * 512


def test_discard_and_zero_detection(sock_dir: str, tmp_path: Path) -> None:
    kept = {}
    for discard in ("ignore", "unmap"):
        image = tmp_path / discard
        image.write_bytes(os.urandom(MIB))
        with Running(f"--discard={discard}", "-f", "raw", str(image), folder=sock_dir) as server:
            io(server.uri, "discard 0 512k")
            assert server.ends() == 0
        os.unlink(os.path.join(sock_dir, "pid"))
        kept[discard] = blocks(str(image))
    assert kept["ignore"] >= MIB > 700_000 > kept["unmap"]
    for detect, allocates in (("off", True), ("on", False), ("unmap", False)):
        image = tmp_path / f"zeroes-{detect}"
        make(tmp_path, f"qemu-img create -f qcow2 {image} 1M")
        before = blocks(str(image))
        words = ("--discard=unmap", f"--detect-zeroes={detect}", "-f", "qcow2", str(image))
        with Running(*words, folder=sock_dir) as server:
            io(server.uri, "write -P 0 0 512k", "read -P 0 0 512k")
            assert server.ends() == 0
        os.unlink(os.path.join(sock_dir, "pid"))
        assert (blocks(str(image)) - before >= 512 << 10) == allocates


@pytest.mark.parametrize("mode", ["none", "writeback", "writethrough", "directsync", "unsafe"])
def test_cache_and_aio_modes(raw: str, sock_dir: str, mode: str) -> None:
    with Running(f"--cache={mode}", "--aio=threads", "-f", "raw", raw, folder=sock_dir) as server:
        io(server.uri, "write -P 9 4k 8k", "flush", "read -P 9 4k 8k")
        assert server.ends() == 0
    assert Path(raw).read_bytes()[4096:12288] == b"\x09" * 8192


def test_image_options(images: Path, sock_dir: str) -> None:
    options = f"driver=qcow2,file.driver=file,file.filename={images}/a.qcow2,read-only=on"
    with Running("--image-opts", options, "-r", folder=sock_dir) as server, Client(server.socket) as client:
        assert client.read(0, 512) == b"\x08" * 512


def test_a_guessed_raw_image_keeps_its_format(raw: str, sock_dir: str) -> None:
    with Running("-t", raw, folder=sock_dir) as server:
        with Client(server.socket) as client:
            assert client.write(0, b"QFI\xfb\0\0\0\3" + bytes(504)) == 1
            assert client.write(512, b"fine") == 0
        assert "Image format was not specified" in server.log()


def test_tcp_by_name_and_number(raw: str, sock_dir: str) -> None:
    port = free_port()
    with Running("-b", "localhost", "-p", str(port), "-f", "raw", raw, folder=sock_dir, place=False) as server:
        with Client(("127.0.0.1", port)) as client:
            assert client.read(0, 4) == b"\x11" * 4
            taken = ours("-b", "127.0.0.1", "-p", str(port), "-f", "raw", raw, cwd=Path(sock_dir))
            assert (taken.code, taken.err) == (
                1,
                "qemu-nbd: Failed to find an available port: Address already in use\n",
            )
        assert server.ends() == 0


def test_a_socket_in_use_and_other_files_are_left_alone(raw: str, sock_dir: str) -> None:
    with Running("-t", "-f", "raw", raw, folder=sock_dir) as server:
        refused = ours("-k", server.socket, "-f", "raw", raw, cwd=Path(sock_dir))
        assert refused.code == 1 and "Address already in use" in refused.err
        with Client(server.socket) as client:
            assert client.read(0, 1) == b"\x11"
    precious = Path(sock_dir, "file")
    precious.write_text("precious")
    assert ours("-k", str(precious), "-f", "raw", raw, cwd=Path(sock_dir)).code == 1
    assert precious.read_text() == "precious"


# -- the process -------------------------------------------------------------------------------------


def gone(pid: int) -> bool:
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    return True
        except OSError:
            return True
        time.sleep(0.01)
    return False


def test_fork_returns_when_clients_can_connect(raw: str, sock_dir: str) -> None:
    path, pid_file = os.path.join(sock_dir, "n"), os.path.join(sock_dir, "pid")
    done = run(OURS, "--fork", "-k", path, "--pid-file", pid_file, "-f", "raw", raw, cwd=Path(sock_dir))
    # Its standard streams are closed as well: else this would not have returned.
    assert done == Result(0, "", "")
    pid = int(Path(pid_file).read_text())
    try:
        assert os.getsid(pid) == pid
        with Client(path) as client:
            assert client.read(0, 1) == b"\x11"
    finally:
        if not gone(pid):
            os.kill(pid, signal.SIGKILL)
    assert not os.path.exists(path)


def test_fork_tells_what_goes_wrong(images: Path, sock_dir: str) -> None:
    for words in (
        ("-k", NOWHERE, *RAW),
        ("-k", os.path.join(sock_dir, "n"), "-f", "qcow2", "missing"),
        ("-k", os.path.join(sock_dir, "n"), "--pid-file=/nonexistent/folder/p", *RAW),
        ("-k", os.path.join(sock_dir, "n"), "-B", "foo", "-f", "qcow2", "a.qcow2"),
    ):
        mine = run(OURS, "--fork", *words, cwd=images)
        assert not os.path.exists(os.path.join(sock_dir, "n"))
        assert mine.code == 1 and mine == run(REAL, "--fork", *words, cwd=images)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(sock_dir, "n"))  # the real one leaves it there


def test_fork_tolerates_a_warning(raw: str, sock_dir: str) -> None:
    path, pid_file = os.path.join(sock_dir, "n"), os.path.join(sock_dir, "pid")
    done = run(OURS, "--fork", "-k", path, "--pid-file", pid_file, raw, cwd=Path(sock_dir))
    os.kill(int(Path(pid_file).read_text()), signal.SIGTERM)
    assert done.code == 0 and "Image format was not specified" in done.err
    assert gone(int(Path(pid_file).read_text()))


def activated(listener: socket.socket, count: str = "1", whose: str = "") -> tuple[str, ...]:
    """Ours, started as a service manager starts it: the variables name its own process."""
    script = (
        "import os, sys; os.dup2(int(sys.argv[1]), 3); os.environ.update(LISTEN_FDS=sys.argv[2], "
        "LISTEN_PID=sys.argv[3] or str(os.getpid())); sys.argv[:] = ['qemu-nbd', *sys.argv[4:]]; "
        "from diskwright.cli.main import main; sys.exit(main())"
    )
    return (OURS[0], "-c", script, str(listener.fileno()), count, whose)


def test_socket_activation(raw: str, sock_dir: str) -> None:
    path = os.path.join(sock_dir, "passed")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        program = activated(listener)
        fds = (listener.fileno(),)
        with Running("-f", "raw", raw, folder=sock_dir, program=program, place=False, pass_fds=fds) as server:
            with Client(path) as client:
                assert client.read(0, 1) == b"\x11"
            assert server.ends() == 0
    assert os.path.exists(path)  # it is its maker's


@pytest.mark.parametrize("words", [("-k", "/x"), ("-p", "1"), ("-b", "h"), ("--fork",), ("-L",), ("-c", "/dev/nbd0")])
def test_socket_activation_leaves_no_choice(images: Path, sock_dir: str, words: tuple[str, ...]) -> None:
    path = os.path.join(sock_dir, "passed")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        operands = () if words == ("-L",) else RAW
        done = subprocess.run(
            [*activated(listener), *words, *operands], cwd=images, env=environment(), capture_output=True, text=True,
            pass_fds=(listener.fileno(),), check=False, timeout=TIMEOUT,
        )  # fmt: skip
    assert done.returncode == 1 and "socket activation" in done.stderr


# -- TLS ---------------------------------------------------------------------------------------------


def test_tls_options_with_real_clients(images: Path, raw: str, sock_dir: str, tmp_path: Path) -> None:
    authority = Authority()
    theirs, mine = authority.server(tmp_path / "server"), authority.client(tmp_path / "client")
    client = ("--object", f"tls-creds-x509,id=t,dir={mine},endpoint=client", "--tls-creds=t")
    named = (*client, "--tls-hostname=localhost")
    words = ("--object", f"tls-creds-x509,id=t,dir={theirs},endpoint=server", "--tls-creds=t", "-t", "-f", "raw", raw)
    with Running(*words, folder=sock_dir) as server:
        for run_it in (ours, lambda *words, cwd: run(REAL, *words, cwd=cwd)):
            listed = run_it("-L", "-k", server.socket, *named, cwd=images)
            assert listed.code == 0 and "size:  1048576" in listed.out
            assert run_it("-L", "-k", server.socket, cwd=images).code == 1
            assert run_it("-L", "-k", server.socket, *client, "--tls-hostname=other", cwd=images).code == 1
            nameless = run_it("-L", "-k", server.socket, *client, cwd=images)
            assert (nameless.code, nameless.err) == (1, "qemu-nbd: No hostname for certificate validation\n")
    os.unlink(os.path.join(sock_dir, "pid"))
    authz = ("--object", "authz-simple,id=a,identity=CN=nobody", "--tls-authz=a")
    with Running(*authz, *words, folder=sock_dir) as server:
        assert run(REAL, "-L", "-k", server.socket, *named, cwd=images).code == 1
    os.unlink(os.path.join(sock_dir, "pid"))
    with Running("--tls-optional", *words, folder=sock_dir) as server:
        assert run(REAL, "-L", "-k", server.socket, cwd=images).code == 0
        assert run(REAL, "-L", "-k", server.socket, *named, cwd=images).code == 0


@needs_same_texts
def test_listing_real_servers_over_tls(images: Path, raw: str, tmp_path: Path) -> None:
    authority = Authority()
    theirs, mine = authority.server(tmp_path / "server"), authority.client(tmp_path / "client")
    for kind, server_folder, words in (
        ("x509", theirs, (f"tls-creds-x509,id=t,dir={mine},endpoint=client", "--tls-hostname=localhost")),
        ("psk", str(images / "psk"), (f"tls-creds-psk,id=t,dir={images}/psk,endpoint=client,username=bob",)),
    ):
        obj = f"tls-creds-{kind},id=t,dir={server_folder},endpoint=server"
        with QemuNbd(raw, arguments=("--object", obj, "--tls-creds=t")) as peer:
            client = ("-L", "-k", peer.socket, "--tls-creds=t", "--object", *words)
            found = run(REAL, *client, cwd=images)
            assert found.code == 0 and ours(*client, cwd=images) == found
            refused = ours("-L", "-k", peer.socket, cwd=images)
            assert refused.code == 1 and "TLS" in refused.err
