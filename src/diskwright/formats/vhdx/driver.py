"""vhdx: the driver. Source: MS-VHDX, "Virtual Hard Disk v2 (VHDX) File Format".

The table has an entry for each block of the disk, and one for a block of the sector bitmap after every ``chunk_ratio``
of them. A slice of it in the cache holds entries of the disk's blocks only: it has as many as divide the chunk ratio.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final, cast

from diskwright.core.blockmap import CACHE_BYTES, NOWHERE, ZEROS, BlockMap
from diskwright.core.driver import CheckReport, Info, MeasuredSource, Measurement, OpenContext, Reservation
from diskwright.core.options import BOOL, option
from diskwright.core.tables import Piece, SliceCache
from diskwright.errors import CorruptImage, LimitExceeded, OptionError, UnsupportedFeature
from diskwright.extents import DATA, Extent, Extents
from diskwright.formats.vhdx.create import VhdxCreateOptions, create, measure
from diskwright.formats.vhdx.header import (
    BAT_REGION,
    METADATA_REGION,
    NO_GUID,
    SECTION,
    SIGNATURE,
    Bytes,
    Headers,
    Region,
    Taken,
    new_guid,
    read_header,
    read_regions,
)
from diskwright.formats.vhdx.journal import Journal
from diskwright.formats.vhdx.log import Log, Replayed, check_growth, replay
from diskwright.formats.vhdx.metadata import Disk, read_disk
from diskwright.units import MiB, align_down, align_up

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
    ignore_id_mismatch: bool = option(BOOL, "read from a parent though it has changed since", default=False)


class Vhdx(BlockMap):
    """One open VHDX image."""

    name = "vhdx"
    options = VhdxOptions
    create_options = VhdxCreateOptions
    has_backing = True
    consults_backing = True
    suffixes = (".vhdx", ".avhdx")
    alignment = MiB
    zero_entry = ZERO_STATE

    def __init__(
        self,
        file: Node,
        headers: Headers,
        log: FoundLog,
        regions: dict[bytes, Region],
        others: list[Region],
        about: Disk,
    ) -> None:
        """``others`` are regions of the file that are not known, and must be left alone."""
        self.headers, self.log, self.regions, self.others, self.about = headers, log, regions, others, about
        self.journal = Journal(file, headers)
        self.writable = file.writable
        self.bat = regions[BAT_REGION]
        self._ratio = about.chunk_ratio
        self.holes = "always" if about.leave_allocated else "never"
        source = cast("Node", log.source or file)
        table = SliceCache(
            source, self.locate, typecode="Q", items=min(_ITEMS, self._ratio), byteorder="little", budget=CACHE_BYTES
        )
        super().__init__(file, about.size, about.block_size, table, SECTION)
        self.file = source
        self._identity: bytes | None = None  # of the contents, once they change
        self._identified = False  # whether the file says so
        self.followers: list[Callable[[bytes], None]] = []
        """Told the new identity before this image's contents change: its children, when they go into it."""
        self.trusting = False
        """Whether the parent need not be the one the image was made over."""
        self._known_size = 0  # of the file: it may be longer by now
        self._flushed = 0  # length of the file that the flush under way makes durable

    # -- opening ---------------------------------------------------------------------------------

    @staticmethod
    def probe(head: bytes, filename: str) -> int:
        return 100 if head[:8] == SIGNATURE else 0

    @classmethod
    def open(cls, context: OpenContext, options: VhdxOptions) -> Vhdx:
        file = context.file
        header, index = read_header(file)
        headers = Headers(file, header, index)
        found = _replay(file, headers, writable=context.writable, repair=options.repair)
        source = found.source or file
        regions, others = read_regions(source)
        about = read_disk(source, regions[METADATA_REGION])
        cls._check_bat(source, regions[BAT_REGION], about)
        kind = cls
        if about.has_parent:
            from diskwright.formats.vhdx.differencing import Differencing as kind
        image = kind(file, headers, found, regions, others, about)
        image.trusting = options.ignore_id_mismatch
        if found.source is not None:
            image.check_overlay(found.source)
        return image

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

    def check_overlay(self, source: Replayed) -> None:
        """A log is for metadata. Raises UnsupportedFeature when this one, replayed in memory, changes blocks: what is
        read of those comes from the file itself."""
        import numpy as np

        known = Taken([(0, SECTION), *self.tables()])
        strange = [(start, end) for start, end in source.ranges() if not known.holds(start, end)]
        if not strange:
            return
        for _, places in self.used_places():
            places = np.sort(places)
            for start, end in strange:
                at = int(np.searchsorted(places, start - self.stride, "right"))
                if at < len(places) and places[at] < end:
                    raise UnsupportedFeature(
                        f"{self.path}: its log changes the disk's data at {start:#x}, so it cannot be replayed in "
                        "memory; 'check -r all' replays it in the file"
                    )

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
        if place >= _MOST_PLACE:
            raise LimitExceeded(f"{self.path}: no block can lie at {place:#x}")
        return place | FULLY_PRESENT

    def data_place(self, block: int) -> int:
        """Where a block lies in the file, or -1."""
        items = self.table.get(block // self._items)
        assert items is not None
        place = self.place_of(items[block % self._items])
        return place if place >= 0 else -1

    # -- changing ----------------------------------------------------------------------------------

    def tables(self) -> Iterator[tuple[int, int]]:
        return self.regions_taken()

    def regions_taken(self) -> Iterator[tuple[int, int]]:
        """``(start, end)`` of the log and all regions."""
        header = self.headers.current
        for region in (*self.regions.values(), self.bat, *self.others):
            yield region.offset, region.end
        yield header.log_offset, header.log_offset + header.log_length

    def _survey(self) -> None:
        self._check_ends()
        super()._survey()
        parts = sorted(set(self.tables()))
        for (_, end), (start, _) in pairwise(parts):
            if start < end:
                raise CorruptImage(self.path, "log or region", "damaged", None, f"two of them overlap at {start:#x}")
        self.begin(contents=True)

    def _check_ends(self) -> None:
        """A block behind the end of the file would seem to be zeros as soon as the file grows."""
        import numpy as np

        size = align_up(self.file.size, MiB)
        for blocks, places in self.used_places():
            ends = places + np.minimum(self.size - blocks * self.cluster_size, self.cluster_size)
            at = int(ends.argmax())
            if int(ends[at]) > size:
                self._refuse(int(blocks[at]), int(places[at]), f"behind the end of the file, which has {size} bytes")

    def begin(self, *, contents: bool) -> None:
        """Before the first change of the file; ``contents``: of what the disk reads as, too. Under both locks."""
        if contents and not self._identified:
            self._identity = self._identity or new_guid()  # the same when this has failed before: some may know it
            for follow in self.followers:
                follow(self._identity)
        if not self.journal.active:
            self.journal.begin(self._identity if contents else None)
        elif contents and not self._identified:
            self.headers.update(data_write_guid=self._identity)
        self._identified = self._identified or contents

    def take(self, length: int) -> int:
        """Space at the end of the file, in whole MiB."""
        with self.lock:
            place = self._end
            self._end += align_up(length, MiB)
            return place

    def _reserve(self, offset: int, length: int, first: int, last: int) -> Reservation:
        reservation = super()._reserve(offset, length, first, last)
        self._lengthen()  # the log tells how long the file is, in whole MiB
        return reservation

    def capture_first(self) -> list[Piece]:
        self._flushed = self.flushable_size()
        return []

    def flushable_size(self) -> int:
        """What length of the file will be durable when it is flushed now."""
        return align_down(self.file.size, MiB)

    def put(self, pieces: list[Piece]) -> None:
        self.put_pieces(pieces, self._flushed)

    def put_pieces(self, pieces: list[Piece], flushed: int) -> None:
        """Pieces of metadata go to their places through the log. Under the flush lock."""
        self.journal.put(pieces, flushed=flushed, end=max(self._end, flushed), table=self.bat)

    def zero(self, offset: int, length: int, *, unmap: bool) -> tuple[int, int]:
        """See ``Format.zero``. Blocks whose contents are merely undefined become blocks of zeros."""
        at, covered = super().zero(offset, length, unmap=unmap)
        block, end = at // self.cluster_size, -(-(at + covered) // self.cluster_size)
        while covered and block < end:
            number, low = divmod(block, self._items)
            items = self.table.get(number)
            assert items is not None
            stop = min(end, (number + 1) * self._items)
            if items[low : low + stop - block].count(ZERO_STATE) != stop - block:
                self._set_zero(block, stop)
            block = stop
        return at, covered

    def discard(self, offset: int, length: int) -> None:
        """See ``Format.discard``. A fixed image keeps its space."""
        if not self.about.leave_allocated:
            super().discard(offset, length)

    def unwritten(self) -> bool:
        """Whether there are changes that have not been written back."""
        return self.table.changed > 0

    def close(self) -> None:
        if self.surveyed and self.unwritten():
            self.write_back()
        self.journal.end()

    def grown(self) -> None:
        """The disk has more blocks now."""

    def bitmap_entries(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        """``(chunk, entry)`` of the blocks of the sector bitmap there are of some chunks."""
        return iter(())

    # -- checking ----------------------------------------------------------------------------------

    @property
    def absent_entry(self) -> int:
        """What a block has that is not there."""
        return NOT_PRESENT if self.about.has_parent else ZERO_STATE

    def claimed(self, entries: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Of some entries: which have a place, those places (a very large one for an impossible one), and which are in
        a state there is none of."""
        import numpy as np

        states = (entries & np.uint64(7)).astype(np.int64)
        present = states == FULLY_PRESENT
        if self.about.has_parent:
            present |= states == PARTIALLY_PRESENT
        at = np.flatnonzero(present)
        raw = entries[at] & np.uint64(_PLACES)
        places = np.minimum(raw, np.uint64(_MOST_PLACE)).astype(np.int64)
        return at, places, np.flatnonzero(~present & (states > UNMAPPED))

    def check_bitmap(self, report: CheckReport) -> None:
        """Tells what is wrong with a sector bitmap there may be."""

    def moved_entry(self, block: int, place: int) -> int:
        """The entry of a block that has been copied to ``place``."""
        items = self.table.get(block // self._items)
        assert items is not None
        return place | items[block % self._items] & 7

    def set_entries(self, new: Mapping[int, int], end: int) -> None:
        """Gives blocks other entries, durably. Nothing in the file lies behind ``end``."""
        self.file.flush()
        for block, entry in new.items():
            number, index = divmod(block, self._items)
            with self.lock:
                self.own_slice(number)[index] = entry
                self.table.mark(number, index, index)
        self._end, self._flushed = end, self.flushable_size()
        self.write_back()

    # -- the rest ----------------------------------------------------------------------------------

    def resize(self, size: int, *, preallocation: str = "off", conceal: Callable[[], None] | None = None) -> None:
        """Larger only."""
        from diskwright.formats.vhdx.resize import grow

        if preallocation != "off":
            raise UnsupportedFeature(f"Preallocation mode '{preallocation}' is not supported when resizing VHDX images")
        if self.about.leave_allocated:
            raise UnsupportedFeature("VHDX images of the subformat 'fixed' cannot be resized")
        grow(self, size, conceal)

    def check(self, repair: str) -> CheckReport:
        from diskwright.formats.vhdx.check import check

        self.write_back()
        return check(self, repair)

    def info(self) -> Info:
        return Info(cluster_size=self.cluster_size, dirty=self.log.source is not None or self.log.damaged)

    def zero_init(self) -> bool:
        """Of a dynamic image whose blocks are not there the specification does not say what they read as."""
        if not self.size:
            return True
        items = self.table.get(0)
        return items is not None and items[0] & 7 != NOT_PRESENT

    # -- creating ----------------------------------------------------------------------------------

    @classmethod
    def create(cls, file: Node, options: VhdxCreateOptions) -> None:
        if options.backing_file is not None:
            raise OptionError("The parent of a VHDX image has to be looked at")
        create(file, options)

    @classmethod
    def create_from(cls, file: Node, options: VhdxCreateOptions, parts: Mapping[str, Node]) -> None:
        if "backing" not in parts:
            return cls.create(file, options)
        from diskwright.formats.vhdx.differencing import create_over

        return create_over(file, options, parts["backing"])

    @classmethod
    def measure(cls, options: VhdxCreateOptions, source: MeasuredSource | None) -> Measurement:
        return measure(options, source)


@dataclass
class FoundLog:
    """What opening made of the log."""

    source: Replayed | None = None
    """The file with its log replayed in memory, when it could not be in the file."""
    replayed: bool = False
    """Whether it was replayed in the file."""
    damaged: bool = False
    """Whether there was none that could be replayed, though the header says so; its use has ended if writable."""


def _replay(file: Node, headers: Headers, *, writable: bool, repair: bool) -> FoundLog:
    """Does what the log asks for, in the file or, when that is not to be changed, in memory. Raises CorruptImage when
    it should have something to ask for and has not, except to ``repair``."""
    if headers.current.log_guid == NO_GUID:
        return FoundLog()
    log = Log(file, headers.current)
    entries = log.active(repair=repair)
    check_growth(file, log, entries)
    if not writable:
        if not entries:
            return FoundLog(damaged=True)
        changes = [change for entry in entries for change in log.changes(entry)]
        return FoundLog(Replayed(file, changes, entries[-1].last_file_offset))
    headers.update(file_write_guid=new_guid())
    replay(file, log, entries)
    headers.update(log_guid=NO_GUID)
    return FoundLog(replayed=bool(entries), damaged=not entries)


DRIVERS: Final[tuple[Any, ...]] = (Vhdx,)
