"""vmdk: space-efficient sparse extents (seSparse), to be read.

VMware has not published this format. What is known of it is how images look, and how QEMU reads them: directory and
tables of 64-bit entries, whose highest four bits say what a grain is; tables and grains known by their numbers; and a
journal, which has to be empty.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NoReturn

from diskwright.core.blockmap import NOWHERE, ZEROS, DirectoryMap
from diskwright.core.tables import Directory
from diskwright.errors import CorruptImage, LimitExceeded, UnsupportedFeature
from diskwright.formats.vmdk.header import MAX_TABLES
from diskwright.formats.vmdk.part import Part
from diskwright.units import SECTOR

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from diskwright.core.node import Node

MAGIC: Final = 0xCAFEBABE
_VOLATILE_MAGIC: Final = 0xCAFECAFE
_VERSION: Final = 0x200000001
_HEADER: Final = struct.Struct("<26Q")
_VOLATILE: Final = struct.Struct("<4Q")
_GRAIN: Final = 8
_TABLE_SECTORS: Final = 64
_TABLE_ENTRIES: Final = _TABLE_SECTORS * SECTOR // 8
_MOST_SECTORS: Final = 64 << 31
"""64 TiB, the largest disk of VMware's."""
_UNALLOCATED, _UNMAPPED, _ZERO, _ALLOCATED = range(4)
"""What the highest four bits of an entry say of a grain. One that the guest has unmapped reads as zeros."""
_TABLE_THERE: Final = 1
"""The same of a directory entry, for a table that is there."""


@dataclass
class SeHeader:
    """The fields that are used. They count sectors."""

    capacity: int
    grain_dir_offset: int
    grain_tables_offset: int
    grains_offset: int

    @property
    def tables(self) -> int:
        return -(-self.capacity // (_GRAIN * _TABLE_ENTRIES))


def read_header(file: Node) -> SeHeader:
    """The header, checked. Raises CorruptImage, UnsupportedFeature, LimitExceeded."""
    path = file.filename
    if file.size < 2 * SECTOR:
        raise CorruptImage(path, "length of the file", file.size, None, "shorter than the header of an seSparse extent")
    (magic, version, capacity, grain, table, flags, _, _, _, _, volatile, *_, gd, gd_size, gt, _, _, _, _, _, grains,
     _) = _HEADER.unpack(file.pread(0, _HEADER.size))  # fmt: skip
    if magic != MAGIC:
        raise CorruptImage(path, "constMagic", f"{magic:#x}", 0, f"it should be {MAGIC:#x}")
    if version != _VERSION or flags:
        raise UnsupportedFeature(f"{path}: is of version {version:#x} with the flags {flags:#x}, which is not known")
    if grain != _GRAIN or table != _TABLE_SECTORS:
        raise UnsupportedFeature(f"{path}: has grains of {grain} sectors and tables of {table}; 8 and 64 are known")
    header = SeHeader(capacity, gd, gt, grains)
    if capacity > _MOST_SECTORS or header.tables > MAX_TABLES:
        raise LimitExceeded(f"{path}: has {capacity} sectors; at most {_MOST_SECTORS} are possible")
    if header.tables * 8 > gd_size * SECTOR or (gd + gd_size) * SECTOR > file.size:
        raise CorruptImage(path, "grainDirectory", gd, 16 * 8, "it does not lie within the file, or is too short")
    if gt * SECTOR > file.size or grains * SECTOR > file.size:
        raise CorruptImage(path, "grainTables or grain", (gt, grains), 18 * 8, "beyond the end of the file")
    _check_journal(file, volatile)
    return header


def _check_journal(file: Node, place: int) -> None:
    if not 1 <= place <= file.size // SECTOR - 1:
        raise CorruptImage(file.filename, "volatileHeader", place, 10 * 8, "beyond the end of the file")
    magic, _, _, replay = _VOLATILE.unpack(file.pread(place * SECTOR, _VOLATILE.size))
    if magic != _VOLATILE_MAGIC:
        raise CorruptImage(
            file.filename, "volatileMagic", f"{magic:#x}", place * SECTOR, f"it should be {_VOLATILE_MAGIC:#x}"
        )
    if replay:
        raise UnsupportedFeature("Image is dirty, Replaying journal not supported")


class SeSparse(Part, DirectoryMap):
    """One open seSparse extent."""

    kind = "SESPARSE"

    def __init__(self, file: Node, header: SeHeader, size: int) -> None:
        self.header = header
        self._grains = header.grains_offset * SECTOR
        self._count = -(-(file.size - self._grains) // (_GRAIN * SECTOR))  # of grains that the file has room for
        directory = Directory(
            file, "grainDirectory", header.grain_dir_offset * SECTOR, header.tables, typecode="Q", byteorder="little"
        )
        super().__init__(
            file, size, _GRAIN * SECTOR, directory=directory, table_entries=_TABLE_ENTRIES, typecode="Q",
            byteorder="little", first_place=SECTOR,
        )  # fmt: skip

    def place_of(self, entry: int) -> int:
        kind = entry >> 60
        if kind == _ALLOCATED:
            number = (entry >> 48 & 0xFFF) | (entry & 0xFFFFFFFFFFFF) << 12
            if number >= self._count:
                raise CorruptImage(
                    self.path, "grain table entry", f"{entry:#x}", None, "the file has not so many grains"
                )
            return self._grains + number * _GRAIN * SECTOR
        if kind == _UNALLOCATED:
            return NOWHERE
        if kind in (_UNMAPPED, _ZERO):
            return ZEROS
        raise CorruptImage(self.path, "grain table entry", f"{entry:#x}", None, "there is no such kind of grain")

    def places_of(self, entries: NDArray[Any]) -> NDArray[np.int64]:
        import numpy as np

        kind = entries >> np.uint64(60)
        number = (entries >> np.uint64(48) & np.uint64(0xFFF)) | (entries & np.uint64(0xFFFFFFFFFFFF)) << np.uint64(12)
        bad = (kind > _ALLOCATED) | ((kind == _ALLOCATED) & (number >= self._count))
        if bad.any():
            self.place_of(int(entries[np.argmax(bad)]))
        number[kind != _ALLOCATED] = 0
        places = self._grains + number.astype(np.int64) * (_GRAIN * SECTOR)
        places[kind == _UNALLOCATED] = NOWHERE
        places[(kind == _UNMAPPED) | (kind == _ZERO)] = ZEROS
        return places

    def entry_for(self, place: int) -> NoReturn:
        raise UnsupportedFeature("No write support for seSparse images available")

    def table_place(self, entry: int) -> int:
        if not entry:
            return -1
        if entry >> 32 != _TABLE_THERE << 28:
            raise CorruptImage(self.path, "grain directory entry", f"{entry:#x}", None, "it says no table can be there")
        return (self.header.grain_tables_offset + (entry & 0xFFFFFFFF) * _TABLE_SECTORS) * SECTOR

    def survey(self) -> NoReturn:
        raise UnsupportedFeature("No write support for seSparse images available")
