"""throttle: limits, bursts, fairness. Time is simulated: nothing here waits for a clock."""

from __future__ import annotations

import threading
from collections import Counter
from fractions import Fraction

import pytest

from diskwright.core.disk import Disk
from diskwright.core.graph import Graph
from diskwright.core.node import FilterNode
from diskwright.core.throttle import Bucket, Limit, Limits, Member, Meter, ThrottleGroup, limits_of
from diskwright.errors import OptionError
from tests.filters.opening import memory, opened

SIZE = 1 << 20


class Time:
    """A clock that goes only when somebody waits for it, and then at once."""

    def __init__(self) -> None:
        self.seconds = Fraction()
        self.waits = 0

    def now(self) -> float:
        return float(self.seconds)

    def wait(self, changed: threading.Condition, seconds: float) -> None:
        self.waits += 1
        self.seconds += Fraction(seconds) + Fraction(1, 10**9)


class Stopped:
    """A clock that stands still: who waits, waits."""

    def now(self) -> float:
        return 0.0

    def wait(self, changed: threading.Condition, seconds: float) -> None:
        changed.wait()


def run(meter: Meter, seconds: float, length: int, *, write: bool = False, start: float = 0.0) -> int:
    """How many requests go in that time when there is always a next one."""
    now, count = start, 0
    while True:
        wait = meter.wait(write, now)
        if now + wait > start + seconds:
            return count
        now += wait
        meter.add(write, length)
        count += 1


# -- buckets ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [1, 7, 100, 12345])
@pytest.mark.parametrize("kind", ["iops", "bps"])
def test_in_the_long_run_it_is_the_rate(kind: str, rate: int) -> None:
    length = 1 if kind == "bps" else 4096
    meter = Meter(limits_of({f"{kind}-total": rate}), 0.0)
    seconds = max(1, min(100, 10_000 // rate))
    went = run(meter, seconds, length)
    assert seconds * rate <= went <= seconds * rate + rate / 10 + 1


def test_bytes_are_counted() -> None:
    meter = Meter(limits_of({"bps-total": 1 << 20}), 0.0)
    assert run(meter, 10, 65536) in range(160, 164)  # a tenth of a second's worth more than the rate


def test_a_burst_goes_at_its_rate_and_not_longer_than_its_length() -> None:
    meter = Meter(limits_of({"iops-total": 10, "iops-total-max": 100, "iops-total-max-length": 5}), 0.0)
    first = run(meter, 5, 1)
    assert 490 <= first <= 520
    later = run(meter, 100, 1, start=5.0)
    assert 990 <= later <= 1060, "what was left of the burst, then the rate"


def test_a_burst_of_one_second_is_there_at_once() -> None:
    meter = Meter(limits_of({"iops-total": 10, "iops-total-max": 100}), 0.0)
    assert run(meter, 0, 1) == 101


def test_reads_and_writes_apart_and_together() -> None:
    apart = Meter(limits_of({"iops-read": 10}), 0.0)
    assert run(apart, 1, 1) in range(11, 14) and not apart.limits_any(True)
    assert apart.wait(True, 1.0) == 0.0
    together = Meter(limits_of({"iops-total": 10}), 0.0)
    run(together, 1, 1)
    assert together.wait(True, 1.0) > 0, "what was read has been used up for writes too"


def test_the_stricter_of_two_limits_counts() -> None:
    meter = Meter(limits_of({"iops-total": 100, "bps-total": 4096}), 0.0)
    assert 80 <= run(meter, 10, 512) <= 82


def test_large_requests_count_as_several() -> None:
    meter = Meter(limits_of({"iops-total": 100, "iops-size": 4096}), 0.0)
    assert run(meter, 10, 40960) in range(100, 104)
    assert run(Meter(limits_of({"iops-total": 100, "iops-size": 4096}), 0.0), 10, 512) in range(1009, 1013)


def test_an_idle_bucket_saves_no_more_than_it_holds() -> None:
    bucket = Bucket(Limit(10))
    bucket.leak(1e9)
    bucket.add(2)
    assert bucket.wait() == pytest.approx(0.1)


# -- limits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"iops-total": 1, "iops-read": 1}, "cannot be used at the same time"),
        ({"bps-total": 5, "bps-total-max": 6, "bps-write": 1}, "cannot be used at the same time"),
        ({"bps-total": 100, "bps-total-max": 50}, "cannot be lower"),
        ({"bps-total-max": 50}, "require corresponding"),
        ({"bps-total": 5, "bps-total-max-length": 3}, "without burst rate"),
        ({"bps-total": 5, "bps-total-max-length": 0}, "cannot be 0"),
        ({"iops-size": -1}, "negative"),
        ({"iops-size": 4}, "iops size requires"),
        ({"iops": 1}, "'iops' is unexpected"),
        ({"bps-total": "1k"}, "expects integer"),
        ({"bps-total": True}, "expects integer"),
        ({"bps-total": 10**15 + 1}, "within"),
        ({"bps-total": 1, "bps-total-max": 10**15, "bps-total-max-length": 2}, "too high"),
        ({"iops-total": 5, "iops-total-max": 10, "iops-total-max-length": 1 << 32}, "range"),
    ],
)
def test_limits_that_cannot_be(values: dict[str, object], what: str) -> None:
    with pytest.raises(OptionError, match=what):
        limits_of(values)


