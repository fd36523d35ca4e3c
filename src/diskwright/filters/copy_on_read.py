"""copy-on-read: what is read out of backing files is kept in the image above them."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import ClassVar, Final

from diskwright.core.driver import Filter, OpenContext, Segments
from diskwright.core.node import Node, below_filters
from diskwright.core.options import STR, option
from diskwright.core.ranges import Ranges
from diskwright.core.status import status
from diskwright.errors import GraphError, ImageError
from diskwright.extents import UNALLOCATED
from diskwright.units import MiB, align_down, align_up

_AT_ONCE: Final = 4 * MiB
"""Bytes copied at a time, which is what a read needs of memory."""


@dataclass(frozen=True, kw_only=True)
class CopyOnReadOptions:
    bottom: str | None = option(STR, "name of the lowest node to copy from; default: all there are", default=None)


class CopyOnRead(Filter):
    """Copies whole clusters. Writes to them wait meanwhile: a copy must not put back what a write has replaced."""

    name = "copy-on-read"
    options: ClassVar[type] = CopyOnReadOptions

    def __init__(self, child: Node, bottom: str | None = None) -> None:
        """Raises GraphError when ``bottom`` is not in the child's backing chain, ImageError for a read-only child."""
        if not child.writable:
            raise ImageError("Block node is read-only")
        self.child = child
        self._bottom = _in_chain(child, bottom) if bottom is not None else None
        self._ranges = Ranges()

    @classmethod
    def open(cls, context: OpenContext, options: CopyOnReadOptions) -> CopyOnRead:
        return cls(context.file, options.bottom)

    def readv(self, segments: Segments, *, nowait: bool) -> None:
        if not any(self._missing(offset, len(buffer)) for offset, buffer in segments):
            self.child.readv(segments, nowait=nowait)
            return
        if nowait:
            raise BlockingIOError(errno.EAGAIN, "What is read is copied")
        for offset, buffer in segments:
            self._copy(offset, len(buffer))
        self.child.readv(segments)

    def _missing(self, offset: int, length: int) -> bool:
        """Whether the upper layer says nothing of some of the range."""
        node, end = below_filters(self.child), offset + length
        if node.backing is None:
            return False
        while offset < end:
            run = node.extent_at(offset, end - offset)
            if run.kind == UNALLOCATED:
                return True
            offset = run.end
        return False

    def _copy(self, offset: int, length: int) -> None:
        unit, size = self.child.cluster_size, self.child.size
        start, end = align_down(offset, unit), min(align_up(offset + length, unit), size)
        base = self._bottom.backing if self._bottom is not None else None
        for at in range(start, end, _AT_ONCE):
            step = min(_AT_ONCE, end - at)
            with self._ranges.alone(at, at + step):
                for run in status(self.child, at, step, base=base):
                    if run.present and run.depth > 0:
                        self._copy_run(run.offset, run.length)

    def _copy_run(self, offset: int, length: int) -> None:
        data = memoryview(bytearray(length))
        self.child.readv([(offset, data)])
        self.child.announce("cor_write")
        self.child.write_unchanged([(offset, data)])

    def writev(self, segments: Segments) -> None:
        for segment in segments:
            with self._ranges.alone(*self._clusters(segment[0], len(segment[1]))):
                self.child.writev([segment])

    def write_zeros(self, offset: int, length: int, *, unmap: bool, fast: bool) -> None:
        with self._ranges.alone(*self._clusters(offset, length)):
            self.child.write_zeros(offset, length, unmap=unmap, fast=fast)

    def discard(self, offset: int, length: int) -> None:
        with self._ranges.alone(*self._clusters(offset, length)):
            self.child.discard(offset, length)

    def _clusters(self, offset: int, length: int) -> tuple[int, int]:
        unit = self.child.cluster_size
        return align_down(offset, unit), align_up(offset + length, unit)

    def transparent(self) -> bool:
        return False


def _in_chain(child: Node, name: str) -> Node:
    node: Node | None = child
    while node is not None:
        if node.name == name:
            return below_filters(node)
        below = node.file if node is not below_filters(node) else node.backing
        node = below
    raise GraphError(f"Bottom node '{name}' not found")


DRIVERS = (CopyOnRead,)
