"""Draining: whether somebody waits for the requests in flight to end."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Draining:
    """Counts those who wait, and tells listeners when the first one begins. Thread-safe.

    What holds requests back on purpose lets them go while ``active`` is above 0: a drained section must not last as
    long as a guest's rate limit makes its requests wait.
    """

    def __init__(self) -> None:
        self.active = 0
        self._lock = threading.Lock()
        self._listeners: list[Callable[[], None]] = []

    def listen(self, listener: Callable[[], None]) -> None:
        """``listener`` is called, from any thread, whenever a drain begins."""
        with self._lock:
            self._listeners.append(listener)

    def forget(self, listener: Callable[[], None]) -> None:
        with self._lock:
            self._listeners.remove(listener)

    def begin(self) -> None:
        with self._lock:
            self.active += 1
            listeners = list(self._listeners)
        for listener in listeners:
            listener()

    def end(self) -> None:
        with self._lock:
            self.active -= 1
