"""Changing the map of images with extended L2 entries or an external data file; see ``subclusters``.

What differs from ``writing`` is what has to be copied, and whose the places are:

* A write into a cluster that has a place of its own takes no new one: it fills the subclusters it touches, and of
  those only the first and the last are completed with what the guest reads there.
* Places in a data file are nobody else's: they need no refcounts and no quarantine. A range is given back to the
  data file while the lock is held, so that no later write can be under way there.
* A *raw* data file reads as the disk does, so in it zeros are bytes, and the map never says anything but data.
"""

from __future__ import annotations

import errno
from array import array
from collections.abc import Callable, Iterable
from typing import NamedTuple

from diskwright.core.driver import Reservation
from diskwright.core.leases import Leases
from diskwright.core.node import Node
from diskwright.core.placing import InPlace
from diskwright.core.tables import Generations
from diskwright.errors import CorruptImage
from diskwright.extents import DATA, Extent
from diskwright.formats.qcow2.header import Header
from diskwright.formats.qcow2.layout import ALL_SUBCLUSTERS, COMPRESSED, COPIED, SUBCLUSTER_BITS, ZERO
from diskwright.formats.qcow2.ordering import Cause
from diskwright.formats.qcow2.packing import PackingWriter
from diskwright.formats.qcow2.refcounts import Refcounts
from diskwright.formats.qcow2.subclusters import SubclusterMapping, parts_of
from diskwright.formats.qcow2.writing import PlacedClusters, steps

_NOWHERE = (-1, 0)


class _State(NamedTuple):
    """What a cluster is: its entry, its place or -1, and its bitmap as two masks of parts."""

    entry: int
    place: int
    alloc: int
    zero: int

    @property
    def held(self) -> bool:
        """Whether something is stored for it anywhere."""
        return self.place >= 0 or bool(self.entry & COMPRESSED)


_Change = Callable[[_State, int], "tuple[bool, int, int]"]
"""Given a cluster's state and a mask of parts: ``(keeps its place, alloc, zero)`` afterwards."""


