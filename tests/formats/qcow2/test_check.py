"""Checking and repairing: our numbers are those of qemu-img, on sound and on damaged images."""

from __future__ import annotations

import random
import struct
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from diskwright.errors import DiskwrightError, LimitExceeded
from diskwright.formats.qcow2 import references, scan
from diskwright.formats.qcow2.layout import COMPRESSED, COPIED, OFFSET_MASK
from tests.formats.qcow2.support import (
    LONG,
    Image,
    Tape,
    checked,
    contents,
    created,
    entries,
    header_of,
    l1_of,
    l2_entry_place,
    our_check,
    poked,
    qemu,
    qemu_check,
)
from tests.peers import find

K = 4096
BASES = {
    "64k": ("65536", False, False),
    "64k compressed": ("65536", True, False),
    "4k compressed with snapshots": ("4096", True, True),
    "512 compressed": ("512", True, False),
    "4k refcounts of a bit": ("4096,refcount_bits=1", False, False),
    "4k refcounts of 2 bits with snapshots": ("4096,refcount_bits=2", False, True),
    "4k refcounts of 64 bits with snapshots": ("4096,refcount_bits=64", False, True),
    "64k version 2 with snapshots": ("65536,compat=0.10", False, True),
    "2M with snapshots": ("2097152", False, True),
}


@cache
def base(name: str, folder: Path) -> bytes:
    """An image made by QEMU with a bit of everything."""
    options, squeezed, snapshots = BASES[name]
    size = 300 << 10 if name.startswith("512") else 40 << 20 if name.startswith("2M") else 4 << 20
    raw, path = folder / "raw", folder / "base"
    chance = random.Random(5)
    source = bytearray(size)
    for i in range(40):
        at, length = chance.randrange(size - 70000), chance.randrange(1, 70000)
        source[at : at + length] = chance.randbytes(length) if i % 2 else (b"abc" * 25000)[:length]
    raw.write_bytes(source)
    qemu(
        "qemu-img", "convert", *(["-c"] if squeezed else []), "-O", "qcow2", "-o", f"cluster_size={options}", raw, path
    )
    qemu("qemu-io", "-c", "write -P 3 0 64k", "-c", "write -z 64k 64k", path) if "0.10" not in options else None
    if snapshots:
        qemu("qemu-img", "snapshot", "-c", "one", path)
        qemu("qemu-io", "-c", "write -P 3 0 200k", path)
        qemu("qemu-img", "snapshot", "-c", "two", path)
        qemu("qemu-io", "-c", "write -P 4 100k 60k", path)
    data = path.read_bytes()
    path.unlink()
    raw.unlink()
    return data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bases")


