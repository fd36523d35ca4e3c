"""vhdx: the driver. Source: MS-VHDX, "Virtual Hard Disk v2 (VHDX) File Format".

The table has an entry for each block of the disk, and one for a block of the sector bitmap after every ``chunk_ratio``
of them. A slice of it in the cache holds entries of the disk's blocks only: it has as many as divide the chunk ratio.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, cast

from diskwright.core.blockmap import CACHE_BYTES, NOWHERE, ZEROS, BlockMap
from diskwright.core.driver import Info, OpenContext
from diskwright.core.options import BOOL, option
from diskwright.core.tables import SliceCache
from diskwright.errors import CorruptImage, LimitExceeded, UnsupportedFeature
from diskwright.extents import DATA, Extent, Extents
from diskwright.formats.vhdx.header import (
    BAT_REGION,
    METADATA_REGION,
    NO_GUID,
    SECTION,
    SIGNATURE,
    Bytes,
    Header,
    Region,
    read_header,
    read_regions,
)
from diskwright.formats.vhdx.log import Log, Replayed
from diskwright.formats.vhdx.metadata import Disk, read_disk
from diskwright.units import MiB, align_up

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from diskwright.core.node import Node

NOT_PRESENT, UNDEFINED, ZERO_STATE, UNMAPPED, FULLY_PRESENT, PARTIALLY_PRESENT = 0, 1, 2, 3, 6, 7
"""States of a block. MS-VHDX 2.5.1.1."""
_ITEMS: Final = 512
_PLACES: Final = ((1 << 44) - 1) * MiB
"""The bits of an entry that say where a block lies, in whole MiB."""
_MOST_PLACE: Final = 1 << 47
"""No block lies behind this: a disk has 64 TiB at most. Such an entry is told like one for the place 0."""


@dataclass(frozen=True, kw_only=True)
class VhdxOptions:
    repair: bool = option(BOOL, "open an image whose log is damaged, to repair it", default=False)


class Vhdx(BlockMap):
    """One open VHDX image."""

    name = "vhdx"
    options = VhdxOptions
    suffixes = (".vhdx", ".avhdx")
    alignment = MiB
    zero_entry = ZERO_STATE

    def __init__(self, file: Node, source: Bytes, header: Header, regions: dict[bytes, Region], about: Disk) -> None:
        """``source`` is what metadata is read from."""
        self.header, self.regions, self.about = header, regions, about
        self.bat = regions[BAT_REGION]
        self._ratio = about.chunk_ratio
        self.replayed = source if isinstance(source, Replayed) else None
        self.holes = "always" if about.leave_allocated else "never"
        table = SliceCache(
            cast("Node", source), self.locate, typecode="Q", items=min(_ITEMS, self._ratio), byteorder="little",
            budget=CACHE_BYTES, total=about.blocks,
        )  # fmt: skip
        super().__init__(file, about.size, about.block_size, table, SECTION)
        self.file = cast("Node", source)
        self._known_size = 0  # of the file: it may be longer by now

    # -- opening ---------------------------------------------------------------------------------

    @staticmethod
    def probe(head: bytes, filename: str) -> int:
        return 100 if head[:8] == SIGNATURE else 0

    @classmethod
    def open(cls, context: OpenContext, options: VhdxOptions) -> Vhdx:
        file = context.file
        header, _ = read_header(file)
        if context.writable:
            raise UnsupportedFeature(f"{file.filename}: VHDX images can only be read")
        source: Bytes = file
        if header.log_guid != NO_GUID:
            log = Log(file, header)
            entries = log.active()
            changes = [change for entry in entries for change in log.changes(entry)]
            source = Replayed(file, changes, entries[-1].last_file_offset)
        regions = read_regions(source)
        about = read_disk(source, regions[METADATA_REGION])
        cls._check_bat(source, regions[BAT_REGION], about)
        if about.has_parent:
            raise UnsupportedFeature(f"{file.filename}: is a differencing image, which is not supported")
        return cls(file, source, header, regions, about)

    @staticmethod
    def _check_bat(source: Bytes, bat: Region, about: Disk) -> None:
        if about.bat_entries * 8 > bat.length:
            raise CorruptImage(
                source.filename, "length of the BAT region", bat.length, None,
                f"a disk of {about.size} bytes needs {about.bat_entries} entries",
            )  # fmt: skip
        if bat.end > source.size:
            raise CorruptImage(
                source.filename, "BAT region", f"{bat.length} bytes at {bat.offset:#x}", None,
                f"it would end behind the file ({source.size} bytes)",
            )  # fmt: skip

    # -- where blocks may lie ----------------------------------------------------------------------

    def extent_at(self, offset: int, length: int) -> Extent:
        run = super().extent_at(offset, length)
        if run.kind == DATA and run.file_offset + run.length > self._known_size:
            self._check_end(run.offset, run.file_offset + run.length)
        return run

    def extents(self, offset: int, length: int) -> Extents:
        found = super().extents(offset, length)
        ends = (found.file_offset + found.length) * (found.kind == DATA)
        if len(ends) and int(ends.max()) > self._known_size:
            at = int(ends.argmax())
            self._check_end(int(found.offset[at]), int(ends[at]))
        return found

    def _check_end(self, offset: int, end: int) -> None:
        """Raises CorruptImage when data up to ``end`` would lie behind the file, as it does when that was cut off."""
        self._known_size = align_up(self.file.size, MiB)
        if end > self._known_size:
            raise CorruptImage(
                self.path, f"table entry of guest offset {offset:#x}", f"{end:#x}", None,
                f"its block ends there, but the file at {self.file.size:#x}; it has probably been truncated",
            )  # fmt: skip

    # -- what an entry means -----------------------------------------------------------------------

    def locate(self, number: int) -> int:
        first = number * self._items
        return self.bat.offset + 8 * (first + first // self._ratio)

    def place_of(self, entry: int) -> int:
        state = entry & 7
        if state >= FULLY_PRESENT:
            place = entry & _PLACES
            return place if state == FULLY_PRESENT and place < _MOST_PLACE else 0
        return NOWHERE if state == NOT_PRESENT else ZEROS if state <= UNMAPPED else 0

    def places_of(self, entries: NDArray[Any]) -> NDArray[np.int64]:
        import numpy as np

        states = entries & np.uint64(7)
        places = (entries & np.uint64(_PLACES & (_MOST_PLACE - 1))).astype(np.int64)
        places[entries >= np.uint64(_MOST_PLACE)] = 0
        places[states == NOT_PRESENT] = NOWHERE
        places[(states >= UNDEFINED) & (states <= UNMAPPED)] = ZEROS
        places[(states > UNMAPPED) & (states != FULLY_PRESENT)] = 0
        return places

    def entry_for(self, place: int) -> int:
        if place > _PLACES:
            raise LimitExceeded(f"{self.path}: no table entry can name a block at {place:#x}")
        return place | FULLY_PRESENT

    # -- the rest ----------------------------------------------------------------------------------

    def info(self) -> Info:
        return Info(cluster_size=self.cluster_size, dirty=self.header.log_guid != NO_GUID)


DRIVERS: Final[tuple[Any, ...]] = (Vhdx,)
