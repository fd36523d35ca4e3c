"""Images whose bitmaps are not as they should be."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterable

import pytest

from diskwright.core import bitmaps
from diskwright.core.bitmap import InconsistentBitmap
from diskwright.errors import CorruptImage, DiskwrightError, ImageError, LimitExceeded
from diskwright.formats.qcow2 import bitmap_store
from diskwright.formats.qcow2.bitmaps import AUTO, EXTRA_DATA_COMPATIBLE, IN_USE, Entry, encode_directory
from diskwright.formats.qcow2.header import EXT_BITMAPS
from tests.formats.qcow2.bitmap_support import entries_of, sound, stored, with_bitmaps
from tests.formats.qcow2.support import (
    Image,
    Tape,
    checked,
    contents,
    header_of,
    poked,
)


def rewritten(data: bytes, entries: Iterable[Entry]) -> bytes:
    """The image with another directory in the old one's place."""
    place = data.index(struct.pack(">II", EXT_BITMAPS, 24)) + 8
    _, _, _, offset = struct.unpack_from(">IIQQ", data, place)
    listed = list(entries)
    directory = encode_directory(listed)
    changed = bytearray(data)
    changed[place : place + 24] = struct.pack(">IIQQ", len(listed), 0, len(directory), offset)
    changed[offset : offset + len(directory)] = directory
    return bytes(changed)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("name", b"", "name of bitmap 0"),
        ("name", b"x" * 1024, "name of bitmap 0"),
        ("name", b"a\0b", "name of bitmap 0"),
        ("granularity_bits", 8, "granularity_bits of bitmap 0 is 8"),
        ("granularity_bits", 32, "granularity_bits of bitmap 0 is 32"),
        ("type", 0, "type of bitmap 0 is 0"),
        ("type", 2, "type of bitmap 0 is 2"),
        ("name", b"two", "another has it too"),
    ],
)
def test_impossible_entries_are_refused(field: str, value: object, words: str) -> None:
    data = with_bitmaps("one", "two")
    entries = entries_of(data)
    setattr(entries[0], field, value)
    damaged = rewritten(data, entries)
    with pytest.raises(CorruptImage, match=words):
        stored(damaged)
    with pytest.raises(CorruptImage, match=words):
        Image(Tape(damaged))
    assert contents(damaged) == bytes(1 << 20), "the disk can still be read"


@pytest.mark.parametrize(
    ("at", "layout", "value", "words"),
    [
        (0, "I", 0, "nb_bitmaps"),
        (0, "I", 65536, "nb_bitmaps"),
        (0, "I", 3, "bitmap directory|sizes in the entry|bitmap_directory_size"),
        (0, "I", 1, "bitmap_directory_size"),
        (8, "Q", 0, "bitmap_directory_size"),
        (8, "Q", 1 << 60, "bitmap_directory_size"),
        (8, "Q", 60, "sizes in the entry|too short|bitmap_directory_size"),
        (16, "Q", 0, "bitmap_directory_offset"),
        (16, "Q", 512, "bitmap_directory_offset"),
        (16, "Q", 1 << 62, "bitmap_directory_offset"),
    ],
)
def test_impossible_directories_are_refused(at: int, layout: str, value: int, words: str) -> None:
    data = bytearray(with_bitmaps("one", "two"))
    struct.pack_into(f">{layout}", data, data.index(struct.pack(">II", EXT_BITMAPS, 24)) + 8 + at, value)
    with pytest.raises(CorruptImage, match=words):
        stored(bytes(data))
    with pytest.raises(CorruptImage, match=words):
        Image(Tape(bytes(data)))


@pytest.mark.parametrize("value", ["reserved", "unaligned", "beyond", "header", "itself", "refcounts", "size", "place"])
def test_a_bitmap_with_an_impossible_table_is_inconsistent_and_no_more(value: str) -> None:
    data = with_bitmaps("one", "two")
    entries = entries_of(data)
    table = entries[0].bitmap_table_offset
    header = header_of(data)
    damaged = {
        "reserved": lambda: poked(data, table, 1 << 60),
        "unaligned": lambda: poked(data, table, 0x50200),
        "beyond": lambda: poked(data, table, 1 << 40),
        "header": lambda: poked(data, table, header.refcount_table_offset),
        "itself": lambda: poked(data, table, table),
        "refcounts": lambda: poked(data, table, header.l1_table_offset),
        "size": lambda: rewritten(data, [_with(entries[0], "bitmap_table_size", 2), entries[1]]),
        "place": lambda: rewritten(data, [_with(entries[0], "bitmap_table_offset", 77), entries[1]]),
    }[value]()
    tape = Tape(damaged)
    with Image(tape) as image:
        one, two = bitmaps.named(image.node)
        assert (one.inconsistent, two.inconsistent) == (True, False)
        image.disk.pwrite(9 << 16, b"x")
    found = stored(bytes(tape.data))
    assert found == {"one": (False, None), "two": (True, {1, 9})}
    assert entries_of(bytes(tape.data))[0].flags == IN_USE | AUTO, "what was not recorded must not be believed"
    with Image(tape) as image:
        bitmaps.remove(image.node, "one")
        image.disk.pwrite(0, bytes(range(256)) * 4096)
    assert stored(bytes(tape.data)) == {"two": (True, set(range(16)))}
    assert contents(bytes(tape.data)) == bytes(range(256)) * 4096
    assert not checked(bytes(tape.data)).corruptions


