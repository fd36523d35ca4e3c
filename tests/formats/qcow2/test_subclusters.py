"""Extended L2 entries and data files against QEMU, in both directions; and the entries no image should have."""

from __future__ import annotations

import random
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from diskwright.core.create import create_image
from diskwright.core.driver import runs_of
from diskwright.errors import CorruptImage, ImageError, OptionError
from diskwright.extents import DATA, UNALLOCATED, ZERO, Extents
from diskwright.formats.qcow2.layout import COMPRESSED, COPIED
from diskwright.formats.qcow2.layout import ZERO as ZERO_FLAG
from diskwright.formats.qcow2.subclusters import parts_of, state_of
from tests.formats.qcow2.support import LONG, Image, Tape, created, header_of, l1_of, poked, qemu
from tests.formats.qcow2.variants import OPTIONS, agreed, make, opened, our_map, play, play_theirs, their_map

K = 1024


@pytest.mark.parametrize("variant", OPTIONS)
@pytest.mark.parametrize("seed", range(30 if LONG else 2))
def test_what_we_write_qemu_reads_checks_and_maps(variant: str, seed: int, tmp_path: Path) -> None:
    chance = random.Random(f"{variant} {seed}")
    size = chance.choice((1 << 20, (1 << 20) + 512, 700 << 10))
    path = make(tmp_path, OPTIONS[variant], size)
    disk = play(path, chance, 40, resizing=True)
    agreed(path, disk, tmp_path)
    if OPTIONS[variant].get("data_file_raw"):
        assert (tmp_path / "data").read_bytes() == disk, "a raw data file is the disk"


@pytest.mark.parametrize("variant", [name for name in OPTIONS if "raw" not in name])
@pytest.mark.parametrize("seed", range(30 if LONG else 1))
def test_what_we_write_over_a_backing_file_qemu_reads_checks_and_maps(variant: str, seed: int, tmp_path: Path) -> None:
    chance = random.Random(f"{variant} {seed}")
    base = chance.randbytes(chance.choice((300, 512, 1024, 1500)) << 10)
    path = make(tmp_path, OPTIONS[variant], 1 << 20, backing=base)
    disk = play(path, chance, 40, resizing=False)
    agreed(path, disk, tmp_path)
    assert (tmp_path / "base.raw").read_bytes() == base


@pytest.mark.parametrize("variant", OPTIONS)
@pytest.mark.parametrize("seed", range(30 if LONG else 2))
def test_what_qemu_writes_we_read_and_map(variant: str, seed: int, tmp_path: Path) -> None:
    chance = random.Random(f"{variant} {seed}")
    path = make(tmp_path, OPTIONS[variant], 1 << 20, ours=False)
    expected = play_theirs(path, chance, 30, 1 << 20)
    disk = opened(path, writable=False)
    assert disk.pread(0, disk.size) == expected
    form = disk.node.format  # type: ignore[attr-defined]
    for _ in range(50):
        offset = chance.randrange(disk.size)
        length = chance.randrange(1, disk.size - offset + 1)
        single = Extents.of(runs_of(form.extent_at, offset, length)).merge()
        assert form.extents(offset, length).merge() == single
    disk.close()
    assert our_map(path) == their_map(path)


@pytest.mark.parametrize("variant", ["extended", "extended, 16k"])
def test_shared_and_compressed_clusters_are_written_to(variant: str, tmp_path: Path) -> None:
    """A snapshot keeps what it has, and of a compressed cluster the rest is kept."""
    source = tmp_path / "source.raw"
    source.write_bytes(b"compressible " * 80000)
    path, chance = tmp_path / "image.qcow2", random.Random(variant)
    options = "extended_l2=on" + (",cluster_size=16k" if "16k" in variant else "")
    qemu("qemu-img", "convert", "-c", "-O", "qcow2", "-o", options, source, path)
    qemu("qemu-io", "-c", "write -P 7 100k 300k", "-c", "write -P 8 700k 3k", "-c", "write -z 500k 6k", path)
    qemu("qemu-img", "convert", "-O", "raw", path, source)
    qemu("qemu-img", "snapshot", "-c", "kept", path)
    disk = play(path, chance, 60, resizing=False)
    agreed(path, disk, tmp_path)
    qemu("qemu-img", "snapshot", "-a", "kept", path)
    agreed(path, source.read_bytes(), tmp_path)


