"""A small NBD client that can also misbehave, and an in-memory storage that can fail, wait and record."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from struct import pack, unpack, unpack_from
from typing import Any, NamedTuple

from diskwright.core.disk import Disk
from diskwright.core.driver import Segments
from diskwright.core.graph import Graph
from diskwright.core.node import FormatNode, StorageNode
from diskwright.exports.nbd import NbdExport, NbdServer
from diskwright.formats.raw import Raw
from tests.core.ram import Ram

READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES, STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO = 1, 2, 4, 8, 16
MIB = 1 << 20
PATIENCE = 30.0  # seconds until a client gives up; only a broken server makes it wait


class Reply(NamedTuple):
    """A whole reply. ``chunks`` are the types of its chunks, none for a simple reply."""

    error: int
    data: bytes
    chunks: tuple[int, ...]
    extents: tuple[tuple[int, int], ...] = ()


class Client:
    """One connection. Requests may be sent ahead; replies are told apart by cookie.

    ``secure`` sets up TLS on the socket, which is asked for then. ``contexts`` are asked for when replies are
    structured; the ids of those the server has are in ``ids``, and what the last block status told in ``status``.
    """

    def __init__(
        self,
        address: str | tuple[str, int],
        name: str = "",
        *,
        structured: bool = False,
        secure: Callable[[socket.socket], Any] | None = None,
        contexts: tuple[str, ...] = ("base:allocation",),
    ) -> None:
        family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
        self.sock: Any = socket.socket(family)
        self._raw, self._secure, self._contexts = self.sock, secure, contexts
        self.ids: dict[str, int] = {}
        self.status: dict[int, tuple[tuple[int, int], ...]] = {}
        self.sock.settimeout(PATIENCE)
        self.sock.connect(address)
        self.structured = structured
        self._wanted: dict[int, tuple[int, int, int]] = {}
        self._cookie = 0
        try:
            self._agree(name)
        except BaseException:
            self._raw.close()
            raise

    def _start_tls(self) -> None:
        self.sock.sendall(pack(">IQII", 3, 0x49484156454F5054, 5, 0))
        _, _, kind, length = unpack(">QIII", self.take(20))
        assert (kind, length) == (1, 0), (hex(kind), self.take(length))
        assert self._secure is not None
        self.sock = self._secure(self._raw)

    def _agree(self, name: str) -> None:
        assert self.take(18) == b"NBDMAGICIHAVEOPT\0\3"
        options = [(8, b"")] if self.structured else []
        if self.structured:
            queries = b"".join(pack(">I", len(each)) + each.encode() for each in self._contexts)
            options.append((10, pack(">I", len(name)) + name.encode() + pack(">I", len(self._contexts)) + queries))
        options.append((7, pack(">I", len(name)) + name.encode() + pack(">H", 0)))
        sent = b"".join(pack(">QII", 0x49484156454F5054, number, len(data)) + data for number, data in options)
        if self._secure is not None:
            self._start_tls()
            self.sock.sendall(sent)
        else:
            self.sock.sendall(pack(">I", 3) + sent)
        while True:
            _, option, kind, length = unpack(">QIII", self.take(20))
            data = self.take(length)
            assert kind < 0x80000000, (option, hex(kind), data)
            if kind == 3 and unpack_from(">H", data)[0] == 0:
                self.size, self.flags = unpack_from(">QH", data, 2)
            if (option, kind) == (10, 4):
                self.ids[data[4:].decode()] = unpack_from(">I", data)[0]
            if (option, kind) == (7, 1):
                return

    def take(self, length: int) -> bytes:
        """Exactly ``length`` bytes; EOFError when the server has hung up."""
        data = bytearray()
        while len(data) < length:
            piece = self.sock.recv(length - len(data))
            if not piece:
                raise EOFError
            data += piece
        return bytes(data)

    def send(self, kind: int, offset: int, length: int, payload: bytes = b"", flags: int = 0) -> int:
        """Sends a request; returns its cookie."""
        self._cookie += 1
        self._wanted[self._cookie] = kind, offset, length
        self.sock.sendall(pack(">IHHQQI", 0x25609513, flags, kind, self._cookie, offset, length) + payload)
        return self._cookie

    def receive(self) -> tuple[int, Reply]:
        """The next whole reply, whichever request it answers. Chunks of different replies must not be mixed here."""
        (magic,) = unpack(">I", self.take(4))
        if magic == 0x67446698:
            error, cookie = unpack(">IQ", self.take(12))
            kind, _, length = self._wanted.pop(cookie)
            assert not (self.structured and kind == READ), "a structured read wants chunks"
            return cookie, Reply(error, self.take(length) if kind == READ and not error else b"", ())
        assert self.structured and magic == 0x668E33EF, hex(magic)
        return self._chunks()

    def _chunks(self) -> tuple[int, Reply]:
        flags, kind, cookie, length = unpack(">HHQI", self.take(16))
        request, offset, wanted = self._wanted.pop(cookie)
        data, covered, error = bytearray(wanted if request == READ else 0), 0, 0
        kinds, extents = [], []
        status = self.status = {}
        while True:
            body = self.take(length)
            kinds.append(kind)
            if kind in (1, 2):
                (at,) = unpack_from(">Q", body)
                size = length - 8 if kind == 1 else unpack_from(">I", body, 8)[0]
                assert size and offset <= at and at + size <= offset + wanted
                if kind == 1:
                    data[at - offset : at - offset + size] = body[8:]
                covered += size
            elif kind == 5:
                extents = [unpack_from(">II", body, at) for at in range(4, length, 8)]
                status[unpack_from(">I", body)[0]] = tuple(extents)
            elif kind & 0x8000:
                (error,) = unpack_from(">I", body)
            else:
                assert kind == 0 and not length
            if flags & 1:
                break
            assert self.take(4) == b"\x66\x8e\x33\xef"
            flags, kind, again, length = unpack(">HHQI", self.take(16))
            assert again == cookie
        assert error or request != READ or covered == wanted
        return cookie, Reply(error, bytes(data), tuple(kinds), tuple(extents))

    def ask(self, kind: int, offset: int, length: int, payload: bytes = b"", flags: int = 0) -> Reply:
        """One request and its reply."""
        cookie = self.send(kind, offset, length, payload, flags)
        answered, reply = self.receive()
        assert answered == cookie
        return reply

    def read(self, offset: int, length: int, flags: int = 0) -> bytes:
        reply = self.ask(READ, offset, length, flags=flags)
        assert reply.error == 0
        return reply.data

    def write(self, offset: int, data: bytes, flags: int = 0) -> int:
        return self.ask(WRITE, offset, len(data), data, flags).error

    def ended(self) -> bool:
        """Waits until the server has hung up."""
        try:
            while self.sock.recv(65536):
                pass
        except ConnectionError:
            pass
        return True

    def close(self) -> None:
        self._raw.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Medium(Ram):
    """Ram that fails, waits and records as a test asks."""

    def __init__(self, size: int) -> None:
        super().__init__(size, "medium")
        self.cold = False
        self.fail_reads = 0
        self.fail_flush = 0
        self.fast_zeros = False
        self.go = threading.Event()  # what has to wait, waits for this
        self.go.set()
        self.waiting = threading.Semaphore(0)  # released by each that begins to wait

    def _wait(self) -> None:
        if not self.go.is_set():
            self.waiting.release()
            assert self.go.wait(PATIENCE)

    def readv(self, segments: Segments, *, nowait: bool = False) -> None:
        if nowait and self.cold:
            raise BlockingIOError(errno.EAGAIN, "cold")
        if self.cold:
            self._wait()
        if self.fail_reads:
            raise OSError(self.fail_reads, "made to fail")
        super().readv(segments, nowait=nowait)

    def writev(self, segments: Segments) -> None:
        self._wait()
        super().writev(segments)

    def flush(self) -> None:
        self._wait()
        super().flush()
        if self.fail_flush:
            raise OSError(self.fail_flush, "made to fail")

    def write_zeros(self, offset: int, length: int, *, unmap: bool, fast: bool) -> None:
        self.calls.append(("write_zeros", offset, length, unmap, fast))
        if not self.fast_zeros:
            raise OSError(errno.ENOTSUP, "not faster")
        self.data[offset : offset + length] = bytes(length)

    def discard(self, offset: int, length: int) -> None:
        self.calls.append(("discard", offset, length))


class Served(NamedTuple):
    """A server and what is behind its export ''."""

    server: NbdServer
    disk: Disk
    path: str
    uri: str


@contextmanager
def serving(*exports: NbdExport, folder: str, **options: Any) -> Iterator[Served]:
    """A server of ``exports`` on a unix socket."""
    server = NbdServer(**options)
    try:
        for export in exports:
            server.add_export(export)
        path = server.listen_unix(os.path.join(folder, "s"))
        server.start()
        yield Served(server, exports[0].disk, path, server.uri(exports[0].name))
    finally:
        server.close(5)


@contextmanager
def serving_image(path: str, driver: str, folder: str, **options: Any) -> Iterator[Served]:
    """A server of one image file."""
    with closing(Graph()) as graph:
        disk = graph.disk(graph.open(path, driver=driver, writable=True))
        try:
            with serving(NbdExport("", disk), folder=folder, **options) as served:
                yield served
        finally:
            disk.close()


@contextmanager
def serving_medium(medium: Medium, folder: str, *, read_only: bool = False, **options: Any) -> Iterator[Served]:
    """A server of a raw disk on ``medium``."""
    with closing(Graph()) as graph:
        storage = StorageNode("medium", medium, not read_only)
        graph.adopt(storage)
        node = FormatNode("raw", Raw(storage, 0, None), not read_only)
        graph.adopt(node)
        disk = graph.disk(node)
        try:
            with serving(NbdExport("", disk, read_only=read_only), folder=folder, **options) as served:
                yield served
        finally:
            medium.go.set()
            medium.fail_flush = 0
            disk.close()
