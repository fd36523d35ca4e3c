"""parallels: the header. Source: "Parallels Expandable Image File Format", section Disk header."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from diskwright.errors import CorruptImage, ImageError, LimitExceeded, OptionError, UnsupportedFeature
from diskwright.units import SECTOR, align_up

if TYPE_CHECKING:
    from diskwright.core.node import Node

OLD_MAGIC: Final = b"WithoutFreeSpace"
"""Table entries are sectors."""
MAGIC: Final = b"WithouFreSpacExt"
"""Table entries are clusters."""
VERSION: Final = 2
IN_USE: Final = 0x746F6E59
"""Somebody is writing to the image, or was when it died."""
AT_IN_USE: Final = 44

MAX_ENTRIES: Final = 1 << 28
"""Entries of the table at most: 256 TiB with clusters of 1 MiB."""
MAX_CLUSTER: Final = 1 << 30

_HEADER: Final = struct.Struct("<16sIIIIIQIIIQ")
HEADS: Final = 16
CYLINDERS_SECTORS: Final = 32


@dataclass
class Header:
    """The fields under the specification's names. ``tracks`` is the cluster size in sectors; so are ``data_off`` and
    ``ext_off``."""

    magic: bytes
    version: int
    heads: int
    cylinders: int
    tracks: int
    bat_entries: int
    nb_sectors: int
    inuse: int
    data_off: int
    flags: int
    ext_off: int

    def encode(self) -> bytes:
        return _HEADER.pack(*vars(self).values())

    @property
    def cluster_size(self) -> int:
        return self.tracks * SECTOR

    @property
    def size(self) -> int:
        """Of the disk, in bytes."""
        sectors = self.nb_sectors & 0xFFFFFFFF if self.magic == OLD_MAGIC else self.nb_sectors
        return sectors * SECTOR

    @property
    def data_start(self) -> int:
        """Where the first cluster may lie, in bytes."""
        return max(self.data_off * SECTOR, align_up(BAT + 4 * self.bat_entries, SECTOR))


BAT: Final = _HEADER.size
"""Where the table begins."""


def plan(size: int, cluster_size: int) -> Header:
    """The header of a new image. Raises OptionError or LimitExceeded."""
    if not 0 < cluster_size <= MAX_CLUSTER or cluster_size % SECTOR:
        raise OptionError(f"Cluster size must be a multiple of {SECTOR} up to {MAX_CLUSTER}")
    entries = -(-size // cluster_size)
    if entries > MAX_ENTRIES:
        raise LimitExceeded(f"Image size is too big for this cluster size (at most {MAX_ENTRIES} clusters)")
    sectors = align_up(size, SECTOR) // SECTOR
    tracks = cluster_size // SECTOR
    start = align_up(BAT + 4 * entries, cluster_size) // SECTOR
    cylinders = min(sectors // HEADS // CYLINDERS_SECTORS, 0xFFFFFFFF)
    return Header(MAGIC, VERSION, HEADS, cylinders, tracks, entries, sectors, 0, start, 0, 0)


def read_header(file: Node, *, writable: bool) -> Header:
    """The header, checked. Raises CorruptImage, UnsupportedFeature, ImageError or LimitExceeded."""
    path = file.filename
    if file.size < BAT:
        raise CorruptImage(path, "length of the file", file.size, None, "shorter than a Parallels header")
    header = Header(*_HEADER.unpack(file.pread(0, BAT)))
    if header.magic not in (MAGIC, OLD_MAGIC) or header.version != VERSION:
        raise ImageError("Image not in Parallels format")
    if not 0 < header.tracks <= MAX_CLUSTER // SECTOR:
        raise CorruptImage(path, "tracks", header.tracks, 28, f"1 to {MAX_CLUSTER // SECTOR} sectors are possible")
    if header.bat_entries > MAX_ENTRIES:
        raise LimitExceeded(f"{path}: has {header.bat_entries} clusters; at most {MAX_ENTRIES} are possible")
    if header.size > header.bat_entries * header.cluster_size:
        raise CorruptImage(path, "nb_sectors", header.nb_sectors, 36, "the table has no entries for so many")
    if BAT + 4 * header.bat_entries > file.size:
        raise CorruptImage(
            path, "bat_entries", header.bat_entries, 32, f"the table would end behind the file ({file.size} bytes)"
        )
    if writable and header.ext_off:
        raise UnsupportedFeature(f"{path}: has an extension (dirty bitmaps, say), so it can only be read")
    return header
