"""Throttle groups: limits on requests and bytes a second, shared by all nodes of a group.

Each limit is a bucket that leaks at its rate. A request waits while a bucket it fills is above its brim, then goes
and adds what it costs; so one large request never waits for more than others before it have used up. Without a burst
rate a bucket holds a tenth of a second's worth. With one (``...-max``, for ``...-max-length`` seconds) it holds what
may go in that time, and a second bucket, which leaks at the burst rate, keeps the burst itself to that.
"""

from __future__ import annotations

import errno
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Final, NamedTuple, Protocol

from diskwright.errors import OptionError

RATES: Final = ("bps-total", "bps-read", "bps-write", "iops-total", "iops-read", "iops-write")

MOST: Final = 10**15
"""The largest rate."""

_LONGEST: Final = (1 << 32) - 1
"""Seconds a burst may be said to last."""

_BRIM: Final = 10
"""A bucket without a burst rate holds one second's worth divided by this, and so does a burst's own."""

MAX_WAITING: Final = 65536
"""Requests that wait in a group."""


class Clock(Protocol):
    """Where a group has its time from."""

    def now(self) -> float:
        """Seconds since some moment."""

    def wait(self, changed: threading.Condition, seconds: float) -> None:
        """Waits on ``changed``, whose lock is held, at most so long."""


class Monotonic:
    """The time of this machine."""

    def now(self) -> float:
        return time.monotonic()

    def wait(self, changed: threading.Condition, seconds: float) -> None:
        changed.wait(seconds)


class Limit(NamedTuple):
    """Units a second; ``burst`` units a second for ``length`` seconds; 0: none."""

    rate: int = 0
    burst: int = 0
    length: int = 1


NONE: Final = Limit()


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of a group. ``iops_size`` is how many bytes count as one request; 0: any."""

    bps_total: Limit = NONE
    bps_read: Limit = NONE
    bps_write: Limit = NONE
    iops_total: Limit = NONE
    iops_read: Limit = NONE
    iops_write: Limit = NONE
    iops_size: int = 0

    def __post_init__(self) -> None:
        for unit in ("bps", "iops"):
            total, *halves = (getattr(self, f"{unit}_{each}") for each in ("total", "read", "write"))
            for part in (0, 1):
                if total[part] and any(half[part] for half in halves):
                    raise OptionError("bps/iops/max total values and read/write values cannot be used at the same time")
        if self.iops_size and not (self.iops_total.rate or self.iops_read.rate or self.iops_write.rate):
            raise OptionError("iops size requires an iops value to be set")
        for rate in RATES:
            _check(getattr(self, rate.replace("-", "_")))

    def named(self) -> dict[str, int]:
        """Every value under the name it has in QAPI's ThrottleLimits."""
        values: dict[str, int] = {}
        for each in RATES:
            limit: Limit = getattr(self, each.replace("-", "_"))
            values[each], values[f"{each}-max"], values[f"{each}-max-length"] = limit
        return {**values, "iops-size": self.iops_size}


def _check(limit: Limit) -> None:
    if limit.rate > MOST or limit.burst > MOST:
        raise OptionError(f"bps/iops/max values must be within [0, {MOST}]")
    if not limit.length:
        raise OptionError("the burst length cannot be 0")
    if limit.length > 1 and not limit.burst:
        raise OptionError("burst length set without burst rate")
    if limit.burst and limit.length > MOST // limit.burst:
        raise OptionError("burst length too high for this burst rate")
    if limit.burst and not limit.rate:
        raise OptionError("bps_max/iops_max require corresponding bps/iops values")
    if limit.burst and limit.burst < limit.rate:
        raise OptionError("bps_max/iops_max cannot be lower than bps/iops")


def limits_of(values: Mapping[str, object], *, prefix: str = "", before: Limits | None = None) -> Limits:
    """Limits by QAPI's names, each after ``prefix``; what is not given is as ``before``. Raises OptionError."""
    found = (before if before is not None else Limits()).named()
    for key, value in values.items():
        name = key.removeprefix(prefix)
        if name not in found or not key.startswith(prefix):
            raise OptionError(f"Parameter '{key}' is unexpected")
        found[name] = _number(key, value)
        if name.endswith("-length") and found[name] > _LONGEST:
            raise OptionError(f"{key} value must be in the range [0, {_LONGEST}]")
    rates = {each: Limit(found[each], found[f"{each}-max"], found[f"{each}-max-length"]) for each in RATES}
    return Limits(**{each.replace("-", "_"): rate for each, rate in rates.items()}, iops_size=found["iops-size"])


def _number(key: str, value: object) -> int:
    if isinstance(value, str):
        try:
            value = int(value, 10)
        except ValueError:
            value = None
    if not isinstance(value, int) or isinstance(value, bool) or value >= 1 << 63:
        raise OptionError(f"Parameter '{key}' expects integer")
    if value < 0:
        raise OptionError("Property values cannot be negative")
    return value


