"""vmdk: hosted sparse extents. After "Virtual Disk Format 5.0", section "Hosted Sparse Extents".

A directory names tables of 512 entries, each the sector where a grain lies. Directory and tables are there twice; a
change goes to both.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

from diskwright.core.blockmap import NOWHERE, ZEROS, DirectoryMap
from diskwright.core.tables import Directory, Piece
from diskwright.errors import CorruptImage, LimitExceeded
from diskwright.formats.vmdk.header import REDUNDANT, TABLE_ENTRIES, ZEROED, Header
from diskwright.formats.vmdk.part import Part
from diskwright.units import SECTOR

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from diskwright.core.node import Node

_TABLE: Final = TABLE_ENTRIES * 4


class Sparse(Part, DirectoryMap):
    """One open sparse extent."""

    kind = "SPARSE"

    def __init__(self, file: Node, header: Header, size: int) -> None:
        """``size``: of the disk that it holds, in bytes; at most the header's capacity."""
        self.header = header
        self._has_zeroed = bool(header.flags & ZEROED)
        if self._has_zeroed:
            self.zero_entry = 1
        count = header.tables
        directory = Directory(file, "gdOffset", header.gd_offset * SECTOR, count, typecode="I", byteorder="little")
        self.redundant: Directory | None = None
        if header.flags & REDUNDANT:
            self.redundant = Directory(
                file, "rgdOffset", header.rgd_offset * SECTOR, count, typecode="I", byteorder="little"
            )
        self._twins: list[tuple[int, int]] = []
        super().__init__(
            file, size, header.grain_size * SECTOR, directory=directory,
            table_entries=TABLE_ENTRIES, typecode="I", byteorder="little", first_place=SECTOR,
        )  # fmt: skip

    # -- what an entry means -----------------------------------------------------------------------

    def place_of(self, entry: int) -> int:
        if entry == 0:
            return NOWHERE
        return ZEROS if entry == 1 and self._has_zeroed else entry * SECTOR

    def places_of(self, entries: NDArray[Any]) -> NDArray[np.int64]:
        import numpy as np

        places = entries.astype(np.int64) * SECTOR
        places[entries == 0] = NOWHERE
        if self._has_zeroed:
            places[entries == 1] = ZEROS
        return places

    def entry_for(self, place: int) -> int:
        if place // SECTOR > 0xFFFFFFFF:
            raise LimitExceeded(f"{self.path}: has no room for another grain: places end at 2 TiB")
        return place // SECTOR

    def table_place(self, entry: int) -> int:
        return entry * SECTOR or -1

    def table_entry(self, place: int) -> int:
        return self.entry_for(place)

    # -- the second directory and its tables -------------------------------------------------------

    def tables(self) -> Iterator[tuple[int, int]]:
        yield from super().tables()
        if self.header.descriptor_size:
            start = self.header.descriptor_offset * SECTOR
            yield start, start + self.header.descriptor_size * SECTOR
        size = len(self.directory.entries) * 4
        for table in (self.directory, self.redundant):
            if table is not None:
                yield table.offset, table.offset + size
        if self.redundant is not None:
            for entry in self.redundant.entries:
                if entry:
                    yield entry * SECTOR, entry * SECTOR + _TABLE

    def _survey(self) -> None:
        super()._survey()
        ranges = sorted(self.tables())
        for (_, end), (start, _) in pairwise(ranges):
            if start < end:
                raise CorruptImage(self.path, "the grain directory", "damaged", None, f"two tables lie at {start:#x}")
        if ranges and ranges[0][0] < self.first_place:
            raise CorruptImage(self.path, "the grain directory", "damaged", None, "a table lies in the header")
        self._pair()
        self.before_change()

    def _pair(self) -> None:
        if self.redundant is not None:
            pairs = zip(self.directory.entries, self.redundant.entries, strict=True)
            self._twins = sorted((one * SECTOR, two * SECTOR) for one, two in pairs if one and two)

    def add_table(self, index: int) -> None:
        super().add_table(index)
        if self.redundant is not None:
            if not self.redundant.entries[index]:
                self.redundant.set(index, self.entry_for(self._end))
                self._end += _TABLE
            self._pair()

    def _capture(self) -> list[list[Piece]]:
        tables, directory = super()._capture()
        if self.redundant is not None:
            tables += [twin for piece in tables if (twin := self._twin(piece)) is not None]
            directory += self.redundant.capture()
        return [tables, directory]

    def _twin(self, piece: Piece) -> Piece | None:
        """What has to be written to the redundant table. A piece lies within one table."""
        at = bisect_right(self._twins, (piece[0], 1 << 63)) - 1
        if at < 0 or piece[0] >= self._twins[at][0] + _TABLE:
            return None
        return self._twins[at][1] + piece[0] - self._twins[at][0], piece[1]

    def _settle(self) -> None:
        super()._settle()
        if self.redundant is not None:
            self.redundant.settle()

    def _restore(self) -> None:
        super()._restore()
        if self.redundant is not None:
            self.redundant.restore()

    # -- the rest ----------------------------------------------------------------------------------

    def make_empty(self) -> None:
        """See ``Format.make_empty``. The tables stay where they are, full of zeros, and the file ends behind them."""
        self.survey()
        self.write_back()
        with self.flush_lock, self.lock:
            self.table.clear()
            directories = [self.directory, *([self.redundant] if self.redundant is not None else [])]
            for entry in (entry for table in directories for entry in table.entries if entry):
                self.file.write_zeros(entry * SECTOR, _TABLE)
            self.file.flush()
            end = max(end for _, end in self.tables()) if self.size else self.file.size
            self.file.resize(min(self.file.size, max(end, self.header.over_head * SECTOR)))
            self._survey()
