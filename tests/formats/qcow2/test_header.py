"""The header: what is read from it, and what is refused, by name."""

from __future__ import annotations

import struct

import pytest

from diskwright.errors import CorruptImage, DiskwrightError, ImageError, LimitExceeded, UnsupportedFeature
from diskwright.formats.qcow2 import Qcow2
from diskwright.formats.qcow2.header import BITMAPS, COMPRESSION, CORRUPT, DIRTY, EXT_BITMAPS, LENGTH
from tests.formats.qcow2.support import Image, Tape, contents, created, header_of, poked

SIZE = 1 << 20
NEW = created(size=SIZE)


@pytest.mark.parametrize(
    ("offset", "value", "width", "field"),
    [
        (0, 0x514649FC, 4, "magic"),
        (8, 65537, 8, "backing_file_offset"),
        (20, 8, 4, "cluster_bits"),
        (20, 22, 4, "cluster_bits"),
        (20, 0xFFFFFFFF, 4, "cluster_bits"),
        (24, (1 << 63) - 1, 8, "size"),
        (24, 1 << 50, 8, "l1_size"),
        (36, 0, 4, "l1_size"),
        (40, 0x30001, 8, "l1_table_offset"),
        (40, 0, 8, "l1_table_offset"),
        (40, 1 << 40, 8, "l1_table_offset"),
        (40, (1 << 64) - 65536, 8, "l1_table_offset"),
        (48, 0x10200, 8, "refcount_table_offset"),
        (96, 7, 4, "refcount_order"),
        (100, 103, 4, "header_length"),
        (100, 65537, 4, "header_length"),
        (104, 1, 1, "compression_type"),
    ],
)
def test_impossible_fields_are_named(offset: int, value: int, width: int, field: str) -> None:
    with pytest.raises(CorruptImage) as raised:
        header_of(poked(NEW, offset, value, width))
        contents(poked(NEW, offset, value, width))
    assert raised.value.field == field
    assert "tape" in str(raised.value)


