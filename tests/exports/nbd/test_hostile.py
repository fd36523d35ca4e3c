"""Clients that break the protocol, stall or vanish: they lose their own connection, and nobody else notices."""

from __future__ import annotations

import os
import socket
import threading
from struct import pack

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.exports.nbd.client import (
    FLUSH,
    MIB,
    READ,
    TRIM,
    WRITE,
    Client,
    Medium,
    Served,
    serving_image,
    serving_medium,
)

GREETED = pack(">I", 3)


def request(kind: int, offset: int, length: int, *, magic: int = 0x25609513, flags: int = 0) -> bytes:
    return pack(">IHHQQI", magic, flags, kind, 1, offset, length)


def connect(served: Served) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(30)
    sock.connect(served.path)
    return sock


class Good:
    """A client that writes, reads back and flushes all the while, and fails if anything is wrong or stops."""

    def __init__(self, path: str, base: int) -> None:
        self._path, self._base = path, base
        self._stop = threading.Event()
        self.rounds = 0
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            with Client(self._path, structured=True) as client:
                while not self._stop.is_set():
                    data = os.urandom(5000)
                    at = self._base + 5000 * (self.rounds % 20)
                    assert client.write(at, data) == 0
                    assert client.ask(FLUSH, 0, 0).error == 0
                    assert client.read(at, 5000) == data
                    self.rounds += 1
        except BaseException as error:
            self.failure = error

    def __enter__(self) -> Good:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        seen = self.rounds
        while self.failure is None and self.rounds < seen + 3:  # it still gets its answers
            self._thread.join(0.01)
        self._stop.set()
        self._thread.join()
        assert self.failure is None


BAD_BEGINNINGS = {
    "nothing": b"",
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "client flags": pack(">I", 0xFFFFFFFF),
    "option magic": GREETED + bytes(16),
    "huge option": GREETED + pack(">QII", 0x49484156454F5054, 7, 0xFFFFFFFF),
    "many options": GREETED + pack(">QII", 0x49484156454F5054, 3, 0) * 100,
    "no such export": GREETED + pack(">QII", 0x49484156454F5054, 1, 3) + b"abc",
}


@pytest.mark.parametrize("data", BAD_BEGINNINGS.values(), ids=BAD_BEGINNINGS)
def test_a_bad_handshake_is_hung_up_on(sock_dir: str, data: bytes) -> None:
    with serving_medium(Medium(MIB), sock_dir) as served, Good(served.path, 0), connect(served) as sock:
        sock.sendall(data)
        if not data:
            sock.shutdown(socket.SHUT_WR)
        assert _ended(sock)


def _ended(sock: socket.socket) -> bool:
    try:
        while sock.recv(65536):
            pass
    except ConnectionError:
        pass
    return True


def test_a_handshake_that_takes_for_ever_is_cut(sock_dir: str) -> None:
    with serving_medium(Medium(MIB), sock_dir, handshake_timeout=0.2) as served, Good(served.path, 0):
        with connect(served) as sock:
            assert _ended(sock)
        with connect(served) as sock:  # a byte now and then is not enough
            try:
                for byte in GREETED + pack(">QII", 0x49484156454F5054, 7, 60000) + bytes(60000):
                    sock.sendall(bytes([byte]))
                    threading.Event().wait(0.02)
                pytest.fail("the server waited for all of it")
            except ConnectionError:
                pass


BAD_REQUESTS = {
    "magic": request(READ, 0, 512, magic=0),
    "reply magic": pack(">IIQ", 0x67446698, 0, 1) * 2,
    "long write": request(WRITE, 0, (32 << 20) + 1),
    "endless write": request(WRITE, 0, 0xFFFFFFFF) + bytes(100000),
    "half a header": request(READ, 0, 512)[:20],
    "half a payload": request(WRITE, 0, 4096) + bytes(100),
    "half a long payload": request(WRITE, 0, 4 << 20) + bytes(3 << 20),
}


