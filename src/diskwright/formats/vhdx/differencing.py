"""vhdx: differencing images. MS-VHDX 2.4, 2.5.1.1, 2.6.2.6.

A block may be partly present: the sector bitmap says which of its sectors this image has, the parent has the others. So
a write needs no copy of the rest of a block. Bits change when the data is there, together with the table and in the
same entry of the log.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from diskwright.core.blockmap import STORED
from diskwright.core.driver import BackingHint, CheckReport, Reservation
from diskwright.core.node import FormatNode, below_filters
from diskwright.core.placing import InPlace, Placed
from diskwright.core.tables import Piece
from diskwright.errors import CorruptImage, ImageError, OptionError, UnsupportedFeature
from diskwright.extents import DATA, SPECIAL, UNALLOCATED, Extent, Extents
from diskwright.formats.vhdx import locator
from diskwright.formats.vhdx.bitmap import PRESENT, SectorBitmap
from diskwright.formats.vhdx.create import VhdxCreateOptions, create
from diskwright.formats.vhdx.driver import FULLY_PRESENT, NOT_PRESENT, PARTIALLY_PRESENT, UNMAPPED, Vhdx
from diskwright.formats.vhdx.header import METADATA_REGION
from diskwright.formats.vhdx.log import Change
from diskwright.formats.vhdx.metadata import PARENT_LOCATOR, changed_item, inherited_items
from diskwright.units import MiB, align_down, align_up

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from diskwright.core.node import Node

_BULK: Final = 1 << 18


class _Part(Placed):
    """Sectors of one block, which lies or is to lie at ``place``."""

    def __init__(self, owner: Differencing, block: int, place: int, span: tuple[int, int], *, new: bool) -> None:
        self._owner = owner
        self.first = self.last = block
        self.place, self.span, self.new = place, span, new

    def publish(self) -> None:
        self._owner.publish_part(self)

    def abort(self) -> None:
        self._owner.abort_part(self)


class Differencing(Vhdx):
    """One open differencing image."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        assert self.about.locator is not None
        self.pairs = locator.decode(self.path, self.about.locator)
        name = locator.file_name(self.pairs)
        self.backing = None if name is None else BackingHint(name, "vhdx")
        self.bitmap = SectorBitmap(self)
        self.parent: Vhdx | None = None

    # -- the parent --------------------------------------------------------------------------------

    def accept_backing(self, backing: Node) -> None:
        """See ``Format.accept_backing``. Whoever puts another kind of image beneath this one knows what it is for."""
        parent = _vhdx_of(backing)
        if parent is None:
            return
        guid = parent.headers.current.data_write_guid
        if not self.trusting and guid not in locator.links(self.pairs):
            raise ImageError(
                f"{self.path}: its parent '{parent.path}' has changed since: its DataWriteGuid is "
                f"{locator.braced(guid)}, not {self.pairs[locator.LINKAGE]}"
            )
        if parent.about.logical_sector != self.about.logical_sector:
            raise ImageError(
                f"{self.path}: its sectors have {self.about.logical_sector} bytes, those of its parent "
                f"'{parent.path}' {parent.about.logical_sector}"
            )
        self._attach(parent)

    def backing_changes(self, backing: Node | None) -> None:
        self._detach()
        parent = _vhdx_of(backing)
        if parent is not None:
            self._attach(parent)

    def _attach(self, parent: Vhdx) -> None:
        self.parent = parent
        if self.writable and parent.writable:
            parent.followers.append(self._follow)

    def _detach(self) -> None:
        if self.parent is not None and self._follow in self.parent.followers:
            self.parent.followers.remove(self._follow)
        self.parent = None

    def _follow(self, guid: bytes) -> None:
        """The parent is about to change, because what this image has goes into it, and will have the identity ``guid``
        then. This image has to know both before that."""
        self._write_pairs({**self.pairs, locator.LINKAGE2: locator.braced(guid)})

    def _write_pairs(self, pairs: dict[str, str]) -> None:
        """Changes the locator, durably and at once."""
        pieces = changed_item(self.file, self.regions[METADATA_REGION], PARENT_LOCATOR, locator.encode(pairs))
        with self.flush_lock:
            with self.lock:
                self.begin(contents=False)
            flushed = self.flushable_size()
            self.file.flush()
            self.put_pieces([(at, memoryview(data)) for at, data in pieces], flushed)
        self.pairs = pairs

    def change_backing(self, filename: str | None, format: str | None) -> None:
        """See ``Format.change_backing``. The identity noted is that of the backing node there is; without one it stays
        as it is: then it is the same parent under another name."""
        if filename is None:
            raise UnsupportedFeature(f"{self.path}: a differencing image cannot do without a parent; convert it")
        if format not in (None, "vhdx"):
            raise OptionError("The parent of a VHDX image must be a VHDX image")
        guid = next(iter(locator.links({locator.LINKAGE: self.pairs[locator.LINKAGE]})))
        if self.parent is not None:
            guid = self.parent.headers.current.data_write_guid
        pairs = locator.pairs_for(self.path, filename, guid)
        self.write_back()
        self._write_pairs(pairs)
        self.backing = BackingHint(locator.file_name(pairs) or filename, "vhdx")

    def make_empty(self) -> None:
        """See ``Format.make_empty``."""
        self.survey()
        self.write_back()
        with self.flush_lock:
            flushed = self.flushable_size()
            self.file.flush()
            end = max(stop for _, stop in super().tables())
            self.journal.commit([Change(self.bat.offset, self.bat.length, None)], flushed=min(flushed, end), end=end)
            with self.lock:
                self.table.clear()
                self.bitmap.clear()
            self.file.flush()
            self.file.resize(end)
            with self.lock:
                self._end, self._fresh, self._length = end, end, end
        if self.parent is not None:
            self._write_pairs({**self._own_names(), locator.LINKAGE: locator.braced(self._parent_guid())})

    def _own_names(self) -> dict[str, str]:
        return {key: value for key, value in self.pairs.items() if key != locator.LINKAGE2}

    def _parent_guid(self) -> bytes:
        assert self.parent is not None
        return self.parent.headers.current.data_write_guid

    def close(self) -> None:
        try:
            super().close()
        finally:
            self._detach()

    def grown(self) -> None:
        self.bitmap.grown()

    def bitmap_entries(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        for chunk in range(first, min(end, len(self.bitmap.places))):
            if self.bitmap.has(chunk):
                yield chunk, self.bitmap.places[chunk] | PRESENT

    # -- what an entry means -----------------------------------------------------------------------

    def place_of(self, entry: int) -> int:
        return STORED if entry & 7 == PARTIALLY_PRESENT else super().place_of(entry)

    def places_of(self, entries: NDArray[Any]) -> NDArray[np.int64]:
        import numpy as np

        partial = (entries & np.uint64(7)) == PARTIALLY_PRESENT
        places = super().places_of(entries)
        places[partial] = STORED
        return places

    def stored_unit(self, block: int, entry: int) -> tuple[int, int]:
        """Where a partly present block lies."""
        place = super().place_of(entry & ~7 | FULLY_PRESENT)
        self._check(block, entry, place)
        return place, 1

    def data_place(self, block: int) -> int:
        entry = self._entry(block)
        return self.stored_unit(block, entry)[0] if entry & 7 == PARTIALLY_PRESENT else super().data_place(block)

    def _entry(self, block: int) -> int:
        items = self.table.get(block // self._items)
        assert items is not None
        return items[block % self._items]

    def tables(self) -> Iterator[tuple[int, int]]:
        yield from super().tables()
        yield from self.bitmap.tables()

    def used_places(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        for first in range(0, self.about.blocks, _BULK):
            entries = self.entries(first, min(_BULK, self.about.blocks - first))
            assert entries is not None
            blocks, places, _ = self.claimed(entries)
            if len(blocks):
                yield blocks + first, places

    # -- runs --------------------------------------------------------------------------------------

    def extent_at(self, offset: int, length: int) -> Extent:
        run = super().extent_at(offset, length)
        if run.kind != SPECIAL:
            return run
        inside = offset % self.cluster_size
        present, length = self.bitmap.run_at(offset, min(run.length, length))
        if not present:
            return Extent(offset, length, UNALLOCATED)
        return self._whole(Extent(offset, length, DATA, run.file_offset + inside))

    def _whole(self, run: Extent) -> Extent:
        if run.file_offset + run.length > self._known_size:
            self._check_end(run.offset, run.file_offset + run.length)
        return run

    def extents(self, offset: int, length: int) -> Extents:
        found = super().extents(offset, length)
        import numpy as np

        at = np.flatnonzero(found.kind == SPECIAL)
        if not len(at):
            return found
        rows: list[Extent] = []
        for run in found:
            if run.kind == SPECIAL:
                rows += self._parts(run)
            else:
                rows.append(run)
        return Extents.of(rows)

    def _parts(self, run: Extent) -> Iterator[Extent]:
        """The runs within a partly present block."""
        import numpy as np

        starts, present = self.bitmap.runs(run.offset, run.length)
        starts[0] = run.offset
        shift = run.file_offset - align_down(run.offset, self.cluster_size)
        ends = np.append(starts[1:], run.end)
        for start, end, here in zip(starts.tolist(), ends.tolist(), present.tolist(), strict=True):
            if here:
                yield self._whole(Extent(start, end - start, DATA, start + shift))
            else:
                yield Extent(start, end - start, UNALLOCATED)

    # -- writing -----------------------------------------------------------------------------------

    def _reserve(self, offset: int, length: int, first: int, last: int) -> Reservation:
        size, entry = self.cluster_size, self._entry(first)
        state = entry & 7
        covered = offset == first * size and offset + length >= min((first + 1) * size, self.size)
        if state == PARTIALLY_PRESENT or (state == NOT_PRESENT and not covered):
            return self._reserve_part(offset, min(length, (first + 1) * size - offset), first, entry)
        if state <= UNMAPPED:
            last = self._last_whole(first, min(last, (offset + length - 1) // size), offset + length)
            length = min(length, (last + 1) * size - offset)
        return super()._reserve(offset, length, first, last)

    def _last_whole(self, first: int, last: int, end: int) -> int:
        """Up to which block the write, which ends at ``end``, fills blocks that have no place."""
        block = first
        while block < last and self._entry(block + 1) & 7 <= UNMAPPED:
            if end < min((block + 2) * self.cluster_size, self.size):
                break
            block += 1
        return block

    def _reserve_part(self, offset: int, length: int, block: int, entry: int) -> Reservation:
        run = self.extent_at(offset, length)
        if run.kind == DATA:
            return InPlace(run)
        new, sector, start = entry & 7 == NOT_PRESENT, self.about.logical_sector, block * self.cluster_size
        self.own_slice(block // self._items)
        place = self._place_new(block) if new else self.stored_unit(block, entry)[0]
        span = align_down(offset, sector), align_up(offset + length, sector)
        part = _Part(self, block, place, span, new=new)
        self.table.pin(block // self._items)
        shift, end = place - start, offset + length
        part.extents = (Extent(offset, length, DATA, offset + shift),)
        edges = ((span[0], offset), (end, span[1]))
        part.fills = [Extent(low, high - low, DATA, low + shift) for low, high in edges if low < high]
        self._turns.begin(part)
        return part

    def _place_new(self, block: int) -> int:
        """Room for a block, and for the bitmap that tells of it."""
        chunk = block // self._ratio
        if self.bitmap.places[chunk] < 0:
            raise CorruptImage(
                self.path, f"entry of sector bitmap block {chunk}", "damaged", None, "no block can lie there"
            )
        if not self.bitmap.has(chunk):
            self.entry_for(self._end + MiB)
            self.bitmap.put(chunk, self._end)
            self._end += MiB
        place = self._end
        self.entry_for(place)
        self._end = place + self.cluster_size
        self._lengthen()
        return place

    def publish_part(self, part: _Part) -> None:
        size = self.cluster_size
        with self.lock:
            number, index = divmod(part.first, self._items)
            items = self.own_slice(number)
            start = part.first * size
            covered = min(size, self.size - start)
            if part.new:
                self.bitmap.set(start, size, False)
            self.bitmap.set(part.span[0], part.span[1] - part.span[0], True)
            full = self.bitmap.full(start, covered)
            items[index] = part.place | (FULLY_PRESENT if full and covered == size else PARTIALLY_PRESENT)
            self.table.mark(number, index, index)
            self._close(part)
            overdue = self.table.changed + self.bitmap.changed > self._most_changed
        if overdue:
            self.write_back()

    def abort_part(self, part: _Part) -> None:
        if part.new:
            self._abort(part)  # type: ignore[arg-type]
            return
        with self.lock:
            self._close(part)

    # -- checking ----------------------------------------------------------------------------------

    def check_bitmap(self, report: CheckReport) -> None:
        for chunk, place in enumerate(self.bitmap.places):
            if place < 0:
                report.corruptions += 1
                report.say(f"ERROR block {chunk} of the sector bitmap lies where it cannot lie")
        for first in range(0, self.about.blocks, self._ratio):
            chunk = first // self._ratio
            if not self.bitmap.places[chunk] and self._any_partial(first, min(self._ratio, self.about.blocks - first)):
                report.corruptions += 1
                report.say(f"ERROR block {chunk} of the sector bitmap is missing, and blocks are partly present")

    def _any_partial(self, first: int, count: int) -> bool:
        import numpy as np

        entries = self.entries(first, count)
        return entries is not None and bool(((entries & np.uint64(7)) == PARTIALLY_PRESENT).any())

    # -- writing back ------------------------------------------------------------------------------

    def _capture(self) -> list[list[Piece]]:
        return [[*super()._capture()[0], *self.bitmap.capture()]]

    def _settle(self) -> None:
        super()._settle()
        self.bitmap.settle()

    def _restore(self) -> None:
        super()._restore()
        self.bitmap.restore()

    def unwritten(self) -> bool:
        return super().unwritten() or self.bitmap.changed > 0


def _vhdx_of(node: Node | None) -> Vhdx | None:
    bottom = None if node is None else below_filters(node)
    form = bottom.format if isinstance(bottom, FormatNode) else None
    return form if isinstance(form, Vhdx) else None


def create_over(file: Node, options: VhdxCreateOptions, node: Node) -> None:
    """Makes an empty image over ``node``. Raises OptionError, ImageError."""
    assert options.backing_file is not None
    parent = _vhdx_of(node)
    if parent is None:
        raise ImageError(f"'{options.backing_file}' is no VHDX image, so it cannot be the parent of one")
    pairs = locator.pairs_for(file.filename, options.backing_file, parent.headers.current.data_write_guid)
    items = inherited_items(parent.file, parent.regions[METADATA_REGION])
    create(file, options, locator.encode(pairs), replace(parent.about, inherited=items))
