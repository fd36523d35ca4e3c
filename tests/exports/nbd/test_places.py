"""Reads sent from the file itself: exactly what was promised, and leases for as long as bytes are under way."""

from __future__ import annotations

import errno
import os
import socket
import threading
from contextlib import closing
from pathlib import Path

import pytest

from diskwright.core.graph import Graph
from diskwright.exports.nbd import NbdExport, NbdServer
from diskwright.exports.nbd.places import MAX_PENDING, Places
from tests.exports.nbd.client import FLUSH, MIB, READ, TRIM, WRITE, Client, serving_image
from tests.peers import qemu_img


def held(graph: Graph) -> int:
    """Leases that are held now."""
    leases = graph.leases
    return sum(leases._held.values())


class Watched:
    """Counts what goes through sendfile, and lets it fail after so many bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sent = 0
        self.fail_after = -1
        self.error: int = errno.EIO
        self.cut = ""  # cut this file off instead of failing
        self._real = os.sendfile
        monkeypatch.setattr(os, "sendfile", self)

    def __call__(self, out: int, fd: int, offset: int, length: int) -> int:
        if self.fail_after >= 0:
            length = min(length, self.fail_after - self.sent)
            if length <= 0:
                if self.cut:
                    os.truncate(self.cut, 0)
                    return self._real(out, fd, offset, 1)
                raise OSError(self.error, "made to fail")
        done = self._real(out, fd, offset, length)
        self.sent += done
        return done


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(monkeypatch)


@pytest.fixture
def image(tmp_path: Path) -> str:
    path = tmp_path / "a.raw"
    path.write_bytes(os.urandom(4 * MIB))
    return str(path)


@pytest.mark.parametrize("structured", [False, True])
def test_large_reads_come_from_the_file(sock_dir: str, image: str, watched: Watched, structured: bool) -> None:
    data = Path(image).read_bytes()
    with serving_image(image, "raw", sock_dir) as served, Client(served.path, structured=structured) as client:
        for offset, length in ((0, 65536), (1, 65537), (4096, 3 * MIB), (0, 4 * MIB)):
            assert client.read(offset, length) == data[offset : offset + length]
        assert watched.sent == 65536 + 65537 + 7 * MIB


@pytest.mark.parametrize("structured", [False, True])
def test_without_sendfile_reads_go_through_memory(
    sock_dir: str, image: str, watched: Watched, structured: bool
) -> None:
    data = Path(image).read_bytes()
    watched.fail_after, watched.error = 100000, errno.EINVAL
    with serving_image(image, "raw", sock_dir) as served, Client(served.path, structured=structured) as client:
        assert client.read(0, 4 * MIB) == data
        assert client.read(4096, 65536) == data[4096:69632]


@pytest.mark.parametrize("structured", [False, True])
def test_a_file_that_fails_is_told_or_hung_up_on(
    sock_dir: str, image: str, watched: Watched, monkeypatch: pytest.MonkeyPatch, structured: bool
) -> None:
    def fail(*_: object) -> bytes:
        raise OSError(errno.EIO, "made to fail")

    watched.fail_after = MIB
    monkeypatch.setattr(os, "pread", fail)
    with serving_image(image, "raw", sock_dir) as served, Client(served.path, structured=structured) as client:
        if structured:
            reply = client.ask(READ, 0, 4 * MIB)  # with zeros in place of what could not be read, and an error chunk
            assert reply.error == errno.EIO
            assert client.ask(FLUSH, 0, 0).error == 0
        else:
            client.send(READ, 0, 4 * MIB)
            with pytest.raises(EOFError):  # never fewer bytes with a reply behind them
                client.receive()


@pytest.mark.parametrize("structured", [False, True])
def test_a_file_that_becomes_shorter(sock_dir: str, image: str, watched: Watched, structured: bool) -> None:
    watched.fail_after, watched.cut = MIB, image
    with serving_image(image, "raw", sock_dir) as served, Client(served.path, structured=structured) as client:
        if structured:
            assert client.ask(READ, 0, 4 * MIB).error == errno.EIO
        else:
            client.send(READ, 0, 4 * MIB)
            with pytest.raises(EOFError):
                client.receive()


def test_leases_last_until_the_bytes_have_left(sock_dir: str, image: str) -> None:
    data = Path(image).read_bytes()
    with serving_image(image, "raw", sock_dir) as served, Client(served.path) as client:
        graph = served.disk.graph
        assert held(graph) == 0
        client.send(READ, 0, 65536)
        client.sock.recv(1, socket.MSG_PEEK)  # the reply is under way, all of it in the socket
        assert _soon(lambda: held(graph) == 1)
        epoch = graph.leases.close_epoch()
        for _ in range(20):
            assert not graph.leases.passed(epoch)
            threading.Event().wait(0.002)
        assert client.receive()[1].data == data[:65536]
        assert _soon(lambda: graph.leases.passed(epoch)), "the client idles, and the lease must end nevertheless"


def test_leases_outlive_a_disconnect_but_not_the_client(sock_dir: str, image: str) -> None:
    with serving_image(image, "raw", sock_dir) as served:
        graph = served.disk.graph
        with Client(served.path) as client:
            client.send(READ, 0, 65536)
            client.send(2, 0, 0)
            client.sock.recv(1, socket.MSG_PEEK)
            assert _soon(lambda: held(graph) == 1)
            threading.Event().wait(0.05)
            assert held(graph) == 1
            client.receive()
            assert client.ended()
            assert _soon(lambda: held(graph) == 0)
        client = Client(served.path)
        client.send(READ, 0, 65536)
        client.sock.recv(1, socket.MSG_PEEK)
        assert _soon(lambda: held(graph) == 1)
        client.close()
        assert _soon(lambda: held(graph) == 0)
        with Client(served.path) as client:
            client.send(READ, 0, 65536)
            client.sock.recv(1, socket.MSG_PEEK)
            served.server.close(0.1)  # the client has not read: it is cut off
            assert held(graph) == 0


def _soon(condition: object) -> bool:
    for _ in range(3000):
        if condition():  # type: ignore[operator]
            return True
        threading.Event().wait(0.01)
    return False


def test_a_full_queue_of_leases_means_memory_and_none_ends_early(image: str) -> None:
    with closing(Graph()) as graph:
        disk = graph.disk(graph.open(image, driver="raw"))
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 25)
            limit = ours.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
            places = Places(ours, disk)
            taken = 0
            while taken < min(MAX_PENDING, limit // (3 * 65536)):  # what surely fits unread
                found = places.find(0, 65536)
                assert found is not None
                assert places.send(b"", found, pad=False) is None
                taken += 1
            places.release()
            assert held(graph) == taken
            if taken == MAX_PENDING:
                assert places.find(0, 65536) is None
            assert held(graph) == taken
            left = taken * 65536
            while left:
                left -= len(theirs.recv(left))
            places.release()
            assert held(graph) == 0 and not places.pending
            found = places.find(0, 65536)
            assert found is not None
            places.give_up(found)
            places.end(threading.Event())
            assert held(graph) == 0
        disk.close()


def test_a_discarded_cluster_is_not_reused_under_an_unread_reply(sock_dir: str, tmp_path: Path) -> None:
    """A reply lies unread in one client's socket while another discards what was read and writes elsewhere."""
    path = qemu_img.create(str(tmp_path / "a.qcow2"), "64M")
    old = os.urandom(65536)
    with serving_image(path, "qcow2", sock_dir) as served, Client(served.path) as reader, Client(served.path) as writer:
        graph = served.disk.graph

        def lies_at(offset: int) -> int:
            (run,) = served.disk.extents(offset, 65536)
            return run.file_offset

        def discard_and_write(at: int) -> int:
            for kind, offset, data in ((TRIM, 0, b""), (FLUSH, 0, b""), (WRITE, at, b"N" * 65536), (FLUSH, 0, b"")):
                assert writer.ask(kind, offset, 0 if kind == FLUSH else 65536, data).error == 0
            return lies_at(at)

        assert writer.write(0, old) == 0
        assert writer.ask(FLUSH, 0, 0).error == 0
        place = lies_at(0)
        reader.send(READ, 0, 65536)
        reader.sock.recv(1, socket.MSG_PEEK)
        assert _soon(lambda: held(graph) == 1)
        assert all(discard_and_write(at * 65536) != place for at in range(1, 9))
        assert reader.receive()[1].data == old
        assert _soon(lambda: held(graph) == 0)
        assert any(discard_and_write(at * 65536) == place for at in range(9, 17))  # now it may
    qemu_img.assert_clean(path)


def test_over_tcp_only_images_without_clusters_are_sent_from_the_file(
    tmp_path: Path, image: str, watched: Watched
) -> None:
    path = qemu_img.create(str(tmp_path / "a.qcow2"), "4M")
    with closing(Graph()) as graph:
        server = NbdServer()
        for name, driver in ((path, "qcow2"), (image, "raw")):
            server.add_export(NbdExport(driver, graph.disk(graph.open(name, driver=driver, writable=True))))
        address = server.listen_tcp("127.0.0.1", 0)
        server.start()
        try:
            with Client(address, "qcow2") as client:
                data = os.urandom(MIB)
                assert client.write(0, data) == 0
                assert client.read(0, MIB) == data
                assert watched.sent == 0
            with Client(address, "raw") as client:
                assert client.read(0, MIB) == Path(image).read_bytes()[:MIB]
                assert watched.sent == MIB
        finally:
            server.close(5)
