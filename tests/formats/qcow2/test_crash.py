"""Crashes: whatever part of the unflushed writes reached the medium, the image is sound and flushed data is there."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path

import pytest

from diskwright.core.node import StorageNode
from tests.formats.qcow2.support import (
    LONG,
    Change,
    Image,
    Tape,
    apply,
    checked,
    contents,
    created,
    header_of,
    qemu,
    qemu_check,
)
from tests.peers import find

SECTOR = 512


class Guest:
    """What a guest did, and what its sectors may hold after a crash at any point of the tape."""

    def __init__(self, disk: bytes) -> None:
        self.now = bytearray(disk)
        self.history: list[tuple[int, int, bytes]] = []  # (tape position when it began, offset, new bytes)
        self.flushed: list[tuple[int, int, bytes]] = [(0, 0, bytes(disk))]  # (position, history length, disk)

    def does(self, position: int, offset: int, data: bytes) -> None:
        self.history.append((position, offset, data))
        self.now[offset : offset + len(data)] = data

    def has_flushed(self, position: int) -> None:
        self.flushed.append((position, len(self.history), bytes(self.now)))

    def check(self, position: int, found: bytes) -> None:
        """``found`` is the disk after a crash when the tape was ``position`` long."""
        _, done, durable = next(entry for entry in reversed(self.flushed) if entry[0] <= position)
        allowed: dict[int, list[bytes]] = {}
        for _, offset, data in self.history[done:]:
            for at in range(0, len(data), SECTOR):
                allowed.setdefault(offset + at, []).append(data[at : at + SECTOR])
        for at in range(0, len(durable), SECTOR):
            sector = found[at : at + SECTOR]
            if sector != durable[at : at + SECTOR]:
                assert sector in allowed.get(at, []), f"sector at {at} was lost in a crash at {position}"


def after_crash(start: bytes, changes: list[Change], position: int, chance: random.Random) -> bytes:
    """What the medium may hold: all up to the last flush, and of the rest any sectors."""
    flush = max((i for i in range(position) if changes[i][0] == "flush"), default=0)
    data = bytearray(start)
    for change in changes[:flush]:
        apply(data, change)
    for change in changes[flush:position]:
        kind, offset, piece = change
        fate = chance.random()
        if kind != "write" or fate < 0.4:
            apply(data, change)
        elif fate < 0.7:
            for at in range(0, len(piece), SECTOR):
                if chance.random() < 0.5:
                    apply(data, (kind, offset + at, piece[at : at + SECTOR]))
    return bytes(data)


def play(tape: Tape, chance: random.Random, steps: int, *, grow: bool = False, data: Tape | None = None) -> Guest:
    """A guest writes, zeros, discards and flushes."""
    with Image(tape, data=data) as image:
        disk = image.disk
        cluster = image.format.cluster_size
        guest = Guest(disk.pread(0, disk.size))
        for _ in range(steps):
            sectors = disk.size // SECTOR
            offset = chance.randrange(sectors) * SECTOR
            length = min(
                disk.size - offset, chance.choice((1, 2, 3, cluster // SECTOR, 2 * cluster // SECTOR + 1)) * SECTOR
            )
            action, position = chance.random(), len(tape.log)
            if action < 0.5:
                data = chance.randbytes(length)
                guest.does(position, offset, data)
                disk.pwrite(offset, data)
            elif action < 0.65:
                guest.does(position, offset, bytes(length))
                disk.zero(offset, length, unmap=chance.random() < 0.5)
            elif action < 0.8:
                disk.trim(offset, length)
                # A discarded sector holds zeros or what it held; which, is seen by looking.
                guest.does(position, offset, disk.pread(offset, length))
            elif action < 0.9 and grow:
                image.node.resize(disk.size + chance.randrange(1, 40) * cluster + SECTOR)
                guest.now.extend(bytes(disk.size - len(guest.now)))
            else:
                disk.flush()
                guest.has_flushed(len(tape.log))
        image.node.flush()
    return guest


def crash_everywhere(start: bytes, tape: Tape, guest: Guest, chance: random.Random, sample: Path | None) -> None:
    """Ends the tape after each change, and lets chance decide what of the unflushed ones was written."""
    changes = tape.changes
    for position in range(len(changes) + 1):
        data = after_crash(start, changes, position, chance)
        report = checked(data)
        assert not report.corruptions and not report.check_errors, (position, report.messages)
        guest.check(position, contents(data))
        if sample is not None and position % 40 == 7:
            sample.write_bytes(data)
            assert not qemu_check(sample)["corruptions"], position
    after = checked(bytes(tape.data))
    assert (after.corruptions, after.leaks) == (0, 0), after.messages


CASES = {
    "512": {"size": 96 << 10, "cluster_size": 512},
    "4k": {"size": 512 << 10, "cluster_size": 4096},
    "4k version 2": {"size": 512 << 10, "cluster_size": 4096, "compat": "0.10"},
    "4k refcounts of a bit": {"size": 512 << 10, "cluster_size": 4096, "refcount_bits": 1},
    "64k": {"size": 2 << 20, "cluster_size": 65536},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", range(40 if LONG else 2))
def test_crash_anywhere(case: str, seed: int, tmp_path: Path) -> None:
    chance = random.Random(f"{case} {seed}")
    start = created(**CASES[case])
    tape = Tape(start)
    guest = play(tape, chance, 60)
    crash_everywhere(start, tape, guest, chance, tmp_path / "crashed.qcow2")
    assert contents(bytes(tape.data)) == guest.now


@pytest.mark.parametrize("seed", range(40 if LONG else 3))
def test_crash_while_the_refcount_table_moves(seed: int) -> None:
    """With refcounts of 64 bits a table of one cluster counts 2 MiB."""
    chance = random.Random(seed)
    first = Tape(created(size=160 << 10, cluster_size=512, refcount_bits=64))
    with Image(first) as image:
        image.disk.pwrite(0, chance.randbytes(20 << 10))
    start = bytes(first.data)
    tape = Tape(start)
    with Image(tape) as image:
        writer = image.format.writer
        assert writer is not None
        before = writer.refcounts.table_offset
        guest = Guest(image.disk.pread(0, image.disk.size))
        writer.refcounts.take_from(4096 - 40)  # as if the rest were in use
        for _ in range(40):
            offset = chance.randrange(160 << 1) * SECTOR
            data = chance.randbytes(min(3, (160 << 1) - offset // SECTOR) * SECTOR)
            guest.does(len(tape.changes), offset, data)
            image.disk.pwrite(offset, data)
            if chance.random() < 0.06:
                image.disk.flush()
                guest.has_flushed(len(tape.changes))
        assert writer.refcounts.table_offset != before, "the table must have moved"
    for _ in range(4):
        crash_everywhere(start, tape, guest, chance, None)


@pytest.mark.parametrize("seed", range(40 if LONG else 2))
def test_crash_with_snapshots_and_compressed_clusters(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    raw, path = tmp_path / "source.raw", tmp_path / "image.qcow2"
    raw.write_bytes(
        bytes(chance.choice(b"ab") for _ in range(200 << 10)) + chance.randbytes(56 << 10) + bytes(256 << 10)
    )
    qemu("qemu-img", "convert", "-c", "-O", "qcow2", "-o", "cluster_size=4096", raw, path)
    qemu("qemu-io", "-c", "write -P 3 64k 64k", path)
    qemu("qemu-img", "snapshot", "-c", "one", path)
    qemu("qemu-io", "-c", "write -P 4 80k 10k", path)
    start = path.read_bytes()
    tape = Tape(start)
    guest = play(tape, chance, 60)
    crash_everywhere(start, tape, guest, chance, path)
    path.write_bytes(bytes(tape.data))
    qemu("qemu-img", "snapshot", "-a", "one", path)
    expected = bytearray(raw.read_bytes())
    expected[64 << 10 : 128 << 10] = b"\3" * (64 << 10)
    assert contents(path.read_bytes()) == expected, "the snapshot must not have changed"


@pytest.mark.parametrize("seed", range(40 if LONG else 2))
def test_crash_while_growing(seed: int) -> None:
    chance = random.Random(seed)
    start = created(size=40 << 10, cluster_size=512)
    tape = Tape(start)
    play(tape, chance, 60, grow=True)
    for position in range(len(tape.changes) + 1):
        data = after_crash(start, tape.changes, position, chance)
        report = checked(data)
        assert not report.corruptions and not report.check_errors, (position, report.messages)


@pytest.mark.parametrize("seed", range(2))
def test_crash_while_shrinking(seed: int) -> None:
    chance = random.Random(seed)
    tape = Tape(created(size=256 << 10, cluster_size=512))
    with Image(tape) as image:
        image.disk.pwrite(0, chance.randbytes(256 << 10))
        before = image.disk.pread(0, 100 << 10)
    start = bytes(tape.data)
    tape.changes.clear()
    with Image(tape) as image:
        image.node.resize(100 << 10)
    assert len(tape.data) < len(start), "the file must have shrunk too"
    for position in range(len(tape.changes) + 1):
        data = after_crash(start, tape.changes, position, chance)
        report = checked(data)
        assert not report.corruptions and not report.check_errors, (position, report.messages)
        assert contents(data)[: 100 << 10] == before


PARTS = {
    "extended": {"extended_l2": True, "size": 1 << 20},
    "extended, 16k": {"extended_l2": True, "size": 512 << 10, "cluster_size": 16384},
    "data file": {"data_file": "d", "size": 512 << 10, "cluster_size": 4096},
    "raw data file": {"data_file": "d", "size": 512 << 10, "cluster_size": 4096, "data_file_raw": True},
    "both": {"data_file": "d", "size": 512 << 10, "cluster_size": 16384, "extended_l2": True},
}


@pytest.mark.parametrize("case", PARTS)
@pytest.mark.parametrize("seed", range(40 if LONG else 2))
def test_crash_with_subclusters_and_data_files(case: str, seed: int, tmp_path: Path) -> None:
    """Image and data file are two media: after a crash each has its own part of what it was not told to flush."""
    chance = random.Random(f"{case} {seed}")
    apart = "data_file" in PARTS[case]
    data = Tape(filename="data") if apart else None
    tape = Tape(created(data=data, **PARTS[case]))
    start, beside = bytes(tape.data), None if data is None else bytes(data.data)
    if data is not None:
        data.log = tape.log
        data.changes.clear()
    guest = play(tape, chance, 60, data=data)
    sample = tmp_path / "crashed.qcow2"
    for position in range(len(tape.log) + 1):
        own = [change for at, change in tape.log[:position] if at is tape]
        image = after_crash(start, own, len(own), chance)
        rest = None
        if data is not None and beside is not None:
            others = [change for at, change in tape.log[:position] if at is data]
            rest = after_crash(beside, others, len(others), chance)
        guest.check(position, contents(image, beside=rest))
        if position % 30 == 7:
            sample.write_bytes(image)
            (tmp_path / "d").write_bytes(rest or b"")
            qemu_sound(sample, tmp_path)
    assert contents(bytes(tape.data), beside=None if data is None else bytes(data.data)) == guest.now
    if data is not None and PARTS[case].get("data_file_raw"):
        assert data.data == guest.now


def qemu_sound(path: Path, folder: Path) -> None:
    """QEMU, started where it finds the data file, sees nothing worse than leaks."""
    done = subprocess.run(
        [find("qemu-img"), "check", "--output=json", path.name],
        cwd=folder, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode in (0, 3) and not json.loads(done.stdout).get("corruptions"), done.stdout + done.stderr


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_crash_while_an_overlay_grows(compat: str) -> None:
    """What a longer backing image has beyond the old end never comes into sight."""
    start = created(size=30 << 10, cluster_size=4096, compat=compat, backing_file="b", backing_fmt="raw")
    secret = b"secret.." * (16 << 10)
    tape = Tape(start)
    with _overlay(tape, secret) as image:
        image.node.resize(200 << 10)
        assert image.disk.pread(0, 200 << 10) == secret[: 30 << 10] + bytes(170 << 10)
    chance = random.Random(1)
    sizes = set()
    for position in range(len(tape.changes) + 1):
        data = after_crash(start, tape.changes, position, chance)
        assert not checked(data).corruptions, position
        with _overlay(Tape(data), secret) as image:
            sizes.add(image.disk.size)
            assert image.disk.pread(0, image.disk.size) == (secret[: 30 << 10]).ljust(image.disk.size, b"\0"), position
    assert sizes == {30 << 10, 200 << 10}
    for step in range(len(tape.changes)):
        torn = Tape(start)
        with _overlay(torn, secret) as image:
            torn.fail = step
            with pytest.raises(OSError, match="the tape is torn"):
                image.node.resize(200 << 10)
                image.node.flush()
            torn.fail = -1
            image.node.resize(200 << 10)
            assert image.disk.pread(0, 200 << 10) == secret[: 30 << 10] + bytes(170 << 10)
        report = checked(bytes(torn.data))
        assert not report.corruptions and header_of(bytes(torn.data)).size == 200 << 10


def _overlay(tape: Tape, backing: bytes) -> Image:
    below = StorageNode("below", Tape(backing), False)
    image = Image(tape, backing=below)
    image.graph.adopt(below)
    return image
