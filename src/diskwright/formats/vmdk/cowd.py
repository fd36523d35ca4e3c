"""vmdk: the sparse extents of ESX (COWD). After "Virtual Disk Format 5.0", section "ESX Server Sparse Extents".

A directory names tables of 4096 entries, each the sector where a grain lies; both are there once. The header says which
sector is the first that is free.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from diskwright.core.blockmap import NOWHERE, DirectoryMap
from diskwright.core.tables import Directory, Piece
from diskwright.errors import CorruptImage, LimitExceeded, UnsupportedFeature
from diskwright.formats.vmdk.header import COWD, MAX_TABLES
from diskwright.formats.vmdk.part import Part
from diskwright.units import SECTOR

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from diskwright.core.node import Node

_HEADER: Final = struct.Struct("<4s7I")
_HEADER_SECTORS: Final = 4
_TABLE_ENTRIES: Final = 4096
_MOST_GRAIN: Final = 1 << 17
_AT_FREE: Final = 28
_FREE: Final = struct.Struct("<I")


@dataclass
class CowdHeader:
    """The fields that are used, in their order. All but the first three count sectors, or entries."""

    magic: bytes
    version: int
    flags: int
    num_sectors: int
    grain_size: int
    gd_offset: int
    num_gd_entries: int
    free_sector: int

    @property
    def tables(self) -> int:
        return -(-self.num_sectors // (self.grain_size * _TABLE_ENTRIES))


def read_header(file: Node) -> CowdHeader:
    """The header, checked. Raises CorruptImage, UnsupportedFeature, LimitExceeded."""
    path = file.filename
    if file.size < _HEADER_SECTORS * SECTOR:
        raise CorruptImage(
            path, "length of the file", file.size, None, "shorter than the header of an ESX sparse extent"
        )
    header = CowdHeader(*_HEADER.unpack(file.pread(0, _HEADER.size)))
    if header.magic != COWD:
        raise CorruptImage(path, "magicNumber", header.magic.hex(), 0, f"it should be {COWD.hex()}")
    if header.version != 1:
        raise UnsupportedFeature(f"{path}: is of version {header.version}; of ESX sparse extents 1 is known")
    grain = header.grain_size
    if not 1 <= grain <= _MOST_GRAIN or grain & (grain - 1):
        raise CorruptImage(path, "grainSize", grain, 16, f"it must be a power of two up to {_MOST_GRAIN}")
    if header.num_gd_entries > MAX_TABLES:
        raise LimitExceeded(f"{path}: has {header.num_gd_entries} grain tables; at most {MAX_TABLES} are possible")
    if header.num_gd_entries < header.tables:
        raise CorruptImage(path, "numGDEntries", header.num_gd_entries, 24, f"the disk needs {header.tables}")
    if header.gd_offset < 1 or header.gd_offset * SECTOR + 4 * header.num_gd_entries > file.size:
        raise CorruptImage(path, "gdOffset", header.gd_offset, 20, "the directory does not lie within the file")
    return header


class Cowd(Part, DirectoryMap):
    """One open ESX sparse extent."""

    kind = "VMFSSPARSE"

    def __init__(self, file: Node, header: CowdHeader, size: int) -> None:
        self.header = header
        self._free = self._free_written = header.free_sector
        directory = Directory(
            file, "gdOffset", header.gd_offset * SECTOR, header.tables, typecode="I", byteorder="little"
        )
        super().__init__(
            file, size, header.grain_size * SECTOR, directory=directory, table_entries=_TABLE_ENTRIES, typecode="I",
            byteorder="little", first_place=SECTOR,
        )  # fmt: skip

    def place_of(self, entry: int) -> int:
        return entry * SECTOR or NOWHERE

    def places_of(self, entries: NDArray[Any]) -> NDArray[np.int64]:
        import numpy as np

        places = entries.astype(np.int64) * SECTOR
        places[entries == 0] = NOWHERE
        return places

    def entry_for(self, place: int) -> int:
        if place // SECTOR > 0xFFFFFFFF:
            raise LimitExceeded(f"{self.path}: has no room for another grain: places end at 2 TiB")
        return place // SECTOR

    def table_place(self, entry: int) -> int:
        return entry * SECTOR or -1

    def table_entry(self, place: int) -> int:
        return self.entry_for(place)

    def tables(self) -> Iterator[tuple[int, int]]:
        yield from super().tables()
        yield self.directory.offset, self.directory.offset + 4 * self.header.num_gd_entries
        yield 0, _HEADER_SECTORS * SECTOR

    def _survey(self) -> None:
        super()._survey()
        self.before_change()

    def capture_first(self) -> list[Piece]:
        """The first free sector: too high a number wastes space, too low a one would cost data."""
        self._free = -(-self._end // SECTOR)
        if self._free == self._free_written or self._free > 0xFFFFFFFF:
            return []
        return [(_AT_FREE, memoryview(_FREE.pack(self._free)))]

    def _settle(self) -> None:
        super()._settle()
        self._free_written = self._free
