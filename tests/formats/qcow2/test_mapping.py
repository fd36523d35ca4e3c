"""Maps: one run at a time and in bulk say the same, for every kind of entry, and impossible entries are named."""

from __future__ import annotations

import itertools
import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diskwright.core.driver import runs_of
from diskwright.errors import CorruptImage
from diskwright.extents import DATA, SPECIAL, UNALLOCATED, ZERO, Extent, Extents
from diskwright.formats.qcow2 import mapping
from diskwright.formats.qcow2.layout import COMPRESSED, COPIED
from tests.formats.qcow2.support import Image, Tape, created, header_of, l1_of, l2_entry_place, poked

KINDS = ("nothing", "data", "next", "shared", "zero", "ready", "compressed", "reserved", "flag only")


def image_with(entries: list[int], cluster_size: int, *, spare_l1: int = 0) -> bytes:
    """An image whose first guest clusters have these L2 entries. The tables lie behind the metadata."""
    size = (len(entries) + (spare_l1 * cluster_size // 8)) * cluster_size
    data = bytearray(created(size=size, cluster_size=cluster_size))
    header = header_of(bytes(data))
    per_table = cluster_size // 8
    data.extend(bytes(-len(data) % cluster_size))
    for i in range(0, len(entries), per_table):
        struct.pack_into(">Q", data, header.l1_table_offset + i // per_table * 8, len(data) | COPIED)
        part = entries[i : i + per_table]
        data.extend(struct.pack(f">{len(part)}Q", *part).ljust(cluster_size, b"\0"))
    return bytes(data)


def make_entries(kinds: list[str], cluster_size: int) -> list[int]:
    entries, place = [], 1000
    for kind in kinds:
        if kind in ("data", "shared", "ready", "compressed"):
            place += 3
        elif kind == "next":
            place += 1
        at = place * cluster_size
        sectors = 3 << (62 - (cluster_size.bit_length() - 1 - 8)) if cluster_size > 512 else 0
        descriptors = {
            "nothing": 0,
            "data": at | COPIED,
            "next": at | COPIED,
            "shared": at,
            "zero": 1,
            "ready": at | 1 | COPIED,
            "compressed": COMPRESSED | at + 77 | sectors,
            "reserved": at | 1 << 60 | 2,
            "flag only": COPIED,
        }
        entries.append(descriptors[kind])
    return entries


@settings(deadline=None, max_examples=150)
@given(
    kinds=st.lists(st.tuples(st.sampled_from(KINDS), st.integers(1, 30)), min_size=1, max_size=40),
    cluster_size=st.sampled_from([512, 4096]),
    start=st.integers(0, 1 << 20),
    length=st.integers(1, 1 << 20),
    bulk=st.sampled_from([7, 1 << 18]),
)
def test_one_by_one_and_in_bulk(
    kinds: list[tuple[str, int]], cluster_size: int, start: int, length: int, bulk: int
) -> None:
    entries = make_entries([kind for kind, times in kinds for _ in range(times)], cluster_size)
    with Image(Tape(image_with(entries, cluster_size, spare_l1=1)), writable=False) as image:
        size = image.disk.size
        start %= size
        length = min(length, size - start)
        before, mapping._BULK = mapping._BULK, bulk  # type: ignore[misc]
        try:
            cold = image.format.extents(start, length)
            single = list(runs_of(image.format.extent_at, start, length))
            warm = image.format.extents(start, length)
        finally:
            mapping._BULK = before  # type: ignore[misc]
        assert cold.merge() == warm.merge() == Extents.of(single).merge()
        assert single[0].offset == start and single[-1].end == start + length
        for a, b in itertools.pairwise(single):
            assert a.end == b.offset


@pytest.mark.parametrize("cluster_size", [512, 4096, 65536, 2 << 20])
def test_what_each_kind_of_entry_means(cluster_size: int) -> None:
    entries = make_entries(["data", "next", "nothing", "zero", "ready", "compressed", "reserved"], cluster_size)
    with Image(Tape(image_with(entries, cluster_size)), writable=False) as image:
        at, size = image.format.extent_at, cluster_size
        assert at(10, 2 * size - 10) == Extent(10, 2 * size - 10, DATA, 1003 * size + 10)
        assert at(2 * size, 2 * size) == Extent(2 * size, size, UNALLOCATED)
        assert at(3 * size + 1, 2 * size - 1) == Extent(3 * size + 1, size - 1, ZERO)
        assert at(4 * size + 5, 7) == Extent(4 * size + 5, 7, ZERO, 1007 * size + 5)
        stored = (4 if size > 512 else 1) * 512 - 77
        assert at(5 * size + 9, size) == Extent(5 * size + 9, size - 9, SPECIAL, 1010 * size + 77, 0, stored)
        assert at(6 * size, size) == Extent(6 * size, size, DATA, entries[6] & 0x00FFFFFFFFFFFE00)


def test_runs_go_on_over_long_requests() -> None:
    entries = [(5000 + i) * 512 | (COPIED if i % 7 else 0) for i in range(64 * 3)]
    with Image(Tape(image_with(entries, 512)), writable=False) as image:
        assert len(image.format.extents(0, 64 * 3 * 512)) == 1
        assert image.format.extent_at(0, 64 * 512).length == 64 * 512


def test_a_sparse_disk_is_one_run_however_large() -> None:
    with Image(Tape(created(size=1 << 50, cluster_size=2 << 20)), writable=False) as image:
        assert image.format.extent_at(12345, 1 << 39) == Extent(12345, 1 << 39, UNALLOCATED)
        assert list(image.format.extents(5, 1 << 30)) == [Extent(5, 1 << 30, UNALLOCATED)]


@pytest.mark.parametrize(
    ("entry", "why"), [(1000 * 4096 + 512 | COPIED, "not aligned"), (1000 * 4096 + 1024 | 1 | COPIED, "not aligned")]
)
def test_places_that_are_not_aligned_are_refused(entry: int, why: str) -> None:
    data = image_with([0, 0, entry, 0], 4096)
    where = l2_entry_place(data, 2 * 4096)
    with Image(Tape(data), writable=False) as image:
        assert image.format.extent_at(0, 8192).kind == UNALLOCATED
        for ask in (image.format.extent_at, image.format.extents):
            with pytest.raises(
                CorruptImage, match=rf"L2 entry of guest offset 0x2000 is 0x\w+ at offset {where:#x}: .*{why}"
            ):
                ask(2 * 4096, 4096)
    with Image(Tape(data)) as image:
        assert image.format.in_place(8192, 10) == -1
        with pytest.raises(CorruptImage):
            image.disk.pwrite(8192, b"x")
    with Image(Tape(data)) as image, pytest.raises(CorruptImage):
        image.disk.zero(8192, 4096)


def test_version_2_has_no_zero_clusters() -> None:
    data = poked(image_with([1], 4096), 4, 2, 4)
    with Image(Tape(data), writable=False) as image:
        for ask in (image.format.extent_at, image.format.extents):
            with pytest.raises(CorruptImage, match="version 2 has no zero clusters"):
                ask(0, 4096)


@pytest.mark.parametrize(
    ("entry", "why"),
    [(0x4200 | COPIED, "not aligned"), (1 << 40 | COPIED, "beyond the end"), (0x00FFFFFFFFFFF000, "beyond the end")],
)
def test_impossible_l2_tables_are_refused(entry: int, why: str) -> None:
    data = created(size=4 << 20, cluster_size=4096)
    data = poked(data, header_of(data).l1_table_offset, entry) + bytes(16384)
    with Image(Tape(data), writable=False) as image:
        with pytest.raises(CorruptImage, match=rf"L1 entry 0 is {entry:#x} at offset 0x3000: .*{why}"):
            image.format.extent_at(0, 10)
        with pytest.raises(CorruptImage):
            image.format.extents(0, 1 << 20)
        assert image.format.extent_at(2 << 20, 10).kind == UNALLOCATED


def test_the_cache_does_not_show() -> None:
    """With room for a single slice everything is as with room for all."""
    chance = random.Random(4)
    entries = make_entries(chance.choices(KINDS[:6], k=2000), 512)
    data = image_with(entries, 512)
    with Image(Tape(data), writable=False, cache_size=1) as small, Image(Tape(data), writable=False) as large:
        for _ in range(300):
            offset = chance.randrange(2000 * 512)
            length = min(2000 * 512 - offset, chance.randrange(1, 5000))
            assert small.format.extent_at(offset, length) == large.format.extent_at(offset, length)
        assert len(small.format.mapping.l2.young) == 1
    assert len(l1_of(data)) == 32
