"""Persistent bitmaps as they lie in the file (sections Bitmaps extension, Bitmap directory, Bitmap table).

What is done with them is in ``bitmap_store``.
"""

from __future__ import annotations

import os
import struct
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from diskwright.core.node import Node
from diskwright.errors import CorruptImage
from diskwright.formats.qcow2.header import BITMAPS, EXT_BITMAPS, Header
from diskwright.formats.qcow2.layout import MAX_BITMAP_DIRECTORY_BYTES, MAX_BITMAPS, OFFSET_MASK
from diskwright.formats.qcow2.mapping import read_table

_EXTENSION: Final = struct.Struct(">IIQQ")
_ENTRY: Final = struct.Struct(">QIIBBHI")

MAX_TABLE_BYTES: Final = 1 << 26
"""A bitmap of the finest granularity, 512 bytes, for 2 EiB at 64 KiB clusters has a table of this order."""

TABLE_RESERVED: Final = 0xFF00_0000_0000_01FE

ALL_ONES: Final = 1
"""A table entry: the cluster that is not there reads as ones."""

# Flags of a directory entry.
IN_USE: Final = 1 << 0
AUTO: Final = 1 << 1
EXTRA_DATA_COMPATIBLE: Final = 1 << 2
KNOWN_FLAGS: Final = IN_USE | AUTO | EXTRA_DATA_COMPATIBLE
DIRTY_TRACKING: Final = 1
"""The only type of bitmap there is."""

AT_FLAGS: Final = 12
"""Where in an entry its flags lie."""

MAX_NAME: Final = 1023
"""Bytes."""
MIN_GRANULARITY_BITS: Final = 9
MAX_GRANULARITY_BITS: Final = 31


@dataclass
class Entry:
    """An entry of the bitmap directory, its fields named as in the specification. ``at`` is its distance from the
    directory's beginning in bytes."""

    bitmap_table_offset: int
    bitmap_table_size: int
    flags: int
    granularity_bits: int
    name: bytes
    extra_data: bytes = b""
    type: int = DIRTY_TRACKING
    at: int = 0

    @property
    def usable(self) -> bool:
        """Whether we know all that its contents depend on."""
        return not self.flags & ~KNOWN_FLAGS and (not self.extra_data or bool(self.flags & EXTRA_DATA_COMPATIBLE))

    def encode(self) -> bytes:
        """With the padding behind it."""
        fixed = _ENTRY.pack(
            self.bitmap_table_offset, self.bitmap_table_size, self.flags, self.type, self.granularity_bits,
            len(self.name), len(self.extra_data),
        )  # fmt: skip
        data = fixed + self.extra_data + self.name
        return data + bytes(-len(data) % 8)


def encode_extension(count: int, size: int, offset: int) -> bytes:
    """The data of the bitmaps extension."""
    return _EXTENSION.pack(count, 0, size, offset)


def encode_directory(entries: Sequence[Entry]) -> bytes:
    """The bitmap directory; ``at`` of its entries is set."""
    data = bytearray()
    for entry in entries:
        entry.at = len(data)
        data += entry.encode()
    return bytes(data)


def read_entries(file: Node, header: Header) -> list[Entry]:
    """The directory's entries; none when there is no directory that is valid. Raises CorruptImage for anything
    that the specification does not allow, before more than the directory has been read."""
    found = directory(header)
    if found is None:
        return []
    offset, size, count = found
    path = file.filename
    if len(header.extension(EXT_BITMAPS) or b"") != _EXTENSION.size:
        raise CorruptImage(path, "length of the bitmaps extension", len(header.extension(EXT_BITMAPS) or b""))
    if not 0 < count <= MAX_BITMAPS:
        raise CorruptImage(path, "nb_bitmaps", count, None, f"must be 1 to {MAX_BITMAPS}")
    if not _ENTRY.size * count <= size <= MAX_BITMAP_DIRECTORY_BYTES:
        raise CorruptImage(path, "bitmap_directory_size", size, None, f"impossible for {count} bitmaps")
    if not offset or offset & ((1 << header.cluster_bits) - 1) or offset + size > file.size:
        raise CorruptImage(path, "bitmap_directory_offset", f"{offset:#x}", None, "not a possible place")
    data = file.pread(offset, size)
    entries: list[Entry] = []
    names: set[bytes] = set()
    at = 0
    for number in range(count):
        entry = _parse(path, data, at, offset, number)
        if entry.name in names:
            raise CorruptImage(path, f"name of bitmap {number}", repr(entry.name), offset + at, "another has it too")
        names.add(entry.name)
        entries.append(entry)
        at += len(entry.encode())
    if at != size:
        raise CorruptImage(path, "bitmap_directory_size", size, None, f"its entries take {at} bytes")
    return entries


