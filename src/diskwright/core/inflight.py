"""Which ranges of a disk are being copied right now. No two that overlap ever are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from diskwright.core.ranges import Ranges


class InFlight(Ranges):
    """Ranges somebody is at work on. Thread-safe.

    There are few: one a worker's batch, and one for each write that waits for both sides of a mirror, so a list
    is looked through. ``changed`` guards it, and whatever its owner wants to change together with it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        """What copies in flight will have dealt with when they end; the lock is held for reading it."""
        self._copies: list[tuple[int, int]] = []  # those of _ranges that are copies

    def free_until(self, start: int, end: int) -> int:
        """How far from ``start``, which is free, up to ``end`` nothing is in flight. The lock is held."""
        return min((low for low, _ in self._ranges if start <= low < end), default=end)

    def add(self, start: int, end: int) -> None:
        """A copy of ``[start, end)`` begins. The lock is held."""
        self._ranges.append((start, end))
        self._copies.append((start, end))
        self.bytes += end - start

    def remove(self, start: int, end: int) -> None:
        """It has ended. The lock is held."""
        self._ranges.remove((start, end))
        self._copies.remove((start, end))
        self.bytes -= end - start
        self.changed.notify_all()

    @contextmanager
    def beside(self, start: int, end: int) -> Iterator[None]:
        """Keeps copies away from ``[start, end)``, once none has any of it; others that do the same may overlap."""
        mine = (start, end)
        with self.changed:
            while any(low < end and start < high for low, high in self._copies):
                self.changed.wait()
            self._ranges.append(mine)
        try:
            yield
        finally:
            with self.changed:
                self._ranges.remove(mine)
                self.changed.notify_all()

    def copies(self) -> list[tuple[int, int]]:
        """The copies in flight as ``(start, end)``. The lock is held."""
        return list(self._copies)
