"""Reservations of whole units (clusters, blocks): what drivers share that hand out places for new ones."""

from __future__ import annotations

import threading

from diskwright.core.driver import Reservation
from diskwright.extents import DATA, Extent


class InPlace(Reservation):
    """A write that needs no new place after all."""

    def __init__(self, extent: Extent) -> None:
        self.extents = (extent,)

    def publish(self) -> None:
        return

    def abort(self) -> None:
        return


class Placed(Reservation):
    """Of units ``first`` to ``last``, which no other reservation may have meanwhile."""

    first: int
    last: int

    def describe(self, unit: int, place: int, offset: int, length: int) -> None:
        """Sets which bytes the write of ``length`` bytes at ``offset`` fills and which the caller must, when the units
        of ``unit`` bytes come to lie from ``place`` on."""
        start, end = self.first * unit, (self.last + 1) * unit
        shift = place - start
        stop = min(offset + length, end)
        self.extents = (Extent(offset, stop - offset, DATA, offset + shift),)
        fills = []
        if offset > start:
            fills.append(Extent(start, offset - start, DATA, place))
        if stop < end:
            fills.append(Extent(stop, end - stop, DATA, stop + shift))
        self.fills = fills


class Turns:
    """Which units are reserved, and waiting for them. All calls are made under the user's lock."""

    def __init__(self, lock: threading.Lock) -> None:
        self._changed = threading.Condition(lock)
        self._open: list[Placed] = []  # neither published nor aborted: few, one a writing thread

    def wait(self, first: int, last: int) -> int:
        """Waits until no open reservation has unit ``first``; returns ``last``, or the unit before the next one that
        is reserved."""
        while True:
            for other in self._open:
                if other.first <= first <= other.last:
                    break
                if first < other.first <= last:
                    last = other.first - 1
            else:
                return last
            self._changed.wait()

    def wait_for_all(self, first: int, end: int) -> None:
        """Waits until no open reservation has any of the units ``first`` to ``end - 1``."""
        while any(other.first < end and other.last >= first for other in self._open):
            self._changed.wait()

    def begin(self, placed: Placed) -> None:
        self._open.append(placed)

    def finish(self, placed: Placed) -> None:
        self._open.remove(placed)
        self._changed.notify_all()
