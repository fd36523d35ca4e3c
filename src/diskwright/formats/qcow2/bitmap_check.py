"""Whether persistent bitmaps are as the specification wants them (sections Bitmaps extension and Bitmaps).

Looked at without believing anything: what is wrong with one bitmap is told of that bitmap, so that a check goes on.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from diskwright.errors import LimitExceeded
from diskwright.formats.qcow2.header import BITMAPS, EXT_BITMAPS, Header
from diskwright.formats.qcow2.layout import MAX_BITMAP_DIRECTORY_BYTES, MAX_BITMAPS
from diskwright.units import MiB

if TYPE_CHECKING:
    from diskwright.core.node import Node

_EXTENSION: Final = struct.Struct(">IIQQ")
_ENTRY: Final = struct.Struct(">QIIBBHI")

IN_USE: Final = 1
_RESERVED_FLAGS: Final = 0xFFFF_FFF8
_MAX_NAME: Final = 1023
_MAX_TABLES: Final = 256 * MiB
"""All tables of all bitmaps together: bounds the time a hostile directory can cost."""


@dataclass
class Stored:
    """A bitmap, its fields named as in the specification. ``place`` is that of its directory entry in the file."""

    place: int
    bitmap_table_offset: int
    bitmap_table_size: int
    flags: int
    name: bytes
    wrong: list[str] = field(default_factory=list)
    """What is wrong with it, in words."""
    readable: bool = True
    """Whether there can be a table where it says."""


@dataclass
class Directory:
    """``offset`` and ``size`` in bytes. ``wrong`` tells of the directory as a whole."""

    offset: int = 0
    size: int = 0
    bitmaps: list[Stored] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def examine(file: Node, header: Header) -> Directory | None:
    """The directory, when there is one that is valid. Memory is bounded by the largest directory there may be.

    Raises OSError, LimitExceeded.
    """
    data = header.extension(EXT_BITMAPS)
    if data is None or not header.autoclear_features & BITMAPS:
        return None
    found = Directory()
    if len(data) != _EXTENSION.size:
        found.wrong.append(f"the bitmaps extension is {len(data)} bytes long, not {_EXTENSION.size}")
        return found
    count, reserved, size, offset = _EXTENSION.unpack(data)
    if reserved:
        found.wrong.append(f"a reserved field of the bitmaps extension is {reserved}")
    if not 0 < count <= MAX_BITMAPS:
        found.wrong.append(f"there are said to be {count} bitmaps; possible are 1 to {MAX_BITMAPS}")
    elif not _ENTRY.size * count <= size <= MAX_BITMAP_DIRECTORY_BYTES:
        found.wrong.append(f"a bitmap directory of {size} bytes is impossible for {count} bitmaps")
    elif not offset or offset & ((1 << header.cluster_bits) - 1) or offset >= 1 << 63:
        found.wrong.append(f"no bitmap directory can lie at {offset:#x}")
    else:
        found.offset, found.size = offset, size
        _read_entries(file, header, found, count)
    return found


def _read_entries(file: Node, header: Header, found: Directory, count: int) -> None:
    data = file.pread(found.offset, found.size) if found.offset < file.size else bytes(found.size)
    at, names, total = 0, set[bytes](), 0
    for number in range(count):
        fixed = _ENTRY.unpack_from(data, at) if at + _ENTRY.size <= len(data) else None
        if fixed is None or at + _ENTRY.size + fixed[6] + fixed[5] > len(data):
            found.wrong.append(f"the bitmap directory ends within the entry of bitmap {number}")
            return
        table, entries, flags, kind, bits, name_size, extra = fixed
        end = at + _ENTRY.size + extra + name_size
        stored = Stored(found.offset + at, table, entries, flags, data[end - name_size : end])
        stored.wrong += _faults(header, stored, kind, bits)
        if stored.name in names:
            stored.wrong.append("another bitmap has the same name")
        names.add(stored.name)
        stored.readable = not (table & ((1 << header.cluster_bits) - 1) or table >= 1 << 63)
        total += entries * 8 if stored.readable else 0
        if total > _MAX_TABLES:
            raise LimitExceeded(f"{file.filename}: the tables of its bitmaps take more than {_MAX_TABLES} bytes")
        found.bitmaps.append(stored)
        at = end + -end % 8
    if at != found.size:
        found.wrong.append(f"the entries of the bitmap directory take {at} bytes, not {found.size}")


def _faults(header: Header, stored: Stored, kind: int, bits: int) -> Iterator[str]:
    size, mask = stored.bitmap_table_size, (1 << header.cluster_bits) - 1
    if not 0 < len(stored.name) <= _MAX_NAME or b"\0" in stored.name:
        yield "its name is not a possible one"
    if kind != 1:
        yield f"its type is {kind}, and only 1 is defined"
    if not 9 <= bits <= 31:
        yield f"its granularity is 2 to the power of {bits}; possible are 9 to 31"
    if stored.flags & _RESERVED_FLAGS:
        yield f"reserved flags are set: {stored.flags:#x}"
    if not size or not stored.bitmap_table_offset or stored.bitmap_table_offset & mask:
        yield f"a table of {size} entries cannot lie at {stored.bitmap_table_offset:#x}"
    elif not stored.flags & IN_USE and size << header.cluster_bits + 3 + min(bits, 64) < header.size:
        yield f"a table of {size} entries is too short for the disk"
