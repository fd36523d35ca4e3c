"""Changing the map: reservations for writes, zeros and discards. In what order changes reach the file is told in
``ordering``."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from diskwright.core.driver import Reservation
from diskwright.core.leases import Leases
from diskwright.core.node import Node
from diskwright.core.placing import InPlace, Placed, Turns
from diskwright.core.tables import Generations
from diskwright.errors import CorruptImage
from diskwright.extents import DATA, Extent
from diskwright.formats.qcow2.header import Header
from diskwright.formats.qcow2.layout import COMPRESSED, COPIED, OFFSET_MASK, ZERO
from diskwright.formats.qcow2.mapping import Mapping
from diskwright.formats.qcow2.ordering import Cause, Ordering
from diskwright.formats.qcow2.refcounts import Refcounts

_MOST_CLUSTERS: Final = 65536
"""Clusters one reservation covers at most, so that the lock is held for a few milliseconds at worst."""

_MANY: Final = 4096
"""Entries from which on NumPy is worth its import: only allocation in advance makes that many at once."""


class PlacedClusters(Placed):
    """Guest clusters ``first`` to ``last`` on their way to the host clusters from ``place`` on."""

    def __init__(self, writer: Writer, first: int, last: int, place: int, *, kept: bool) -> None:
        self._writer = writer
        self.first, self.last, self.place = first, last, place
        self.kept = kept
        """The places were ready for these clusters, which read as zeros; they were not taken for this write."""
        self.bitmaps: dict[int, tuple[int, int]] = {}
        """For clusters of which it may be only a part: ``(zero, allocated)`` parts afterwards; see ``subwriting``."""

    def publish(self) -> None:
        self._writer.publish(self)

    def abort(self) -> None:
        self._writer.abort(self)


class Writer(Ordering):
    """The writing side of one open image. Thread-safe."""

    def __init__(
        self, file: Node, header: Header, mapping: Mapping, refcounts: Refcounts, leases: Leases, cache_bytes: int
    ) -> None:
        """``cache_bytes`` bounds what is remembered of places, and changed slices. Raises LimitExceeded when the
        snapshot table is too long."""
        super().__init__(file, header, mapping, refcounts, leases, cache_bytes)
        g = self.geometry
        self.size = header.size
        self.backed = True
        """Whether clusters without an entry may read as something else than zeros."""
        self.keeps_places = False
        """Whether clusters keep their place when they are discarded (option ``discard-no-unref``)."""
        self._turns = Turns(self.lock)
        self._file_zero_init = file.zero_init
        self._owned: set[int] = set()  # L1 entries whose L2 table is known to be ours alone
        # Places proven to be writable: one array a slice, 0 where nothing is proven.
        self._places = Generations(max(2, cache_bytes // (g.slice_bytes + 256)))
        self._young = self._places.young.get
        self._slice_shift = g.cluster_bits + g.slice_bits
        self._index_mask = (1 << g.slice_bits) - 1

    def clean_caches(self) -> None:
        """Gives up what is remembered of places and refcounts and has not been used since the call before this one."""
        self.refcounts.cache.age()
        with self.lock:
            self._places.age()

    # -- places that can be written to as they are -------------------------------------------------

    def in_place(self, offset: int, length: int) -> int:
        """See ``Format.in_place``. No lock is taken when all clusters have been proven before."""
        places = self._young(offset >> self._slice_shift)
        if places is not None:
            index = (offset >> self._cluster_bits) & self._index_mask
            place = places[index]
            if place:
                inside = offset & self._cluster_mask
                needed = inside + length
                size = self._cluster_size
                if needed <= size:
                    return place + inside
                expected = place
                count = (needed + self._cluster_mask) >> self._cluster_bits
                for found in places[index + 1 : index + count]:
                    expected += size
                    if found != expected:
                        break
                else:
                    if index + count <= len(places):
                        return place + inside
        return self._prove(offset, length)

    def _prove(self, offset: int, length: int) -> int:
        """``in_place`` the long way, remembering what has been proven."""
        first, last = offset >> self._cluster_bits, (offset + length - 1) >> self._cluster_bits
        start = expected = 0
        with self.lock:
            for cluster in range(first, last + 1):
                try:
                    place = self._writable(cluster)
                except CorruptImage:
                    return -1  # reserving it will say what is wrong
                if not place or (expected and place != expected):
                    return -1
                start = start or place
                expected = place + self._cluster_size
        return start + (offset & self._cluster_mask)

    def _writable(self, cluster: int) -> int:
        """Where a guest cluster may be overwritten, or 0. Raises CorruptImage when the place it has is not its own
        to write to, by the refcounts or because metadata lies there."""
        number, index = cluster >> self.geometry.slice_bits, cluster & self._index_mask
        places = self._places.get(number)
        if places is not None and places[index]:
            return places[index]
        items = self.map.load(number)
        if items is None:
            return 0
        entry = items[index]
        if not entry & COPIED or entry & (COMPRESSED | ZERO):
            return 0
        place = entry & OFFSET_MASK
        if not place:
            return 0
        self.map.check_entry(cluster, entry)
        if not self._exclusive(cluster, place):
            return 0
        self._places_of(number)[index] = place
        return place

    def _places_of(self, number: int) -> array[int]:
        places = self._places.get(number)
        if places is None:
            places = array("Q", bytes(self.geometry.slice_bytes))
            self._places.set(number, places)
        return places

    def _exclusive(self, cluster: int, place: int) -> bool:
        """Whether only guest cluster ``cluster`` uses the host cluster at ``place``. Raises CorruptImage."""
        host = place >> self._cluster_bits
        count = self.refcounts.get(host)
        if count == 0:
            self._refuse(cluster, place, "the refcount of that host cluster is 0")
        if self.metadata.contains(host, 1):
            self._refuse(cluster, place, "metadata lies in that host cluster")
        return count == 1

    def _refuse(self, cluster: int, place: int, why: str) -> None:
        raise CorruptImage(
            self.path, f"place of guest offset {cluster << self._cluster_bits:#x}", f"{place:#x}", None,
            f"{why}; repair the image before writing to it",
        )  # fmt: skip

    # -- reservations ------------------------------------------------------------------------------

    def reserve(self, offset: int, length: int) -> Reservation:
        """See ``Format.reserve``. Covers one run of host clusters within one slice of an L2 table."""
        first = offset >> self._cluster_bits
        last = min((offset + length - 1) >> self._cluster_bits, first | self._index_mask, first + _MOST_CLUSTERS - 1)
        return self.growing(lambda: self._reserve(offset, length, first, last))

    def _reserve(self, offset: int, length: int, first: int, last: int) -> Reservation:
        last = self._turns.wait(first, last)
        bits, size = self._cluster_bits, self._cluster_size
        place = self._writable(first)
        if place:
            end = first + 1
            while end <= last and self._writable(end) == place + ((end - first) << bits):
                end += 1
            inside = offset & self._cluster_mask
            covered = min(length, ((end - first) << bits) - inside)
            return InPlace(Extent(offset, covered, DATA, place + inside))
        number = first >> self.geometry.slice_bits
        items = self._own_table(first)
        index = first & self._index_mask
        entries = items[index : index + last - first + 1]
        place = self._ready_place(first, entries[0])
        kept, before, count = bool(place), self._fresh, 1
        if kept:
            while count < len(entries) and self._ready_place(first + count, entries[count]) == place + count * size:
                count += 1
        else:
            host, count = self._allocate(self._count_new(first, entries))
            place = host << bits
        self.map.l2.pin(number)
        placed = PlacedClusters(self, first, first + count - 1, place, kept=kept)
        placed.zeroed = not kept and place >> bits >= before and self._file_zero_init
        placed.describe(self._cluster_size, place, offset, length)
        self._turns.begin(placed)
        return placed

    def _ready_place(self, cluster: int, entry: int) -> int:
        """Where space is kept ready for a cluster that reads as zeros, or 0."""
        if entry & (COPIED | COMPRESSED | ZERO) != COPIED | ZERO or not entry & OFFSET_MASK:
            return 0
        self.map.check_entry(cluster, entry)
        place = entry & OFFSET_MASK
        return place if self._exclusive(cluster, place) else 0

    def _count_new(self, first: int, entries: array[int]) -> int:
        """How many clusters, the first one included, need a new place. Raises CorruptImage for old places that are
        counted as free: they might be taken while the caller still copies from them."""
        if not any(entries):
            return len(entries)
        self._check_counted(first, entries[0])
        count = 1
        for entry in entries[1:]:
            if entry & COPIED:
                break
            if entry > ZERO:
                self._check_counted(first + count, entry)
            count += 1
        return count

    def _check_counted(self, cluster: int, entry: int) -> None:
        if not entry & COMPRESSED:
            self.map.check_entry(cluster, entry)
        for host, count in self._host_runs((entry,)):
            for each in range(host, host + count):
                if not self.refcounts.get(each):
                    self._refuse(cluster, each << self._cluster_bits, "the refcount of that host cluster is 0")

    def publish(self, placed: PlacedClusters, flags: int = COPIED) -> None:
        """Puts a reservation's places on the map. With ``flags`` that have ZERO in them the places are kept ready for
        clusters that read as zeros."""
        with self.lock:
            bits, size = self.geometry.slice_bits, self._cluster_size
            number, low = placed.first >> bits, placed.first & self._index_mask
            high = placed.last & self._index_mask
            items = self.map.l2.edit(number)
            assert items is not None, "pinned by the reservation"
            old = items[low : high + 1]
            start = placed.place
            items[low : high + 1] = steps(start | flags, size, len(old))
            self.map.l2.mark(number, low, high)
            if not flags & ZERO:
                self._places_of(number)[low : high + 1] = steps(start, size, len(old))
            if not placed.kept and any(old):
                self._give_up(old, Cause.OTHER)
            self._close(placed)
            overdue = self._overdue()
        if overdue:
            self.checkpoint()

    def publish_empty(self, placed: PlacedClusters, *, veiled: bool) -> None:
        """``publish`` for places that are taken in advance, and hold zeros; ``veiled``: what would not read as zeros,
        and has to be called zeros by the map."""
        self.publish(placed, COPIED | ZERO if veiled else COPIED)

    def abort(self, placed: PlacedClusters) -> None:
        """Gives a reservation's places back, or leaks them when even that fails."""
        with self.lock:
            self._close(placed)
            if placed.kept:
                return
            with suppress(Exception):  # what cannot be given back is leaked, and check will find it
                self.refcounts.release([(placed.place >> self._cluster_bits, placed.last - placed.first + 1)])

    def _close(self, placed: Placed) -> None:
        self.map.l2.unpin(placed.first >> self.geometry.slice_bits)
        self._turns.finish(placed)

    # -- L2 tables -----------------------------------------------------------------------------------

    def _own_table(self, cluster: int) -> array[int]:
        """The slice of guest cluster ``cluster``, to be changed, in an L2 table that is the active disk's alone."""
        number = cluster >> self.geometry.slice_bits
        index = cluster >> self.geometry.l2_bits
        if index not in self._owned:
            table = self.map.l1[index] & OFFSET_MASK
            if not table:
                self._new_table(index)
            else:
                self.map.load(number)  # for its checks
                host = table >> self._cluster_bits
                count = self.refcounts.get(host)
                if not count or self.metadata.conflicts(host):
                    raise CorruptImage(
                        self.path, f"L1 entry {index}", f"{self.map.l1[index]:#x}", self.map.l1_offset + index * 8,
                        "other metadata lies there too, or its refcount is 0; repair the image before writing to it",
                    )  # fmt: skip
                if count > 1 or not self.map.l1[index] & COPIED:
                    self._copy_table(index)
            self._owned.add(index)
        items = self.map.l2.edit(number)
        assert items is not None, "there is a table now"
        return items

    def _slices_of(self, index: int) -> range:
        per_table = 1 << (self.geometry.l2_bits - self.geometry.slice_bits)
        return range(index * per_table, (index + 1) * per_table)

    def _new_table(self, index: int) -> None:
        host, _ = self._allocate(1)
        for number in self._slices_of(index):
            self.map.l2.put(number)
        self._set_l1(index, host, COPIED)

    def _copy_table(self, index: int) -> None:
        """A table that a snapshot shares is copied before it is changed."""
        old = (self.map.l1[index] & OFFSET_MASK) >> self._cluster_bits
        self.file.announce("l2_alloc_cow_read")
        for number in self._slices_of(index):
            self.map.l2.edit(number)
        host, _ = self._allocate(1)
        for number in self._slices_of(index):
            self.map.l2.mark_all(number)
        self._set_l1(index, host, COPIED)
        self.metadata.remove(old)
        self._give_up_runs([(old, 1)], Cause.OTHER)

    # -- zeros and discards --------------------------------------------------------------------------

    def zero(self, offset: int, length: int, *, unmap: bool) -> tuple[int, int]:
        """See ``Format.zero``. Version 2 cannot say zero without saying unallocated, so there it covers nothing."""
        first, end = self._whole_clusters(offset, length)
        if self.header.version < 3 or first >= end:
            return offset, 0
        end = min(end, (first | self._index_mask) + 1)
        overdue = self.growing(lambda: self._zero(first, end, unmap))
        if overdue:
            self.checkpoint()
        if unmap and self.keeps_places:
            self._discard_kept(first, end)
        start = first << self._cluster_bits
        return start, min(end << self._cluster_bits, offset + length) - start

    def discard(self, offset: int, length: int) -> None:
        """See ``Format.discard``: zeros, also over a backing file, and in version 2 nothing allocated, or no change
        where that would show what the backing file has there."""
        first, stop = self._whole_clusters(offset, length)
        over = bool(self.header.backing_file)
        if self.header.version < 3 and over:
            return
        while first < stop:
            if not over and not self.map.l1[first >> self.geometry.l2_bits] & OFFSET_MASK:
                first = ((first >> self.geometry.l2_bits) + 1) << self.geometry.l2_bits
                continue
            end = min(stop, (first | self._index_mask) + 1)
            if self.growing(lambda first=first, end=end: self._discard(first, end)):  # type: ignore[misc]
                self.checkpoint()
            if self.keeps_places:
                self._discard_kept(first, end)
            first = end

    def _discard_kept(self, first: int, end: int) -> None:
        """Tells the file to discard what clusters of one slice, which read as zeros now, keep as their place. No lock
        is held: a write to them meanwhile would be one beside a discard of the same range, which has no order."""
        if Cause.REQUEST not in self.told:
            return
        with self.lock:
            items = self.map.load(first >> self.geometry.slice_bits)
            low, high = first & self._index_mask, (end - 1) & self._index_mask
            kept = [] if items is None else [e for e in items[low : high + 1] if e & ZERO and e & COPIED]
            runs = self._host_runs(entry for entry in kept if not entry & COMPRESSED)
        for host, count in runs:
            self.file.discard(host << self._cluster_bits, count << self._cluster_bits)

    def _whole_clusters(self, offset: int, length: int) -> tuple[int, int]:
        """``(first, end)`` of the guest clusters wholly within a range; the disk's last one counts as whole."""
        first = (offset + self._cluster_mask) >> self._cluster_bits
        end = offset + length
        return first, (end + self._cluster_mask if end >= self.size else end) >> self._cluster_bits

    def _zero(self, first: int, end: int, unmap: bool) -> bool:
        def zeroed(entry: int) -> int:
            if entry & COMPRESSED:
                return ZERO
            if not entry & OFFSET_MASK:
                return ZERO if entry & ZERO or self.backed else 0
            return entry | ZERO if entry & COPIED and (self.keeps_places or not unmap) else ZERO

        return self._change(first, end, zeroed, Cause.REQUEST if unmap else Cause.OTHER)

    def _discard(self, first: int, end: int) -> bool:
        gone = ZERO if self.header.version >= 3 else 0
        over = bool(self.header.backing_file)

        def discarded(entry: int) -> int:
            if self.keeps_places and gone and entry & COPIED and not entry & COMPRESSED:
                return entry | ZERO
            return gone if over or entry & COMPRESSED or entry & OFFSET_MASK else entry

        return self._change(first, end, discarded, Cause.REQUEST)

    def _change(self, first: int, end: int, new: Callable[[int], int], cause: Cause) -> bool:
        """Gives guest clusters of one slice the entries ``new`` makes of their old ones. Tells whether changed
        tables are overdue to be written."""
        self._turns.wait_for_all(first, end)
        low, high = first & self._index_mask, (end - 1) & self._index_mask
        items = self.map.load(first >> self.geometry.slice_bits)
        old = array("Q", bytes(8 * (end - first))) if items is None else items[low : high + 1]
        results = {entry: new(entry) for entry in set(old)}
        if all(entry == result for entry, result in results.items()):
            return False
        for cluster, entry in zip(range(first, end), old, strict=True):
            if entry > ZERO and not entry & COMPRESSED:
                self.map.check_entry(cluster, entry)
        items = self._own_table(first)
        number = first >> self.geometry.slice_bits
        items[low : high + 1] = array("Q", [results[entry] for entry in old])
        self.map.l2.mark(number, low, high)
        places = self._places.peek(number)
        if places is not None:
            places[low : high + 1] = array("Q", bytes(8 * len(old)))
        self._give_up((entry for entry in old if not _same_place(entry, results[entry])), cause)
        return self._overdue()

    def unmap(self, first: int, end: int, cause: Cause) -> None:
        """Takes guest clusters of one slice off the map. For a disk that changes its size, or is emptied."""
        if self.growing(lambda: self._change(first, end, lambda entry: 0, cause)):
            self.checkpoint()

    def drop_tables(self, first: int, cause: Cause) -> None:
        """Takes the L2 tables from L1 entry ``first`` on, which map nothing any more, off the L1 table."""
        with self.lock:
            for index in range(first, len(self.map.l1)):
                table = self.map.l1[index] & OFFSET_MASK
                if table:
                    for number in self._slices_of(index):
                        self.map.l2.drop(number)
                    self._set_l1(index, 0, 0)
                    self._owned.discard(index)
                    self.metadata.remove(table >> self._cluster_bits)
                    self._give_up_runs([(table >> self._cluster_bits, 1)], cause)

    def drop_blocks(self) -> None:
        """Takes refcount blocks that have become empty off the refcount table."""
        with self.flush_lock, self.lock:
            for host in self.refcounts.drop_empty_blocks():
                self.metadata.remove(host)
                self._give_up_runs([(host, 1)], Cause.OTHER)


def steps(start: int, step: int, count: int) -> array[int]:
    """``count`` numbers from ``start`` on."""
    if count < _MANY:
        return array("Q", range(start, start + step * count, step))
    import numpy as np

    numbers = np.arange(count, dtype=np.uint64) * np.uint64(step) + np.uint64(start)
    return array("Q", numbers.tobytes())


def _same_place(old: int, new: int) -> bool:
    """Whether what ``old`` refers to is still referred to by ``new``."""
    if old & COMPRESSED:
        return old == new
    return old & OFFSET_MASK == new & OFFSET_MASK
