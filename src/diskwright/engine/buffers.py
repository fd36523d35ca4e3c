"""Buffers for bulk work: page-aligned, made once, used again and again, and never more than a stated number."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

PAGE: Final = mmap.PAGESIZE
"""Alignment of every buffer: enough for direct I/O on any medium."""


class Buffers:
    """At most ``limit`` buffers of ``length`` bytes (rounded up to whole pages). Thread-safe.

    A buffer keeps what was in it when it was given back: users overwrite before they read.
    """

    def __init__(self, length: int, limit: int) -> None:
        if length <= 0 or limit <= 0:
            raise ValueError(f"{limit} buffers of {length} bytes are of no use")
        self.length = -(-length // PAGE) * PAGE
        self.limit = limit
        self._changed = threading.Condition(threading.Lock())
        self._free: list[memoryview] = []
        self._made = 0

    def take(self, timeout: float | None = None) -> memoryview:
        """A buffer for the caller alone, until ``give``; waits while all are in use. TimeoutError after ``timeout``."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._free or self._made < self.limit, timeout):
                raise TimeoutError(f"All {self.limit} buffers are in use")
            if self._free:
                return self._free.pop()
            self._made += 1
        try:
            # Anonymous memory: aligned, zero-filled by the kernel on first touch, not in the allocator's heap.
            return memoryview(mmap.mmap(-1, self.length))
        except BaseException:
            with self._changed:
                self._made -= 1
                self._changed.notify()
            raise

    def give(self, buffer: memoryview) -> None:
        """Takes a buffer back."""
        with self._changed:
            self._free.append(buffer)
            self._changed.notify()

    @contextmanager
    def one(self) -> Iterator[memoryview]:
        """``take`` and ``give`` as a context."""
        buffer = self.take()
        try:
            yield buffer
        finally:
            self.give(buffer)
