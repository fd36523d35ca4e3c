"""Servers and connections begin and end: sockets, many clients, closing, draining, shutting."""

from __future__ import annotations

import errno
import os
import socket
import threading
from pathlib import Path

import pytest

from diskwright.core.graph import Graph
from diskwright.errors import GraphError
from diskwright.exports.nbd import NbdExport, NbdServer
from tests.exports.nbd.client import (
    DISC,
    FLUSH,
    MIB,
    READ,
    WRITE,
    Client,
    Medium,
    serving,
    serving_image,
    serving_medium,
)


def test_several_exports_by_name_on_tcp_and_unix(sock_dir: str, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).write_bytes(name.encode() * 1024)
    graph = Graph()
    disks = {name: graph.disk(graph.open(str(tmp_path / name), driver="raw", writable=True)) for name in ("one", "two")}
    with serving(*(NbdExport(name, disk) for name, disk in disks.items()), folder=sock_dir) as served:
        tcp = served.server
        with pytest.raises(GraphError, match="already has export named 'one'"):
            tcp.add_export(NbdExport("one", disks["two"]))
        for name, other in (("one", "two"), ("two", "one")):
            with Client(served.path, name) as client, Client(served.path, other) as second:
                assert client.read(0, 3) == name.encode() and second.read(0, 3) == other.encode()
        with pytest.raises(AssertionError, match="0x80000006"):
            Client(served.path, "")
        with Client(served.path, "one") as client:
            tcp.remove_export("one")
            assert client.read(0, 3) == b"one"  # who is connected stays so
        with pytest.raises(AssertionError, match="0x80000006"):
            Client(served.path, "one")
        with pytest.raises(GraphError, match="'one' is not found"):
            tcp.remove_export("one")
    graph.close()


def test_tcp(tmp_path: Path) -> None:
    image = tmp_path / "a.raw"
    data = os.urandom(4 * MIB)
    image.write_bytes(data)
    graph = Graph()
    server = NbdServer()
    server.add_export(NbdExport("a disk", graph.disk(graph.open(str(image), driver="raw", writable=True))))
    address = server.listen_tcp("127.0.0.1", 0)
    assert server.uri("a disk") == f"nbd://127.0.0.1:{address[1]}/a%20disk"
    server.start()
    try:
        for structured in (False, True):
            with Client(address, "a disk", structured=structured) as client:
                assert client.read(0, 4 * MIB) == data
                assert client.write(100, b"tcp") == 0
                data = data[:100] + b"tcp" + data[103:]
                assert client.read(0, 70000) == data[:70000]
        with NbdServerOf(graph) as other, pytest.raises(OSError, match=r"ddress already in use"):
            other.listen_tcp(*address)
    finally:
        server.close()
        graph.close()
    assert image.read_bytes() == data


class NbdServerOf:
    """A server that is closed whatever happens."""

    def __init__(self, _: Graph) -> None:
        self.server = NbdServer()

    def __enter__(self) -> NbdServer:
        return self.server

    def __exit__(self, *_: object) -> None:
        self.server.close()


def test_unix_sockets_in_use_left_behind_and_removed(sock_dir: str) -> None:
    path = os.path.join(sock_dir, "s")
    left = socket.socket(socket.AF_UNIX)
    left.bind(path)
    left.close()  # as a server that died leaves it
    with serving_medium(Medium(MIB), sock_dir) as served:
        with NbdServerOf(served.disk.graph) as other, pytest.raises(OSError, match="in use") as caught:
            other.listen_unix(path)
        assert caught.value.errno == errno.EADDRINUSE and path in str(caught.value)
        with Client(served.path) as client:
            assert client.read(0, 1) == b"\0"
    assert not os.path.exists(path)
    with open(path, "w", encoding="ascii") as file:
        file.write("not a socket")
    with NbdServerOf(served.disk.graph) as other, pytest.raises(OSError, match="in use"):
        other.listen_unix(path)
    assert Path(path).read_text(encoding="ascii") == "not a socket"


def test_a_socket_of_another_server_is_not_removed(sock_dir: str) -> None:
    with serving_medium(Medium(MIB), sock_dir) as served:
        os.unlink(served.path)
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(served.path)
            served.server.close()
            assert os.path.exists(served.path)


