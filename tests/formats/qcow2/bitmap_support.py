"""What the tests of persistent bitmaps share."""

from __future__ import annotations

import random

from diskwright.core import bitmaps
from diskwright.core.bitmap import DirtyBitmap
from diskwright.formats.qcow2.bitmaps import Entry, read_entries
from tests.formats.qcow2.support import (
    Image,
    Tape,
    checked,
    created,
)

SECTOR = 512


def dirty(bitmap: DirtyBitmap) -> set[int]:
    """Numbers of the granules that are dirty."""
    return {at for at in range(-(-bitmap.size // bitmap.granularity)) if bitmap.get(at * bitmap.granularity)}


def stored(data: bytes) -> dict[str, tuple[bool, set[int] | None]]:
    """Of each bitmap in an image whether it records and what is dirty in it; None for an inconsistent one."""
    with Image(Tape(data), writable=False) as image:
        return {
            str(each.name): (each.enabled, None if each.inconsistent else dirty(each))
            for each in bitmaps.named(image.node)
        }


def entries_of(data: bytes) -> list[Entry]:
    with Image(Tape(data), writable=False) as image:
        return read_entries(image.format.children[0], image.format.header)


def sound(data: bytes) -> None:
    report = checked(data)
    assert (report.corruptions, report.leaks, report.check_errors) == (0, 0, 0), report.messages


def with_bitmaps(*names: str, **options: object) -> bytes:
    """A new image with bitmaps of which each has a granule dirty."""
    tape = Tape(created(**{"size": 1 << 20, **options}))
    with Image(tape) as image:
        for number, name in enumerate(names):
            bitmaps.add(image.node, name, persistent=True).mark(number << 16, 1)
    return bytes(tape.data)


class Model:
    """Bitmaps as sets of granules, beside those of an image."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.all: dict[str, tuple[int, bool, set[int]]] = {}  # granularity, whether it records, granules

    def wrote(self, offset: int, length: int) -> None:
        for granularity, enabled, granules in self.all.values():
            if enabled:
                granules.update(range(offset // granularity, (offset + length - 1) // granularity + 1))

    def resized(self, size: int) -> None:
        self.size = size
        for name, (granularity, enabled, granules) in self.all.items():
            kept = {granule for granule in granules if granule * granularity < size}
            self.all[name] = granularity, enabled, kept

    def step(self, image: Image, chance: random.Random, *, resize: bool = True) -> None:
        """One thing that can be done with bitmaps, or with the disk."""
        node, disk = image.node, image.disk
        name = f"bitmap {chance.randrange(4)}"
        action = chance.random()
        if name not in self.all:
            granularity, enabled = 512 << chance.randrange(4), chance.random() < 0.7
            bitmaps.add(node, name, granularity, persistent=True, enabled=enabled)
            self.all[name] = granularity, enabled, set()
        elif action < 0.05:
            bitmaps.remove(node, name)
            del self.all[name]
        elif action < 0.1:
            bitmaps.clear(node, name)
            self.all[name][2].clear()
        elif action < 0.2:
            granularity, enabled, granules = self.all[name]
            (bitmaps.disable if enabled else bitmaps.enable)(node, name)
            self.all[name] = granularity, not enabled, granules
        elif action < 0.3:
            other = chance.choice(list(self.all))
            bitmaps.merge(node, name, [(node, other)])
            granularity, theirs = self.all[name][0], self.all[other][0]
            for granule in list(self.all[other][2]):
                end = min((granule + 1) * theirs, self.size)
                self.all[name][2].update(range(granule * theirs // granularity, (end - 1) // granularity + 1))
        elif action < 0.35 and resize:
            size = chance.randrange(1, 400) * SECTOR
            node.resize(size)
            self.resized(size)
        else:
            offset = chance.randrange(self.size)
            length = min(self.size - offset, chance.choice((1, 512, 700, 5000, 70000)))
            kind = chance.random()
            if kind < 0.7:
                disk.pwrite(offset, chance.randbytes(length))
            elif kind < 0.85:
                disk.zero(offset, length)
            else:
                disk.trim(offset, length)
            self.wrote(offset, length)

    def check(self, found: dict[str, tuple[bool, set[int] | None]]) -> None:
        assert found == {name: (enabled, granules) for name, (_, enabled, granules) in self.all.items()}
