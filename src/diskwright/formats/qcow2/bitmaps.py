"""The places of persistent bitmaps (sections Bitmaps extension and Bitmaps). Their contents are not looked at."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator
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