# -- how little is written ---------------------------------------------------------------------------------


def test_a_small_write_touches_only_its_subclusters() -> None:
    """Neither a new cluster nor one that has a place is completed: that is what subclusters are for."""
    tape = Tape(created(size=1 << 20, extended_l2=True, backing_file="b", backing_fmt="raw"))
    with Image(tape) as image:
        image.disk.pwrite(0, b"x" * 2048)  # makes the L2 table
        image.disk.flush()
        for offset, length, written in ((65536, 2048, 2048), (65536 + 10 * K, 100, 2048), (65536 + 10 * K, 5, 5)):
            tape.changes.clear()
            image.disk.pwrite(offset, b"y" * length)
            assert sum(len(data) for kind, _, data in tape.changes if kind == "write") == written
        runs = [(run.kind, run.length) for run in image.format.extents(65536, 14 * K)]
        assert runs == [(DATA, 2 * K), (UNALLOCATED, 8 * K), (DATA, 2 * K), (UNALLOCATED, 2 * K)]


def test_discarded_subclusters_are_zeros_and_the_last_frees_the_cluster() -> None:
    tape = Tape(created(size=1 << 20, extended_l2=True))
    with Image(tape) as image:
        disk, form = image.disk, image.format
        disk.pwrite(0, b"x" * 65536)
        place = form.in_place(0, 65536)
        assert place > 0
        disk.trim(3 * K, 62 * K)  # subclusters from 4 KiB on, and of the next cluster nothing
        assert [(r.kind, r.length) for r in form.extents(0, 65536)] == [(DATA, 4 * K), (ZERO, 60 * K)]
        assert form.in_place(0, 4 * K) == place and form.in_place(4 * K, 1) == -1
        disk.trim(0, 4 * K)
        assert [tuple(r)[2:4] for r in form.extents(0, 65536)] == [(ZERO, -1)]
        disk.flush()
        disk.flush()
        disk.pwrite(512 * K, b"z" * 65536)
        assert form.in_place(512 * K, 65536) == place, "the cluster must have become free"


# -- entries -----------------------------------------------------------------------------------------------


def test_runs_of_subclusters() -> None:
    chance = random.Random(1)
    for _ in range(300):
        bits = chance.getrandbits(32)
        alloc = chance.choice((0, (1 << 32) - 1, bits, bits & chance.getrandbits(32)))
        zero = chance.choice((0, chance.getrandbits(32), (1 << 32) - 1)) & ~alloc
        kinds = [DATA if alloc >> i & 1 else ZERO if zero >> i & 1 else UNALLOCATED for i in range(32)]
        for part in range(32):
            kind, count = state_of(zero << 32 | alloc, part)
            assert kinds[part : part + count] == [kind] * count
            assert part + count == 32 or kinds[part + count] != kind
    assert parts_of(3, 5) == 0b11000 and parts_of(0, 32) == (1 << 32) - 1


def with_entry(data: bytes, entry: int, bitmap: int, *, extended: bool = True) -> bytes:
    """The entry of the second cluster, replaced."""
    table = l1_of(data)[0] & 0x00FF_FFFF_FFFF_FE00
    if not extended:
        return poked(data, table + 8, entry)
    return poked(poked(data, table + 16, entry), table + 24, bitmap)


def written(**options: Any) -> tuple[bytes, bytes]:
    """An image with an L2 table, and its data file."""
    data = Tape(filename="data") if "data_file" in options else None
    tape = Tape(created(size=1 << 20, data=data, **options))
    with Image(tape, data=data) as image:
        image.disk.pwrite(0, b"x" * 65536)
    return bytes(tape.data), b"" if data is None else bytes(data.data)


