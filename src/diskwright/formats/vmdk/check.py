"""vmdk: checking an image, and mending it from the redundant grain directory.

Wrong can be: a table that cannot be where the directory says, a grain beyond the end of the file or where a table is,
two grains in one place. What the redundant tables know better is taken from them; of two grains in one place the
second gets a copy; a grain that is nowhere is taken off its table. A table that is in neither directory stays as it is,
so that reading there is an error, and no zeros.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from diskwright.core.blockmap import STORED, DirectoryMap
from diskwright.core.driver import CheckReport
from diskwright.errors import CorruptImage, LimitExceeded
from diskwright.formats.vmdk.header import AT_GD_OFFSET, GRAIN_MARKER
from diskwright.formats.vmdk.sparse import Sparse
from diskwright.formats.vmdk.stream import Compressed
from diskwright.units import SECTOR, align_up

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from diskwright.core.tables import Directory
    from diskwright.formats.vmdk.part import Part

_MOST: Final = 1 << 26
"""Grains that a check takes at most: 512 MiB of memory."""


def check(parts: Sequence[Part], repair: str) -> CheckReport:
    """See ``Format.check``. The first message is qemu-img's. Raises OSError, LimitExceeded."""
    report, start = CheckReport(), 0
    for part in parts:
        if isinstance(part, DirectoryMap):
            _Check(part, start // SECTOR, report, mend=repair == "all" and not part.compressed).run()
        start += part.size
    if report.corruptions_fixed:
        for part in parts:
            if isinstance(part, DirectoryMap):
                part.file.flush()
                part.table.clear()
    return report


class _Check:
    """The check of one extent that begins at sector ``start`` of the disk."""

    def __init__(self, part: Any, start: int, report: CheckReport, *, mend: bool) -> None:
        self.part, self.start, self.report, self.mend = part, start, report, mend
        self.size = part.file.size
        self.table_bytes = part.table_entries * part.table.slice_bytes // part.table.items
        self.end = align_up(self.size, part.cluster_size)
        self.redundant = part.redundant if isinstance(part, Sparse) else None
        self.taken: list[tuple[int, int]] = []  # where tables are, in order

    def run(self) -> None:
        import numpy as np

        self._find_tables()
        parts: list[NDArray[np.int64]] = []
        blocks: list[NDArray[np.int64]] = []
        count = 0
        for index, entries in self._tables():
            at, places = self._grains(index, entries)
            count += len(places)
            if count > _MOST:
                raise LimitExceeded(f"{self.part.path}: has more than {_MOST} grains; it is not checked")
            parts.append(places)
            blocks.append(at + index * self.part.table_entries)
        if parts:
            self._duplicates(np.concatenate(blocks), np.concatenate(parts))
        if self.redundant is not None:
            self._redundant(self.redundant)
        if isinstance(self.part, Sparse) and self.part.header.lost_directory:
            self._found("the grain directory is not in the file, the redundant one is", fixed=self.mend)
            if self.mend:
                self._rebuild()

    def _sector(self, block: int) -> int:
        return self.start + block * int(self.part.cluster_size) // SECTOR

    def _found(self, what: str, *, fixed: bool) -> None:
        self.report.say(f"{'Repairing' if fixed else 'ERROR:'} {what}")
        if fixed:
            self.report.corruptions_fixed += 1
        else:
            self.report.corruptions += 1

    # -- tables ------------------------------------------------------------------------------------

    def _place(self, entry: int) -> int:
        """Where a table is; 0 when it cannot be there, -1 when there is none."""
        try:
            place: int = self.part.table_place(entry)
        except CorruptImage:
            return 0
        if place < 0:
            return -1
        inside = place >= SECTOR and place + self.table_bytes <= self.size
        return (
            place if inside and not any(place < end and place + self.table_bytes > at for at, end in self._fixed) else 0
        )

    def _find_tables(self) -> None:
        part = self.part
        names = {entry for table in (part.directory, self.redundant) if table is not None for entry in table.entries}
        width = part.directory.entries.itemsize
        self._fixed = [(0, SECTOR)]
        for table in (part.directory, self.redundant):
            if table is not None:
                self._fixed.append((table.offset, table.offset + len(table.entries) * width))
        if isinstance(part, Sparse) and part.header.descriptor_size:
            at = part.header.descriptor_offset * SECTOR
            self._fixed.append((at, at + part.header.descriptor_size * SECTOR))
        places = (self._place(entry) for entry in names)
        self.taken = sorted([*self._fixed, *((place, place + self.table_bytes) for place in places if place > 0)])

    def _tables(self) -> Iterator[tuple[int, NDArray[Any]]]:
        """Every table that can be read, with its number; from the redundant directory where the other is wrong."""
        seen: set[int] = set()
        for index, entry in enumerate(self.part.directory.entries):
            place = self._place(entry)
            if place > 0 and place in seen:
                place = 0
            if place < 0:
                continue
            if place == 0:
                twin = self._place(self.redundant.entries[index]) if self.redundant is not None else 0
                self._misplaced("", index, fixed=self.mend and twin > 0)
                if twin <= 0:
                    continue
                place = self._copy_table(self.part.directory, index, twin) if self.mend else twin
            seen.add(place)
            yield index, self._read(place)

    def _read(self, place: int) -> NDArray[Any]:
        import numpy as np

        raw = self.part.file.pread(place, self.table_bytes)
        return np.frombuffer(raw, f"<u{self.part.directory.entries.itemsize}").copy()

    def _misplaced(self, which: str, index: int, *, fixed: bool) -> None:
        sector = self._sector(index * self.part.table_entries)
        self._found(f"the {which}grain table for sector {sector} is not where it should be", fixed=fixed)

    def _copy_table(self, directory: Directory, index: int, twin: int) -> int:
        """Gives the directory a copy of the other's table, at the end of the file."""
        part, place = self.part, self.end
        part.file.writev([(place, memoryview(part.file.pread(twin, self.table_bytes)))])
        part.file.flush()
        directory.set(index, part.table_entry(place))
        part.file.writev(directory.capture())
        directory.settle()
        self.end = align_up(place + self.table_bytes, part.cluster_size)
        self.size = max(self.size, self.end)
        return place

    # -- grains ------------------------------------------------------------------------------------

    def _wrong(self, places: NDArray[np.int64]) -> NDArray[np.bool_]:
        import numpy as np

        starts = np.array([at for at, _ in self.taken], np.int64)
        ends = np.maximum.accumulate(np.array([end for _, end in self.taken], np.int64))
        before = np.searchsorted(starts, places + self.part.cluster_size, "left") - 1
        wrong: NDArray[np.bool_] = (places >= self.part.file.size) | (ends[before] > places)
        return wrong

    def _grains(self, index: int, entries: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """``(number in the table, place)`` of the grains that have a place."""
        import numpy as np

        first = index * self.part.table_entries
        entries = entries[: max(0, -(-self.part.size // self.part.cluster_size) - first)]
        if self.part.compressed:
            return self._compressed(first, entries)
        try:
            places = self.part.places_of(entries.copy())
        except CorruptImage as error:
            self._found(f"{error}", fixed=False)
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        at = np.flatnonzero(places >= 0)
        wrong = np.flatnonzero(self._wrong(places[at])) if len(at) else at
        if len(wrong):
            self._mend_grains(index, entries, at[wrong], places)
            at = np.flatnonzero(places >= 0)
            if not self.mend:
                at = np.setdiff1d(at, at[wrong], assume_unique=True)
        return at, places[at]

    def _mend_grains(self, index: int, entries: NDArray[Any], wrong: NDArray[np.int64], places: NDArray[Any]) -> None:
        first = index * self.part.table_entries
        table = self._place(self.part.directory.entries[index])
        twin = self._place(self.redundant.entries[index]) if self.redundant is not None else 0
        better = self.part.places_of(self._read(twin)) if twin > 0 else None
        for at in wrong.tolist():
            beyond = int(places[at]) >= self.part.file.size
            why = "points after EOF" if beyond else "points to metadata"
            self._found(f"cluster offset for sector {self._sector(first + at)} {why}", fixed=self.mend)
            if not self.mend:
                continue
            good = better is not None and better[at] >= 0 and not self._wrong(better[at : at + 1])[0]
            places[at] = better[at] if better is not None and good else -1
            entries[at] = self.part.entry_for(int(places[at])) if good else 0
        if self.mend:
            self.part.file.writev([(table, memoryview(entries.tobytes()))])

    def _compressed(self, first: int, entries: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        import numpy as np

        part = self.part
        assert isinstance(part, Compressed)
        at = np.flatnonzero(part.places_of(entries) == STORED)
        for number, entry in zip(at.tolist(), entries[at].tolist(), strict=True):
            place, sector = entry * SECTOR, self._sector(first + number)
            if place >= self.size:
                self._found(f"cluster offset for sector {sector} points after EOF", fixed=False)
            elif part.marked:
                raw = part.file.pread(place, min(GRAIN_MARKER.size, self.size - place)).ljust(GRAIN_MARKER.size, b"\0")
                lba, length = GRAIN_MARKER.unpack(raw)
                if lba != sector - self.start or not length or place + len(raw) + length > self.size:
                    self._found(f"the compressed grain of sector {sector} has a wrong marker", fixed=False)
        return at, entries[at].astype(np.int64) * SECTOR

    def _duplicates(self, blocks: NDArray[np.int64], places: NDArray[np.int64]) -> None:
        import numpy as np

        unit = SECTOR if self.part.compressed else self.part.cluster_size
        order = np.argsort(places, kind="stable")
        close = np.flatnonzero(np.diff(places[order]) < unit) + 1
        for at in sorted(order[close].tolist()):
            block = int(blocks[at])
            self._found(f"sector {self._sector(block)} has the place of another one", fixed=self.mend)
            if self.mend:
                self._separate(block, int(places[at]), places)

    def _separate(self, block: int, place: int, places: NDArray[np.int64]) -> None:
        """Gives a grain the place that the redundant table has for it, or a copy of the one that it has to share."""
        part = self.part
        index, at = divmod(block, part.table_entries)
        twin = self._place(self.redundant.entries[index]) if self.redundant is not None else 0
        other = part.places_of(self._read(twin)[at : at + 1]) if twin > 0 else None
        if (
            other is not None
            and other[0] >= 0
            and not self._wrong(other)[0]
            and not (abs(places - other[0]) < part.cluster_size).any()
        ):
            new = int(other[0])
        else:
            new = self.end
            part.file.writev([(new, memoryview(part.file.pread(place, part.cluster_size)))])
            part.file.flush()
            self.end += part.cluster_size
        table = self._place(part.directory.entries[index])
        part.file.writev([(table + 4 * at, memoryview(struct.pack("<I", part.entry_for(new))))])

    def _redundant(self, redundant: Directory) -> None:
        """Redundant tables that cannot be where they are said to be; and, when mending, all of them say the same as the
        others afterwards. That they differ is no damage: a crash may have come between the two writes."""
        part = self.part
        for index, entry in enumerate(part.directory.entries):
            place, twin = self._place(entry), self._place(redundant.entries[index])
            if twin == 0:
                self._misplaced("redundant ", index, fixed=self.mend and place > 0)
                if self.mend and place > 0:
                    self._copy_table(redundant, index, place)
            elif self.mend and place > 0 and twin > 0:
                data = part.file.pread(place, self.table_bytes)
                if data != part.file.pread(twin, self.table_bytes):
                    part.file.writev([(twin, memoryview(data))])

    def _rebuild(self) -> None:
        """Makes a directory and its tables out of the redundant ones, behind everything else, and names it in the
        header. Until that is written nothing has changed."""
        import numpy as np

        part, place = self.part, self.end
        entries = np.array(part.directory.entries, "<u4")
        there = np.flatnonzero(entries)
        first = place + align_up(4 * len(entries), SECTOR)
        directory = np.zeros(len(entries), "<u4")
        directory[there] = (first + np.arange(len(there)) * self.table_bytes) // SECTOR
        part.entry_for(first + len(there) * self.table_bytes)
        for at, index in enumerate(there.tolist()):
            table = part.file.pread(int(entries[index]) * SECTOR, self.table_bytes)
            part.file.writev([(first + at * self.table_bytes, memoryview(table))])
        part.file.writev([(place, memoryview(directory.tobytes().ljust(first - place, b"\0")))])
        part.file.flush()
        part.file.writev([(AT_GD_OFFSET, memoryview(struct.pack("<Q", place // SECTOR)))])
        part.header.lost_directory = False