def test_hundreds_of_quick_connects(sock_dir: str) -> None:
    # That neither threads nor descriptors are left, the fixture of all tests sees.
    with serving_medium(Medium(MIB), sock_dir) as served:
        before = len(os.listdir("/proc/self/fd"))
        for i in range(300):
            if i % 3 == 0:
                with socket.socket(socket.AF_UNIX) as sock:
                    sock.connect(served.path)
            else:
                with Client(served.path, structured=bool(i % 2)) as client:
                    assert client.read(i, 3) == bytes(3)
                    if i % 5 == 0:
                        client.send(DISC, 0, 0)
                        assert client.ended()
        served.server.close()
        assert len(os.listdir("/proc/self/fd")) < before


def test_most_connections(sock_dir: str) -> None:
    with serving_medium(Medium(MIB), sock_dir, max_connections=2) as served, Client(served.path) as one:
        with Client(served.path) as two:
            with pytest.raises((EOFError, ConnectionError)):
                Client(served.path)
            assert one.read(0, 1) == two.read(0, 1)
            two.send(DISC, 0, 0)
            assert two.ended()
        for _ in range(1000):  # its place is free as soon as its thread has ended
            try:
                with Client(served.path) as three:
                    assert three.read(0, 1) == b"\0"
                break
            except (EOFError, ConnectionError):
                continue
        else:
            pytest.fail("the place of a client that left was not given to another")


def test_disconnect_answers_what_came_before(sock_dir: str) -> None:
    medium = Medium(MIB)
    with serving_medium(medium, sock_dir) as served, Client(served.path) as client:
        medium.go.clear()
        flush = client.send(FLUSH, 0, 0)
        read = client.send(READ, 0, 512)
        client.send(DISC, 0, 0)
        assert client.receive() == (read, (0, bytes(512), (), ()))
        medium.go.set()
        assert client.receive()[0] == flush
        assert client.ended()


@pytest.mark.parametrize("already", [0, 1, 28, 1000, 3 * MIB])
def test_a_client_that_leaves_in_the_middle_of_a_write_has_written_nothing(sock_dir: str, already: int) -> None:
    medium = Medium(8 * MIB)
    with serving_medium(medium, sock_dir) as served:
        client = Client(served.path)
        whole = client.send(WRITE, 0, 4, b"done")
        assert client.receive()[0] == whole
        client.send(WRITE, MIB, 6 * MIB, b"x" * already)
        client.close()
        served.server.close()
    assert medium.data == b"done" + bytes(8 * MIB - 4)


def test_closing_answers_what_was_received(sock_dir: str, tmp_path: Path) -> None:
    """Every write acknowledged while the server closes under load is in the image."""
    image = tmp_path / "a.raw"
    image.write_bytes(bytes(8 * MIB))
    acknowledged: list[int] = []
    half = threading.Event()

    def hammer(path: str, base: int) -> None:
        with Client(path) as client:
            try:
                for i in range(1 << 30):
                    block = base + i % 512
                    cookies = [client.send(WRITE, 4096 * (block % 2048), 4096, block.to_bytes(4, "big") * 1024)]
                    for _ in cookies:
                        assert client.receive()[1].error == 0
                    acknowledged.append(block)
                    if len(acknowledged) > 200:
                        half.set()
            except (EOFError, ConnectionError):
                pass

    with serving_image(str(image), "raw", sock_dir) as served:
        threads = [threading.Thread(target=hammer, args=(served.path, 512 * i)) for i in range(3)]
        for thread in threads:
            thread.start()
        assert half.wait(60)
        served.server.close()
        for thread in threads:
            thread.join()
    data = image.read_bytes()
    for block in set(acknowledged):
        assert data[4096 * block : 4096 * block + 4096] == block.to_bytes(4, "big") * 1024


def test_closing_waits_for_a_request_in_flight(sock_dir: str) -> None:
    medium = Medium(MIB)
    with serving_medium(medium, sock_dir) as served, Client(served.path) as client:
        medium.go.clear()
        write = client.send(WRITE, 0, 4, b"late")
        assert medium.waiting.acquire(timeout=60)
        closer = threading.Thread(target=served.server.close)
        closer.start()
        medium.go.set()
        assert client.receive() == (write, (0, b"", (), ()))
        assert client.ended()
        closer.join()
    assert medium.data[:4] == b"late"