def test_limits_have_their_names() -> None:
    limits = limits_of({"x-bps-read": "5", "x-iops-write-max": 7, "x-iops-write": 6}, prefix="x-")
    named = limits.named()
    assert (named["bps-read"], named["iops-write"], named["iops-write-max"], named["iops-write-max-length"]) == (
        5,
        6,
        7,
        1,
    )
    assert limits_of(named) == limits and len(named) == 19


# -- groups ----------------------------------------------------------------------------------------


def throttled(
    limits: dict[str, object], nodes: int = 1, clock: object = None
) -> tuple[Graph, ThrottleGroup, list[FilterNode]]:
    group = ThrottleGroup("g", limits_of(limits), clock if clock is not None else Time())  # type: ignore[arg-type]
    graph, first = opened({"driver": "throttle", "file": memory(SIZE), "throttle-group": "g"}, {"g": group})
    more = [
        graph.open({"driver": "throttle", "file": memory(SIZE), "throttle-group": "g"}, writable=True)
        for _ in range(nodes - 1)
    ]
    return graph, group, [first, *more]


def test_requests_take_their_time() -> None:
    time = Time()
    graph, _, (node,) = throttled({"bps-total": 1000}, clock=time)
    for i in range(20):
        node.pwrite(i, b"x" * 500)
        node.pread(0, 500)
    assert 19.3 <= time.now() <= 19.5
    graph.close()


def test_flushes_and_what_has_no_limit_do_not() -> None:
    graph, _, (node,) = throttled({"iops-write": 1}, clock=Stopped())
    for _ in range(50):
        node.pread(0, 512)
        node.flush()
    graph.close()


def test_every_change_counts_as_a_write() -> None:
    time = Time()
    graph, _, (node,) = throttled({"iops-write": 1}, clock=time)
    node.pwrite(0, b"x")
    node.write_zeros(0, 512)
    node.discard(0, 512)
    assert 1.8 <= time.now() <= 2.0
    graph.close()


def test_a_read_that_must_not_wait_is_not_counted() -> None:
    graph, _, (node,) = throttled({"iops-read": 1}, clock=Stopped())
    for _ in range(5):
        with pytest.raises(BlockingIOError):
            node.readv([(0, memoryview(bytearray(512)))], nowait=True)
    node.pread(0, 512)
    assert node.place(0, 512) is None, "the kernel must not be sent past the limit"
    graph.close()


