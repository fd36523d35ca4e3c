"""The map of images with extended L2 entries or an external data file (sections Extended L2 Entries and External
data file).

Both are seen in one way: an L2 entry is a place, or none, and a bitmap that says of each of 32 parts of the cluster
whether its bytes lie there, whether it reads as zeros, or neither. Extended entries are stored like that. A standard
entry says the same of all parts.

In a data file the place of a guest cluster is always the guest offset itself. The specification would allow others,
but no writer makes them, and an image that has some is refused: to write to it would need to know what else lies
where in the data file, and nothing records that.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Final, NoReturn

from diskwright.core.node import Node
from diskwright.errors import CorruptImage
from diskwright.extents import DATA, SPECIAL, UNALLOCATED, Extent, Extents
from diskwright.extents import ZERO as ZERO_KIND
from diskwright.formats.qcow2.header import Header
from diskwright.formats.qcow2.layout import (
    ALL_SUBCLUSTERS,
    ALL_ZERO,
    COMPRESSED,
    COPIED,
    OFFSET_MASK,
    SUBCLUSTER_BITS,
    ZERO,
)
from diskwright.formats.qcow2.mapping import Mapping

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_WINDOW: Final = 1 << 14
"""Clusters looked at together in bulk work: at worst each is 32 runs, which makes columns of 20 MiB."""

_make = tuple.__new__


class SubclusterMapping(Mapping):
    """A ``Mapping`` whose entries are a place and a bitmap of 32 parts of the cluster."""

    def __init__(self, file: Node, header: Header, cache_bytes: int) -> None:
        super().__init__(file, header, cache_bytes)
        g = self.geometry
        self.child = 0 if header.data_file is None else 1
        """Which child the places are in: 1 is the data file."""
        self.placed = OFFSET_MASK | (COPIED if self.child else 0)
        """An entry with one of these bits has a place. Offset 0 is one in a data file, where COPIED tells."""
        self._extended = g.extended
        self._to_word = g.entry_words - 1
        self._part_bits = g.cluster_bits - SUBCLUSTER_BITS

    def words(self, items: array[int], index: int) -> tuple[int, int]:
        """The two words of entry ``index`` of a slice; the second is 0 where entries have only one."""
        if self._extended:
            return items[2 * index], items[2 * index + 1]
        return items[index], 0

    def look(self, cluster: int, entry: int, bitmap: int) -> tuple[int, int]:
        """``(place, bitmap)`` of an entry that is not compressed; the place is -1 when there is none. Raises
        CorruptImage for an entry that contradicts the specification."""
        place = -1
        if entry & self.placed:
            place = entry & OFFSET_MASK
            if place & self._cluster_mask:
                self._bad_l2(cluster, entry, "its host offset is not aligned to a cluster")
            if self.child and place != cluster << self._cluster_bits:
                self._bad_l2(cluster, entry, "its place in the external data file is not its guest offset")
        if not self._extended:
            if entry & ZERO:
                # At offset 0 COPIED tells a place only of data; with the zero flag there is none.
                return place or -1, ALL_ZERO
            return place, ALL_SUBCLUSTERS if place >= 0 else 0
        if bitmap & bitmap >> 32 & ALL_SUBCLUSTERS:
            self._bad_bitmap(cluster, bitmap, "a subcluster is both allocated and zero")
        if bitmap & ALL_SUBCLUSTERS and place < 0:
            self._bad_bitmap(cluster, bitmap, "subclusters are allocated in a cluster that has no place")
        return place, bitmap

    def check_compressed(self, cluster: int, entry: int) -> None:
        """Raises CorruptImage for a compressed cluster where there cannot be any."""
        if self.child:
            self._bad_l2(cluster, entry, "compressed, in an image with an external data file")

    def _bad_bitmap(self, cluster: int, bitmap: int, why: str) -> NoReturn:
        where = self.locate(cluster >> self.geometry.slice_bits) + (cluster & self._index_mask) * 16 + 8
        at = cluster << self._cluster_bits
        raise CorruptImage(self.path, f"subcluster bitmap of guest offset {at:#x}", f"{bitmap:#x}", where, why)

    # -- one run ---------------------------------------------------------------------------------

    def extent_at(self, offset: int, length: int) -> Extent:
        """See ``Mapping.extent_at``. Unallocated parts of a cluster that has a place carry it, as zeros do."""
        items = self._young(offset >> self._slice_shift)
        if items is None:
            items = self.load(offset >> self._slice_shift)
            if items is None:
                return self._no_table(offset, length)._replace(child=self.child)
        cluster = offset >> self._cluster_bits
        index = cluster & self._index_mask
        inside = offset & self._cluster_mask
        if inside + length <= self._cluster_size and self._plain(items, index, cluster):
            place = (items[index << self._to_word] & OFFSET_MASK) + inside
            return _make(Extent, (offset, length, DATA, place, self.child, 0))
        entry, bitmap = self.words(items, index)
        if entry & COMPRESSED:
            self.check_compressed(cluster, entry)
            return self._odd_extent(offset, length, array("Q", (entry,)), 0)
        place, bitmap = self.look(cluster, entry, bitmap)
        kind, count = state_of(bitmap, inside >> self._part_bits)
        run = ((inside >> self._part_bits) + count << self._part_bits) - inside
        if run < length and not (inside + run) & self._cluster_mask:
            run += self._going_on(items, cluster, kind, place, length - run)
        return _make(
            Extent,
            (offset, run if run < length else length, kind, place + inside if place >= 0 else -1, self.child, 0),
        )

    def _plain(self, items: array[int], index: int, cluster: int) -> bool:
        """Whether an entry is what most are: all of the cluster is allocated."""
        if self._extended and items[2 * index + 1] != ALL_SUBCLUSTERS:
            return False
        entry = items[index << self._to_word]
        if self.child:
            return entry == cluster << self._cluster_bits | COPIED
        return not entry & self._odd and entry & OFFSET_MASK != 0

    def _going_on(self, items: array[int], cluster: int, kind: int, place: int, wanted: int) -> int:
        """How far a run that reaches the end of ``cluster`` goes on behind it, within the slice."""
        run = 0
        while run < wanted and cluster & self._index_mask < self._index_mask:
            cluster += 1
            if place >= 0:
                place += self._cluster_size
            index = cluster & self._index_mask
            entry, bitmap = self.words(items, index)
            if kind == DATA and entry & OFFSET_MASK == place and self._plain(items, index, cluster):
                run += self._cluster_size
                continue
            if entry & COMPRESSED:
                break
            try:
                found, bitmap = self.look(cluster, entry, bitmap)
            except CorruptImage:
                break  # whoever asks for that cluster will be told
            next_kind, count = state_of(bitmap, 0)
            if next_kind != kind or found != place:
                break
            run += count << self._part_bits
            if count << self._part_bits < self._cluster_size:
                break
        return run

    # -- runs in bulk ----------------------------------------------------------------------------

    def extents(self, offset: int, length: int) -> Extents:
        """See ``Format.extents``."""
        first = offset >> self._cluster_bits
        count = ((offset + length + self._cluster_mask) >> self._cluster_bits) - first
        return self._bulk(first, count).slice(offset, length)

    def _bulk(self, first: int, count: int) -> Extents:
        parts = [self._window(first + at, min(_WINDOW, count - at)) for at in range(0, count, _WINDOW)]
        return Extents.join(parts).merge()

    def _window(self, first: int, count: int) -> Extents:
        import numpy as np

        g = self.geometry
        words = self.entries(first, count)
        if words is None:
            return Extents.of([Extent(first << g.cluster_bits, count << g.cluster_bits, UNALLOCATED, -1, self.child)])
        entry = words[:: g.entry_words]
        compressed = entry & np.uint64(COMPRESSED) != 0
        placed = ~compressed & (entry & np.uint64(self.placed) != 0)
        place = (entry & np.uint64(OFFSET_MASK)).astype(np.int64)
        if g.extended:
            alloc = words[1::2] & np.uint64(ALL_SUBCLUSTERS)
            zero = words[1::2] >> np.uint64(32)
        else:
            full, none = np.uint64(ALL_SUBCLUSTERS), np.uint64(0)
            zero = np.where(entry & np.uint64(ZERO) != 0, full, none)
            placed &= (zero == 0) | (place != 0)
            alloc = np.where(placed & (zero == 0), full, none)
        self._check_columns(first, words, compressed, placed, place, alloc, zero)
        uniform = compressed | (alloc == ALL_SUBCLUSTERS) | (zero == ALL_SUBCLUSTERS) | (alloc | zero == 0)
        # One row for a cluster all of whose parts are alike, 32 for any other.
        rows = np.repeat(np.arange(count), np.where(uniform, 1, 1 << SUBCLUSTER_BITS))
        heads = np.concatenate((np.zeros(1, np.int64), np.flatnonzero(np.diff(rows)) + 1))
        part = np.arange(len(rows)) - heads[rows]
        bit = part.astype(np.uint64)
        kind = np.full(len(rows), UNALLOCATED, np.uint8)
        kind[alloc[rows] >> bit & np.uint64(1) != 0] = DATA
        kind[zero[rows] >> bit & np.uint64(1) != 0] = ZERO_KIND
        kind[compressed[rows]] = SPECIAL
        where = np.where(placed[rows], place[rows] + (part << self._part_bits), -1)
        stored = np.zeros(len(rows), np.int64)
        if compressed.any():
            at = compressed[rows]
            special = entry[rows[at]]
            where[at] = (special & np.uint64(g.compressed_mask)).astype(np.int64)
            sectors = ((special >> np.uint64(g.sectors_shift)) & np.uint64(g.sectors_mask)).astype(np.int64) + 1
            stored[at] = sectors * 512 - (where[at] & 511)
        return Extents(
            (rows + first << g.cluster_bits) + (part << self._part_bits),
            np.where(uniform[rows], np.int64(g.cluster_size), np.int64(1 << self._part_bits)),
            kind,
            where,
            np.full(len(rows), self.child, np.int16),
            stored,
        ).merge()

    def _check_columns(
        self,
        first: int,
        words: NDArray[np.uint64],
        compressed: NDArray[np.bool_],
        placed: NDArray[np.bool_],
        place: NDArray[np.int64],
        alloc: NDArray[np.uint64],
        zero: NDArray[np.uint64],
    ) -> None:
        """Raises CorruptImage for the first entry that ``look`` would."""
        import numpy as np

        bad = ((alloc & zero) != 0) | ((alloc != 0) & ~placed) | (placed & (place & self._cluster_mask != 0))
        bad &= ~compressed
        if self.child:
            guest = np.arange(first, first + len(place)) << self._cluster_bits
            bad |= compressed | (placed & (place != guest))
        if bad.any():
            at = int(np.argmax(bad))
            entry = int(words[at * self.geometry.entry_words])
            if entry & COMPRESSED:
                self.check_compressed(first + at, entry)
            self.look(first + at, entry, int(words[2 * at + 1]) if self._extended else 0)


def state_of(bitmap: int, part: int) -> tuple[int, int]:
    """``(kind, count)``: what a part of a cluster is, and how many from it on, within the cluster, are the same."""
    alloc, zero = bitmap & ALL_SUBCLUSTERS, bitmap >> 32
    if alloc >> part & 1:
        kind, other = DATA, ~alloc >> part
    elif zero >> part & 1:
        kind, other = ZERO_KIND, ~zero >> part
    else:
        kind, other = UNALLOCATED, (alloc | zero) >> part
    other |= 1 << (1 << SUBCLUSTER_BITS) - part
    return kind, (other & -other).bit_length() - 1


def parts_of(start: int, end: int) -> int:
    """The bits of parts ``start`` to ``end - 1``."""
    return (1 << end) - (1 << start)


def open_mapping(file: Node, header: Header, cache_bytes: int) -> Mapping:
    """The map of an image: the plain one, which is quicker, where that will do."""
    if header.geometry.extended or header.data_file is not None:
        return SubclusterMapping(file, header, cache_bytes)
    return Mapping(file, header, cache_bytes)