@pytest.mark.parametrize("name", BASES)
def test_sound_images(name: str, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(base(name, folder))
    report = checked(path.read_bytes())
    assert our_check(report) == qemu_check(path)
    assert (report.corruptions, report.leaks) == (0, 0)


def test_persistent_bitmaps(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(created(size=100 << 20))
    qemu("qemu-img", "bitmap", "--add", path, "one")
    qemu("qemu-io", "-c", "write 0 10M", path)
    qemu("qemu-img", "bitmap", "--add", "-g", "4096", path, "two")
    report = checked(path.read_bytes())
    assert our_check(report) == qemu_check(path) and not report.corruptions and not report.leaks
    forgotten = poked(path.read_bytes(), 88, 0)  # written to by a program that knows no bitmaps
    path.write_bytes(forgotten)
    report = checked(forgotten)
    assert our_check(report) == qemu_check(path) and report.leaks


# -- damage at random --------------------------------------------------------------------------------------


def tables_of(data: bytes) -> list[tuple[int, int]]:
    """``(offset, length)`` of the tables damage is done to, those with much in them cut short."""
    header = header_of(data)
    cluster = 1 << header.cluster_bits
    found = [(header.l1_table_offset, header.l1_size * 8), (header.refcount_table_offset, 64)]
    found += [(entry & OFFSET_MASK, min(cluster, 4096)) for entry in l1_of(data) if entry]
    count = header.refcount_table_clusters * cluster // 8
    found += [(entry, min(cluster, 1024)) for entry in entries(data, header.refcount_table_offset, count) if entry]
    return found


def damage(data: bytes, chance: random.Random) -> bytes:
    tables, changed = tables_of(data), bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 5))):
        offset, length = chance.choice(tables)
        at = offset + 8 * chance.randrange(max(1, length // 8))
        value = int.from_bytes(changed[at : at + 8], "big")
        way = chance.random()
        if way < 0.5:
            value ^= 1 << chance.choice(
                (0, 1, 4, 8, 9, 10, 12, 16, 17, 20, 21, 22, 25, 30, 40, 54, 55, 56, 58, 61, 62, 63)
            )
        elif way < 0.6:
            value = 0
        elif way < 0.8:
            offset, length = chance.choice(tables)
            other = offset + 8 * chance.randrange(max(1, length // 8))
            value = int.from_bytes(changed[other : other + 8], "big")
        elif way < 0.9:
            value = chance.choice((COPIED, COPIED | chance.choice(tables)[0], chance.getrandbits(64)))
        else:
            value = (value + chance.choice((-65536, 65536))) & (1 << 64) - 1
        struct.pack_into(">Q", changed, at, value)
    if chance.random() < 0.1:
        size = chance.randrange(len(data) // 2, len(data) + 200000)
        changed = changed[:size].ljust(size, b"\0")
    return bytes(changed)


@pytest.mark.parametrize("name", BASES)
def test_damage_is_counted_as_qemu_counts_it(name: str, folder: Path, tmp_path: Path) -> None:
    chance, path = random.Random(name), tmp_path / "image"
    for turn in range(300 if LONG else 12):
        data = damage(base(name, folder), chance)
        path.write_bytes(data)
        try:
            ours = our_check(checked(data))
        except DiskwrightError:
            command = [find("qemu-img"), "check", "--output=json", str(path)]
            assert subprocess.run(command, capture_output=True, check=False).returncode == 1, turn
            continue
        assert ours == qemu_check(path), turn


@pytest.mark.parametrize("repair", ["leaks", "all"])
@pytest.mark.parametrize("name", BASES)
def test_repair_of_random_damage(name: str, repair: str, folder: Path, tmp_path: Path) -> None:
    """Whatever is left after a repair, QEMU sees the same; and it never is more than what QEMU leaves."""
    chance, path, other = random.Random(name + repair), tmp_path / "image", tmp_path / "other"
    for turn in range(100 if LONG else 5):
        data = damage(base(name, folder), chance)
        if len(data) != len(base(name, folder)):
            continue  # cut off or longer: QEMU's own repairs change the file's size on their way
        tape = Tape(data)
        try:
            with Image(tape, repair=True) as image:
                report = image.format.check(repair)
        except DiskwrightError:
            continue
        path.write_bytes(bytes(tape.data))
        other.write_bytes(data)
        after = qemu_check(path)
        assert (after["corruptions"], after["leaks"]) == (report.corruptions, report.leaks), turn
        done = subprocess.run(
            [find("qemu-img"), "check", "-q", "-r", repair, str(other)], capture_output=True, check=False
        )
        astray = any(entry & OFFSET_MASK & (1 << header_of(data).cluster_bits) - 1 for entry in l1_of(data))
        if done.returncode in (0, 2, 3) and not astray:  # QEMU changes flags in what is no table at all
            theirs = qemu_check(other)
            assert after["corruptions"] <= theirs["corruptions"] and after["leaks"] <= theirs["leaks"], turn


# -- damage of one kind --------------------------------------------------------------------------------------


def plain() -> bytes:
    tape = Tape(created(size=4 << 20, cluster_size=K))
    with Image(tape) as image:
        image.disk.pwrite(0, b"a" * 8 * K)
        image.disk.pwrite(3 << 20, b"b" * 8 * K)
    return bytes(tape.data)


def refcount_at(cluster: int) -> int:
    return 2 * K + 2 * cluster


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], tuple[int, int]]] = {
    "a leak": (lambda data: poked(data, refcount_at(8), 3, 2), (1, 1)),  # and its flag is wrong then
    "a leaked cluster": (lambda data: poked(data, refcount_at(200), 1, 2) + bytes(200 * K), (0, 1)),
    "a lost refcount": (lambda data: poked(data, refcount_at(8), 0, 2), (2, 0)),
    "refcounts too low": (lambda data: poked(data, l2_entry_place(data, 0), 9 * K), (3, 1)),
    "no refcount block": (lambda data: poked(data, K, 0), (40, 0)),
    "a refcount block that is not aligned": (lambda data: poked(data, K, 2 * K + 512), (1, 0)),
    "a copied flag missing": (lambda data: poked(data, l2_entry_place(data, 0), 5 * K), (1, 0)),
    "an L1 flag missing": (lambda data: poked(data, 3 * K, 4 * K), (1, 0)),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_repair_mends_what_can_be_mended(name: str, tmp_path: Path) -> None:
    data = plain()
    harm, _ = DAMAGE[name]
    bad = harm(data)
    before = checked(bad)
    assert before.corruptions or before.leaks or before.check_errors
    tape = Tape(bad)
    with Image(tape, repair=True) as image:
        report = image.format.check("all")
    assert (report.corruptions, report.leaks, report.check_errors) == (0, 0, 0), report.messages
    assert report.corruptions_fixed + report.leaks_fixed == before.corruptions + before.leaks
    after = bytes(tape.data)
    if name != "refcounts too low":
        assert contents(after) == contents(data)
    with Image(Tape(after)) as image:
        image.disk.pwrite(K, b"works")
        assert image.format.check("off").corruptions == 0


def test_repairing_leaks_leaves_everything_else_alone() -> None:
    data = poked(plain(), l2_entry_place(plain(), 0), 5 * K)  # a wrong flag
    data = poked(data, refcount_at(30), 1, 2) + bytes(20 * K)
    tape = Tape(data)
    with Image(tape, repair=True) as image:
        report = image.format.check("leaks")
        assert (report.leaks, report.leaks_fixed, report.corruptions, report.corruptions_fixed) == (0, 1, 1, 0)
    assert bytes(tape.data) == poked(data, refcount_at(30), 0, 2)


def test_a_repaired_image_in_use_forgets_what_it_had_cached() -> None:
    tape = Tape(poked(plain(), refcount_at(30), 1, 2) + bytes(20 * K))
    with Image(tape) as image:
        image.disk.pwrite(0, b"before")
        assert image.format.check("all").leaks_fixed == 1
        image.disk.pwrite(100 * K, b"after")
        assert image.disk.pread(0, 6) == b"before" and image.disk.pread(100 * K, 5) == b"after"
    assert (checked(bytes(tape.data)).corruptions, checked(bytes(tape.data)).leaks) == (0, 0)


def test_a_crash_while_refcounts_are_rebuilt_does_no_harm() -> None:
    bad = poked(plain(), K, 0)
    tape = Tape(bad)
    with Image(tape, repair=True) as image:
        image.format.check("all")
    expected = contents(plain())
    for position in range(len(tape.changes)):
        data = bytearray(bad)
        for kind, offset, piece in tape.changes[:position]:
            if kind == "write":
                data.extend(bytes(max(0, offset + len(piece) - len(data))))
                data[offset : offset + len(piece)] = piece
        assert contents(bytes(data)) == expected
        again = Tape(bytes(data))
        with Image(again, repair=True) as image:
            assert image.format.check("all").corruptions == 0


def test_check_of_an_image_in_use_counts_what_is_cached() -> None:
    with Image(Tape(created(size=4 << 20, cluster_size=K))) as image:
        image.disk.pwrite(0, b"a" * 8 * K)
        image.disk.trim(0, 2 * K)
        report = image.format.check("off")
        assert (report.corruptions, report.leaks, report.allocated_clusters) == (0, 0, 6)


def test_a_read_only_image_cannot_be_repaired() -> None:
    with Image(Tape(plain()), writable=False) as image, pytest.raises(DiskwrightError, match="read-only"):
        image.format.check("leaks")


# -- windows and batches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["4k compressed with snapshots", "512 compressed", "4k refcounts of a bit"])
def test_small_windows_and_batches_give_the_same(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(name)
    for _ in range(6):
        data = damage(base(name, folder), chance)
        try:
            whole = our_check(checked(data))
        except DiskwrightError:
            continue
        with monkeypatch.context() as patch:
            header = header_of(data)
            per_block = 1 << header.geometry.block_bits
            patch.setattr(references, "WINDOW", per_block)
            patch.setattr("diskwright.formats.qcow2.check._AT_ONCE", 37)
            patch.setattr(scan, "_BATCH", 1)
            patch.setattr(scan, "_FEW_RUNS", 1 << 30)
            assert our_check(checked(data)) == whole


def test_scattered_clusters_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    tape = Tape(created(size=4 << 20, cluster_size=512))
    with Image(tape) as image:
        image.disk.pwrite(0, b"a" * (1 << 20))
    monkeypatch.setattr(references, "WINDOW", 256)
    monkeypatch.setattr(references, "MAX_WINDOWS", 3)
    with pytest.raises(LimitExceeded, match="too far apart"):
        checked(bytes(tape.data))


def test_a_table_named_a_thousand_times_is_read_once() -> None:
    data = plain()
    many = created(size=4 << 30, cluster_size=K)
    header = header_of(many)
    grown = bytearray(many.ljust(1 << 20, b"\0"))
    table = (1 << 20) - K
    grown[table : table + K] = struct.pack(">Q", 4 * K | COPIED) * (K // 8)
    for i in range(header.l1_size):
        struct.pack_into(">Q", grown, header.l1_table_offset + 8 * i, table | COPIED)
    reads = 0

    class Counting(Tape):
        def readv(self, segments: object, *, nowait: bool = False) -> None:
            nonlocal reads
            reads += sum(offset == table for offset, _ in segments)  # type: ignore[attr-defined]
            super().readv(segments, nowait=nowait)  # type: ignore[arg-type]

    with Image(Counting(bytes(grown)), writable=False) as image:
        report = image.format.check("off")
    assert report.allocated_clusters == header.l1_size * (K // 8) and reads == 1
    assert report.corruptions > header.l1_size and len(data) > K


def test_messages_are_limited_and_numbers_are_not() -> None:
    tape = Tape(created(size=8 << 20, cluster_size=512))
    with Image(tape) as image:
        image.disk.pwrite(0, b"a" * (8 << 20))
    header = header_of(bytes(tape.data))
    data = poked(bytes(tape.data), header.refcount_table_offset + 8, 0)
    report = checked(data)
    assert report.corruptions > 256 and len(report.messages) < 200
    assert any("more" in message for message in report.messages)
    assert COMPRESSED
