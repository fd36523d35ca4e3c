"""The proof itself: a record file that is right passes, and each way of losing a record is seen."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.interop.guest.records import (
    CHURN_KEPT,
    Damaged,
    Plan,
    Report,
    verify,
    verify_churn,
    verify_file,
)

SLOTS, BATCH = 64, 8


class Disk:
    """A record disk in memory that remembers the order of writes."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.data = bytearray(plan.length)
        self.data[: plan.block] = plan.header()

    def write(self, sequence: int) -> None:
        offset = self.plan.offset(self.plan.slot(sequence))
        self.data[offset : offset + self.plan.block] = self.plan.record(sequence)

    def read(self, offset: int, length: int) -> bytes:
        return bytes(self.data[offset : offset + length])

    def verify(self, acked: int = 0, **options: bool) -> Report:
        return verify(self.read, self.plan, acked, **options)


@pytest.fixture
def plan() -> Plan:
    return Plan(SLOTS, BATCH, seed=7)


@pytest.fixture
def disk(plan: Plan) -> Disk:
    """All slots written several times, 400 records in 50 batches."""
    disk = Disk(plan)
    for sequence in range(1, 401):
        disk.write(sequence)
    return disk


def survivors(plan: Plan, newest: int) -> list[int]:
    return sorted(sequence for sequence in plan.latest(newest) if sequence)


def test_a_whole_disk_is_right(disk: Disk) -> None:
    report = disk.verify(400, ordered=True)
    assert report.ok and report.newest == 400 and report.floor == 400
    assert report.records == len(survivors(disk.plan, 400))


def test_an_empty_disk_is_right_until_something_was_acknowledged(plan: Plan) -> None:
    disk = Disk(plan)
    assert disk.verify().ok
    report = disk.verify(8)
    assert report.count == len(survivors(plan, 8))
    assert "zeros where record" in str(report)


def test_any_lost_record_below_the_floor_is_seen(disk: Disk) -> None:
    """Each slot in turn gets what it held before its newest record was written."""
    plan = disk.plan
    for lost in survivors(plan, 400):
        if lost >= plan.batch_start(400):
            continue
        before = plan.latest(lost - 1)[plan.slot(lost)]
        offset = plan.offset(plan.slot(lost))
        kept = disk.read(offset, plan.block)
        disk.data[offset : offset + plan.block] = plan.record(before) if before else bytes(plan.block)
        report = disk.verify()
        assert report.count == 1 and f"record {lost} was written" in report.problems[0]
        disk.data[offset : offset + plan.block] = kept


def test_the_batch_being_written_may_lack_records_but_not_once_acknowledged(disk: Disk) -> None:
    plan = disk.plan
    lost = max(number for number in survivors(plan, 400) if number < 400)
    assert lost >= plan.batch_start(400)
    before = plan.latest(392)[plan.slot(lost)]
    offset = plan.offset(plan.slot(lost))
    disk.data[offset : offset + plan.block] = plan.record(before) if before else bytes(plan.block)
    assert disk.verify(392).ok
    assert not disk.verify(400).ok
    assert not disk.verify(392, ordered=True).ok


def test_acknowledged_records_beyond_the_newest_are_missed(disk: Disk) -> None:
    assert not disk.verify(401).ok


@pytest.mark.parametrize("at", [0, 8, 20, 24, 28, 32, 2000, 4095])
def test_any_changed_byte_is_seen(disk: Disk, at: int) -> None:
    offset = disk.plan.offset(5) + at
    disk.data[offset] ^= 1
    report = disk.verify()
    assert report.count >= 1
    assert any("slot 5" in problem for problem in report.problems)


def test_a_record_in_another_slot_is_seen(disk: Disk) -> None:
    plan = disk.plan
    disk.data[plan.offset(3) : plan.offset(4)] = disk.read(plan.offset(4), plan.block)
    assert "belongs to slot 4" in disk.verify().problems[0]


def test_a_block_mixed_of_two_records_is_seen_even_with_torn_writes_allowed(disk: Disk) -> None:
    plan = disk.plan
    middle = plan.offset(9) + 2048
    disk.data[middle : middle + 512] = plan.record(1)[2048:2560]
    writing = {plan.slot(392 + n) for n in range(1, 2 * BATCH + 1)}
    assert not disk.verify(392).ok
    assert disk.verify(392, torn=True).ok == (9 in writing)


def test_torn_blocks_are_allowed_only_where_the_guest_was_writing(disk: Disk) -> None:
    plan = disk.plan
    writing = {plan.slot(392 + n) for n in range(1, 2 * BATCH + 1)}
    for slot in range(plan.slots):
        offset = plan.offset(slot) + 1024
        kept = disk.read(offset, 512)
        disk.data[offset : offset + 512] = bytes(512)
        assert disk.verify(392, torn=True).ok == (slot in writing)
        disk.data[offset : offset + 512] = kept


def test_crashes_of_a_disk_with_a_write_cache_are_right() -> None:
    """Whole batches flushed, any part of the next one: that is what a crash may leave, and never more than it may."""
    chance = random.Random(5)
    plan = Plan(SLOTS, BATCH, seed=3)
    for _ in range(40):
        flushed = chance.randrange(0, 30)
        disk = Disk(plan)
        for sequence in range(1, flushed * BATCH + 1):
            disk.write(sequence)
        for sequence in range(flushed * BATCH + 1, flushed * BATCH + BATCH + 1):
            if chance.random() < 0.5:
                disk.write(sequence)
        assert disk.verify(flushed * BATCH).ok


def test_the_plan_is_read_from_the_header(tmp_path: Path, disk: Disk) -> None:
    path = tmp_path / "records"
    path.write_bytes(disk.data)
    assert verify_file(str(path), 400).ok
    found = Plan.parse(bytes(disk.data[:512]))
    assert found is not None
    assert (found.slots, found.batch, found.seed, found.churn) == (SLOTS, BATCH, 7, 0)
    path.write_bytes(bytes(4096))
    assert verify_file(str(path)).ok and not verify_file(str(path), 1).ok
    path.write_bytes(b"\1" + bytes(disk.data[1:]))
    assert "magic or checksum" in verify_file(str(path)).problems[0]
    path.write_bytes(disk.data[: 20 * 4096])  # cut short
    assert not verify_file(str(path), 400).ok


def test_impossible_plans_are_refused() -> None:
    for slots, batch, block in ((0, 8, 4096), (1 << 30, 8, 4096), (64, 0, 4096), (64, 8, 100), (64, 8, 1 << 20)):
        with pytest.raises(Damaged, match="impossible plan"):
            Plan(slots, batch, 1, block)


def test_churn_files_are_checked(tmp_path: Path) -> None:
    plan = Plan(SLOTS, BATCH, seed=7, churn=2)
    assert plan.churn_file(1) is None and plan.churn_file(2) is not None
    report = Report()
    report.newest = report.floor = 50 * BATCH  # 25 files made, those before the 18th removed
    for number in range(26 - CHURN_KEPT, 26):
        made = plan.churn_file(number * 2)
        assert made is not None
        (tmp_path / made[0]).write_bytes(made[1])
    verify_churn(str(tmp_path), plan, report)
    assert report.ok
    (tmp_path / "00000025").unlink()
    (tmp_path / "00000024").write_bytes(b"something else")
    verify_churn(str(tmp_path), plan, report)
    assert report.count == 2 and "00000024: wrong contents" in str(report) and "00000025 is missing" in str(report)
