"""compress: all that is written is written compressed."""

from __future__ import annotations

from contextlib import ExitStack

from diskwright.core.driver import Filter, OpenContext, Segments, not_supported
from diskwright.core.node import Node
from diskwright.core.ranges import Ranges
from diskwright.errors import OptionError
from diskwright.units import align_down, align_up


class Compress(Filter):
    """Whole clusters pass as they are; a write of part of one reads the rest and writes it all again."""

    name = "compress"

    def __init__(self, child: Node) -> None:
        """Raises OptionError for a child that cannot compress."""
        if not child.compresses:
            raise OptionError(f"Compression is not supported for underlying format: {child.driver_name}")
        self.child = child
        self._ranges = Ranges()

    @classmethod
    def open(cls, context: OpenContext, options: object) -> Compress:
        return cls(context.file)

    def writev(self, segments: Segments) -> None:
        unit, size = self.child.cluster_size, self.child.size
        for offset, buffer in segments:
            end = offset + len(buffer)
            start, stop = align_down(offset, unit), min(align_up(end, unit), size)
            with ExitStack() as stack:
                # What is read around it must still be there when it is written back.
                stack.enter_context(self._ranges.alone(start, align_up(stop, unit)))
                if (start, stop) == (offset, end):
                    self.child.write_compressed([(offset, buffer)])
                else:
                    self._write_padded(start, stop, offset, buffer)

    def _write_padded(self, start: int, stop: int, offset: int, buffer: memoryview) -> None:
        unit = self.child.cluster_size
        whole = memoryview(bytearray(stop - start))
        if start < offset:
            self.child.readv([(start, whole[: min(unit, stop - start)])])
        if stop > offset + len(buffer):
            tail = align_down(stop - 1, unit)
            self.child.readv([(tail, whole[tail - start :])])
        whole[offset - start : offset - start + len(buffer)] = buffer
        self.child.write_compressed([(start, whole)])

    def write_zeros(self, offset: int, length: int, *, unmap: bool, fast: bool) -> None:
        unit, end = self.child.cluster_size, offset + length
        whole = align_down(end, unit) if end < self.child.size else end
        first, last = align_up(offset, unit), whole
        if first >= last:
            first = last = end
        if fast and (first > offset or last < end):
            raise not_supported("Fast zeroing of part of a compressed cluster")
        # Parts of clusters are written, as the child would write them uncompressed.
        for start, stop in ((offset, first), (last, end)):
            if start < stop:
                self.writev([(start, memoryview(bytes(stop - start)))])
        if first < last:
            with self._ranges.alone(first, align_up(last, unit)):
                self.child.write_zeros(first, last - first, unmap=unmap, fast=fast)

    def discard(self, offset: int, length: int) -> None:
        unit = self.child.cluster_size
        with self._ranges.alone(align_down(offset, unit), align_up(offset + length, unit)):
            self.child.discard(offset, length)


DRIVERS = (Compress,)
