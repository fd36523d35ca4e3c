"""Block maps: what the formats share whose map is a table with one entry a block.

Such an image has a table (or a directory of tables) in which every block of the disk has an entry: where the block lies
in the file, or that it is not there. New blocks go to the end of the file, and a block that has a place keeps it. There
are no refcounts, so nothing but the table says what is in use; and so, before anything is changed, all of the table
is read once (``_survey``): two blocks in one place, or a block in the place of the tables, and the image is refused
for writing.

A driver derives from ``BlockMap`` (one table) or ``DirectoryMap`` (tables in a directory), reads its header, and says
what an entry means: ``place_of`` for one, ``places_of`` for many, ``entry_for`` the other way round. All else is
here: extents one by one and in bulk, reservations, zeros, discards, and the order in which changes reach the file:

1. what ``capture_first`` gives (counts of blocks in a header, that may be too high but never too low), and the guest's
   data with it; flush;
2. tables; flush;
3. the directory that names new tables; flush.

So nothing in the file ever names what is not durable, and a crash at any moment leaves at worst space at the end of
the file that nothing uses.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from array import array
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, Literal, NoReturn

from diskwright.core.driver import Format, Reservation
from diskwright.core.placing import InPlace, Placed, Turns
from diskwright.core.tables import Directory, Piece, SliceCache
from diskwright.errors import CorruptImage, LimitExceeded
from diskwright.extents import DATA, SPECIAL, UNALLOCATED, ZERO, Extent, Extents
from diskwright.units import SECTOR, MiB

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from diskwright.core.node import Node

NOWHERE: Final = -1
"""Place of a block this layer says nothing about: it reads as the backing image, or as zeros."""
ZEROS: Final = -2
"""Place of a block that reads as zeros."""
STORED: Final = -3
"""Place of a block that ``stored_unit`` knows more about: it has to be decoded."""

CACHE_BYTES: Final = 8 * MiB
"""Memory for tables of one open image."""

_SLICE_BYTES: Final = 4096
_MOST_BLOCKS: Final = 65536
"""Blocks one reservation covers at most, so that the lock is held for a few milliseconds at worst."""
_BULK: Final = 1 << 18
"""Entries looked at together in bulk work."""
_SURVEY: Final = 1 << 26
"""Blocks with a place that a survey takes at most: 256 MiB of memory."""


class _Placed(Placed):
    """Blocks ``first`` to ``last`` on their way to the places from ``place`` on."""

    def __init__(self, owner: BlockMap, first: int, last: int, place: int) -> None:
        self._owner = owner
        self.first, self.last, self.place = first, last, place

    def publish(self) -> None:
        self._owner._publish(self)

    def abort(self) -> None:
        self._owner._abort(self)


class BlockMap(Format):
    """A format whose map is one table of entries. See the module's text."""

    alignment: int = SECTOR
    """Places of blocks are multiples of this."""
    stride: int
    """How far apart blocks lie that follow each other in the file; ``cluster_size`` where nothing is between them."""
    zero_entry: int | None = None
    """The entry of a block that reads as zeros whatever a backing image has; None where there is none."""

    def __init__(self, file: Node, size: int, block: int, table: SliceCache, first_place: int) -> None:
        """``size`` of the disk and of a ``block`` in bytes; no block lies before ``first_place`` of the file. The
        caller has checked that the table has an entry for every block of the disk."""
        self.children = (file,)
        self.file, self.path = file, file.filename
        self.size, self.cluster_size, self.stride = size, block, block
        self.table = table
        self.first_place = first_place
        self.lock = threading.Lock()
        """Guards everything that changes in memory; no guest data is moved under it."""
        self.flush_lock = threading.Lock()
        """Held while tables are written; taken before ``lock``."""
        self._young = table.young.get
        self._items = table.items
        self._turns = Turns(self.lock)
        self.surveyed = False
        """Whether something may have been changed."""
        self._end = self._fresh = 0  # where the next block goes; from where on nothing was ever written
        self._length = 0  # of the file, as far as blocks are concerned
        self._begun = self._completed = 0  # flushes
        self._most_changed = max(16, CACHE_BYTES // 2 // table.slice_bytes)

    # -- what a driver says --------------------------------------------------------------------------

    @abstractmethod
    def place_of(self, entry: int) -> int:
        """Where the block of an entry lies in the file, or NOWHERE, ZEROS or STORED. No lock is held."""

    @abstractmethod
    def places_of(self, entries: NDArray[Any]) -> NDArray[np.int64]:
        """``place_of`` of many; ``entries`` may be changed."""

    @abstractmethod
    def entry_for(self, place: int) -> int:
        """The entry of a block at ``place``. Raises LimitExceeded when no entry can say that."""

    def stored_unit(self, block: int, entry: int) -> tuple[int, int]:
        """``(file offset, length)`` of what is stored for a block whose place is STORED."""
        raise NotImplementedError(f"{self.name} has no stored units")

    def capture_first(self) -> list[Piece]:
        """What has to be durable before the tables are. Under both locks; called again after a write that failed."""
        return []

    # -- one run -------------------------------------------------------------------------------------

    def extent_at(self, offset: int, length: int) -> Extent:
        """See ``Format.extent_at``. Raises CorruptImage for a place where no block can lie."""
        size = self.cluster_size
        block, inside = divmod(offset, size)
        number, index = divmod(block, self._items)
        items = self._young(number)
        if items is None:
            items = self.load(number)
            if items is None:
                return self._no_table(offset, length)
        place_of = self.place_of
        entry = items[index]
        place = place_of(entry)
        run = size - inside
        if place >= 0:
            self._check(block, entry, place)
            if run < length:
                expected = place
                for entry in items[index + 1 : index + 1 - (run - length) // size]:
                    expected += size
                    if place_of(entry) != expected:
                        break
                    run += size
            return Extent(offset, run if run < length else length, DATA, place + inside)
        if place == STORED:
            at, stored = self.stored_unit(block, entry)
            return Extent(offset, min(run, length), SPECIAL, at, 0, stored)
        for entry in items[index + 1 : index + 1 - (run - length) // size] if run < length else ():
            if place_of(entry) != place:
                break
            run += size
        return Extent(offset, min(run, length), ZERO if place == ZEROS else UNALLOCATED)

    def load(self, number: int) -> array[int] | None:
        """A slice of the table, from the cache or the file; None when there is no table for it."""
        return self.table.get(number)

    def _no_table(self, offset: int, length: int) -> Extent:
        """A run without a table."""
        end = (offset // self.cluster_size // self._items + 1) * self._items * self.cluster_size
        return Extent(offset, min(length, end - offset), UNALLOCATED)

    def _check(self, block: int, entry: int, place: int) -> None:
        if place < self.first_place or place % self.alignment:
            self._bad(block, entry, "no block can lie there")

    def _bad(self, block: int, entry: int, why: str) -> NoReturn:
        raise CorruptImage(
            self.path, f"table entry of guest offset {block * self.cluster_size:#x}", f"{entry:#x}", None, why
        )

    # -- runs in bulk --------------------------------------------------------------------------------

    def extents(self, offset: int, length: int) -> Extents:
        """See ``Format.extents``."""
        size = self.cluster_size
        first, inside = divmod(offset, size)
        count = -(-(inside + length) // size)
        found = Extents.join([self._bulk(first + at, min(_BULK, count - at)) for at in range(0, count, _BULK)])
        if count > _BULK:
            found = found.merge()
        return found.slice(offset, length)

    def _bulk(self, first: int, count: int) -> Extents:
        """The runs of ``count`` blocks from ``first`` on."""
        import numpy as np

        entries = self.entries(first, count)
        if entries is None:
            places, kept = np.full(1, NOWHERE, np.int64), None
        else:
            kept = entries.copy()  # places_of may change them
            places = self.places_of(entries)
        step = np.diff(places)
        goes_on = (step == self.cluster_size) & (places[:-1] >= 0)
        goes_on |= (step == 0) & ((places[1:] == NOWHERE) | (places[1:] == ZEROS))
        heads = np.concatenate((np.zeros(1, np.int64), np.flatnonzero(~goes_on) + 1))
        places = places[heads]
        bad = (places >= 0) & ((places < self.first_place) | (places % self.alignment != 0))
        if kept is not None and bad.any():
            at = int(heads[np.argmax(bad)])
            self._bad(first + at, int(kept[at]), "no block can lie there")
        kind = np.full(len(heads), DATA, np.uint8)
        kind[places == NOWHERE], kind[places == ZEROS], kind[places == STORED] = UNALLOCATED, ZERO, SPECIAL
        stored = np.zeros(len(heads), np.int64)
        if kept is not None:
            for at in np.flatnonzero(places == STORED).tolist():
                head = int(heads[at])
                places[at], stored[at] = self.stored_unit(first + head, int(kept[head]))
        places[places < 0] = -1
        lengths = np.diff(heads, append=count) * self.cluster_size
        child = np.zeros(len(heads), np.int16)
        return Extents((heads + first) * self.cluster_size, lengths, kind, places, child, stored)

    def entries(self, first: int, count: int) -> NDArray[Any] | None:
        """Copies of the entries of blocks, as native integers; None when none of them has a table.

        Nothing enters the cache: a walk over a whole disk must not displace what its users need.
        """
        import numpy as np

        table = self.table
        found = np.zeros(count, np.dtype(table.typecode))
        raw = memoryview(found.view(np.uint8).data)
        width = found.itemsize
        wanted: list[tuple[int, memoryview]] = []
        swapped: list[tuple[int, int]] = []
        at, end, any_table = first, first + count, False
        while at < end:
            number, begin = divmod(at, self._items)
            stop = min(end, (number + 1) * self._items)
            low, high = at - first, stop - first
            cached = table.peek(number)
            place = -1 if cached is not None else self.locate(number)
            if cached is not None:
                found[low:high] = np.frombuffer(cached, found.dtype)[begin : begin + high - low]
            elif place >= 0:
                self._check_inside(place)
                wanted.append((place + begin * width, raw[low * width : high * width]))
                swapped.append((low, high))
            any_table = any_table or cached is not None or place >= 0
            at = stop
        if wanted:
            self.file.readv(wanted)
            if table.swapped:
                for low, high in swapped:
                    found[low:high].byteswap(inplace=True)
        return found if any_table else None

    def _check_inside(self, place: int) -> None:
        """Raises CorruptImage when the table at ``place`` is not in the file."""

    @abstractmethod
    def locate(self, number: int) -> int:
        """Where slice ``number`` of the table lies in the file, or -1."""

    # -- before anything changes ---------------------------------------------------------------------

    def survey(self) -> None:
        """Reads the whole table, once, before the first change. Raises CorruptImage when two blocks share a place."""
        if self.surveyed:
            return
        with self.flush_lock, self.lock:
            if not self.surveyed:
                self._survey()
                self.surveyed = True

    def _survey(self) -> None:
        import numpy as np

        size, parts, count = self.file.size, [], 0
        for blocks, places in self.used_places():
            bad = (places < self.first_place) | (places % self.alignment != 0)
            if bad.any():
                at = int(np.argmax(bad))
                self._refuse(int(blocks[at]), int(places[at]), "no block can lie there")
            count += len(places)
            if count > _SURVEY:
                raise LimitExceeded(f"{self.path}: has more than {_SURVEY} blocks; it can only be read")
            parts.append(places)
        used = np.concatenate(parts) if parts else np.zeros(0, np.int64)
        used.sort()
        close = np.diff(used) < self.stride
        if close.any():
            at = int(used[np.argmax(close)])
            raise CorruptImage(
                self.path, "the block table", "damaged", None,
                f"two blocks share the place {at:#x}; the image can only be read",
            )  # fmt: skip
        for start, end in self.tables():
            at = int(np.searchsorted(used, start - self.stride, "right"))
            if at < len(used) and used[at] < end:
                raise CorruptImage(
                    self.path, "the block table", "damaged", None,
                    f"a block lies at {int(used[at]):#x}, where a table is; the image can only be read",
                )  # fmt: skip
        last = int(used[-1]) + self.stride if len(used) else 0
        last = max([last, self.first_place, *(end for _, end in self.tables())])
        self._end, self._fresh, self._length = self.next_place(last, size), size, size

    def tables(self) -> Iterator[tuple[int, int]]:
        """``(start, end)`` in the file of the tables that lie where blocks may lie."""
        return iter(())

    def _refuse(self, block: int, place: int, why: str) -> NoReturn:
        field = f"place of the block at guest offset {block * self.cluster_size:#x}"
        raise CorruptImage(self.path, field, f"{place:#x}", None, why)

    def next_place(self, used: int, size: int) -> int:
        """Where the next new block goes, when blocks in use end at ``used`` and the file has ``size`` bytes."""
        end = max(used, size)
        return end + -end % self.alignment

    def used_places(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """``(blocks, places)`` of the blocks that have a place of their own, in bounded pieces."""
        import numpy as np

        total = -(-self.size // self.cluster_size)
        for first in range(0, total, _BULK):
            entries = self.entries(first, min(_BULK, total - first))
            if entries is not None:
                places = self.places_of(entries)
                at = np.flatnonzero(places >= 0)
                if len(at):
                    yield at + first, places[at]

    # -- writing -------------------------------------------------------------------------------------

    def in_place(self, offset: int, length: int) -> int:
        """See ``Format.in_place``."""
        if not self.surveyed:
            self.survey()
        run = self.extent_at(offset, length)
        return run[3] if run[1] == length and run[2] == DATA else -1

    def reserve(self, offset: int, length: int) -> Reservation:
        """See ``Format.reserve``. Covers one run of blocks within one slice of the table."""
        self.survey()
        size = self.cluster_size
        first, last = offset // size, (offset + length - 1) // size
        last = min(last, (first // self._items + 1) * self._items - 1, first + _MOST_BLOCKS - 1)
        with self.lock:
            last = self._turns.wait(first, last)
            return self._reserve(offset, min(length, (last + 1) * size - offset), first, last)

    def _reserve(self, offset: int, length: int, first: int, last: int) -> Reservation:
        """The rest of ``reserve``, for blocks nobody else has reserved. Under the lock."""
        size = self.cluster_size
        run = self.extent_at(offset, length)
        if run.kind == DATA:
            return InPlace(run)
        number, index = divmod(first, self._items)
        items = self.own_slice(number)
        count = 1
        while first + count <= last and self.place_of(items[index + count]) < 0:
            count += 1
        place = self._end
        self.entry_for(place + (count - 1) * self.stride)  # raises when there is no room for it
        if self.stride != size:
            count = 1  # they do not adjoin in the file
        placed = _Placed(self, first, first + count - 1, place)
        self._end = place + count * self.stride
        if offset + length < (first + count) * size:
            self._lengthen()
        self.table.pin(number)
        placed.zeroed = place >= self._fresh and self.file.zero_init
        placed.describe(size, place, offset, length)
        self._turns.begin(placed)
        return placed

    def _lengthen(self) -> None:
        """Makes the file as long as the last block, where the write to come does not: zeros at a block's end need not
        be written, but other programs want all of it to be in the file. Under the lock, and before anybody can write
        there: nothing is cut off."""
        if self._length < self._end:
            with suppress(OSError):  # storages of a fixed size cannot, and need not
                self.file.resize(self._end)
            self._length = self._end

    def own_slice(self, number: int) -> array[int]:
        """A slice of the table, to be changed. Under the lock."""
        items = self.table.edit(number)
        assert items is not None, "there is a table for every block"
        return items

    def _publish(self, placed: _Placed) -> None:
        with self.lock:
            number, low = divmod(placed.first, self._items)
            count = placed.last - placed.first + 1
            items = self.own_slice(number)
            places = range(placed.place, placed.place + count * self.stride, self.stride)
            items[low : low + count] = array(items.typecode, [self.entry_for(place) for place in places])
            self.table.mark(number, low, low + count - 1)
            self.published(count)
            self._close(placed)
            overdue = self.table.changed > self._most_changed
        if overdue:
            self.write_back()

    def published(self, count: int) -> None:
        """``count`` blocks have got a place. Under the lock."""

    def _abort(self, placed: _Placed) -> None:
        with self.lock:
            self._close(placed)
            # Space at the end of the file that nothing uses; whoever gets it must not take it for zeros.
            end = placed.place + (placed.last - placed.first + 1) * self.stride
            self._fresh = max(self._fresh, end)
            if self._end == end:
                self._end = placed.place

    def _close(self, placed: Placed) -> None:
        self.table.unpin(placed.first // self._items)
        self._turns.finish(placed)

    # -- zeros and discards --------------------------------------------------------------------------

    def zero(self, offset: int, length: int, *, unmap: bool) -> tuple[int, int]:
        """See ``Format.zero``: blocks without a place. Those that have one keep it; the caller zeros what is there."""
        size = self.cluster_size
        first, end = -(-offset // size), offset + length
        stop = (end + size - 1 if end >= self.size else end) // size
        while first < stop:
            run = self.extent_at(first * size, min(stop * size, self.size) - first * size)
            blocks = -(-run.length // size)
            if run.kind in (UNALLOCATED, ZERO):
                if run.kind == ZERO or not self.has_backing:
                    return run.offset, run.length
                if self.zero_entry is not None:
                    count = self._set_zero(first, min(first + blocks, (first // self._items + 1) * self._items))
                    if count:
                        return run.offset, min(count * size, end - run.offset)
            first += blocks
        return offset, 0

    def _set_zero(self, first: int, end: int) -> int:
        """Gives blocks of one slice, which have no place, the entry that says zero; returns how many from ``first``
        on have it now."""
        assert self.zero_entry is not None
        self.survey()
        with self.lock:
            end = self._turns.wait(first, end - 1) + 1
            number, low = divmod(first, self._items)
            items = self.own_slice(number)
            count = 0
            while count < end - first and self.place_of(items[low + count]) in (NOWHERE, ZEROS):
                count += 1
            if count:
                items[low : low + count] = array(items.typecode, [self.zero_entry]) * count
                self.table.mark(number, low, low + count - 1)
            overdue = self.table.changed > self._most_changed
        if overdue:
            self.write_back()
        return count

    def discard(self, offset: int, length: int) -> None:
        """See ``Format.discard``: the file may give up the space of whole blocks, which keep their place."""
        size = self.cluster_size
        at, end = -(-offset // size) * size, offset + length
        end = end if end >= self.size else end // size * size
        if at < end:
            self.survey()
        while at < end:
            run = self.extent_at(at, end - at)
            if run.kind == DATA:
                self.file.discard(run.file_offset, run.length)
            at = run.end

    # -- the order of things -------------------------------------------------------------------------

    def flush(self) -> None:
        self.write_back()

    def write_back(self) -> None:
        """Makes all that was published before the call durable, in the order the module's text gives. After an error
        nothing is lost: what was to be written stays changed, and a later call tries again."""
        begun = self._begun
        with self.flush_lock:
            if self._completed > begun:
                return  # another call's has begun since ours was made, and covers it
            self._begun += 1
            ticket = self._begun
            with self.lock:
                first = self.capture_first() if self.surveyed else []
                stages = self._capture()
            try:
                if first:
                    self.file.writev(first)
                self.file.flush()
                for pieces in stages:
                    if pieces:
                        self.put(pieces)
            except BaseException:
                with self.lock:
                    self._restore()
                raise
            self._settle()
            self._completed = ticket

    def put(self, pieces: list[Piece]) -> None:
        """Writes pieces of tables, durably. What was written before is durable. Under the flush lock."""
        self.file.writev(pieces)
        self.file.flush()

    def _capture(self) -> list[list[Piece]]:
        """What has changed in the tables, in the order it has to become durable."""
        return [self.table.capture()]

    def _settle(self) -> None:
        self.table.settle()

    def _restore(self) -> None:
        self.table.restore()

    def close(self) -> None:
        if self.surveyed and (self.table.changed or self.capture_first()):
            self.write_back()


class FlatMap(BlockMap):
    """A ``BlockMap`` with one table in one piece."""

    def __init__(
        self,
        file: Node,
        size: int,
        block: int,
        *,
        table_offset: int,
        entries: int,
        typecode: Literal["I", "Q"],
        byteorder: Literal["big", "little"],
        first_place: int,
    ) -> None:
        self.table_offset = table_offset
        items = _SLICE_BYTES // array(typecode).itemsize
        table = SliceCache(
            file, self.locate, typecode=typecode, items=items, byteorder=byteorder, budget=CACHE_BYTES, total=entries
        )
        super().__init__(file, size, block, table, first_place)

    def locate(self, number: int) -> int:
        return self.table_offset + number * _SLICE_BYTES


class DirectoryMap(BlockMap):
    """A ``BlockMap`` with tables of ``table_entries`` entries each, which a ``Directory`` names."""

    def __init__(
        self,
        file: Node,
        size: int,
        block: int,
        *,
        directory: Directory,
        table_entries: int,
        typecode: Literal["I", "Q"],
        byteorder: Literal["big", "little"],
        first_place: int,
    ) -> None:
        self.directory = directory
        self.table_entries = table_entries
        width = array(typecode).itemsize
        items = min(table_entries, _SLICE_BYTES // width)
        while table_entries % items:
            items -= 1
        self._per_table = table_entries // items
        table = SliceCache(file, self.locate, typecode=typecode, items=items, byteorder=byteorder, budget=CACHE_BYTES)
        super().__init__(file, size, block, table, first_place)

    def table_place(self, entry: int) -> int:
        """Where the table of a directory entry lies in the file, or -1 when it has none."""
        return entry or -1

    def table_entry(self, place: int) -> int:
        """The directory entry for a table at ``place``."""
        return place

    def locate(self, number: int) -> int:
        index, within = divmod(number, self._per_table)
        place = self.table_place(self.directory.entries[index])
        if place < 0:
            return -1
        if place < self.first_place or place % self.alignment:
            raise CorruptImage(self.path, f"directory entry {index}", f"{place:#x}", None, "no table can lie there")
        return place + within * self.table.slice_bytes

    def load(self, number: int) -> array[int] | None:
        if self.table.peek(number) is None:
            self._check_inside(self.locate(number))
        return super().load(number)

    def _check_inside(self, place: int) -> None:
        # A new table that is not yet written lies beyond the end too, but that one is cached.
        if place >= self.file.size:
            raise CorruptImage(
                self.path, "place of a table", f"{place:#x}", None, f"the file ends at {self.file.size:#x}"
            )

    def empty(self, end: int) -> None:
        """Takes all tables off the directory, durably, and cuts the file off at ``end``. For ``make_empty``."""
        with self.flush_lock, self.lock:
            self.table.clear()
            for index, entry in enumerate(self.directory.entries):
                if entry:
                    self.directory.set(index, 0)
        self.write_back()
        self.file.resize(end)
        self._survey()

    def tables(self) -> Iterator[tuple[int, int]]:
        length = self._per_table * self.table.slice_bytes
        for entry in self.directory.entries:
            place = self.table_place(entry)
            if place >= 0:
                yield place, place + length

    def _no_table(self, offset: int, length: int) -> Extent:
        span = self.table_entries * self.cluster_size
        index, end = offset // span + 1, offset + length
        while index * span < end and self.table_place(self.directory.entries[index]) < 0:
            index += 1
        return Extent(offset, min(end, index * span) - offset, UNALLOCATED)

    def own_slice(self, number: int) -> array[int]:
        index = number // self._per_table
        if self.table_place(self.directory.entries[index]) < 0:
            self.add_table(index)
        return super().own_slice(number)

    def add_table(self, index: int) -> None:
        """Makes a new table, of nothing but zeros, at the end of the file. Under the lock."""
        place = self._end
        entry = self.table_entry(place)
        for number in range(index * self._per_table, (index + 1) * self._per_table):
            self.table.put(number)
        self.directory.set(index, entry)
        end = place + self._per_table * self.table.slice_bytes
        self._end = end + -end % self.alignment

    def _capture(self) -> list[list[Piece]]:
        return [self.table.capture(), self.directory.capture()]

    def _settle(self) -> None:
        super()._settle()
        self.directory.settle()

    def _restore(self) -> None:
        super()._restore()
        self.directory.restore()
