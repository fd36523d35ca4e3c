"""Places for compressed clusters: packed one behind the other into host clusters (section Cluster mapping,
"Compressed Clusters Descriptor").

A host cluster is counted once for each compressed cluster that has bytes in it. Those of one reservation follow each
other byte by byte; a reservation begins at a sector. So no two writers ever have bytes in the same sector, the file
ends with a whole one, and what a torn write damages nobody relies on yet.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from diskwright.core.driver import Reservation
from diskwright.core.placing import Placed
from diskwright.errors import LimitExceeded
from diskwright.extents import SPECIAL, Extent
from diskwright.formats.qcow2.layout import COMPRESSED
from diskwright.formats.qcow2.ordering import Cause
from diskwright.formats.qcow2.writing import Writer
from diskwright.units import SECTOR, align_up

_MOST_UNITS: Final = 8192
"""Units one reservation covers at most, so that the lock is held for some ten milliseconds at worst."""


class _Stored(Placed):
    """Guest clusters on their way to packed places; ``first`` to ``last`` is the range they lie in."""

    def __init__(self, writer: PackingWriter, first: int, last: int) -> None:
        self._writer = writer
        self.first, self.last = first, last
        self.clusters: list[int] = []
        self.entries: list[int] = []  # the descriptors they are to have

    def publish(self) -> None:
        self._writer.publish_stored(self)

    def abort(self) -> None:
        self._writer.abort_stored(self)


class PackingWriter(Writer):
    """A writer that can also write compressed clusters."""

    _next = 0
    """Where the next unit may begin in ``refcounts.packing``, when that is a cluster."""

    def reserve_stored(self, units: Sequence[tuple[int, int]]) -> Reservation:
        """See ``Format.reserve_stored``. Covers what one slice of an L2 table maps."""
        bits = self._cluster_bits
        first = units[0][0] >> bits
        last = min(units[-1][0] >> bits, first | self._index_mask)
        units = [unit for unit in units[:_MOST_UNITS] if unit[0] >> bits <= last]
        return self.growing(lambda: self._reserve_stored(units, first, units[-1][0] >> bits))

    def _reserve_stored(self, units: Sequence[tuple[int, int]], first: int, last: int) -> Reservation:
        bits, size = self._cluster_bits, self._cluster_size
        last = self._turns.wait(first, last)
        items = self._own_table(first)
        units = [unit for unit in units if unit[0] >> bits <= last]
        for offset, _ in units:
            entry = items[self._word((offset >> bits) & self._index_mask)]
            if entry:
                self._check_counted(offset >> bits, entry)
        self.file.announce("cluster_alloc_bytes")
        places = self._pack([length for _, length in units])
        self.file.announce("l2_update_compressed")
        stored = _Stored(self, first, units[len(places) - 1][0] >> bits)
        extents = []
        for i, ((offset, length), place) in enumerate(zip(units, places, strict=False)):
            end = place + length
            if i + 1 == len(places) or places[i + 1] != end:
                end = align_up(end, SECTOR)
            extents.append(Extent(offset, min(size, self.size - offset), SPECIAL, place, 0, end - place))
            stored.clusters.append(offset >> bits)
            stored.entries.append(self._descriptor(place, length))
        stored.extents = extents
        self.map.l2.pin(first >> self.geometry.slice_bits)
        self._turns.begin(stored)
        return stored

    def _descriptor(self, place: int, length: int) -> int:
        sectors = ((place + length - 1) >> 9) - (place >> 9)
        return COMPRESSED | sectors << self.geometry.sectors_shift | place

    # -- packing -----------------------------------------------------------------------------------

    def _pack(self, lengths: Sequence[int]) -> list[int]:
        """File offsets for the first of some stored units, at least one of them. Raises, with nothing taken, when
        there is no place for that one."""
        places: list[int] = []
        for length in lengths:
            try:
                places.append(self._pack_one(length))
            except Exception:
                if not places:
                    raise
                break  # the next reservation will run into it again
        self._next = align_up(self._next, SECTOR)
        return places

    def _pack_one(self, length: int) -> int:
        """The place of one unit. Each host cluster it touches is now counted once more."""
        bits, refcounts = self._cluster_bits, self.refcounts
        begun = self._begun_cluster()
        if begun >= 0 and length <= (-self._next & self._cluster_mask):
            refcounts.add(begun)
            place = self._next
        else:
            host, _ = self._allocate(1)
            try:
                if (host << bits) + length > self.geometry.compressed_mask + 1:
                    raise LimitExceeded(f"{self.path}: a compressed cluster cannot lie at {host << bits}")
                # Taking a cluster may have shown that the one begun is no longer ours.
                if host == begun + 1 and refcounts.packing == begun:
                    refcounts.add(begun)
                    place = self._next
                else:
                    place = host << bits
            except BaseException:
                refcounts.release([(host, 1)])
                raise
        self._next = place + length
        refcounts.packing = (self._next - 1) >> bits
        return place

    def _begun_cluster(self) -> int:
        """The host cluster that has room at ``_next`` and can be counted once more, or -1."""
        begun = self.refcounts.packing
        if begun < 0 or not self._next & self._cluster_mask:
            return -1
        return begun if 0 < self.refcounts.get(begun) < self.refcounts.most else -1

    def _word(self, index: int) -> int:
        """Where in a slice the entry of its cluster ``index`` begins."""
        return index * self.geometry.entry_words

    def _forget_place(self, places: array[int], index: int) -> None:
        """The cluster must not be written to in place any more."""
        places[index] = 0

    # -- the end of a reservation ------------------------------------------------------------------

    def publish_stored(self, stored: _Stored) -> None:
        """Puts packed units on the map."""
        width = self.geometry.entry_words
        with self.lock:
            number = stored.first >> self.geometry.slice_bits
            items = self.map.l2.edit(number)
            assert items is not None, "pinned by the reservation"
            places = self._places.peek(number)
            old = []
            for cluster, entry in zip(stored.clusters, stored.entries, strict=True):
                index = cluster & self._index_mask
                word = self._word(index)
                if items[word]:
                    old.append(items[word])
                # The second word of an extended entry, its bitmap, is 0 for a compressed cluster.
                items[word : word + width] = array("Q", (entry, 0)[:width])
                if places is not None:
                    self._forget_place(places, index)
            low, high = stored.first & self._index_mask, stored.last & self._index_mask
            self.map.l2.mark(number, self._word(low), self._word(high) + width - 1)
            self._give_up(old, Cause.OTHER)
            self._close(stored)
            overdue = self._overdue()
        if overdue:
            self.checkpoint()

    def abort_stored(self, stored: _Stored) -> None:
        """Gives the places back, or leaks them when even that fails."""
        with self.lock:
            self._close(stored)
            with suppress(Exception):  # what cannot be given back is leaked, and check will find it
                self.refcounts.release(self._host_runs(stored.entries))
