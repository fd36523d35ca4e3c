"""Leases: how long a mapping from guest bytes to file bytes may be relied upon.

Whoever looks up where bytes live and then moves them holds a lease from before the look-up until the
bytes have moved. A cluster that is freed meanwhile must not be used again under the holder's feet, so
a driver puts it in a ``Quarantine``, from which it comes back only when every lease that was held at
the time it was freed has ended (and, by the driver's own rule, the metadata that dropped it is on disk).

The scheme is epochs: a lease is the number of the epoch it was taken in; retiring something ends the
epoch. One lock operation to take a lease, one to end it, whatever the number of clusters.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

T = TypeVar("T")


class Leases:
    """The epochs of one graph. Thread-safe."""

    __slots__ = ("_current", "_held", "_lock")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._current = 0
        self._held: dict[int, int] = {}  # epoch -> leases still held from it

    def take(self) -> int:
        """A new lease; give it to ``end`` exactly once."""
        with self._lock:
            epoch = self._current
            self._held[epoch] = self._held.get(epoch, 0) + 1
            return epoch

    def end(self, lease: int) -> None:
        with self._lock:
            left = self._held[lease] - 1
            if left:
                self._held[lease] = left
            else:
                del self._held[lease]

    @contextmanager
    def held(self) -> Iterator[None]:
        lease = self.take()
        try:
            yield
        finally:
            self.end(lease)

    def close_epoch(self) -> int:
        """Ends the current epoch and returns its number: leases taken from now on belong to a later one."""
        with self._lock:
            epoch = self._current
            self._current += 1
            return epoch

    def passed(self, epoch: int) -> bool:
        """Whether every lease of ``epoch`` and of all before it has ended."""
        with self._lock:
            # Epochs with leases are few (one a retirement that readers still overlap), so min() is cheap.
            return not self._held or min(self._held) > epoch


class Quarantine(Generic[T]):
    """Things given up but perhaps still being read, oldest first. The caller serialises all calls."""

    __slots__ = ("_items", "_leases")

    def __init__(self, leases: Leases) -> None:
        self._leases = leases
        self._items: deque[tuple[int, T]] = deque()

    def put(self, thing: T) -> None:
        self._items.append((self._leases.close_epoch(), thing))

    def __len__(self) -> int:
        return len(self._items)

    def take_passed(self) -> list[T]:
        """Removes and returns what no lease can reach any more."""
        free: list[T] = []
        while self._items and self._leases.passed(self._items[0][0]):
            free.append(self._items.popleft()[1])
        return free
