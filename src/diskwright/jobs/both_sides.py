"""The filter of a write-blocking mirror: the users' writes go to source and target before they are answered."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

from diskwright.core.bitmap import DirtyBitmap
from diskwright.core.driver import Filter, Segments
from diskwright.core.inflight import InFlight
from diskwright.core.lookup import lookup
from diskwright.core.node import Node
from diskwright.extents import ZERO
from diskwright.units import align_down, align_up

_log: Final = logging.getLogger(__name__)


class BothSides(Filter):
    """Sends changes to ``child``, the source, and then to ``target``.

    A write keeps the granules it touches for itself from before it begins until both sides have it, so no copy of
    them is in flight meanwhile and the two sides see writes in one order. The source's bitmap has their bits set when
    the source has the write; they are cleared when the target has it too, except where a granule was dirty before and
    the write covers only part of it. A target that fails is never the users' affair: the bits stay set, and whoever
    copies what is dirty meets the error.

    ``wrote(start, end)``    called before the target is written to
    ``synced(length)``       called with bytes that both sides now have
    """

    name = "mirror_top"

    def __init__(
        self,
        child: Node,
        target: Node,
        bitmap: DirtyBitmap,
        in_flight: InFlight,
        *,
        unmap: bool,
        wrote: Callable[[int, int], None],
        synced: Callable[[int], None],
    ) -> None:
        self.child, self.target = child, target
        self._bitmap, self._in_flight, self._unmap = bitmap, in_flight, unmap
        self._wrote, self._synced = wrote, synced
        self._told = False

    def writev(self, segments: Segments) -> None:
        for segment in segments:
            self._write(segment[0], len(segment[1]), [segment])

    def _write(self, offset: int, length: int, segments: Segments) -> None:
        self._both(offset, length, lambda: self.child.writev(segments), lambda: self._write_target(segments))

    def _write_target(self, segments: Segments) -> bool:
        self.target.writev(segments)
        return True

    def write_zeros(self, offset: int, length: int, *, unmap: bool, fast: bool) -> None:
        self._both(
            offset,
            length,
            lambda: self.child.write_zeros(offset, length, unmap=unmap, fast=fast),
            lambda: self._zero_target(offset, length, unmap),
        )

    def _zero_target(self, offset: int, length: int, unmap: bool) -> bool:
        self.target.write_zeros(offset, length, unmap=unmap and self._unmap)
        return True

    def discard(self, offset: int, length: int) -> None:
        self._both(
            offset, length, lambda: self.child.discard(offset, length), lambda: self._discard_target(offset, length)
        )

    def _discard_target(self, offset: int, length: int) -> bool:
        # What a discard leaves is the source's affair. Where it is zeros the target can have them at once.
        if all(kind == ZERO for _, _, kind in lookup(self.child, offset, length)):
            return self._zero_target(offset, length, True)
        return False

    def _both(self, offset: int, length: int, ours: Callable[[], None], theirs: Callable[[], bool]) -> None:
        bitmap = self._bitmap
        unit = bitmap.granularity
        start, end = align_down(offset, unit), min(align_up(offset + length, unit), align_up(bitmap.size, unit))
        with self._in_flight.alone(start, end):
            dirty = self._dirty_edges(offset, length, start, end) if bitmap.count_in(start, end - start) else []
            ours()  # sets the bits, also when it fails
            try:
                self._wrote(start, end)
                done = theirs()
            except Exception:
                if not self._told:  # once is enough: the job tells of errors, this is for their details
                    self._told = True
                    _log.warning("A write to the target of a mirror failed", exc_info=True)
                return
            if done:
                self._clear(start, end, dirty)

    def _dirty_edges(self, offset: int, length: int, start: int, end: int) -> list[int]:
        """The granules that are dirty and only partly covered: the first or the last of the range, or both."""
        unit, bitmap = self._bitmap.granularity, self._bitmap
        edges = []
        if start < offset or offset + length < min(start + unit, bitmap.size):
            edges.append(start)
        last = end - unit
        if last > start and offset + length < min(end, bitmap.size):
            edges.append(last)
        return [at for at in edges if bitmap.get(at)]

    def _clear(self, start: int, end: int, keep: list[int]) -> None:
        unit = self._bitmap.granularity
        if keep and keep[0] == start:
            start += unit
        if keep and keep[-1] == end - unit:
            end -= unit
        if start < end:
            with self._in_flight.changed:
                self._bitmap.clear(start, end - start)
                self._synced(min(end, self._bitmap.size) - start)