@pytest.mark.parametrize(
    ("entry", "bitmap", "words"),
    [
        (COPIED | 0x80000, 1 << 32 | 1, "both allocated and zero"),
        (COPIED | 0x80000, 1 << 63 | 1 << 31, "both allocated and zero"),
        (0, 1, "has no place"),
        (COPIED, 1, "has no place"),
        (COPIED | 0x80200, 1, "not aligned"),
    ],
)
@pytest.mark.parametrize("bulk", [False, True])
def test_impossible_extended_entries_are_named(entry: int, bitmap: int, words: str, bulk: bool) -> None:
    data = with_entry(written(extended_l2=True)[0], entry, bitmap)
    with Image(Tape(data)) as image:
        look = image.format.extents if bulk else image.format.extent_at
        with pytest.raises(CorruptImage, match=rf"guest offset 0x10000.*{words}"):
            look(65536, 4096)
        with pytest.raises(CorruptImage, match=words):
            image.disk.pread(65536, 10)
        image.disk.pwrite(131072, b"z")
        image.disk.flush()
    for change in (
        lambda disk: disk.pwrite(65536, b"y"),
        lambda disk: disk.zero(65536, 65536),
        lambda disk: disk.trim(65536, 65536),
    ):
        with Image(Tape(data)) as image:
            with pytest.raises(CorruptImage, match=words):
                change(image.disk)
            assert image.disk.pread(0, 65536) == b"x" * 65536, "the others are as good as ever"
            with pytest.raises(ImageError, match="found corrupt"):
                image.disk.pwrite(131072, b"z")


def test_bits_that_extended_entries_do_not_have_are_ignored() -> None:
    """Bit 0 is no zero flag there, and the bitmap of a compressed cluster says nothing."""
    data, _ = written(extended_l2=True)
    with Image(Tape(with_entry(data, 1, 0)), writable=False) as image:
        assert image.format.extent_at(65536, 10).kind == UNALLOCATED
    with Image(Tape(with_entry(data, COMPRESSED | 0x80000, 0xFF)), writable=False) as image:
        assert list(image.format.extents(65536, 65536)) == [image.format.extent_at(65536, 65536)]
        assert image.format.extent_at(65536, 65536).stored == 512


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (COPIED | 0x20000, "not its guest offset"),
        (COPIED, "not its guest offset"),
        (0x10200, "not aligned"),
        (COMPRESSED | 0x10000, "compressed, in an image with an external data file"),
    ],
)
@pytest.mark.parametrize("extended", [False, True])
@pytest.mark.parametrize("bulk", [False, True])
def test_impossible_entries_with_a_data_file_are_named(entry: int, words: str, extended: bool, bulk: bool) -> None:
    data, beside = written(extended_l2=extended, data_file="d")
    data = with_entry(data, entry, 1, extended=extended)
    target = Tape(beside, "data")
    with Image(Tape(data), data=target) as image:
        look = image.format.extents if bulk else image.format.extent_at
        with pytest.raises(CorruptImage, match=rf"guest offset 0x10000.*{words}"):
            look(65536, 4096)
        with pytest.raises(CorruptImage, match=words):
            image.disk.pwrite(65536, b"y" * 65536)
        assert image.disk.pread(0, 65536) == b"x" * 65536
    assert not any(kind == "write" for kind, _, _ in target.changes)


def test_a_zero_cluster_at_offset_0_has_no_place() -> None:
    """There COPIED makes the offset a place, but not along with the zero flag: so QEMU has it."""
    data, beside = written(data_file="d")
    data = poked(data, l1_of(data)[0] & 0x00FF_FFFF_FFFF_FE00, COPIED | ZERO_FLAG)
    target = Tape(beside, "data")
    with Image(Tape(data), data=target) as image:
        assert image.format.extent_at(0, 512)[2:4] == (ZERO, -1)
        assert [tuple(run)[2:4] for run in image.format.extents(0, 65536)] == [(ZERO, -1)]
        image.disk.pwrite(100, b"y")
        assert image.disk.pread(0, 65536) == bytes(100) + b"y" + bytes(65435)
        assert image.format.in_place(0, 65536) == 0


def test_small_clusters_cannot_have_subclusters() -> None:
    header = header_of(created(size=1 << 20, extended_l2=True, cluster_size=16384))
    assert header.geometry.l2_bits == 10 and header.geometry.unit_bits == 9
    data = poked(created(size=1 << 20, cluster_size=8192), 72, 1 << 4)
    with pytest.raises(CorruptImage, match="cluster_bits"):
        header_of(data)