def _parse(path: str, data: bytes, at: int, offset: int, number: int) -> Entry:
    if at + _ENTRY.size > len(data):
        raise CorruptImage(path, "bitmap directory", f"{len(data)} bytes", offset, "too short for its entries")
    table, entries, flags, type_, bits, name_size, extra = _ENTRY.unpack_from(data, at)
    end = at + _ENTRY.size + extra + name_size
    if end > len(data):
        raise CorruptImage(path, f"sizes in the entry of bitmap {number}", f"{extra} and {name_size}", offset + at,
                           "longer than the directory")  # fmt: skip
    name = data[end - name_size : end]
    if not 0 < name_size <= MAX_NAME or b"\0" in name:
        raise CorruptImage(path, f"name of bitmap {number}", repr(name[:64]), offset + at, "not a possible name")
    if not MIN_GRANULARITY_BITS <= bits <= MAX_GRANULARITY_BITS:
        raise CorruptImage(path, f"granularity_bits of bitmap {number}", bits, offset + at + 17,
                           f"must be {MIN_GRANULARITY_BITS} to {MAX_GRANULARITY_BITS}")  # fmt: skip
    if type_ != DIRTY_TRACKING:
        raise CorruptImage(path, f"type of bitmap {number}", type_, offset + at + 16, "no such type is defined")
    return Entry(table, entries, flags, bits, name, data[end - name_size - extra : end - name_size], type_, at)


class BitmapTable(NamedTuple):
    """``size`` in entries."""

    offset: int
    size: int


def directory(header: Header) -> tuple[int, int, int] | None:
    """``(offset, size, number of bitmaps)`` of the directory; None when there is none, or when it is void because
    the image was changed by a program that knows no bitmaps."""
    data = header.extension(EXT_BITMAPS)
    if data is None or not header.autoclear_features & BITMAPS or len(data) < _EXTENSION.size:
        return None
    count, _, size, offset = _EXTENSION.unpack_from(data)
    return offset, size, count


def tables(file: Node, offset: int, size: int, count: int) -> Iterator[BitmapTable]:
    """The bitmaps' tables, as the directory gives them. Raises CorruptImage when it is malformed."""
    if size > MAX_BITMAP_DIRECTORY_BYTES or not 0 < count <= MAX_BITMAPS:
        raise CorruptImage(file.filename, "bitmap_directory_size", size, None, f"for {count} bitmaps, out of bounds")
    data = file.pread(offset, size)
    at = 0
    for _ in range(count):
        if at + _ENTRY.size > size:
            raise CorruptImage(file.filename, "bitmap directory", f"{size} bytes", offset, "too short for its entries")
        table, entries, _, _, _, name, extra = _ENTRY.unpack_from(data, at)
        at += _ENTRY.size + name + extra
        at += -at % 8
        yield BitmapTable(table, entries)


def read_bitmap_table(file: Node, table: BitmapTable) -> array[int]:
    """The entries of a bitmap's table. Raises CorruptImage."""
    if table.size * 8 > MAX_TABLE_BYTES:
        raise CorruptImage(file.filename, "bitmap_table_size", table.size, None, "out of bounds")
    return read_table(file, "bitmap_table_offset", table.offset, table.size)


def cluster_of(entry: int, cluster_size: int) -> int | None:
    """The host offset an entry of a bitmap's table names, 0 for none, or None when the entry is impossible."""
    offset = entry & OFFSET_MASK
    if entry & TABLE_RESERVED or offset & (cluster_size - 1) or (offset and entry & 1):
        return None
    return offset


def describe(entry: Entry) -> dict[str, object]:
    """What ``info`` tells of a bitmap, in the order it is shown."""
    flags = [word for flag, word in ((IN_USE, "in-use"), (AUTO, "auto")) if entry.flags & flag]
    return {"flags": flags, "name": os.fsdecode(entry.name), "granularity": 1 << entry.granularity_bits}
