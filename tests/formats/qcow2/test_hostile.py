"""Images made to do harm: only errors of ours, in bounded memory, and an end to everything (a test that hangs is
ended by its time limit)."""

from __future__ import annotations

import random
import resource
import struct
from collections.abc import Callable

import pytest

from diskwright.errors import DiskwrightError
from diskwright.formats.qcow2.layout import COMPRESSED, COPIED
from tests.formats.qcow2.support import LONG, Image, Tape, created, header_of, l1_of, poked

pytestmark = pytest.mark.timeout(3000 if LONG else 120)


def seed_images() -> list[bytes]:
    images = []
    for options in (
        {"size": 1 << 20, "cluster_size": 512},
        {"size": 1 << 20, "cluster_size": 4096, "compat": "0.10"},
        {"size": 4 << 20, "cluster_size": 65536, "refcount_bits": 1},
        {"size": 1 << 20, "cluster_size": 4096, "backing_file": "base", "backing_fmt": "raw"},
    ):
        tape = Tape(created(**options))
        with Image(tape) as image:
            image.disk.pwrite(0, b"a" * 50000)
            image.disk.zero(60000, 50000, unmap=False)
            image.disk.pwrite(500_000, b"b" * 50000)
        data = bytearray(tape.data)
        # Compressed entries too, pointing anywhere.
        header = header_of(bytes(data))
        table = l1_of(bytes(data))[0] & ~COPIED
        struct.pack_into(">Q", data, table + (1 << (header.cluster_bits - 3)) * 8 - 8, COMPRESSED | 5000)
        images.append(bytes(data))
    return images


SEEDS = seed_images()


def attempt(action: Callable[[], object]) -> None:
    try:
        action()
    except (DiskwrightError, OSError, ValueError) as error:
        # ValueError is what a disk raises for requests beyond its end, which has moved.
        assert not isinstance(error, ValueError) or "beyond the end" in str(error), repr(error)


def abuse(data: bytes, chance: random.Random) -> Tape:
    """Does everything that can be done with an image."""
    tape = Tape(data)
    attempt(lambda: read_all(data))
    for repair in (True, False):
        attempt(lambda repair=repair: write_some(tape, chance, repair))  # type: ignore[misc]
    return tape


def read_all(data: bytes) -> None:
    with Image(Tape(data), writable=False) as image:
        attempt(image.format.info)
        attempt(lambda: image.format.check("off"))
        size = image.disk.size
        for offset in {0, 512, size // 2, max(0, size - 4096), min(500_000, max(0, size - 1))}:
            attempt(lambda offset=offset: image.disk.pread(offset, 70_000))  # type: ignore[misc]
            if offset < size:
                length = min(1 << 30, size - offset)
                attempt(lambda offset=offset, length=length: image.format.extents(offset, length))  # type: ignore[misc]
                attempt(lambda offset=offset, length=length: image.format.extent_at(offset, length))  # type: ignore[misc]


def write_some(tape: Tape, chance: random.Random, repair: bool) -> None:
    with Image(tape, repair=repair) as image:
        if repair:
            attempt(lambda: image.format.check(chance.choice(("leaks", "all"))))
            return
        disk, size = image.disk, image.disk.size
        for _ in range(10):
            offset = chance.randrange(max(1, min(size, 1 << 20)))
            length = min(chance.choice((1, 5000, 60000)), max(0, size - offset))
            if length:
                attempt(lambda offset=offset, length=length: disk.pwrite(offset, b"x" * length))  # type: ignore[misc]
                attempt(lambda offset=offset, length=length: disk.zero(offset, length))  # type: ignore[misc]
                attempt(lambda offset=offset, length=length: disk.trim(offset, length))  # type: ignore[misc]
        attempt(disk.flush)
        attempt(lambda: image.node.resize(chance.choice((size + 4096, size // 2))))
        attempt(image.node.flush)


def mutate(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4, 16))):
        way = chance.random()
        if way < 0.4:
            changed[chance.randrange(112)] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))
        elif way < 0.5:
            at = chance.choice((8, 24, 40, 48, 64, 72, 88))
            struct.pack_into(">Q", changed, at, chance.choice((chance.getrandbits(64), chance.randrange(len(data)), 0)))
        else:
            at = chance.randrange(512, len(changed) - 8)
            at -= at % 8
            value = chance.choice(
                (chance.getrandbits(64), COPIED | chance.randrange(len(data)), COMPRESSED | chance.getrandbits(62), 1)
            )
            struct.pack_into(">Q", changed, at, value)
    if chance.random() < 0.1:
        del changed[chance.randrange(len(changed)) :]
    return bytes(changed)


@pytest.mark.parametrize("number", range(len(SEEDS)))
@pytest.mark.parametrize("part", range(3))
def test_damaged_images(number: int, part: int) -> None:
    chance = random.Random(f"{number} {part}")
    for _ in range(3000 if LONG else 30):
        abuse(mutate(SEEDS[number], chance), chance)


@pytest.mark.parametrize("number", range(len(SEEDS)))
def test_every_field_at_its_extremes(number: int) -> None:
    chance = random.Random(number)
    for offset in range(4, 112, 4):
        for value in (0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x10000):
            abuse(poked(SEEDS[number], offset, value, 4), chance)


def test_tables_that_point_at_each_other() -> None:
    chance = random.Random(1)
    data = SEEDS[1]
    header = header_of(data)
    places = [0, header.l1_table_offset, header.refcount_table_offset, l1_of(data)[0] & ~COPIED, 2 * 4096]
    for l1 in places:
        for l2 in places:
            for block in places:
                changed = poked(data, header.l1_table_offset, l1 | COPIED)
                changed = poked(changed, (l1_of(data)[0] & ~COPIED), l2 | COPIED)
                abuse(poked(changed, header.refcount_table_offset, block), chance)


def test_claims_of_size_take_no_memory() -> None:
    """The largest tables that are accepted, in a file that ends long before they do."""
    data = created(size=1 << 20, cluster_size=512)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for offset, value, width in ((36, 4194304, 4), (56, 16384, 4), (60, 65536, 4)):
        changed = poked(data, offset, value, width)
        if offset == 36:
            changed = poked(changed, 24, 128 << 30)
        if offset == 60:
            changed = poked(changed, 64, 512)
        abuse(changed, random.Random(2))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10, "200 MiB"


def test_no_more_than_the_declared_size_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compressed cluster of the greatest length there can be is two clusters long, not more."""
    data = SEEDS[0]
    header = header_of(data)
    g = header.geometry
    offset, stored = g.compressed_place(COMPRESSED | (1 << 62) - 1)
    assert stored <= 2 * g.cluster_size and offset < 1 << 62
    with Image(Tape(poked(data, (l1_of(data)[0] & ~COPIED) + 8, COMPRESSED | (1 << 62) - 1)), writable=False) as image:
        attempt(lambda: image.disk.pread(512, 512))


def test_a_long_snapshot_table_ends() -> None:
    """Entries that claim 4 GiB of extra data each, and as many of them as may be."""
    data = bytearray(created(size=1 << 20, cluster_size=4096))
    data.extend(bytes(-len(data) % 4096))
    where = len(data)
    data.extend(struct.pack(">QIHHIIQII", 0, 0, 0, 0, 0, 0, 0, 0, 0xFFFFFFFF) + bytes(4096))
    changed = poked(poked(bytes(data), 60, 65536, 4), 64, where)
    abuse(changed, random.Random(3))
