"""Rate, clock, progress, policy, buffers: the small parts of the engine."""

from __future__ import annotations

import errno
import mmap
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diskwright.engine import rate as rate_module
from diskwright.engine.buffers import Buffers
from diskwright.engine.clock import Clock, Clocks
from diskwright.engine.policy import Action, OnError, action, io_status
from diskwright.engine.progress import Progress
from diskwright.engine.rate import RateLimit
from diskwright.errors import OptionError


def never() -> bool:
    return False


class FakeTime:
    """A clock that moves only when somebody waits."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    fake = FakeTime()
    monkeypatch.setattr(rate_module, "monotonic", fake)
    return fake


def limited(speed: int, clock: FakeTime) -> RateLimit:
    """A limit whose waits move ``clock`` and take no time."""
    limit = RateLimit(speed)

    class Instant(threading.Condition):
        def wait(self, timeout: float | None = None) -> bool:
            assert timeout is not None
            clock.now += timeout
            return True

    limit._changed = Instant(threading.Lock())
    return limit


@given(speed=st.integers(1, 1 << 30), sizes=st.lists(st.integers(1, 1 << 24), min_size=1, max_size=30))
def test_the_mean_rate_is_exact_whatever_the_sizes(speed: int, sizes: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        clock = FakeTime()
        patch.setattr(rate_module, "monotonic", clock)
        limit = limited(speed, clock)
        begin = clock.now
        for size in sizes:
            assert limit.wait(never)
            limit.charge(size)
        # The last request is not waited for; all before it are paid off.
        assert clock.now - begin == pytest.approx(sum(sizes[:-1]) / speed, rel=1e-6, abs=1 / speed + 1e-6)


def test_idle_time_is_not_saved_up(clock: FakeTime) -> None:
    limit = limited(1000, clock)
    clock.now += 3600
    limit.charge(500)
    begin = clock.now
    limit.wait(never)
    assert clock.now - begin == pytest.approx(0.5)


def test_no_limit_means_no_wait(clock: FakeTime) -> None:
    limit = limited(0, clock)
    limit.charge(1 << 40)
    assert limit.wait(never)
    assert clock.now == 100.0
    assert limit.limit(1 << 20) == 1 << 20


def test_a_limited_request_is_at_most_a_slice() -> None:
    assert RateLimit(1_000_000).limit(1 << 30) == 100_000
    assert RateLimit(1).limit(1 << 30) == 1
    assert RateLimit(1 << 40).limit(4096) == 4096


def test_a_change_of_speed_reaches_a_sleeper() -> None:
    limit = RateLimit(1)
    limit.charge(1 << 30)
    passed = threading.Event()

    def wait() -> None:
        limit.wait(never)
        passed.set()

    sleeper = threading.Thread(target=wait)
    sleeper.start()
    assert not passed.wait(0.05)
    limit.speed = 0
    assert passed.wait(10)
    sleeper.join()


def test_stop_reaches_a_sleeper() -> None:
    limit = RateLimit(1)
    limit.charge(1 << 30)
    stop = threading.Event()
    result: list[bool] = []
    sleeper = threading.Thread(target=lambda: result.append(limit.wait(stop.is_set)))
    sleeper.start()
    time.sleep(0.02)
    stop.set()
    limit.wake()
    sleeper.join(10)
    assert result == [False]


def test_a_negative_speed_is_refused_and_changes_nothing() -> None:
    with pytest.raises(OptionError, match="Parameter 'speed' expects a non-negative value"):
        RateLimit(-1)
    limit = RateLimit(5)
    with pytest.raises(OptionError):
        limit.speed = -5
    assert limit.speed == 5


def test_every_moment_of_a_worker_is_booked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from diskwright.engine import clock as clock_module

    fake = FakeTime()
    monkeypatch.setattr(clock_module, "perf_counter", fake)
    clocks = Clocks()
    first, second = clocks.new(), clocks.new()
    fake.now += 2
    first.lap("read")
    fake.now += 1
    first.lap("write")
    second.lap("read")
    fake.now += 5
    second.start()
    fake.now += 1
    second.lap("read")
    assert clocks.totals() == {"read": (6.0, 3), "write": (1.0, 1)}
    lines = clocks.report().splitlines()
    assert lines[0].split() == ["9.000", "s", "elapsed,", "2", "workers"]
    assert lines[1].split() == ["6.000", "s", "85.7", "%", "3", "x", "read"]


def test_a_clock_without_laps_reports_nothing_but_its_time() -> None:
    clocks = Clocks()
    clocks.new()
    assert len(clocks.report().splitlines()) == 1
    assert isinstance(Clock().seconds, dict)


def test_progress_is_exact_and_cannot_lie() -> None:
    seen: list[tuple[int, int]] = []
    progress = Progress(10, lambda offset, length: seen.append((offset, length)))
    progress.advance(4)
    progress.expect(5)
    progress.advance(11)
    assert progress.snapshot() == (15, 15)
    assert seen == [(4, 10), (15, 15)]
    with pytest.raises(ValueError, match="1 bytes done of 0 left"):
        progress.advance(1)
    with pytest.raises(ValueError, match="-1"):
        progress.expect(-1)
    with pytest.raises(ValueError, match="-1"):
        progress.advance(-1)
    assert progress.snapshot() == (15, 15)


@pytest.mark.parametrize(
    ("policy", "number", "expected"),
    [
        ("report", errno.EIO, Action.REPORT),
        ("report", errno.ENOSPC, Action.REPORT),
        ("ignore", errno.EIO, Action.IGNORE),
        ("ignore", errno.ENOSPC, Action.IGNORE),
        ("enospc", errno.EIO, Action.REPORT),
        ("enospc", errno.ENOSPC, Action.STOP),
        ("enospc", errno.EDQUOT, Action.STOP),
        ("auto", errno.ENOSPC, Action.STOP),
        ("auto", errno.EIO, Action.REPORT),
        ("stop", errno.EIO, Action.STOP),
        ("stop", errno.ENOSPC, Action.STOP),
    ],
)
def test_policy(policy: str, number: int, expected: Action) -> None:
    assert action(OnError(policy), OSError(number, "x")) is expected


def test_io_status_tells_a_full_medium_from_a_broken_one() -> None:
    assert io_status(OSError(errno.ENOSPC, "x")) == "nospace"
    assert io_status(OSError(errno.EIO, "x")) == "failed"
    assert io_status(ValueError("x")) == "failed"


def test_buffers_are_aligned_reused_and_bounded() -> None:
    import numpy as np

    buffers = Buffers(5000, 2)
    first, second = buffers.take(), buffers.take()
    assert len(first) == 2 * mmap.PAGESIZE
    assert np.frombuffer(first, np.uint8).ctypes.data % mmap.PAGESIZE == 0
    with pytest.raises(TimeoutError, match="All 2 buffers"):
        buffers.take(timeout=0.01)
    first[:3] = b"abc"
    buffers.give(first)
    with buffers.one() as again:
        assert again is first
        assert bytes(again[:3]) == b"abc"
    assert again is not second


def test_a_buffer_given_back_reaches_who_waits() -> None:
    buffers = Buffers(4096, 1)
    only = buffers.take()
    got: list[memoryview] = []
    waiter = threading.Thread(target=lambda: got.append(buffers.take()))
    waiter.start()
    time.sleep(0.02)
    assert not got
    buffers.give(only)
    waiter.join(10)
    assert got == [only]


def test_buffers_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="of no use"):
        Buffers(0, 1)
    with pytest.raises(ValueError, match="of no use"):
        Buffers(1, 0)
