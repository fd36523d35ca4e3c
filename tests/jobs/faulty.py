"""A storage in memory for tests of jobs: it can be told to fail, to wait, and to call the test at any request."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable

from diskwright.core.driver import Segments, not_supported
from diskwright.core.graph import Graph
from diskwright.core.node import StorageNode
from tests.core.ram import Ram


class Faulty(Ram):
    """``hook(operation, offset, length)`` is called before each request, outside any lock; what it raises, the
    request raises. Operations: read, write, zero, discard, flush. ``zeroes``: write_zeros works."""

    def __init__(self, size: int, filename: str = "faulty", *, zeroes: bool = True) -> None:
        super().__init__(size, filename)
        self.zeroes = zeroes
        self.hook: Callable[[str, int, int], None] | None = None
        self.after: Callable[[str, int, int], None] | None = None

    def _call(self, operation: str, offset: int, length: int) -> None:
        if self.hook is not None:
            self.hook(operation, offset, length)

    def _done(self, operation: str, offset: int, length: int) -> None:
        if self.after is not None:
            self.after(operation, offset, length)

    def readv(self, segments: Segments, *, nowait: bool = False) -> None:
        for offset, buffer in segments:
            self._call("read", offset, len(buffer))
        super().readv(segments, nowait=nowait)
        for offset, buffer in segments:
            self._done("read", offset, len(buffer))

    def writev(self, segments: Segments) -> None:
        for segment in segments:
            self._call("write", segment[0], len(segment[1]))
            super().writev([segment])

    def write_zeros(self, offset: int, length: int, *, unmap: bool, fast: bool) -> None:
        if not self.zeroes:
            raise not_supported("zeros")
        self._call("zero", offset, length)
        self.calls.append(("zero", offset, length))
        self.data[offset : offset + length] = bytes(length)

    def discard(self, offset: int, length: int) -> None:
        self._call("discard", offset, length)
        self.calls.append(("discard", offset, length))
        # What a discard leaves may be anything; here: zeros in the first half, the old bytes in the second.
        self.data[offset : offset + length // 2] = bytes(length // 2)

    def flush(self) -> None:
        self._call("flush", 0, 0)
        super().flush()


class Fault:
    """A hook that fails requests: of ``operation``, ``times`` times (None: always), with ``number``, touching
    ``[offset, end)``."""

    def __init__(
        self, operation: str, number: int = errno.EIO, *, times: int | None = 1, offset: int = 0, end: int = 1 << 62
    ) -> None:
        self.operation, self.number, self.times = operation, number, times
        self.offset, self.end = offset, end
        self.met = threading.Event()
        self._lock = threading.Lock()

    def __call__(self, operation: str, offset: int, length: int) -> None:
        if operation != self.operation:
            return
        if length and (offset >= self.end or offset + length <= self.offset):
            return
        with self._lock:
            if self.times is not None:
                if self.times == 0:
                    return
                self.times -= 1
        self.met.set()
        raise OSError(self.number, os.strerror(self.number))


def faulty_node(
    graph: Graph, size: int, name: str, *, zeroes: bool = True, writable: bool = True
) -> tuple[StorageNode, Faulty]:
    storage = Faulty(size, name, zeroes=zeroes)
    node = StorageNode(name, storage, writable)
    graph.adopt(node)
    return node, storage
