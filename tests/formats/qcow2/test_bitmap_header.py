"""Pointing the header at bitmaps: nothing else in it is ever at risk."""

from __future__ import annotations

import random
import struct

import pytest

from diskwright.core import bitmaps
from diskwright.errors import ImageError
from diskwright.formats.qcow2.bitmap_header import EXT_VACANT
from diskwright.formats.qcow2.header import BITMAPS, EXT_BITMAPS
from tests.formats.qcow2.bitmap_support import sound, stored, with_bitmaps
from tests.formats.qcow2.support import (
    Image,
    Tape,
    created,
    header_of,
    poked,
)
from tests.formats.qcow2.test_crash import after_crash


@pytest.mark.parametrize("cluster_size", [512, 1024, 4096, 65536])
@pytest.mark.parametrize("length", [0, 1, 9, 100, 200, 301])
def test_the_backing_file_name_makes_room(cluster_size: int, length: int) -> None:
    """Wherever a crash comes, the name is there, and other extensions are as they were."""
    names = {"backing_file": "b" * length, "backing_fmt": "raw"} if length else {}
    start = created(size=1 << 20, cluster_size=cluster_size, **names)
    tape = Tape(start)
    with Image(tape) as image:
        bitmaps.add(image.node, "one", persistent=True)
    before = header_of(start)
    for seed in range(3):
        chance = random.Random(seed)
        for position in range(len(tape.changes) + 1):
            header = header_of(after_crash(start, tape.changes, position, chance))
            assert header.backing_file == before.backing_file
            assert [pair for pair in header.extensions if pair[0] != EXT_BITMAPS] == before.extensions
    assert header_of(bytes(tape.data)).autoclear_features == BITMAPS
    with Image(tape) as image:
        bitmaps.remove(image.node, "one")
    header = header_of(bytes(tape.data))
    assert (header.extensions, header.backing_file) == (before.extensions, before.backing_file)
    assert header.autoclear_features == 0
    sound(bytes(tape.data))


def test_no_room_in_the_header() -> None:
    start = created(size=1 << 20, cluster_size=512, backing_file="b" * 380)
    tape = Tape(start)
    image = Image(tape)
    bitmaps.add(image.node, "one", persistent=True)
    with pytest.raises(ImageError, match="no room for bitmaps in the header"):
        image.close()
    assert header_of(bytes(tape.data)).backing_file == b"b" * 380
    assert stored(bytes(tape.data)) == {}


def followed(data: bytes) -> bytes:
    """Another extension behind the bitmaps extension."""
    place = data.index(struct.pack(">II", EXT_BITMAPS, 24)) + 32
    changed = bytearray(data)
    changed[place : place + 16] = struct.pack(">II8s", 0x1234_5678, 8, b"follower")
    return bytes(changed)


def test_the_last_bitmap_leaves_an_extension_that_others_follow() -> None:
    tape = Tape(followed(with_bitmaps("one")))
    with Image(tape) as image:
        bitmaps.remove(image.node, "one")
    header = header_of(bytes(tape.data))
    assert header.extension(EXT_BITMAPS) is None and header.extension(0x1234_5678) == b"follower"
    assert header.extension(EXT_VACANT) is not None
    with Image(tape) as image:
        bitmaps.add(image.node, "two", persistent=True).mark(0, 1)
    header = header_of(bytes(tape.data))
    assert header.extension(EXT_VACANT) is None and header.extension(0x1234_5678) == b"follower"
    assert stored(bytes(tape.data)) == {"two": (True, {0})}
    sound(bytes(tape.data))


def test_an_extension_across_sectors_is_exchanged_in_steps() -> None:
    start = bytearray(with_bitmaps("one"))
    place = start.index(struct.pack(">II", EXT_BITMAPS, 24))
    extension = bytes(start[place : place + 32])
    shift = (488 - place) % 512
    start[place : place + 8] = struct.pack(">II", 0x1111_1111, shift - 8)
    start[place + shift : place + shift + 32] = extension
    assert (place + shift + 8) // 512 != (place + shift + 31) // 512
    data = bytes(start)
    tape = Tape(data)
    with Image(tape) as image:
        image.disk.pwrite(5 << 16, b"x")
    for position in range(len(tape.changes) + 1):
        found = stored(after_crash(data, tape.changes, position, random.Random(position)))
        assert found in ({}, {"one": (True, {0})}, {"one": (False, None)}, {"one": (True, {0, 5})})
    assert stored(bytes(tape.data)) == {"one": (True, {0, 5})}


def test_bitmaps_of_a_program_that_did_not_know_them_are_void() -> None:
    tape = Tape(poked(with_bitmaps("one"), 88, 0))
    assert stored(bytes(tape.data)) == {}
    with Image(tape) as image:
        assert bitmaps.named(image.node) == []
        image.disk.pwrite(0, b"x")
        bitmaps.add(image.node, "two", persistent=True)
    assert stored(bytes(tape.data)) == {"two": (True, set())}