def _with(entry: Entry, field: str, value: int) -> Entry:
    setattr(entry, field, value)
    return entry


def test_two_bitmaps_cannot_share_a_cluster() -> None:
    data = with_bitmaps("one", "two")
    first, second = (entry.bitmap_table_offset for entry in entries_of(data))
    shared = bytearray(data)
    shared[second : second + 8] = shared[first : first + 8]
    tape = Tape(bytes(shared))
    with Image(tape) as image:
        assert [each.inconsistent for each in bitmaps.named(image.node)] == [False, True]
        bitmaps.remove(image.node, "two")
    assert stored(bytes(tape.data)) == {"one": (True, {0})}


def test_extra_data_that_does_no_harm_is_kept() -> None:
    data = with_bitmaps("one")
    (entry,) = entries_of(data)
    entry.extra_data, entry.flags = b"more than we know", AUTO | EXTRA_DATA_COMPATIBLE
    tape = Tape(rewritten(data, [entry]))
    with Image(tape) as image:
        image.disk.pwrite(5 << 16, b"x")
    (entry,) = entries_of(bytes(tape.data))
    assert (entry.extra_data, entry.flags) == (b"more than we know", AUTO | EXTRA_DATA_COMPATIBLE)
    assert stored(bytes(tape.data)) == {"one": (True, {0, 5})}
    sound(bytes(tape.data))


@pytest.mark.parametrize(("flags", "extra"), [(0, b"what is this?"), (8, b"")])
def test_what_is_not_understood_is_kept_or_refused(flags: int, extra: bytes) -> None:
    data = with_bitmaps("one", "two")
    one, two = entries_of(data)
    one.extra_data, one.flags = extra, flags
    tape = Tape(rewritten(data, [one, two]))
    with Image(tape) as image:
        assert bitmaps.find(image.node, "one").inconsistent
        image.disk.pwrite(5 << 16, b"x")
        with pytest.raises(InconsistentBitmap):
            image.node.resize(2 << 20)
    kept = entries_of(bytes(tape.data))[0]
    assert (kept.extra_data, kept.flags, kept.bitmap_table_offset) == (extra, flags, one.bitmap_table_offset)
    report = checked(bytes(tape.data))
    assert report.messages == (["ERROR bitmap 0: reserved flags are set: 0x8"] if flags else [])
    assert (report.corruptions, report.leaks) == (len(report.messages), 0)
    one.flags |= AUTO
    with pytest.raises(ImageError, match="bitmap 'one' would have to record writes"):
        Image(Tape(rewritten(data, [one, two])))


def test_memory_is_bounded_before_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    data = with_bitmaps("one", "two")
    entries = entries_of(data)
    entries[0].bitmap_table_size = 0xFFFF_FFFF
    with pytest.raises(LimitExceeded, match="the tables of its bitmaps take"):
        Image(Tape(rewritten(data, entries)))
    monkeypatch.setattr(bitmap_store, "MAX_BITS_BYTES", 5)
    with pytest.raises(LimitExceeded, match="bitmaps take 6 bytes"):
        stored(data)


def test_hostile_bytes_do_no_more_than_raise() -> None:
    data = with_bitmaps("one", "two", cluster_size=512)
    place = data.index(struct.pack(">II", EXT_BITMAPS, 24))
    _, _, size, offset = struct.unpack_from(">IIQQ", data, place + 8)
    spots = [*range(place + 8, place + 32), *range(offset, offset + size)]
    spots += [entry.bitmap_table_offset + i for entry in entries_of(data) for i in range(8)]
    chance = random.Random(7)
    for spot in spots:
        changed = bytearray(data)
        changed[spot] ^= 1 << chance.randrange(8)
        tape = Tape(bytes(changed))
        try:
            with Image(tape) as image:
                image.disk.pwrite(0, bytes(range(256)) * 4096)
                assert image.disk.pread(0, 1 << 20) == bytes(range(256)) * 4096
        except DiskwrightError:
            continue
        assert contents(bytes(tape.data)) == bytes(range(256)) * 4096


def test_a_bitmap_in_clusters_counted_as_free_is_not_believed() -> None:
    data = with_bitmaps("one", cluster_size=512)
    (entry,) = entries_of(data)
    (block,) = struct.unpack_from(">Q", data, header_of(data).refcount_table_offset)
    tape = Tape(poked(data, block + entry.bitmap_table_offset // 512 * 2, 0, 2))
    with Image(tape) as image:
        assert bitmaps.find(image.node, "one").inconsistent
        image.disk.pwrite(0, b"z" * (1 << 20))
    assert contents(bytes(tape.data)) == b"z" * (1 << 20)
    assert stored(bytes(tape.data)) == {"one": (False, None)}


def test_a_repair_leaves_bitmaps_alone() -> None:
    tape = Tape(with_bitmaps("one"))
    with Image(tape, repair=True) as image:
        image.format.check("all")
    assert stored(bytes(tape.data)) == {"one": (True, {0})}
    sound(bytes(tape.data))