@pytest.mark.parametrize(
    ("offset", "value", "width", "words"),
    [
        (36, (32 << 20) // 8 + 1, 4, "l1_size is 4194305 at offset 0x24"),
        (56, 129, 4, "refcount_table_clusters is 129 at offset 0x38"),
        (60, 65537, 4, "nb_snapshots is 65537"),
    ],
)
def test_limits_are_stated(offset: int, value: int, width: int, words: str) -> None:
    with pytest.raises(LimitExceeded, match=words):
        header_of(poked(NEW, offset, value, width))


@pytest.mark.parametrize(
    ("offset", "value", "width", "words"),
    [
        (4, 4, 4, "version 4"),
        (4, 1, 4, "version 1"),
        (32, 9, 4, "method 9"),
        (72, 1 << 5, 8, "unknown feature 5"),
        (72, 1 << 63, 8, "unknown feature 63"),
        (72, 1 << 4 | 1 << 2 | 1 << 6, 8, "unknown feature 6"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(offset: int, value: int, width: int, words: str) -> None:
    with pytest.raises(UnsupportedFeature, match=words):
        header_of(poked(NEW, offset, value, width))


def test_unknown_features_have_the_name_the_image_gives_them() -> None:
    at = NEW.index(b"extended L2 entries") - 2
    renamed = bytearray(NEW)
    renamed[at : at + 48] = struct.pack(">BB46s", 0, 40, b"time \x1b[31mtravel")
    with pytest.raises(UnsupportedFeature, match=r"not supported here: time \[31mtravel$"):
        header_of(poked(bytes(renamed), 72, 1 << 40))


def test_unknown_compression_type() -> None:
    with pytest.raises(UnsupportedFeature, match="compression type 2"):
        header_of(poked(poked(NEW, 72, COMPRESSION), 104, 2, 1))


def extended(kind: int, data: bytes, *, image: bytes = NEW) -> bytes:
    """The image with one more header extension, before the others."""
    added = struct.pack(">II", kind, len(data)) + data + bytes(-len(data) % 8)
    return image[:LENGTH] + added + image[LENGTH : 65536 - len(added)] + image[65536:]


def test_unknown_extensions_are_read_over_and_stay() -> None:
    image = extended(0x12345678, b"something else")
    header = header_of(image)
    assert header.extensions[0] == (0x12345678, b"something else")
    tape = Tape(image)
    with Image(tape) as opened:
        opened.disk.pwrite(0, b"data")
        opened.node.resize(SIZE * 2)
    after = header_of(bytes(tape.data))
    assert after.extensions == header.extensions and after.size == 2 * SIZE


def test_an_extension_that_is_too_long_is_refused() -> None:
    with pytest.raises(CorruptImage, match="length of header extension 0x12345678 is 4294967295 at offset 0x74"):
        header_of(poked(extended(0x12345678, b"x"), LENGTH + 4, 0xFFFFFFFF, 4))


def test_backing_name_limits() -> None:
    image = created(size=SIZE, backing_file="base", backing_fmt="raw")
    with pytest.raises(CorruptImage, match="backing_file_size is 1024 at offset 0x10"):
        header_of(poked(image, 16, 1024, 4))
    where = header_of(image).backing_file_offset
    with pytest.raises(CorruptImage, match="backing file name"):
        header_of(poked(image, where, 0, 1))
    v2 = created(size=SIZE, backing_file="base", compat="0.10")
    backing = header_of(v2).backing
    assert backing is not None and backing == ("base", None)


@pytest.mark.parametrize("length", [0, 3, 4, 20, 71, 72, 100, 111, 112, 1000, 65536, 0x20000, 0x30001])
def test_cut_off_images_raise_errors_of_ours(length: int) -> None:
    with pytest.raises(DiskwrightError):
        contents(NEW[:length])


def test_probe() -> None:
    assert Qcow2.probe(NEW[:2048], "x") == 100
    assert Qcow2.probe(NEW[:8], "x") == 100 and Qcow2.probe(NEW[:7], "x") == 0
    assert Qcow2.probe(poked(NEW, 4, 1, 4)[:2048], "x") == 0 and Qcow2.probe(b"", "x.qcow2") == 0


# -- marks that concern writing ----------------------------------------------------------------------------


def test_an_image_marked_corrupt_is_read_but_not_written() -> None:
    image = poked(NEW, 72, CORRUPT)
    assert contents(image) == bytes(SIZE)
    with pytest.raises(ImageError, match="marked corrupt"):
        Image(Tape(image))
    with Image(Tape(image), writable=False) as opened:
        specific = opened.format.info().specific
        assert specific is not None and specific["corrupt"] is True


def test_a_repair_takes_the_marks_away() -> None:
    tape = Tape(poked(NEW, 72, CORRUPT | DIRTY))
    with Image(tape, repair=True) as image:
        with pytest.raises(ImageError, match="for repair only"):
            image.disk.pwrite(0, b"x")
        assert image.format.check("all").corruptions == 0
    assert header_of(bytes(tape.data)).incompatible_features == 0


def test_a_dirty_image_is_repaired_before_it_is_written_to() -> None:
    tape = Tape(NEW)
    with Image(tape) as image:
        image.disk.pwrite(0, b"x" * 200000)
    dirty = poked(poked(bytes(tape.data), 72, DIRTY), 0x20000 + 2 * 5, 0, 2)  # and the refcount of cluster 5 was lost
    assert contents(dirty)[:200000] == b"x" * 200000
    tape = Tape(dirty)
    with Image(tape) as image:
        assert image.disk.pread(0, 200000) == b"x" * 200000
        image.disk.pwrite(500000, b"y")
        assert image.format.check("off").corruptions == 0
    assert header_of(bytes(tape.data)).incompatible_features == 0


def test_unknown_autoclear_bits_are_cleared_for_writing_only() -> None:
    image = poked(NEW, 88, 1 << 20 | 1 << 63)
    tape = Tape(image)
    with Image(tape, writable=False):
        pass
    assert bytes(tape.data) == image
    with Image(tape):
        assert tape.changes[0][:2] == ("write", 88) and tape.changes[1][0] == "flush"
    assert header_of(bytes(tape.data)).autoclear_features == 0


def test_impossible_bitmaps_keep_an_image_from_being_written_to_only() -> None:
    image = poked(extended(EXT_BITMAPS, struct.pack(">IIQQ", 1, 0, 64, 0x40000)), 88, BITMAPS)
    assert contents(image) == bytes(SIZE)
    with pytest.raises(CorruptImage, match="bitmap_directory_offset is 0x40000"):
        Image(Tape(image))


def test_an_image_without_refcounts_is_read_but_not_written() -> None:
    image = poked(NEW, 56, 0, 4)
    assert contents(image) == bytes(SIZE)
    with pytest.raises(CorruptImage, match="refcount_table_clusters is 0"):
        Image(Tape(image))
    tape = Tape(image)
    with Image(tape, repair=True) as opened:
        opened.format.check("all")
    with Image(tape) as opened:
        opened.disk.pwrite(0, b"works again")
        report = opened.format.check("off")
        assert (report.corruptions, report.leaks) == (0, 0)


def test_lazy_refcounts_are_no_obstacle() -> None:
    tape = Tape(created(size=SIZE, lazy_refcounts=True))
    with Image(tape) as image:
        image.disk.pwrite(0, b"x")
        specific = image.format.info().specific
        assert specific is not None and specific["lazy-refcounts"] is True
    header = header_of(bytes(tape.data))
    assert header.compatible_features == 1 and header.incompatible_features == 0


def test_info_has_the_facts_qemu_shows() -> None:
    with Image(Tape(created(size=SIZE, cluster_size=4096, refcount_bits=8)), writable=False) as image:
        info = image.format.info()
    assert info.cluster_size == 4096 and info.dirty is False
    assert info.specific is not None and list(info.specific.items()) == [
        ("compat", "1.1"), ("compression-type", "zlib"), ("lazy-refcounts", False), ("refcount-bits", 8),
        ("corrupt", False), ("extended-l2", False),
    ]  # fmt: skip
    with Image(Tape(created(size=SIZE, compat="0.10")), writable=False) as image:
        specific = image.format.info().specific
    assert specific is not None and list(specific) == ["compat", "compression-type", "refcount-bits"]