class Bucket:
    """One limit at work. Not thread-safe."""

    __slots__ = ("_burst", "_level", "_limit", "_size")

    def __init__(self, limit: Limit) -> None:
        self._limit = limit
        self._size = limit.burst * limit.length if limit.burst else limit.rate / _BRIM
        self._level = self._burst = 0.0

    def leak(self, seconds: float) -> None:
        self._level = max(0.0, self._level - self._limit.rate * seconds)
        self._burst = max(0.0, self._burst - self._limit.burst * seconds)

    def wait(self) -> float:
        """Seconds until the next request may go."""
        rate, burst, length = self._limit
        seconds = max(0.0, self._level - self._size) / rate
        if length > 1:
            seconds = max(seconds, (self._burst - burst / _BRIM) / burst)
        return seconds

    def add(self, units: float) -> None:
        self._level += units
        if self._limit.length > 1:
            self._burst += units


class Meter:
    """All buckets of a group: when the next request may go. Not thread-safe; ``now`` never goes back."""

    def __init__(self, limits: Limits, now: float) -> None:
        self.limits = limits
        self._now = now
        made: dict[str, Bucket] = {}
        for field in fields(limits):
            limit = getattr(limits, field.name)
            if isinstance(limit, Limit) and limit.rate:
                made[field.name] = Bucket(limit)
        self._all = list(made.values())
        kinds = (("total", "read"), ("total", "write"))
        self._bytes = [[made[f"bps_{each}"] for each in kind if f"bps_{each}" in made] for kind in kinds]
        self._requests = [[made[f"iops_{each}"] for each in kind if f"iops_{each}" in made] for kind in kinds]

    def limits_any(self, write: bool) -> bool:
        return bool(self._bytes[write] or self._requests[write])

    def wait(self, write: bool, now: float) -> float:
        """Seconds from ``now`` until a request may go."""
        for bucket in self._all:
            bucket.leak(now - self._now)
        self._now = now
        return max((bucket.wait() for bucket in (*self._bytes[write], *self._requests[write])), default=0.0)

    def add(self, write: bool, length: int) -> None:
        """A request of so many bytes goes."""
        for bucket in self._bytes[write]:
            bucket.add(length)
        size = self.limits.iops_size
        for bucket in self._requests[write]:
            bucket.add(length / size if size and length > size else 1.0)


class Member:
    """A node in a group."""

    def __init__(self) -> None:
        self.waiting: tuple[deque[object], deque[object]] = deque(), deque()
        """Its requests that wait, oldest first: reads, writes."""


class ThrottleGroup:
    """Limits, and the members that share them: in turn, a request each. Thread-safe."""

    def __init__(self, id: str, limits: Limits, clock: Clock | None = None) -> None:
        self.id = id
        self._clock: Clock = clock if clock is not None else Monotonic()
        self._changed = threading.Condition(threading.Lock())
        self._meter = Meter(limits, self._clock.now())
        self._members: list[Member] = []
        self._last: list[Member | None] = [None, None]  # whose request went last: read, write
        self._waiting = 0

    @property
    def limits(self) -> Limits:
        return self._meter.limits

    def set_limits(self, limits: Limits) -> None:
        """From now on. What has gone so far is forgotten, so that nobody waits for what an old limit allowed."""
        with self._changed:
            self._meter = Meter(limits, self._clock.now())
            self._changed.notify_all()

    def join(self) -> Member:
        member = Member()
        with self._changed:
            self._members.append(member)
        return member

    def leave(self, member: Member) -> None:
        """Its requests have ended."""
        with self._changed:
            self._members.remove(member)
            self._last = [None if last is member else last for last in self._last]

    def wake(self) -> None:
        """Makes all who wait ask their ``stop`` again."""
        with self._changed:
            self._changed.notify_all()

    def limits_any(self, write: bool) -> bool:
        """Whether a request may have to wait at all."""
        return self._meter.limits_any(write)

    def admit(self, member: Member, write: bool, length: int, stop: Callable[[], bool]) -> None:
        """Waits until a request of ``length`` bytes may go, or until ``stop`` says that nothing shall wait now."""
        with self._changed:
            if self._waiting >= MAX_WAITING:
                raise OSError(errno.ENOBUFS, f"{MAX_WAITING} requests wait in throttle group '{self.id}' already")
            queue, ticket = member.waiting[write], object()
            queue.append(ticket)
            self._waiting += 1
            try:
                while not stop():
                    if queue[0] is not ticket or self._next(write) is not member:
                        self._changed.wait()
                        continue
                    seconds = self._meter.wait(write, self._clock.now())
                    if seconds <= 0:
                        break
                    self._clock.wait(self._changed, seconds)
                self._meter.add(write, length)
                self._last[write] = member
            finally:
                queue.remove(ticket)
                self._waiting -= 1
                if self._waiting:
                    self._changed.notify_all()

    def _next(self, write: bool) -> Member | None:
        """The member whose turn it is: the first one with something to do after the one served last."""
        last = self._last[write]
        start = self._members.index(last) + 1 if last is not None else 0
        for i in range(len(self._members)):
            member = self._members[(start + i) % len(self._members)]
            if member.waiting[write]:
                return member
        return None
