"""vmdk: the header of a hosted sparse extent, and where a new image has its parts.

After VMware's "Virtual Disk Format 5.0", section "Hosted Sparse Extents". Its fields count sectors of 512 bytes.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from diskwright.errors import CorruptImage, LimitExceeded, UnsupportedFeature
from diskwright.formats.vmdk.descriptor import MAX_DESCRIPTOR
from diskwright.units import SECTOR

if TYPE_CHECKING:
    from diskwright.core.node import Node

MAGIC: Final = b"KDMV"
COWD: Final = b"COWD"
REDUNDANT: Final = 1 << 1
ZEROED: Final = 1 << 2
COMPRESSED: Final = 1 << 16
MARKERS: Final = 1 << 17
GD_AT_END: Final = (1 << 64) - 1
"""``gdOffset`` of a header that leaves it to the footer to say."""
_DEFLATE: Final = 1
_NEWLINES: Final = 1 << 0
_KNOWN: Final = _NEWLINES | REDUNDANT | ZEROED | COMPRESSED | MARKERS

AT_GD_OFFSET: Final = 56
_HEADER: Final = struct.Struct("<4sIIQQQQIQQQB4sH")
GRAIN_MARKER: Final = struct.Struct("<QI")  # sector of the disk, length of what follows
_MARKER: Final = struct.Struct("<QII")  # length of what follows in sectors, 0, type
FOOTER_MARKER: Final = 3
_CHECK: Final = b"\n \r\n"
TABLE_ENTRIES: Final = 512
_TABLE_SECTORS: Final = TABLE_ENTRIES * 4 // SECTOR
MAX_TABLES: Final = 1 << 21
"""Tables of an extent at most: 64 TiB with the usual grains, which takes 8 MiB of directory in memory."""
_MOST_GRAIN: Final = 1 << 17
"""Sectors of a grain at most: 64 MiB."""
_DESCRIPTOR_SECTORS: Final = 20
_GRAIN: Final = 128


@dataclass
class Header:
    """The fields of the header, in its order; all but the flags and small ones count sectors."""

    magic: bytes
    version: int
    flags: int
    capacity: int
    grain_size: int
    descriptor_offset: int
    descriptor_size: int
    num_gtes_per_gt: int
    rgd_offset: int
    gd_offset: int
    over_head: int
    unclean_shutdown: int
    newlines: bytes
    compress_algorithm: int
    lost_directory: bool = False
    """Not a field: whether ``gd_offset`` is that of the redundant directory, as the other is not in the file."""

    def encode(self) -> bytes:
        return _HEADER.pack(*list(vars(self).values())[:-1]).ljust(SECTOR, b"\0")

    @property
    def tables(self) -> int:
        return -(-self.capacity // (self.grain_size * self.num_gtes_per_gt))


def marker(sectors: int, kind: int) -> bytes:
    """The sector that announces ``sectors`` of metadata in a stream."""
    return _MARKER.pack(sectors, 0, kind).ljust(SECTOR, b"\0")


def plan(size: int, *, zeroed_grain: bool) -> Header:
    """The header of a new image. Raises LimitExceeded."""
    capacity, tables = _measured(size)
    span = -(-tables * 4 // SECTOR) + tables * _TABLE_SECTORS
    rgd = 1 + _DESCRIPTOR_SECTORS
    end = rgd + 2 * span
    flags = _NEWLINES | REDUNDANT | (ZEROED if zeroed_grain else 0)
    return Header(
        MAGIC, 2 if zeroed_grain else 1, flags, capacity, _GRAIN, 1, _DESCRIPTOR_SECTORS, TABLE_ENTRIES, rgd,
        rgd + span, end + -end % _GRAIN, 0, _CHECK, 0,
    )  # fmt: skip


def plan_stream(size: int) -> Header:
    """The header of a new image that is written in one pass. Raises LimitExceeded."""
    capacity, _ = _measured(size)
    return Header(
        MAGIC, 3, _NEWLINES | COMPRESSED | MARKERS, capacity, _GRAIN, 1, _DESCRIPTOR_SECTORS, TABLE_ENTRIES, 0,
        GD_AT_END, _GRAIN, 0, _CHECK, _DEFLATE,
    )  # fmt: skip


def _measured(size: int) -> tuple[int, int]:
    """Sectors and grain tables of a new image."""
    capacity = -(-size // SECTOR)
    tables = -(-capacity // (_GRAIN * TABLE_ENTRIES))
    if tables > MAX_TABLES:
        raise LimitExceeded(f"vmdk: a disk of {size} bytes would need {tables} grain tables; at most {MAX_TABLES}")
    return capacity, tables


def read_header(file: Node, *, repair: bool = False) -> Header:
    """The header, checked. With ``repair`` the redundant directory takes the place of one that is not in the file.
    Raises CorruptImage, UnsupportedFeature or LimitExceeded."""
    path = file.filename
    if file.size < SECTOR:
        raise CorruptImage(path, "length of the file", file.size, None, "shorter than a VMDK header")
    header = Header(*_HEADER.unpack(file.pread(0, _HEADER.size)))
    if header.magic == MAGIC and header.gd_offset == GD_AT_END:
        header = _footer(file, header)
    if header.magic != MAGIC:
        raise CorruptImage(path, "magicNumber", header.magic.hex(), 0, f"it should be {MAGIC.hex()}")
    if not 1 <= header.version <= 3:
        raise UnsupportedFeature(f"{path}: is of version {header.version}; 1 to 3 are known")
    if header.flags & MARKERS and not header.flags & COMPRESSED:
        raise UnsupportedFeature(f"{path}: has markers and no compressed grains")
    if header.flags & COMPRESSED and header.compress_algorithm != _DEFLATE:
        raise UnsupportedFeature(f"{path}: is compressed by the method {header.compress_algorithm}, which is not known")
    if header.flags & ~_KNOWN:
        raise UnsupportedFeature(f"{path}: has unknown flags {header.flags & ~_KNOWN:#x}")
    if header.flags & _NEWLINES and header.newlines != _CHECK:
        raise CorruptImage(path, "newline characters", header.newlines.hex(), 73, "the file was changed as text")
    grain = header.grain_size
    if not 8 <= grain <= _MOST_GRAIN or grain & (grain - 1):
        raise CorruptImage(path, "grainSize", grain, 20, f"it must be a power of two from 8 to {_MOST_GRAIN}")
    if header.num_gtes_per_gt != TABLE_ENTRIES:
        raise CorruptImage(path, "numGTEsPerGT", header.num_gtes_per_gt, 44, f"it must be {TABLE_ENTRIES}")
    if header.tables > MAX_TABLES:
        raise LimitExceeded(f"{path}: has {header.tables} grain tables; at most {MAX_TABLES} are possible")
    if header.descriptor_size > MAX_DESCRIPTOR // SECTOR:
        raise LimitExceeded(f"{path}: has a descriptor of {header.descriptor_size} sectors")
    if not header.descriptor_offset or not header.descriptor_size:
        header.descriptor_offset = header.descriptor_size = 0
    try:
        _check_places(file, header)
    except CorruptImage:
        if not repair or not header.flags & REDUNDANT:
            raise
        header.gd_offset, header.flags = header.rgd_offset, header.flags & ~REDUNDANT
        _check_places(file, header)
        header.lost_directory = True
    return header


def _footer(file: Node, header: Header) -> Header:
    """The copy of the header at the end of a stream, which knows where the directory is."""
    raw = file.pread(max(0, file.size - 3 * SECTOR), min(3 * SECTOR, file.size))
    if len(raw) < 3 * SECTOR or _MARKER.unpack_from(raw)[::2] != (1, FOOTER_MARKER) or any(raw[2 * SECTOR :][:16]):
        raise CorruptImage(
            file.filename, "footer", "missing", max(0, file.size - 3 * SECTOR), "the image is incomplete, or cut off"
        )
    footer = Header(*_HEADER.unpack_from(raw, SECTOR))
    for name in ("magic", "version", "capacity", "grain_size", "num_gtes_per_gt", "flags", "compress_algorithm"):
        if getattr(footer, name) != getattr(header, name):
            raise CorruptImage(
                file.filename, "footer", "damaged", file.size - 2 * SECTOR, "it does not say the same as the header"
            )
    footer.descriptor_offset, footer.descriptor_size = header.descriptor_offset, header.descriptor_size
    if not footer.rgd_offset:
        footer.flags &= ~REDUNDANT
    return footer


def _check_places(file: Node, header: Header) -> None:
    size = -(-header.tables * 4 // SECTOR)
    places = [("gdOffset", header.gd_offset, 56, size)]
    if header.descriptor_size:
        places.append(("descriptorOffset", header.descriptor_offset, 28, header.descriptor_size))
    if header.flags & REDUNDANT:
        places.append(("rgdOffset", header.rgd_offset, 48, size))
    for name, value, at, length in places:
        if not value or (value + length) * SECTOR > file.size:
            raise CorruptImage(file.filename, name, value, at, f"{length} sectors there do not lie within the file")
    places.sort(key=lambda place: place[1])
    for before, after in pairwise(places):
        if before[1] + before[3] > after[1]:
            raise CorruptImage(file.filename, after[0], after[1], after[2], f"{before[0]} reaches beyond it")
    if header.over_head * SECTOR > file.size + header.grain_size * SECTOR:
        raise CorruptImage(file.filename, "overHead", header.over_head, 64, "beyond the end of the file")
