"""The judge of crashes is itself judged: what would lose data or damage an image must not pass."""

from __future__ import annotations

import random

import pytest

from tests.crash.recording import Change, Fault, Recording
from tests.crash.workload import Ledger, Workload
from tests.formats.qcow2.support import created

START = {"size": 256 << 10, "cluster_size": 4096}


def test_what_was_flushed_is_certain_and_the_rest_is_not() -> None:
    recording = Recording(one=bytes(2048), two=b"")
    one, two = recording.files.values()
    one.writev([(0, memoryview(b"a" * 512))])
    two.writev([(0, memoryview(b"z" * 1024))])
    one.flush()
    one.writev([(512, memoryview(b"b" * 1024))])
    seen: set[tuple[bytes, bytes]] = set()
    for seed in range(200):
        found = recording.after(4, random.Random(seed))
        assert found["one"].startswith(b"a" * 512)
        seen.add((found["one"], found["two"]))
    assert {one for one, _ in seen} == {
        b"a" * 512 + first + second + bytes(512)
        for first in (bytes(512), b"b" * 512)
        for second in (bytes(512), b"b" * 512)
    }
    assert {two for _, two in seen} == {b"", b"z" * 512, bytes(512) + b"z" * 512, b"z" * 1024}, "its own flush counts"


def test_crashes_cover_what_lies_about_each_flush() -> None:
    recording = Recording(file=bytes(512))
    for i in range(300):
        recording.step(Change("file", "flush") if i == 150 else Change("file", "write", 0, b"%d" % i))
    positions = {position for position, _ in recording.crashes(random.Random(1), most=20)}
    assert len(positions) == 20 and {150, 151} <= positions
    assert len({position for position, _ in recording.crashes(random.Random(1))}) == 301


def test_faults_come_when_and_as_ordered() -> None:
    recording = Recording(file=bytes(2048))
    file = recording.files["file"]
    recording.fail(Fault(1, error=28, kinds=("write",), sectors=1))
    file.writev([(0, memoryview(b"a" * 1024))])
    file.flush()
    with pytest.raises(OSError, match="No space"):
        file.writev([(1024, memoryview(b"b" * 1024))])
    file.writev([(0, memoryview(b"c"))])
    assert bytes(file.data) == b"c" + b"a" * 1023 + b"b" * 512 + bytes(512)


def test_a_lost_sector_is_seen() -> None:
    ledger = Ledger(bytes(2048))
    ledger.does(0, 0, b"a" * 1024)
    ledger.has_flushed(3)
    ledger.does(3, 512, b"b" * 512)
    ledger.check(2, bytes(512) + b"a" * 512 + bytes(1024))
    ledger.check(4, b"a" * 512 + b"b" * 512 + bytes(1024))
    for position, wrong in ((4, bytes(2048)), (3, b"a" * 512 + b"b" * 512), (4, b"a" * 512 + b"c" * 512)):
        with pytest.raises(AssertionError, match="was lost"):
            ledger.check(position, wrong.ljust(2048, b"\0"))


def work_with(broken: str, monkeypatch: pytest.MonkeyPatch) -> Workload:
    """A workload on a medium that leaves out some of the flushes asked for."""
    work = Workload(created(**START))
    step, count = work.recording.step, 0

    def lossy(change: Change) -> None:
        nonlocal count
        count += change.kind == "flush"
        if change.kind != "flush" or (broken == "some" and count % 2):
            step(change)

    monkeypatch.setattr(work.recording, "step", lossy)
    with work:
        work.play(random.Random(1), 40)
    return work


@pytest.mark.parametrize("broken", ["all", "some"])
def test_missing_flushes_are_found_out(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    work = work_with(broken, monkeypatch)
    with pytest.raises(AssertionError):
        work.verify(random.Random(1), each=3)
