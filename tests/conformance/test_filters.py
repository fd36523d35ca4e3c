"""Filters that change nothing of what is written and read, held to the suite of storages: what a storage keeps, one
keeps too that has a filter over it."""

from __future__ import annotations

from typing import Any, ClassVar, Self

from diskwright.core.driver import FilePlace, Segments, Storage
from diskwright.core.gate import OpenGate
from diskwright.core.graph import Graph
from diskwright.core.node import Node
from diskwright.core.throttle import Limits, ThrottleGroup
from diskwright.extents import Extent, Extents
from tests.conformance.storage_suite import StorageConformance


class NodeAsStorage(Storage):
    """A node, asked as storages are. It owns its graph."""

    name = "node"

    def __init__(self, graph: Graph, node: Node) -> None:
        self._graph, self._node = graph, node
        self.filename, self.alignment, self.zero_init = node.filename, node.alignment, node.zero_init

    @classmethod
    def open(cls, options: Any, *, writable: bool) -> Self:
        raise NotImplementedError

    @property
    def size(self) -> int:
        return self._node.size

    def readv(self, segments: Segments, *, nowait: bool = False) -> None:
        self._node.readv(segments, nowait=nowait)

    def writev(self, segments: Segments) -> None:
        self._node.writev(segments)

    def flush(self) -> None:
        self._node.flush()

    def write_zeros(self, offset: int, length: int, *, unmap: bool, fast: bool) -> None:
        self._node.write_zeros(offset, length, unmap=unmap, fast=fast)

    def discard(self, offset: int, length: int) -> None:
        self._node.discard(offset, length)

    def truncate(self, size: int, *, preallocation: str = "off") -> None:
        self._node.resize(size, preallocation=preallocation)

    def extent_at(self, offset: int, length: int) -> Extent:
        return self._node.extent_at(offset, length)

    def extents(self, offset: int, length: int) -> Extents:
        return self._node.extents(offset, length)

    def place(self, offset: int, length: int) -> FilePlace | None:
        return self._node.place(offset, length)

    def copy_from(self, offset: int, source: FilePlace) -> None:
        self._node.copy_from(offset, source)

    def close(self) -> None:
        self._graph.close()


class FilterConformance(StorageConformance):
    """Over memory, or where it is a matter of space over a file."""

    can_copy = False  # a filter sees bytes
    has_place = False
    model_examples = 20
    driver: ClassVar[str]
    role: ClassVar[str] = "file"
    options: ClassVar[dict[str, object]] = {}
    on_file: ClassVar[bool] = False

    def make(self, size: int) -> Storage:
        number = len(list(self.home.iterdir()))
        below: dict[str, object] = {"driver": "memory", "size": size}
        if self.on_file:
            path = self.home / f"{number}"
            path.write_bytes(b"")
            path.open("r+b").truncate(size)
            below = {"driver": "file", "filename": str(path)}
        graph = Graph(OpenGate(), objects={"group": ThrottleGroup("group", Limits())})
        options = {"driver": self.driver, self.role: below, **self.options, **self.further(size)}
        return NodeAsStorage(graph, graph.open(options, writable=True))

    def further(self, size: int) -> dict[str, object]:
        return {}


class TestThrottle(FilterConformance):
    driver = "throttle"
    options = {"throttle-group": "group"}


class TestBlkdebug(FilterConformance):
    driver, role = "blkdebug", "image"


class TestBlkdebugAligned(FilterConformance):
    driver, role = "blkdebug", "image"
    options = {"align": 4096, "max-transfer": 16384, "opt-write-zero": 8192, "max-write-zero": 65536}
    can_zero = False  # what is less than a unit is written
    model_examples = 30


class TestBlkdebugOverAFile(FilterConformance):
    driver, role, on_file = "blkdebug", "image", True
    options = {"align": 512, "opt-discard": 4096}
    can_zero = False


class TestBlkverify(FilterConformance):
    driver, role = "blkverify", "raw"
    can_truncate = can_zero = False

    def further(self, size: int) -> dict[str, object]:
        return {"test": {"driver": "memory", "size": size}}


class TestBlkLogWrites(FilterConformance):
    driver = "blklogwrites"
    can_zero = True
    has_place = True

    def further(self, size: int) -> dict[str, object]:
        return {"log": {"driver": "memory", "size": 0}}


class TestPreallocate(FilterConformance):
    driver, on_file = "preallocate", True
    options = {"prealloc-size": 1 << 20, "prealloc-align": 65536}
    has_place = True


class TestCopyOnReadOfAFile(FilterConformance):
    """Where there is nothing to copy from it is in nobody's way."""

    driver = "copy-on-read"