# -- creating ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"extended_l2": True},
        {"extended_l2": True, "cluster_size": 16384},
        {"extended_l2": True, "cluster_size": 2 << 20, "refcount_bits": 8},
        {"extended_l2": True, "preallocation": "metadata"},
        {"extended_l2": True, "cluster_size": 16384, "preallocation": "metadata"},
        {"data_file": "data"},
        {"data_file": "data", "preallocation": "metadata"},
        {"data_file": "data", "cluster_size": 512, "preallocation": "metadata"},
        {"data_file": "data", "data_file_raw": True},
        {"data_file": "data", "preallocation": "full"},
        {"data_file": "data", "data_file_raw": True, "preallocation": "falloc"},
        {"data_file": "data", "extended_l2": True, "preallocation": "metadata"},
        {"data_file": "data", "extended_l2": True, "data_file_raw": True},
    ],
    ids=str,
)
def test_new_images_are_those_of_qemu(options: dict[str, Any], tmp_path: Path) -> None:
    made = []
    for ours in (False, True):
        path = make(tmp_path, options, 5 << 20, ours=ours)
        space = (tmp_path / "data").stat().st_blocks * 512 if "data_file" in options else 0
        made.append((path.read_bytes(), their_map(path), our_map(path), space >= 5 << 20))
        path.unlink()
    assert made[0] == made[1]


@pytest.mark.parametrize("mode", ["metadata", "falloc", "full"])
def test_preallocation_over_a_backing_file_does_not_hide_it(mode: str, tmp_path: Path) -> None:
    base = random.Random(1).randbytes(300 << 10)
    maps = []
    for ours in (False, True):
        path = make(tmp_path, {"extended_l2": True, "preallocation": mode}, 1 << 20, backing=base, ours=ours)
        maps.append((our_map(path), their_map(path)))
    assert maps[0][0] == maps[0][1] == maps[1][0] == maps[1][1]
    disk = opened(path)
    assert disk.pread(0, 1 << 20) == base.ljust(1 << 20, b"\0")
    disk.pwrite(5000, b"new")
    disk.close()
    agreed(path, (base[:5000] + b"new" + base[5003:]).ljust(1 << 20, b"\0"), tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"extended_l2": True, "compat": "0.10"}, "Extended L2 entries are only .* compatibility level 1.1"),
        ({"extended_l2": True, "cluster_size": 8192}, "cluster sizes of at least 16384 bytes"),
        ({"data_file_raw": True}, "data-file-raw requires data-file"),
        ({"data_file": "d", "compat": "0.10"}, "External data files are only supported with compatibility level 1.1"),
        (
            {"data_file": "d", "data_file_raw": True, "backing_file": "b", "backing_fmt": "raw"},
            "Backing file and data-file-raw cannot be used at the same time",
        ),
        (
            {"preallocation": "metadata", "backing_file": "b", "backing_fmt": "raw"},
            "can only be used at the same time if extended_l2 is on",
        ),
        ({"data_file": "image"}, "cannot be the data-file"),
        ({"data_file": "b", "backing_file": "b", "backing_fmt": "raw"}, "cannot be the data-file"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(b"base" * 1000)
    with pytest.raises(OptionError, match=words):
        create_image(str(tmp_path / "image"), "qcow2", {**options, "size": 1 << 20})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b"], "nothing is left behind"
    assert (tmp_path / "b").read_bytes() == b"base" * 1000


def _kind_of(row: dict[str, Any]) -> tuple[bool, bool]:
    return row["present"], row["zero"]


@pytest.mark.parametrize("variant", ["extended", "extended, preallocated", "data file", "raw data file", "both"])
@pytest.mark.parametrize("mode", ["metadata", "falloc", "full"])
def test_growing_with_preallocation(variant: str, mode: str, tmp_path: Path) -> None:
    """The map is the one QEMU's resizing leads to, and the new bytes are zeros, taken in advance as asked."""
    maps = []
    for ours in (False, True):
        path = make(tmp_path, OPTIONS[variant], 1 << 20, ours=False)
        qemu("qemu-io", "-c", "write -P 1 100k 900k", path)
        if ours:
            disk = opened(path)
            with disk.drained():
                disk.node.resize(3 << 20, preallocation=mode)
            disk.close()
        else:
            qemu("qemu-img", "resize", "-q", f"--preallocation={mode}", path, "3M")
        # Where metadata lies may differ, and with it where a run of places is interrupted.
        maps.append([(key, sum(row["length"] for row in rows)) for key, rows in groupby(our_map(path), _kind_of)])
        expected = bytes(100 << 10) + b"\1" * (900 << 10) + bytes((2 << 20) + (24 << 10))
        agreed(path, expected, tmp_path)
        holder = tmp_path / "data" if "data_file" in OPTIONS[variant] else path
        assert (holder.stat().st_blocks * 512 >= 2 << 20) is (mode != "metadata")
        path.unlink()
    assert maps[0] == maps[1]
