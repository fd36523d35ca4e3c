"""Byte ranges held by requests in flight, so that a read-modify-write meets no other write in its blocks."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Ranges:
    """Ranges in use, first come first served. Thread-safe.

    Two requests exclude each other when their ranges overlap and at least one is exclusive. There are
    never more ranges than threads in a call.
    """

    __slots__ = ("_changed", "_held", "_next", "_waiting")

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._held: dict[int, tuple[int, int, bool]] = {}  # number -> start, end, exclusive; oldest first
        self._next = 0
        self._waiting = 0

    @contextmanager
    def hold(self, start: int, end: int, *, exclusive: bool) -> Iterator[None]:
        """Holds ``[start, end)``, after every earlier request that must not overlap it has ended."""
        with self._changed:
            number = self._next
            self._next += 1
            self._held[number] = (start, end, exclusive)
            if self._blocked(number):
                self._waiting += 1
                try:
                    while self._blocked(number):
                        self._changed.wait()
                except BaseException:
                    del self._held[number]
                    self._changed.notify_all()
                    raise
                finally:
                    self._waiting -= 1
        try:
            yield
        finally:
            with self._changed:
                del self._held[number]
                if self._waiting:
                    self._changed.notify_all()

    def _blocked(self, number: int) -> bool:
        start, end, exclusive = self._held[number]
        for other, (low, high, alone) in self._held.items():
            if other == number:
                return False
            if low < end and start < high and (exclusive or alone):
                return True
        return False
