"""Errors of the medium at every step of an operation: it fails with the system's error, the image stays sound, and the
next call works."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable

import pytest

from diskwright.formats.qcow2.header import DIRTY
from tests.crash.recording import Fault, Recording
from tests.crash.workload import Workload
from tests.formats.qcow2.support import LONG, Image, created, poked

K = 512
SIZE = 1 << 20


def _write(work: Workload) -> None:
    work.write(100 * K + 512, b"n" * 3 * K)
    work.write(0, b"o" * K)


def _far(work: Workload) -> None:
    work.write(900 << 10, b"f" * 2 * K)  # a new L2 table


def _zero(work: Workload) -> None:
    work.zero(K, 6 * K)


def _discard(work: Workload) -> None:
    work.discard(0, 8 * K)


def _grow(work: Workload) -> None:
    work.resize(4 << 20)  # moves the L1 table


OPERATIONS: dict[str, Callable[[Workload], None]] = {
    "write": _write, "far": _far, "zero": _zero, "discard": _discard, "grow": _grow,
}  # fmt: skip


def start() -> bytes:
    with Workload(created(size=SIZE, cluster_size=K)) as work:
        work.write(0, b"a" * 10 * K)
    return work.recording.contents()["file"]


START = start()


def judge(data: bytes) -> None:
    with Image(Recording(file=data).files["file"], writable=False) as image:  # type: ignore[arg-type]
        report = image.format.check("off")
        assert not report.corruptions and not report.check_errors, report.messages


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("sectors", [0, 1], ids=["", "short"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_each_step_fails_once(name: str, error: int, sectors: int) -> None:
    """Until there is no step left to fail."""
    for step in range(200):
        work = Workload(START)
        work.recording.fail(Fault(step, error=error, sectors=sectors))
        try:
            OPERATIONS[name](work)
            work.flush()
        except OSError as failure:
            assert failure.errno == error, (step, failure)
            assert work.recording.failed
        failed = work.recording.failed
        judge(work.recording.contents()["file"])
        work.recording.fail(None)
        OPERATIONS[name](work)  # the next call works
        work.flush()
        # Sectors that the failed call was to write are the same now, for it was repeated.
        expected = bytes(work.ledger.now)
        assert work.disk.pread(0, len(expected)) == expected, step
        with work:
            pass
        judge(work.recording.contents()["file"])
        work.verify(random.Random(step), most=4, reopen=8)
        if not failed:
            assert step > 2
            return
    raise AssertionError("steps never end")


@pytest.mark.parametrize("repair", ["leaks", "all"])
@pytest.mark.parametrize("kind", ["lost block", "leak", "flag"])
def test_a_repair_that_fails_can_be_repeated(kind: str, repair: str) -> None:
    bad = {
        "lost block": poked(START, K, 0),
        "leak": poked(START, 2 * K + 2 * 200, 1, 2).ljust(201 * K, b"\0"),
        "flag": poked(START, 3 * K, int.from_bytes(START[3 * K : 3 * K + 8], "big") & ~(1 << 63)),
    }[kind]
    before = _disk(bad)
    for step in range(60):
        recording = Recording(file=bad)
        recording.fail(Fault(step, sectors=step % 2))
        with Image(recording.files["file"], repair=True) as image:  # type: ignore[arg-type]
            failed = _fails(lambda image=image: image.format.check(repair))  # type: ignore[misc]
            recording.fail(None)
            if failed:
                assert _disk(recording.contents()["file"]) == before
            report = image.format.check(repair)
        assert not report.leaks or kind != "leak"
        assert not report.corruptions or repair == "leaks"
        assert _disk(recording.contents()["file"]) == before
        if not recording.failed:
            return
    raise AssertionError("steps never end")


def _fails(action: Callable[[], object]) -> bool:
    try:
        action()
    except OSError as error:
        assert error.errno == errno.EIO
        return True
    return False


def _disk(data: bytes) -> bytes:
    with Image(Recording(file=data).files["file"], writable=False) as image:  # type: ignore[arg-type]
        return bytes(image.disk.pread(0, image.disk.size))


@pytest.mark.parametrize("repair", ["leaks", "all"])
@pytest.mark.parametrize("seed", range(30 if LONG else 4))
def test_a_repair_may_be_cut_off_anywhere(seed: int, repair: str) -> None:
    """What could be read can be read, and another repair brings it to an end."""
    chance = random.Random(seed)
    bad = bytearray(START)
    for _ in range(4):
        cluster = chance.randrange(20)
        bad[2 * K + 2 * cluster : 2 * K + 2 * cluster + 2] = chance.choice((b"\0\0", b"\0\5", b"\0\1"))
    if seed % 2:
        bad[K : K + 8] = chance.choice((bytes(8), (2 * K + 512).to_bytes(8, "big")))
    before = _disk(bytes(bad))
    recording = Recording(file=bytes(bad))
    with Image(recording.files["file"], repair=True) as image:  # type: ignore[arg-type]
        image.format.check(repair)
    for _, files in recording.crashes(chance, most=12, each=2):
        assert _disk(files["file"]) == before
        again = Recording(**files)
        with Image(again.files["file"], repair=True) as image:  # type: ignore[arg-type]
            assert image.format.check("all").corruptions == 0
        assert _disk(again.contents()["file"]) == before


def test_a_dirty_image_is_repaired_when_opened_for_writing_and_only_then() -> None:
    dirty = poked(poked(START, 72, DIRTY), 2 * K + 2 * 9, 0, 2)
    reading = Recording(file=dirty)
    with Image(reading.files["file"], writable=False) as image:  # type: ignore[arg-type]
        assert image.disk.pread(0, K) == b"a" * K
    assert not reading.changes
    with Workload(dirty) as work:
        work.write(0, b"b" * K)
    after = work.recording.contents()["file"]
    assert after[72:80] == bytes(8)
    judge(after)
