"""Disk: a root node as a guest, an export, a job or a program holds it.

Every request of a disk's users passes its gate: ``begin`` and ``end`` around each batch. The gate is
what makes draining possible (no request is in flight inside ``drained``) and what gives the batch the
lease under which mappings stay valid. Inside a drained section the disk can be switched to another root.
"""

from __future__ import annotations

import errno
import io
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from diskwright.core.driver import FilePlace, Segments
from diskwright.core.node import Node
from diskwright.core.permissions import Access
from diskwright.errors import GraphError

if TYPE_CHECKING:
    from diskwright.core.graph import Graph
    from diskwright.core.status import Status


class Disk(io.RawIOBase):
    """A root in use. Also a raw binary file object of fixed size: ``read``, ``write``, ``seek``, ``tell``.

    Two levels of calls. Between ``token = begin()`` and ``end(token)``: ``readv``, ``writev``,
    ``write_zeros``, ``discard``, ``flush_node``, ``place``, ``status``, once per batch and from any thread.
    Or the simple ones, which do that themselves: ``pread``, ``pwrite``, ``zero``, ``trim``, ``flush`` and the
    file methods.
    """

    def __init__(self, graph: Graph, node: Node, access: Access, *, owns_graph: bool = False) -> None:
        super().__init__()
        self._graph, self._node, self.access, self._owns_graph = graph, node, access, owns_graph
        self._leases = graph.leases
        self._mutex = threading.Lock()
        self._gate = threading.Condition(self._mutex)
        self._in_flight = 0
        self._drains = 0
        self._position = 0
        self._closing = False
        self._shut = False

    # -- facts -----------------------------------------------------------------------------------

    @property
    def node(self) -> Node:
        """The root, valid until the next switch."""
        return self._node

    @property
    def graph(self) -> Graph:
        return self._graph

    @property
    def size(self) -> int:
        return self._node.size

    @property
    def read_only(self) -> bool:
        return not self._node.writable

    @property
    def alignment(self) -> int:
        return self._node.alignment

    # -- the gate --------------------------------------------------------------------------------

    def begin(self, wait: bool = True) -> int:
        """Enters the gate; returns the lease to hand to ``end``. While the disk is drained it waits, or raises
        BlockingIOError."""
        with self._mutex:  # the plain lock: a Condition's own methods cost three times as much
            while self._drains and not self._shut:
                if not wait:
                    raise BlockingIOError(errno.EAGAIN, "The disk is drained")
                self._gate.wait()
            if self._shut:
                raise OSError(errno.ESHUTDOWN, os.strerror(errno.ESHUTDOWN), self._node.filename)
            if self.closed:
                raise GraphError("The disk is closed")
            self._in_flight += 1
        return self._leases.take()

    def end(self, token: int) -> None:
        """Leaves the gate."""
        self._leases.end(token)
        with self._mutex:
            self._in_flight -= 1
            if self._drains and not self._in_flight:
                self._gate.notify_all()

    @contextmanager
    def request(self) -> Iterator[None]:
        """``begin`` and ``end`` as a context."""
        token = self.begin()
        try:
            yield
        finally:
            self.end(token)

    @contextmanager
    def drained(self) -> Iterator[None]:
        """Inside, no request is in flight and new ones wait. Never enter it from within a request."""
        self.start_drain()
        try:
            self.await_drained()
            yield
        finally:
            self.end_drain()

    def start_drain(self) -> None:
        """Holds new requests at the gate."""
        with self._gate:
            self._drains += 1
        self._graph.draining.begin()

    def await_drained(self) -> None:
        """Waits until those inside have left; call after ``start_drain``."""
        with self._gate:
            while self._in_flight:
                self._gate.wait()

    def end_drain(self) -> None:
        self._graph.draining.end()
        with self._gate:
            self._drains -= 1
            if not self._drains:
                self._gate.notify_all()

    def shut(self) -> None:
        """Turns users away for good: those waiting at the gate and all who come get ESHUTDOWN. For a disk that must
        not change any more while exports still have it."""
        with self._gate:
            self._shut = True
            self._gate.notify_all()

    def switch(self, node: Node) -> None:
        """Goes on upon another root. Only inside a drained section, and only to a node of the same size."""
        with self._gate:
            if not self._drains or self._in_flight:
                raise GraphError("A disk can be switched only while it is drained")
        if node.size != self._node.size:
            raise GraphError(
                f"Cannot switch from '{self._node.name}' ({self._node.size} bytes) to '{node.name}' ({node.size} bytes)"
            )
        self._graph.move_use(self, self._node, node)
        self._node = node

    # -- requests, between begin and end ---------------------------------------------------------

    def readv(self, segments: Segments, *, nowait: bool = False) -> None:
        """Fills every buffer. Raises ValueError when one goes beyond the end."""
        node = self._node
        size = node.size
        for offset, buffer in segments:
            if offset < 0 or offset + len(buffer) > size:
                raise _beyond(offset, len(buffer), size)
        node.readv(segments, nowait=nowait)

    def writev(self, segments: Segments) -> None:
        """Writes every buffer, in order."""
        node = self._node
        size = node.size
        for offset, buffer in segments:
            if offset < 0 or offset + len(buffer) > size:
                raise _beyond(offset, len(buffer), size)
        if not node.writable:
            raise io.UnsupportedOperation(f"'{node.filename}' is open read-only")
        node.writev(segments)

    def write_zeros(self, offset: int, length: int, *, unmap: bool = False, fast: bool = False) -> None:
        if self._check_write(offset, length):
            self._node.write_zeros(offset, length, unmap=unmap, fast=fast)

    def discard(self, offset: int, length: int) -> None:
        if self._check_write(offset, length):
            self._node.discard(offset, length)

    def flush_node(self) -> None:
        """Returns when every write that had returned is durable."""
        if self._node.writable:
            self._node.flush()

    def place(self, offset: int, length: int) -> FilePlace | None:
        return self._node.place(offset, length)

    def status(self, offset: int, length: int) -> list[Status]:
        """What the range holds, through the whole backing chain."""
        from diskwright.core.status import status

        if offset < 0 or offset + length > self.size:
            raise _beyond(offset, length, self.size)
        return status(self._node, offset, length)

    def _check_write(self, offset: int, length: int) -> bool:
        if offset < 0 or length < 0 or offset + length > self._node.size:
            raise _beyond(offset, length, self._node.size)
        if not self._node.writable:
            raise io.UnsupportedOperation(f"'{self._node.filename}' is open read-only")
        return length > 0

    # -- simple calls ----------------------------------------------------------------------------

    def pread(self, offset: int, length: int) -> bytes:
        """``length`` bytes at ``offset``; shorter only at the disk's end, as a file is."""
        with self.request():  # before the size is asked for: outside the gate the root may be closed under our feet
            buffer = bytearray(max(0, min(length, self.size - offset)))
            if buffer:
                self.readv([(offset, memoryview(buffer))])
        return bytes(buffer)

    def pwrite(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Writes all of ``data`` at ``offset``. Raises ValueError when it does not fit."""
        view = memoryview(data).cast("B")
        if len(view):
            with self.request():
                self.writev([(offset, view)])

    def zero(self, offset: int, length: int, *, unmap: bool = True) -> None:
        """Makes the range read as zeros."""
        with self.request():
            self.write_zeros(offset, length, unmap=unmap)

    def trim(self, offset: int, length: int) -> None:
        """Discards the range."""
        with self.request():
            self.discard(offset, length)

    def extents(self, offset: int = 0, length: int | None = None) -> list[Status]:
        """What a range holds (default: the whole disk), through the backing chain."""
        from diskwright.core.status import status
        from diskwright.extents import windows

        end = self.size if length is None else offset + length
        rows: list[Status] = []
        with self.request():
            for start, step in windows(offset, end - offset):
                rows.extend(status(self._node, start, step))
        return rows

    # -- a file object ---------------------------------------------------------------------------

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return self._node.writable

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        if base + offset < 0:
            raise ValueError(f"Cannot seek to {base + offset}, before the beginning of the disk")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: memoryview | bytearray) -> int:  # type: ignore[override]
        view = memoryview(buffer).cast("B")
        length = max(0, min(len(view), self.size - self._position))
        if length:
            with self.request():
                self.readv([(self._position, view[:length])])
            self._position += length
        return length

    def write(self, data: bytes | bytearray | memoryview) -> int:  # type: ignore[override]
        """Writes at the position, all of it or, at the disk's end, what fits. ENOSPC when nothing fits."""
        view = memoryview(data).cast("B")
        length = max(0, min(len(view), self.size - self._position))
        if len(view) and not length:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._node.filename)
        if length:
            with self.request():
                self.writev([(self._position, view[:length])])
            self._position += length
        return length

    def flush(self) -> None:
        """Makes every write that has returned durable. Does nothing on a closed or read-only disk."""
        if not self.closed and not self._closing and self._node.writable:
            with self.request():
                self._node.flush()

    def close(self) -> None:
        """Waits for requests in flight, flushes, and gives the root up (and the graph, when it came with it)."""
        if self._closing:
            return
        self._closing = True  # also keeps the base class from flushing through a gate that is shut
        try:
            with self.drained():
                if self._node.writable:
                    self._node.flush()
                super().close()
        finally:
            super().close()
            self._graph.drop_disk(self)
            if self._owns_graph:
                self._graph.close()


def _beyond(offset: int, length: int, size: int) -> ValueError:
    return ValueError(f"Request of {length} bytes at {offset} goes beyond the end of the disk ({size} bytes)")
