"""Progress: how much has been done, of how much. Two numbers that never contradict each other."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Progress:
    """``offset`` bytes done of ``length``. Thread-safe.

    ``offset`` never falls and never passes ``length``. ``length`` may grow while more work turns up. Both
    are read together by ``snapshot``, so that "offset equals length" means that nothing is left.
    """

    def __init__(self, length: int = 0, on_change: Callable[[int, int], None] | None = None) -> None:
        self._lock = threading.Lock()
        self._offset, self._length = 0, length
        self._on_change = on_change

    def expect(self, more: int) -> None:
        """``more`` bytes of work have turned up."""
        if more < 0:
            raise ValueError(f"Work cannot turn up in {more} bytes")
        with self._lock:
            self._length += more

    def advance(self, done: int) -> None:
        """``done`` more bytes have been dealt with. Raises ValueError when that is more than is left."""
        with self._lock:
            if not 0 <= done <= self._length - self._offset:
                raise ValueError(f"{done} bytes done of {self._length - self._offset} left")
            self._offset += done
            now = self._offset, self._length
        if self._on_change is not None:
            self._on_change(*now)

    def snapshot(self) -> tuple[int, int]:
        """``(offset, length)`` of one moment."""
        with self._lock:
            return self._offset, self._length