def test_draining_while_clients_hammer(sock_dir: str) -> None:
    medium = Medium(4 * MIB)
    stop = threading.Event()
    failures: list[BaseException] = []

    def hammer(path: str, seed: int) -> None:
        try:
            with Client(path, structured=bool(seed % 2)) as client:
                for i in range(1 << 30):
                    data = bytes([seed, i & 255]) * 256
                    assert client.write(MIB * seed + 512 * (i % 64), data) == 0
                    assert client.read(MIB * seed + 512 * (i % 64), 512) == data
                    if i % 16 == 0:
                        assert client.ask(FLUSH, 0, 0).error == 0
                        assert client.read(MIB * seed, 70000)[:2] == bytes([seed, i & 192]) or i < 64
                    if stop.is_set():
                        return
        except BaseException as error:
            failures.append(error)

    with serving_medium(medium, sock_dir) as served:
        threads = [threading.Thread(target=hammer, args=(served.path, seed)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for turn in range(60):
            medium.cold = bool(turn % 2)
            with served.disk.drained():
                before = bytes(medium.data), len(medium.calls)
                threading.Event().wait(0.002)
                assert (bytes(medium.data), len(medium.calls)) == before  # nobody got through
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures


def test_draining_while_cold_and_failing_batches_wait(sock_dir: str) -> None:
    """Batches that need workers, or are done again one by one, come to the gate anew: they must have left it before."""
    medium = Medium(MIB)
    medium.cold = True
    with serving_medium(medium, sock_dir) as served, Client(served.path) as client:
        medium.go.clear()
        wanted = [client.send(READ, 512 * i, 512) for i in range(100)]  # more than may be with the workers
        assert medium.waiting.acquire(timeout=60)
        drain = threading.Thread(target=_drain, args=(served.disk,))
        drain.start()
        medium.go.set()
        drain.join()
        assert sorted(client.receive()[0] for _ in wanted) == wanted
        medium.cold = False
        medium.fail_reads = medium.fail_writes = errno.EIO
        for _ in range(20):
            drain = threading.Thread(target=_drain, args=(served.disk,))
            wanted = [client.send(kind, 512 * i, 2, b"xx" * kind) for kind in (READ, WRITE) for i in range(20)]
            drain.start()
            assert {client.receive()[1].error for _ in wanted} == {errno.EIO}
            drain.join()


def _drain(disk: object) -> None:
    with disk.drained():  # type: ignore[attr-defined]
        pass


@pytest.mark.parametrize("structured", [False, True])
def test_a_disk_that_was_shut(sock_dir: str, structured: bool) -> None:
    medium = Medium(MIB)
    medium.data[:] = b"x" * MIB
    with serving_medium(medium, sock_dir) as served, Client(served.path, structured=structured) as client:
        assert client.read(0, 1) == b"x"
        served.disk.shut()
        ahead = [client.send(READ, 0, 512), client.send(READ, 0, 512), client.send(READ, 0, MIB)]
        ahead += [client.send(WRITE, 0, 1, b"y"), client.send(WRITE, 0, 1, b"y"), client.send(FLUSH, 0, 0)]
        ahead += [client.send(4, 0, 512), client.send(6, 0, 512), client.send(7, 0, 512)]
        found = dict(client.receive() for _ in ahead)
        expected = [errno.ESHUTDOWN] * 9 if structured else [errno.ESHUTDOWN] * 8 + [errno.EINVAL]
        assert [found[cookie].error for cookie in ahead] == expected
    assert medium.data == b"x" * MIB


def test_switching_while_clients_read(sock_dir: str, tmp_path: Path) -> None:
    """A read gets one image's bytes or the other's, also when the file that was read is closed meanwhile."""
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(name.encode() * (8 * MIB))
    with serving_image(str(tmp_path / "a"), "raw", sock_dir) as served, Client(served.path) as client:
        graph = served.disk.graph
        graph.release(served.disk.node)
        for turn in range(6):
            fresh = graph.open(str(tmp_path / "ba"[turn % 2]), driver="raw", writable=True)
            client.send(READ, 0, 6 * MIB)  # does not fit in the socket: the server is in the middle of it
            client.sock.recv(16, socket.MSG_PEEK)
            with served.disk.drained():
                served.disk.switch(fresh)  # closes the old one
            graph.release(fresh)
            assert len(set(client.receive()[1].data)) == 1
            assert client.read(0, MIB) == b"ba"[turn % 2 : turn % 2 + 1] * MIB
