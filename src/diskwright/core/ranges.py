"""Ranges that somebody has to himself for a while."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Ranges:
    """Ranges in use, no two of which overlap. Thread-safe.

    There are few, about one a thread, so a list is looked through. ``changed`` guards it.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition(threading.Lock())
        self._ranges: list[tuple[int, int]] = []

    def busy_end(self, start: int, end: int) -> int:
        """The end of a range in use that overlaps ``[start, end)``; 0 when there is none. The lock is held."""
        for low, high in self._ranges:
            if low < end and start < high:
                return high
        return 0

    @contextmanager
    def alone(self, start: int, end: int) -> Iterator[None]:
        """Keeps ``[start, end)`` for the caller, once nobody else has any of it."""
        mine = (start, end)
        with self.changed:
            while self.busy_end(start, end):
                self.changed.wait()
            self._ranges.append(mine)
        try:
            yield
        finally:
            with self.changed:
                self._ranges.remove(mine)
                self.changed.notify_all()
