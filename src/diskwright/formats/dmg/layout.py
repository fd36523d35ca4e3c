"""dmg: the property list and the trailer, as they are written. One table describes the whole disk."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from diskwright.units import SECTOR

TRAILER: Final = 512
COMMENT: Final = 0x7FFFFFFE
END: Final = 0xFFFFFFFF
CRC32: Final = 2
_ENTRY: Final = struct.Struct(">IIQQQQ")
_TABLE: Final = struct.Struct(">4sIQQQII24xII128sI")
_TRAILER: Final = struct.Struct(">4sIII5QII16sII128sQQ120xII128sIQ12x")
_MORE: Final = 8
"""Sectors a reader's buffer should have beyond those of the largest chunk, in what Apple's programs write."""

Row = tuple[int, int, int, int, int]
"""``(type, sector, sectors, place, stored)``."""


@dataclass(frozen=True)
class Checksums:
    """CRC-32 of the table's part of the disk, and of the data fork."""

    disk: int
    fork: int


def table(size: int, unit: int, rows: Iterable[Row], comment: bytes, checksums: Checksums | None) -> bytes:
    """The table of chunks of a disk of ``size`` bytes. ``comment``: four bytes that readers pass over."""
    entries = [_ENTRY.pack(COMMENT, int.from_bytes(comment, "big"), 0, 0, 0, 0)]
    end = 0
    for kind, sector, sectors, place, stored in rows:
        entries.append(_ENTRY.pack(kind, 0, sector, sectors, place, stored))
        end = place + stored
    entries.append(_ENTRY.pack(END, 0, size // SECTOR, 0, end, 0))
    crc = b"" if checksums is None else struct.pack(">I", checksums.disk)
    head = _TABLE.pack(
        b"mish", 1, 0, size // SECTOR, 0, unit // SECTOR + _MORE, 0, CRC32 if crc else 0, 32 if crc else 0,
        crc, len(entries),
    )  # fmt: skip
    return head + b"".join(entries)


def property_list(blocks: bytes) -> bytes:
    """The property list with that table."""
    import plistlib

    name = "whole disk (unknown partition : 0)"
    resource = {"Attributes": "0x0050", "CFName": name, "Data": blocks, "ID": "0", "Name": name}
    drivers = {"Attributes": "0x0050", "Data": bytes(1032), "ID": "0", "Name": ""}
    return plistlib.dumps({"resource-fork": {"blkx": [resource], "plst": [drivers]}})


def longest_list(chunks: int) -> int:
    """Bytes that the property list of a disk of so many chunks may take. Base64 makes four bytes of three, and its
    lines, which are indented, have 36 of these in 42."""
    return 8192 + ((chunks + 2) * _ENTRY.size + _TABLE.size) * 5 // 3


def trailer(size: int, fork: int, place: int, length: int, checksums: Checksums | None) -> bytes:
    """The last 512 bytes. ``fork``: length of the data fork, which begins at 0; ``place`` and ``length``: the
    property list's."""
    kind, width, master = (0, 0, b"") if checksums is None else (CRC32, 32, master_of([checksums.disk]))
    crc = b"" if checksums is None else struct.pack(">I", checksums.fork)
    return _TRAILER.pack(
        b"koly", 4, TRAILER, 1, 0, 0, fork, 0, 0, 1, 1, os.urandom(16), kind, width, crc, place, length,
        kind, width, master, 1, size // SECTOR,
    )  # fmt: skip


def master_of(disks: Iterable[int]) -> bytes:
    """The checksum over the tables' checksums."""
    import zlib

    return struct.pack(">I", zlib.crc32(b"".join(struct.pack(">I", crc) for crc in disks)))
