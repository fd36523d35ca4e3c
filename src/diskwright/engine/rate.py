"""A limit on bytes per second, shared by the workers of one operation.

What has been moved is a debt that the passing of time pays off at the set speed; a worker may begin
while there is no debt. So each worker overshoots by at most its own request, and the mean is exact
whatever the sizes of requests.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from time import monotonic
from typing import Final

from diskwright.errors import OptionError

SLICE: Final = 0.1
"""Seconds of work that one request should be at most, so that a limited copy runs evenly, not in bursts."""


class RateLimit:
    """Lets ``speed`` bytes a second through; 0 means no limit. Thread-safe.

    Speed can be changed at any time: those who wait at that moment wait on at the new speed.
    Raises OptionError for a negative speed.
    """

    def __init__(self, speed: int = 0) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._speed = _checked(speed)
        self._debt = 0.0  # bytes not paid off at the time of ``_settled``
        self._settled = monotonic()

    @property
    def speed(self) -> int:
        return self._speed

    @speed.setter
    def speed(self, speed: int) -> None:
        checked = _checked(speed)
        with self._changed:
            self._settle()
            self._speed = checked
            self._changed.notify_all()

    def charge(self, length: int) -> None:
        """``length`` bytes are being moved."""
        if self._speed:
            with self._changed:
                self._settle()
                self._debt += length

    def wait(self, stop: Callable[[], bool]) -> bool:
        """Waits until there is no debt. False when ``stop()`` became true first: it is asked before each
        wait and whenever ``wake`` is called."""
        if not self._speed:
            return not stop()
        with self._changed:
            while not stop():
                delay = self._delay()
                if delay <= 0:
                    return True
                self._changed.wait(delay)
            return False

    def wake(self) -> None:
        """Makes all who wait ask their ``stop`` again."""
        with self._changed:
            self._changed.notify_all()

    def limit(self, length: int) -> int:
        """The most of ``length`` that one request should move at this speed."""
        speed = self._speed
        return min(length, max(1, int(speed * SLICE))) if speed else length

    def _delay(self) -> float:
        self._settle()
        # Less than a byte is no debt: rounding leaves such rests, too short for a clock to ever run out.
        return self._debt / self._speed if self._speed and self._debt >= 1 else 0.0

    def _settle(self) -> None:
        now = monotonic()
        self._debt = max(0.0, self._debt - (now - self._settled) * self._speed) if self._speed else 0.0
        self._settled = now


def _checked(speed: int) -> int:
    if speed < 0:
        raise OptionError("Parameter 'speed' expects a non-negative value")
    return speed