@pytest.mark.parametrize("data", BAD_REQUESTS.values(), ids=BAD_REQUESTS)
def test_a_bad_request_ends_its_connection_and_changes_nothing(sock_dir: str, data: bytes) -> None:
    medium = Medium(8 * MIB)
    with serving_medium(medium, sock_dir) as served, Good(served.path, 6 * MIB), Client(served.path) as client:
        write = client.send(WRITE, 0, 4, b"good")
        try:
            client.sock.sendall(data)
            client.sock.shutdown(socket.SHUT_WR)
        except ConnectionError:
            pass  # cut off already
        assert client.receive() == (write, (0, b"", (), ()))  # what came whole before is answered
        assert client.ended()
    assert medium.data[: 6 * MIB] == b"good" + bytes(6 * MIB - 4)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    st.lists(
        st.tuples(
            st.sampled_from([0, 1, 3, 4, 5, 6, 7, 9]),
            st.integers(0, 80000) | st.integers(0, (1 << 64) - 1),
            st.integers(0, 70000) | st.integers(0, (1 << 32) - 1),
            st.sampled_from([0, 0, 0, 1, 2, 4, 8, 16, 0xFFFF]),
        ),
        max_size=12,
    ),
    st.lists(st.tuples(st.integers(0, 400), st.integers(1, 255)), max_size=2),
    st.integers(1, 300),
)
def test_any_bytes_do_no_harm(
    sock_dir: str, requests: list[tuple[int, int, int, int]], damage: list[tuple[int, int]], step: int
) -> None:
    """Requests with any numbers, damaged and cut at any place: at worst the connection ends."""
    data = bytearray()
    for kind, offset, length, flags in requests:
        data += request(kind, offset, length, flags=flags) + bytes(length if kind == 1 and length <= 70000 else 0)
    for at, change in damage:
        if at < len(data):
            data[at] ^= change
    with serving_medium(Medium(65536), sock_dir) as served, Client(served.path, structured=bool(step % 2)) as client:
        reader = threading.Thread(target=client.ended)
        reader.start()
        try:
            for at in range(0, min(len(data), 20 * step), step):
                client.sock.sendall(data[at : at + step])
            client.sock.sendall(data[20 * step :])
            client.sock.shutdown(socket.SHUT_WR)
        except ConnectionError:
            pass
        reader.join()
        with Client(served.path) as other:
            assert other.size == 65536 and len(other.read(0, 65536)) == 65536


def test_parsing_does_not_depend_on_where_bytes_are_cut(sock_dir: str) -> None:
    script = request(WRITE, 10, 5) + b"hello" + request(READ, 8, 10) + request(TRIM, 0, 0) + request(READ, 0, 20)
    answers = set()
    with serving_medium(Medium(4096), sock_dir) as served:
        for cut in range(1, len(script)):
            with Client(served.path) as client:
                client.sock.sendall(script[:cut])
                client.sock.sendall(script[cut:])
                answers.add(client.take(4 * 16 + 30))
    assert len(answers) == 1
    assert b"\0\0hello\0" in answers.pop()


@pytest.mark.parametrize("structured", [False, True])
@pytest.mark.parametrize("what", ["small reads", "cold reads", "large reads", "flushes"])
def test_a_client_that_does_not_read_its_replies(
    sock_dir: str, tmp_path_factory: pytest.TempPathFactory, structured: bool, what: str
) -> None:
    """It holds up neither others nor a drain, and the server can still be closed."""
    medium = Medium(8 * MIB)
    medium.data[:] = os.urandom(8 * MIB)
    with serving_medium(medium, sock_dir) as served:
        medium.cold = what == "cold reads"
        stuck = [Client(served.path, structured=structured) for _ in range(3)]
        try:
            for client in stuck:
                _stuff(client, what)
            with Good(served.path, 4 * MIB), served.disk.drained():
                pass
            served.server.close(0.1)
        finally:
            for client in stuck:
                client.close()


def _stuff(client: Client, what: str) -> None:
    """Sends requests until the server takes no more."""
    data = {
        "small reads": request(READ, 0, 4096),
        "cold reads": request(READ, 0, 4096),
        "large reads": request(READ, 0, 4 << 20),
        "flushes": request(FLUSH, 0, 0),
    }[what]
    client.sock.settimeout(0.05)
    try:
        for _ in range(200):
            client.sock.sendall(data * 100)
    except TimeoutError:
        pass


def test_a_client_that_does_not_read_a_file(sock_dir: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    image = tmp_path_factory.mktemp("image") / "a.raw"
    image.write_bytes(os.urandom(8 * MIB))
    with serving_image(str(image), "raw", sock_dir) as served:
        with Client(served.path) as client:
            _stuff(client, "large reads")
            with Good(served.path, 0), served.disk.drained():
                pass
        with Client(served.path) as client:
            _stuff(client, "large reads")
            served.server.close(0.1)


def test_clients_that_vanish(sock_dir: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    image = tmp_path_factory.mktemp("image") / "a.raw"
    image.write_bytes(os.urandom(8 * MIB))
    with serving_image(str(image), "raw", sock_dir) as served, Good(served.path, 0):
        for i in range(40):
            client = Client(served.path, structured=bool(i % 2))
            client.send((READ, WRITE, FLUSH, TRIM)[i % 4], 4 * MIB, 3 * MIB, bytes(1000 * i) if i % 4 == 1 else b"")
            client.close()