class SubclusterWriter(PackingWriter):
    """The writing side of an image whose map is a ``SubclusterMapping``. Thread-safe."""

    map: SubclusterMapping

    def __init__(
        self,
        file: Node,
        header: Header,
        mapping: SubclusterMapping,
        refcounts: Refcounts,
        leases: Leases,
        cache_bytes: int,
        data_file: Node | None,
    ) -> None:
        """``data_file`` is None when the data is in ``file``. Otherwise as ``Writer``."""
        super().__init__(file, header, mapping, refcounts, leases, cache_bytes)
        g = self.geometry
        self.data_file = data_file
        self._raw = header.raw_data_file
        self._extended, self._to_word = g.extended, g.entry_words - 1
        self._part_bits = g.cluster_bits - SUBCLUSTER_BITS
        self._child = mapping.child
        # Places proven to be writable: for each cluster of a slice the place, and a mask of the parts that are.
        self._places = Generations(max(2, cache_bytes // ((16 << g.slice_bits) + 256)))
        self._young = self._places.young.get

    # -- places that can be written to as they are -------------------------------------------------

    def in_place(self, offset: int, length: int) -> int:
        """See ``Format.in_place``. No lock is taken when all parts of all clusters have been proven before."""
        places = self._young(offset >> self._slice_shift)
        if places is not None:
            index = (offset >> self._cluster_bits & self._index_mask) << 1
            inside = offset & self._cluster_mask
            if places[index + 1] == ALL_SUBCLUSTERS:
                if inside + length <= self._cluster_size:
                    return places[index] + inside
                place = self._run_of(places, index, (inside + length + self._cluster_mask) >> self._cluster_bits)
                if place >= 0:
                    return place + inside
        return self._prove(offset, length)

    def _run_of(self, places: array[int], index: int, count: int) -> int:
        """Where ``count`` clusters from ``index`` on lie, all proven and one after another; or -1."""
        size = self._cluster_size
        start = expected = places[index]
        end = index + 2 * count
        if end > len(places) or places[index + 1 : end : 2].count(ALL_SUBCLUSTERS) != count:
            return -1
        for found in places[index:end:2]:
            if found != expected:
                return -1
            expected += size
        return start

    def _prove(self, offset: int, length: int) -> int:
        end = offset + length
        first, last = offset >> self._cluster_bits, (end - 1) >> self._cluster_bits
        start = expected = -1
        with self.lock:
            for cluster in range(first, last + 1):
                try:
                    place, mask = self._own_parts(cluster)
                except CorruptImage:
                    return -1  # reserving it will say what is wrong
                if self._touched(cluster, offset, end) & ~mask or (expected >= 0 and place != expected):
                    return -1
                if start < 0:
                    start = place
                expected = place + self._cluster_size
        return start + (offset & self._cluster_mask)

    def _own_parts(self, cluster: int) -> tuple[int, int]:
        """Where a guest cluster lies that is its own to write to, or -1, and which parts are allocated there. Raises
        CorruptImage as ``Writer._writable`` does."""
        number, index = cluster >> self.geometry.slice_bits, cluster & self._index_mask
        places = self._places.get(number)
        if places is not None and places[2 * index + 1]:
            return places[2 * index], places[2 * index + 1]
        items = self.map.load(number)
        if items is None:
            return _NOWHERE
        state = self._state(cluster, *self.map.words(items, index))
        if state.place < 0:
            return _NOWHERE
        if self.data_file is None and not (state.entry & COPIED and self._exclusive(cluster, state.place)):
            return _NOWHERE
        if state.alloc:
            places = self._places_of(number)
            places[2 * index] = state.place
            places[2 * index + 1] = state.alloc
        return state.place, state.alloc

    def _forget_place(self, places: array[int], index: int) -> None:
        places[2 * index + 1] = 0

    def _places_of(self, number: int) -> array[int]:
        places = self._places.get(number)
        if places is None:
            places = array("Q", bytes(16 << self.geometry.slice_bits))
            self._places.set(number, places)
        return places

    def _state(self, cluster: int, entry: int, bitmap: int) -> _State:
        if entry & COMPRESSED:
            self.map.check_compressed(cluster, entry)
            return _State(entry, -1, 0, 0)
        place, bitmap = self.map.look(cluster, entry, bitmap)
        return _State(entry, place, bitmap & ALL_SUBCLUSTERS, bitmap >> 32)

    def _touched(self, cluster: int, start: int, end: int) -> int:
        """Which parts of a cluster a guest range touches: all or none where entries speak of whole clusters."""
        if not self._extended:
            return ALL_SUBCLUSTERS
        base = cluster << self._cluster_bits
        low = max(0, start - base) >> self._part_bits
        high = (min(end - base, self._cluster_size) - 1 >> self._part_bits) + 1
        return parts_of(low, high)

    # -- reservations ------------------------------------------------------------------------------

    def _reserve(self, offset: int, length: int, first: int, last: int) -> Reservation:
        last = self._turns.wait(first, last)
        end = min(offset + length, last + 1 << self._cluster_bits)
        place, mask = self._own_parts(first)
        if place >= 0:
            missing = self._touched(first, offset, end) & ~mask
            count = self._count_own(first, last, place, offset, end, not missing)
            if not missing:
                inside = offset & self._cluster_mask
                covered = min(end, first + count << self._cluster_bits) - offset
                return InPlace(Extent(offset, covered, DATA, place + inside, self._child))
        number, index, words = first >> self.geometry.slice_bits, first & self._index_mask, self.geometry.entry_words
        items = self._own_table(first)
        kept, before = place >= 0 or self.data_file is not None, self._fresh
        if place < 0:
            entries = items[index * words : (index + last - first + 1) * words : words]
            count = self._count_new(first, entries)
            if self.data_file is not None:
                place = first << self._cluster_bits
            else:
                host, count = self._allocate(count)
                place = host << self._cluster_bits
        self.map.l2.pin(number)
        placed = PlacedClusters(self, first, first + count - 1, place, kept=kept)
        placed.zeroed = not kept and place >> self._cluster_bits >= before and self._file_zero_init
        try:
            self._describe_parts(placed, items, offset, min(end, first + count << self._cluster_bits))
        except BaseException:
            self.map.l2.unpin(number)
            if not kept:
                self.refcounts.release([(place >> self._cluster_bits, count)])
            raise
        self._turns.begin(placed)
        return placed

    def _count_own(self, first: int, last: int, place: int, offset: int, end: int, complete: bool) -> int:
        """How many clusters, the first included, lie one after another in places of their own, and have all the parts
        that are wanted or, when ``complete`` is false, do not."""
        count = 1
        while first + count <= last:
            found, mask = self._own_parts(first + count)
            if found != place + (count << self._cluster_bits):
                break
            if complete is bool(self._touched(first + count, offset, end) & ~mask):
                break
            count += 1
        return count

    def _count_new(self, first: int, entries: array[int]) -> int:
        if self.data_file is None:
            return super()._count_new(first, entries)
        count = 1
        while count < len(entries) and not entries[count] & (self.map.placed | COMPRESSED):
            count += 1
        return count

    def _describe_parts(self, placed: PlacedClusters, items: array[int], start: int, end: int) -> None:
        """Which bytes the write fills, which the caller must, and what the entries become."""
        placed.extents = (Extent(start, end - start, DATA, placed.place + (start & self._cluster_mask), self._child),)
        fills: list[Extent] = []
        bitmaps = {}
        for cluster in dict.fromkeys((placed.first, placed.last)):
            state = self._state(cluster, *self.map.words(items, cluster & self._index_mask))
            touched = self._touched(cluster, start, end)
            if state.entry & COMPRESSED:
                wanted = ALL_SUBCLUSTERS
            elif placed.kept:
                wanted = touched & ~state.alloc
            else:
                wanted = touched | state.alloc
            alloc = state.alloc | touched | wanted
            bitmaps[cluster] = state.zero & ~alloc, alloc
            shift = placed.place - (placed.first << self._cluster_bits)
            for low, high in self._outside(cluster, wanted, start, end):
                fills.append(Extent(low, high - low, DATA, low + shift, self._child))
        placed.fills = fills
        placed.bitmaps = bitmaps

    def _outside(self, cluster: int, wanted: int, start: int, end: int) -> Iterable[tuple[int, int]]:
        """The guest ranges of the ``wanted`` parts of a cluster that lie outside of a guest range."""
        base = cluster << self._cluster_bits
        # Behind the disk's end a data file has nothing: there is no need to make it longer.
        most = base + self._cluster_size if self.data_file is None else max(base, self.size)
        part = 0
        while wanted >> part:
            part += ((wanted >> part) & -(wanted >> part)).bit_length() - 1
            rest = ~wanted >> part
            count = (rest & -rest).bit_length() - 1
            low, high = base + (part << self._part_bits), min(most, base + (part + count << self._part_bits))
            if low < min(high, start):
                yield low, min(high, start)
            if high > max(low, end):
                yield max(low, end), high
            part += count

    def publish(self, placed: PlacedClusters, flags: int = COPIED) -> None:
        self._publish(placed, flags, empty=bool(flags & ZERO))

    def publish_empty(self, placed: PlacedClusters, *, veiled: bool) -> None:
        """With extended entries places can be had without anything being in them: the guest then reads what it would
        without them."""
        flags = COPIED | ZERO if veiled and not self._extended else COPIED
        self._publish(placed, flags, empty=veiled or self._extended)

    def _publish(self, placed: PlacedClusters, flags: int, *, empty: bool) -> None:
        with self.lock:
            number, words = placed.first >> self.geometry.slice_bits, self.geometry.entry_words
            low, count = placed.first & self._index_mask, placed.last - placed.first + 1
            items = self.map.l2.edit(number)
            assert items is not None, "pinned by the reservation"
            begin, end = low * words, (low + count) * words
            old = items[begin:end:words]
            new, places = array("Q", bytes(8 * words * count)), array("Q", bytes(16 * count))
            new[::words] = steps(placed.place | flags, self._cluster_size, count)
            places[::2] = steps(placed.place, self._cluster_size, count)
            if empty:
                if words == 2:
                    new[1::2] = items[begin + 1 : end : 2]
            else:
                masks = array("Q", (ALL_SUBCLUSTERS,)) * count
                for cluster, (_, alloc) in placed.bitmaps.items():
                    masks[cluster - placed.first] = alloc
                places[1::2] = masks
                if words == 2:
                    new[1::2] = masks
                    for cluster, (zero, alloc) in placed.bitmaps.items():
                        new[2 * (cluster - placed.first) + 1] = zero << 32 | alloc
            items[begin:end] = new
            self.map.l2.mark(number, begin, end - 1)
            self._places_of(number)[2 * low : 2 * (low + count)] = places
            if not placed.kept and any(old):
                self._give_up(old, Cause.OTHER)
            self._close(placed)
            overdue = self._overdue()
        if overdue:
            self.checkpoint()

    def _give_up(self, entries: Iterable[int], cause: Cause) -> None:
        if self.data_file is None:
            super()._give_up(entries, cause)

    # -- zeros and discards --------------------------------------------------------------------------

    def zero(self, offset: int, length: int, *, unmap: bool) -> tuple[int, int]:
        """See ``Format.zero``. In a raw data file zeros are bytes, and the map stays as it is."""
        if self._raw:
            return self._zero_bytes(offset, length, unmap)
        start, stop = self._whole_units(offset, length)
        if start >= stop:
            return offset, 0
        stop = min(stop, (start >> self._cluster_bits | self._index_mask) + 1 << self._cluster_bits)
        start, stop, overdue = self.growing(lambda: self._zero_units(start, stop, unmap))
        if overdue:
            self.checkpoint()
        if unmap and self.keeps_places:
            self._discard_kept(start + self._cluster_mask >> self._cluster_bits, stop >> self._cluster_bits)
        return start, max(0, min(stop, offset + length) - start)

    def _zero_bytes(self, offset: int, length: int, unmap: bool) -> tuple[int, int]:
        """Zeros a range of the data file, as it stands: what the map does not call data reads as zeros anyway. Covers
        nothing where that would mean to write them out, which is for the caller to decide."""
        assert self.data_file is not None
        try:
            self.data_file.write_zeros(offset, length, unmap=unmap, fast=True)
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.EOPNOTSUPP):
                raise
            return offset, 0
        return offset, length

    def discard(self, offset: int, length: int) -> None:
        """See ``Format.discard``: by subclusters where there are any; a host cluster is given back when nothing of it
        is in use."""
        start, stop = self._whole_units(offset, length)
        table_shift = self._cluster_bits + self.geometry.l2_bits
        over = bool(self.header.backing_file)

        def change(state: _State, parts: int) -> tuple[bool, int, int]:
            keeps, alloc, zero = (_discarded_over if over else _discarded)(state, parts)
            return keeps or (self.keeps_places and state.place >= 0), alloc, zero

        while start < stop:
            if not over and not self.map.l1[start >> table_shift]:
                start = (start >> table_shift) + 1 << table_shift
                continue
            end = min(stop, (start >> self._cluster_bits | self._index_mask) + 1 << self._cluster_bits)
            if self.growing(lambda start=start, end=end: self._alter(start, end, change, Cause.REQUEST)):  # type: ignore[misc]
                self.checkpoint()
            if self.keeps_places:
                self._discard_kept(start + self._cluster_mask >> self._cluster_bits, end >> self._cluster_bits)
            start = end

    def _discard_kept(self, first: int, end: int) -> None:
        """As ``Writer._discard_kept``. Of data files the space has been given up under the lock."""
        if Cause.REQUEST not in self.told or self.data_file is not None or first >= end:
            return
        runs: list[tuple[int, int]] = []
        with self.lock:
            items = self.map.load(first >> self.geometry.slice_bits)
            if items is None:
                return
            for cluster in range(first, end):
                state = self._state(cluster, *self.map.words(items, cluster & self._index_mask))
                if state.place >= 0 and not state.alloc and state.entry & COPIED:
                    runs.append((state.place, self._cluster_size))
        for place, length in runs:
            self.file.discard(place, length)

    def _whole_units(self, offset: int, length: int) -> tuple[int, int]:
        """The guest range of whole subclusters, or clusters, within a range; the disk's last one counts as whole."""
        bits = self.geometry.unit_bits
        mask = (1 << bits) - 1
        end = offset + length
        if end >= self.size:
            end += -end & self._cluster_mask
        return offset + mask & ~mask, end & ~mask

    def _zero_units(self, start: int, stop: int, unmap: bool) -> tuple[int, int, bool]:
        """Zeros a range of units within a slice, or the part of it that the map can say that of: compressed clusters
        are either zero or not. Returns that range, and whether changed tables are overdue."""
        self._await_none_open(start, stop)
        mask, bits = self._cluster_mask, self._cluster_bits
        if start & mask and self._compressed(start >> bits):
            start = (start | mask) + 1
        if stop & mask and stop > start and self._compressed(stop >> bits):
            stop &= ~mask
        if start >= stop:
            return start, start, False

        def zeroed(state: _State, parts: int) -> tuple[bool, int, int]:
            alloc, zero = state.alloc & ~parts, state.zero | parts
            if not state.held:
                return False, 0, zero if self.backed else state.zero
            if state.entry & COMPRESSED:
                return False, 0, zero
            shared = self.data_file is None and not state.entry & COPIED
            gives = unmap and not self.keeps_places
            return bool(alloc) or not (gives or (shared and zero == ALL_SUBCLUSTERS)), alloc, zero

        return start, stop, self._alter(start, stop, zeroed, Cause.REQUEST if unmap else Cause.OTHER)

    def _compressed(self, cluster: int) -> bool:
        items = self.map.load(cluster >> self.geometry.slice_bits)
        return items is not None and bool(self.map.words(items, cluster & self._index_mask)[0] & COMPRESSED)

    def _await_none_open(self, start: int, stop: int) -> None:
        self._turns.wait_for_all(start >> self._cluster_bits, ((stop - 1) >> self._cluster_bits) + 1)

    def _alter(self, start: int, stop: int, new: _Change, cause: Cause) -> bool:
        """Changes the entries of a range of units within one slice. Tells whether changed tables are overdue."""
        self._await_none_open(start, stop)
        first, words = start >> self._cluster_bits, self.geometry.entry_words
        count = (stop - 1 >> self._cluster_bits) - first + 1
        number, low = first >> self.geometry.slice_bits, first & self._index_mask
        items = self.map.load(number)
        if items is None:
            items = array("Q", bytes(8 * words << self.geometry.slice_bits))
        changed = array("Q", items[low * words : (low + count) * words])
        given_up, emptied = [], []
        for at in range(count):
            cluster = first + at
            state = self._state(cluster, *self.map.words(items, low + at))
            parts = self._touched(cluster, start, stop)
            keeps, alloc, zero = new(state, parts)
            if self._encode(changed, at, state, keeps, alloc, zero):
                if not keeps and state.held:
                    given_up.append(state.entry)
                if state.alloc & ~alloc:
                    emptied.append((cluster, state.alloc & ~alloc))
        if cause is Cause.REQUEST and cause in self.told and self.data_file is not None:
            self._empty(self.data_file, emptied)
        if self._raw and new is not _gone:
            return False  # the map goes on to say data, of bytes that the data file may have forgotten
        if changed == items[low * words : (low + count) * words]:
            return False
        items = self._own_table(first)
        items[low * words : (low + count) * words] = changed
        self.map.l2.mark(number, low * words, (low + count) * words - 1)
        places = self._places.peek(number)
        if places is not None:
            places[2 * low : 2 * (low + count)] = array("Q", bytes(16 * count))
        self._give_up(given_up, cause)
        return self._overdue()

    def _encode(self, words: array[int], at: int, state: _State, keeps: bool, alloc: int, zero: int) -> bool:
        """Stores entry ``at`` as it becomes; tells whether anything changes."""
        if keeps == state.held and (alloc, zero) == (state.alloc, state.zero):
            return False
        if self._extended:
            words[2 * at] = state.entry if keeps else 0
            words[2 * at + 1] = zero << 32 | alloc
        else:
            words[at] = (state.entry & ~ZERO if keeps else 0) | (ZERO if zero else 0)
        return True

    def _empty(self, data_file: Node, emptied: list[tuple[int, int]]) -> None:
        """Gives parts of clusters back to the data file."""
        runs: list[tuple[int, int]] = []
        for cluster, parts in emptied:
            for low, high in self._outside(cluster, parts, 0, 0):
                if runs and runs[-1][1] == low:
                    runs[-1] = runs[-1][0], high
                else:
                    runs.append((low, high))
        for low, high in runs:
            try:
                data_file.discard(low, high - low)
            except OSError as error:
                if error.errno not in (errno.ENOTSUP, errno.EOPNOTSUPP):
                    raise

    def unmap(self, first: int, end: int, cause: Cause) -> None:
        """See ``Writer.unmap``. What a data file has there stays: it may be needed until the map is durable."""
        start, stop = first << self._cluster_bits, end << self._cluster_bits
        if self.growing(lambda: self._alter(start, stop, _gone, cause)):
            self.checkpoint()


def _discarded(state: _State, parts: int) -> tuple[bool, int, int]:
    """What was stored becomes zeros; what was not stays as it is."""
    if state.entry & COMPRESSED:
        return (False, 0, ALL_SUBCLUSTERS) if parts == ALL_SUBCLUSTERS else (True, 0, 0)
    alloc, zero = state.alloc & ~parts, state.zero | state.alloc & parts
    # A place all of which is zero or nothing is of no use to anyone, when that was discarded too.
    return state.place >= 0 and (bool(alloc) or not parts & (state.alloc | state.zero)), alloc, zero


def _discarded_over(state: _State, parts: int) -> tuple[bool, int, int]:
    """Over a backing file what was not stored becomes zeros too, by whole clusters."""
    keeps, alloc, zero = _discarded(state, parts)
    return keeps, alloc, ALL_SUBCLUSTERS if parts == ALL_SUBCLUSTERS else zero


def _gone(state: _State, parts: int) -> tuple[bool, int, int]:
    return False, 0, 0
