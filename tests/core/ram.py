"""A storage of a few lines for tests of the core: bytes in memory, with everything it is asked on record."""

from __future__ import annotations

import errno
from typing import Any

from diskwright.core.driver import Segments, Storage
from diskwright.core.graph import Graph
from diskwright.core.node import FormatNode, StorageNode
from diskwright.extents import DATA, ZERO, Extent
from diskwright.formats.raw import Raw


class Ram(Storage):
    """A bytearray. ``fail_writes`` makes every write raise that errno; ``calls`` records what was asked."""

    name = "ram"
    zero_init = True

    def __init__(self, size: int, filename: str = "ram") -> None:
        self.data = bytearray(size)
        self.filename = filename
        self.calls: list[tuple[Any, ...]] = []
        self.fail_writes = 0
        self.closed = False

    @classmethod
    def open(cls, options: Any, *, writable: bool) -> Ram:
        return cls(0)

    @property
    def size(self) -> int:
        return len(self.data)

    def readv(self, segments: Segments, *, nowait: bool = False) -> None:
        for offset, buffer in segments:
            piece = bytes(self.data[offset : offset + len(buffer)])
            buffer[:] = piece.ljust(len(buffer), b"\0")

    def writev(self, segments: Segments) -> None:
        self.calls.append(("writev", [(offset, len(buffer)) for offset, buffer in segments]))
        if self.fail_writes:
            raise OSError(self.fail_writes, "made to fail")
        for offset, buffer in segments:
            if offset + len(buffer) > len(self.data):
                self.data.extend(bytes(offset + len(buffer) - len(self.data)))
            self.data[offset : offset + len(buffer)] = buffer

    def flush(self) -> None:
        self.calls.append(("flush",))

    def discard(self, offset: int, length: int) -> None:
        self.calls.append(("discard", offset, length))
        raise OSError(errno.ENOTSUP, "no discard here")

    def truncate(self, size: int, *, preallocation: str = "off") -> None:
        del self.data[size:]
        self.data.extend(bytes(size - len(self.data)))

    def extent_at(self, offset: int, length: int) -> Extent:
        """4 KiB blocks, so that tests see holes."""
        block = offset - offset % 4096
        zero = not any(self.data[block : block + 4096])
        end = min(offset + length, block + 4096)
        return Extent(offset, end - offset, ZERO if zero else DATA, -1 if zero else offset)

    def close(self) -> None:
        self.closed = True


def ram_node(graph: Graph, size: int, name: str, *, writable: bool = True) -> StorageNode:
    """A StorageNode on a new Ram, owned by the caller."""
    node = StorageNode(name, Ram(size, name), writable)
    graph.adopt(node)
    return node


def raw_node(graph: Graph, size: int, name: str) -> FormatNode:
    """A raw image in a new Ram, owned by the caller."""
    node = FormatNode(name, Raw(ram_node(graph, size, name + ".file"), 0, None), True)
    graph.adopt(node)
    return node
