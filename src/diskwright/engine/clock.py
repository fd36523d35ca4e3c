"""Where the time of a copy went: a clock per worker, laps under names.

A worker calls ``lap("read")`` when a read has ended: the time since its last lap is booked under that
name. Every moment of a worker is so booked exactly once, at some 0.2 us a lap.
"""

from __future__ import annotations

import threading
from time import perf_counter


class Clock:
    """The time of one worker. Not thread-safe: each worker has its own."""

    __slots__ = ("_last", "counts", "seconds")

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.counts: dict[str, int] = {}
        self._last = perf_counter()

    def start(self) -> None:
        """Time up to now is nobody's."""
        self._last = perf_counter()

    def lap(self, name: str) -> None:
        """Books the time since the last lap (or start) under ``name``."""
        now = perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self.counts[name] = self.counts.get(name, 0) + 1
        self._last = now


class Clocks:
    """The clocks of all workers of one operation."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._clocks: list[Clock] = []
        self._begin = perf_counter()

    def new(self) -> Clock:
        """A clock for one more worker."""
        clock = Clock()
        with self._lock:
            self._clocks.append(clock)
        return clock

    def totals(self) -> dict[str, tuple[float, int]]:
        """Seconds and number of laps by name, over all workers, the longest first."""
        seconds: dict[str, float] = {}
        counts: dict[str, int] = {}
        with self._lock:
            clocks = list(self._clocks)
        for clock in clocks:
            # A worker may add a name meanwhile: a copy made in one step cannot see half of it.
            for name, value in clock.seconds.copy().items():
                seconds[name] = seconds.get(name, 0.0) + value
                counts[name] = counts.get(name, 0) + clock.counts.get(name, 0)
        return {name: (seconds[name], counts[name]) for name in sorted(seconds, key=lambda n: -seconds[n])}

    def report(self) -> str:
        """A line per name: seconds of all workers, share of their time, laps. The first line is the wall clock."""
        totals = self.totals()
        whole = sum(seconds for seconds, _ in totals.values()) or 1.0
        lines = [f"{perf_counter() - self._begin:10.3f} s elapsed, {len(self._clocks)} workers"]
        lines += [f"{s:10.3f} s {100 * s / whole:5.1f} % {n:9d} x {name}" for name, (s, n) in totals.items()]
        return "\n".join(lines)
