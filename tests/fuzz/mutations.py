"""Damage to qcow2 images that knows where their structures are, so that most of it goes unnoticed by the first check
of a header and reaches what lies behind."""

from __future__ import annotations

import random
import struct
from typing import NamedTuple

from diskwright.formats.qcow2 import bitmaps
from diskwright.formats.qcow2.header import EXT_BITMAPS, V2_LENGTH, Header
from diskwright.formats.qcow2.layout import COMPRESSED, COPIED, OFFSET_MASK
from tests.formats.qcow2.support import entries, header_of

TOP = (1 << 64) - 1
BITS = (0, 1, 2, 4, 8, 9, 10, 11, 12, 14, 16, 17, 20, 21, 22, 25, 30, 31, 32, 40, 54, 55, 56, 58, 61, 62, 63)


class Place(NamedTuple):
    """A structure: ``length`` bytes at ``offset`` of the file, made of fields of ``width`` bytes."""

    kind: str
    offset: int
    length: int
    width: int = 8


def places(data: bytes) -> list[Place]:
    """Everything that describes the image, tables with much in them cut short."""
    header = header_of(data)
    cluster = 1 << header.cluster_bits
    table = entries(data, header.refcount_table_offset, header.refcount_table_clusters * cluster // 8)
    l1 = entries(data, header.l1_table_offset, header.l1_size)
    found = [
        Place("header", 8, V2_LENGTH - 8, 4),
        Place("l1", header.l1_table_offset, header.l1_size * 8),
        Place("reftable", header.refcount_table_offset, 64),
    ]
    if header.version >= 3:
        found.append(Place("header", 72, 40, 4))
    found += [Place("l2", entry & OFFSET_MASK, min(cluster, 4096)) for entry in l1 if entry]
    found += [Place("refblock", entry, min(cluster, 512), 2) for entry in table if entry]
    return found + _snapshot_places(data, header) + _bitmap_places(data, header)


def _snapshot_places(data: bytes, header: Header) -> list[Place]:
    found, at = [], header.snapshots_offset
    for _ in range(header.nb_snapshots):
        offset, size, id_length, name_length, *_, extra = struct.unpack_from(">QIHHIIQII", data, at)
        found.append(Place("snapshot", at, 40, 4))
        found.append(Place("snapshot extra", at + 36, 4 + extra, 4))
        found.append(Place("snapshot l1", offset, size * 8))
        found += [
            Place("snapshot l2", entry & OFFSET_MASK, min(1 << header.cluster_bits, 4096))
            for entry in entries(data, offset, size)
            if entry
        ]
        length = 40 + extra + id_length + name_length
        at += length + -length % 8
    return found


def _bitmap_places(data: bytes, header: Header) -> list[Place]:
    extension = header.extension(EXT_BITMAPS)
    if extension is None:
        return []
    count, _, _, offset = struct.unpack(">IIQQ", extension)
    found = [Place("bitmap extension", data.index(extension) - 8, 32, 4)]
    at = offset
    for _ in range(count):
        table, length, _, _, _, name, extra = struct.unpack_from(">QIIBBHI", data, at)
        found += [Place("bitmap entry", at, 24, 4), Place("bitmap table", table, length * 8)]
        used = 24 + name + extra
        at += used + -used % 8
    assert bitmaps.MAX_TABLE_BYTES
    return found


def mutated(data: bytes, chance: random.Random, *, kinds: tuple[str, ...] = (), resize: bool = True) -> bytes:
    """A damaged copy. ``kinds``: only structures of these; else of all kinds alike."""
    there, changed = places(data), bytearray(data)
    there = [place for place in there if not kinds or place.kind in kinds]
    names = sorted({place.kind for place in there})
    # A header that is refused shows little; one change in ten is enough for it.
    weights = [0.4 if name == "header" else 1 for name in names]
    for _ in range(chance.choice((1, 1, 2, 5))):
        kind = chance.choices(names, weights)[0]
        place = chance.choice([place for place in there if place.kind == kind])
        _damage(changed, place, there, chance)
    if resize and chance.random() < 0.1:
        size = chance.randrange(len(data) // 2, len(data) + 200000)
        changed = changed[:size].ljust(size, b"\0")
    return bytes(changed)


def _damage(changed: bytearray, place: Place, there: list[Place], chance: random.Random) -> None:
    width = place.width
    at = place.offset + width * chance.randrange(max(1, place.length // width))
    at = max(0, min(at, len(changed) - width))
    value = int.from_bytes(changed[at : at + width], "big")
    other = chance.choice(there)
    way = chance.random()
    if way < 0.45:
        value ^= 1 << chance.choice([bit for bit in BITS if bit < 8 * width])
    elif way < 0.55:
        value = 0
    elif way < 0.7:
        at_other = other.offset + other.width * chance.randrange(max(1, other.length // other.width))
        value = int.from_bytes(changed[at_other : at_other + width], "big")
    elif way < 0.8:
        value = chance.choice((COPIED, COPIED | other.offset, COMPRESSED | chance.getrandbits(62), other.offset))
    elif way < 0.85:
        value = chance.getrandbits(8 * width)
    elif way < 0.95:
        value += chance.choice((-65536, 65536, -4096, 4096, 1, -1, 512))
    else:
        value = chance.choice((TOP, TOP >> 1, 1 << 55, 1 << 31, 0xFFFFFFFF))
    changed[at : at + width] = (value & TOP >> 64 - 8 * width).to_bytes(width, "big")
