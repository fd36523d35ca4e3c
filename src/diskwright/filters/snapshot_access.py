"""snapshot-access: a disk as it was when a copy-before-write filter was put over it.

It can be exported and read while the disk is written to (*fleecing*). A discard says that nobody will read a part any
more: it need not be copied then, and its place in the target is given back.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import ClassVar

from diskwright.core.driver import Filter, OpenContext, Segments, not_supported
from diskwright.core.node import FilterNode, Node
from diskwright.errors import GraphError
from diskwright.extents import Extent, Extents


class SnapshotAccess(Filter):
    """``child`` is a node with a filter that keeps a snapshot. Reads fail with EACCES where that is not kept."""

    name = "snapshot-access"
    opaque: ClassVar[bool] = True

    def __init__(self, child: Node) -> None:
        if not isinstance(child, FilterNode) or type(child.filter).snapshot_readv is Filter.snapshot_readv:
            raise GraphError(f"Node '{child.name}' ({child.driver_name}) keeps no snapshot that could be accessed")
        self.child, self._keeper = child, child.filter

    @classmethod
    def open(cls, context: OpenContext, options: object) -> SnapshotAccess:
        return cls(context.file)

    def readv(self, segments: Segments, *, nowait: bool) -> None:
        if nowait:
            raise BlockingIOError(errno.EAGAIN, "A copy in flight may have to be waited for")
        self._keeper.snapshot_readv(segments)

    def extent_at(self, offset: int, length: int) -> Extent:
        return next(iter(self.extents(offset, length)))

    def extents(self, offset: int, length: int) -> Extents:
        return self._keeper.snapshot_extents(offset, length)

    def discard(self, offset: int, length: int) -> None:
        self._keeper.snapshot_discard(offset, length)

    def writev(self, segments: Segments) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    def write_zeros(self, offset: int, length: int, *, unmap: bool, fast: bool) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    def write_compressed(self, segments: Segments, turn: Callable[[], None] | None) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    def resize(self, size: int, *, preallocation: str) -> None:
        raise not_supported("Filter 'snapshot-access' cannot resize")

    def flush(self) -> None:
        """Nothing of it is written."""

    def transparent(self) -> bool:
        return False


DRIVERS = (SnapshotAccess,)