def test_members_take_turns() -> None:
    """Many requests of one wait; another's first is next nevertheless."""
    group = ThrottleGroup("g", limits_of({"iops-total": 10}), Time())
    one, two = group.join(), group.join()
    order: list[str] = []

    def ask(member: Member, name: str) -> None:
        group.admit(member, False, 1, lambda: False)
        order.append(name)

    with group._changed:  # nobody gets in before all of them wait
        threads = [threading.Thread(target=ask, args=(one, "one")) for _ in range(20)]
        threads += [threading.Thread(target=ask, args=(two, "two")) for _ in range(20)]
        for thread in threads:
            thread.start()
    for thread in threads:
        thread.join()
    assert Counter(order) == {"one": 20, "two": 20}
    assert group._waiting == 0 and not any(queue for member in (one, two) for queue in member.waiting)


def test_turns_alternate() -> None:
    group = ThrottleGroup("g", limits_of({"iops-total": 10}), Time())
    members = [group.join() for _ in range(3)]
    for member in members[:2]:
        member.waiting[0].extend(object() for _ in range(3))
    order = []
    while (member := group._next(False)) is not None:
        order.append(members.index(member))
        member.waiting[0].popleft()
        group._last[False] = member
        if len(order) == 2:
            members[2].waiting[0].append(object())
    assert order == [0, 1, 2, 0, 1, 0, 1]


def test_nodes_of_a_group_share_its_limit() -> None:
    time = Time()
    graph, _, nodes = throttled({"iops-total": 10}, nodes=3, clock=time)
    threads = [
        threading.Thread(target=lambda node=node: [node.pread(0, 512) for _ in range(20)])  # type: ignore[misc]
        for node in nodes
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.now() >= (60 - 3) / 10
    graph.close()


def _blocked(group: ThrottleGroup) -> None:
    """Returns when a request waits."""
    while not group._waiting:
        threading.Event().wait(0.001)


def test_limits_changed_at_run_time_hold_for_those_who_wait() -> None:
    graph, group, (node,) = throttled({"iops-total": 1}, clock=Stopped())
    node.pread(0, 512)
    thread = threading.Thread(target=lambda: [node.pread(0, 512) for _ in range(5)])
    thread.start()
    _blocked(group)
    assert thread.is_alive()
    group.set_limits(Limits())
    thread.join()
    assert group.limits == Limits()
    graph.close()


def test_a_drained_section_does_not_wait_for_the_limit() -> None:
    graph, group, (node,) = throttled({"iops-total": 1}, clock=Stopped())
    disk = graph.disk(node)
    threads = [threading.Thread(target=lambda: [disk.pread(0, 512) for _ in range(3)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    _blocked(group)
    with graph.drained():
        assert group._waiting == 0
    graph.remove_filter(node)
    for thread in threads:
        thread.join()
    assert disk.node.driver_name == "memory"
    disk.close()
    graph.close()


def test_closing_a_disk_does_not_wait_either() -> None:
    graph, group, (node,) = throttled({"iops-total": 1}, clock=Stopped())
    disk: Disk = graph.disk(node)
    disk.pread(0, 512)
    thread = threading.Thread(target=disk.pread, args=(0, 512))
    thread.start()
    _blocked(group)
    disk.close()
    thread.join()
    graph.close()


def test_a_group_outlives_its_nodes() -> None:
    graph, group, nodes = throttled({"iops-total": 10}, nodes=2)
    for node in nodes:
        node.pread(0, 1)
    graph.close()
    assert group._members == [] and group._last == [None, None]


@pytest.mark.parametrize(("options", "what"), [({}, "specify"), ({"throttle-group": "h"}, "'h' does not exist")])
def test_no_group(options: dict[str, object], what: str) -> None:
    with pytest.raises(OptionError, match=what):
        opened({"driver": "throttle", "file": memory(SIZE), **options}, {"h": "not a group"})
