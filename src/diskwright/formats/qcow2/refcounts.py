"""Reference counts of host clusters, and finding free ones (section Host cluster management).

Everything here happens in memory, under the lock of whoever writes to the image; ``capture``, ``capture_table``
and ``grown`` hand out what has to be written and leave the order to ``writing``.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, Literal

from diskwright.core.node import Node
from diskwright.core.tables import Piece, SliceCache
from diskwright.errors import CorruptImage, LimitExceeded
from diskwright.formats.qcow2.header import Header
from diskwright.formats.qcow2.layout import (
    MAX_HOST_OFFSET,
    MAX_REFTABLE_BYTES,
    REFTABLE_OFFSET_MASK,
)
from diskwright.formats.qcow2.mapping import read_table

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_TYPECODES: Final[dict[int, Literal["B", "H", "I", "Q"]]] = {3: "B", 4: "H", 5: "I", 6: "Q"}
_SECTOR_ENTRIES: Final = 64
"""The refcount table is written by sectors of this many entries."""


class TableFull(Exception):
    """The refcount table has no entry for ``block``: it must grow to an area that begins with block ``area``,
    and then what was tried can be tried again. Never leaves the driver."""

    def __init__(self, block: int, area: int) -> None:
        super().__init__(block, area)
        self.block, self.area = block, area


class Refcounts:
    """The refcount table, and refcount blocks in slices. ``clusters`` are numbers of host clusters."""

    def __init__(self, file: Node, header: Header, cache_bytes: int) -> None:
        """Reads the refcount table. Raises CorruptImage when it is not all in the file."""
        self.file, self.path = file, file.filename
        self.geometry = g = header.geometry
        self.table_offset = header.refcount_table_offset
        file.announce("reftable_load")
        self.table = read_table(
            file, "refcount_table_offset", self.table_offset, header.refcount_table_clusters << (g.cluster_bits - 3)
        )
        self.table_changed: set[int] = set()  # sectors of the table
        order = g.refcount_order
        self._per_item = 1 << max(0, 3 - order)  # counts in an item of a slice
        items = (1 << g.ref_slice_bits) // self._per_item
        self.cache = SliceCache(
            file,
            self._locate,
            typecode=_TYPECODES[max(order, 3)],
            items=items,
            byteorder="big",
            budget=cache_bytes,
            event="refblock_load",
        )
        self._order = order
        self._slice_mask = (1 << g.ref_slice_bits) - 1
        self._block_to_slice = g.block_bits - g.ref_slice_bits
        self._hint = 0  # no cluster below is free
        self.most = (1 << (1 << order)) - 1
        """The largest refcount there can be."""
        self.packing = -1
        """The host cluster that stored units are being packed into; -1 when there is none. It is left as soon as
        it is free, or about to be: nobody may be given room in a cluster that then becomes somebody else's."""
        self.is_metadata: Callable[[int, int], bool] = _nothing
        """``(cluster, count)``: whether one of them holds metadata we know of. Guards against images that count
        a cluster in use as free."""
        self.added: Callable[[int], None] = _ignore
        """Told of every cluster that has become a refcount block."""

    # -- reading ---------------------------------------------------------------------------------

    def _locate(self, number: int) -> int:
        block = number >> self._block_to_slice
        if block >= len(self.table):
            return -1
        offset = self.table[block] & REFTABLE_OFFSET_MASK
        if not offset:
            return -1
        if offset & self.geometry.cluster_mask or offset >= 1 << 63:
            raise CorruptImage(
                self.path, f"refcount table entry {block}", f"{self.table[block]:#x}", self.table_offset + block * 8,
                "not aligned to a cluster",
            )  # fmt: skip
        return offset + (number & ((1 << self._block_to_slice) - 1)) * self.geometry.slice_bytes

    def get(self, cluster: int) -> int:
        """The refcount of a cluster."""
        items = self.cache.get(cluster >> self.geometry.ref_slice_bits)
        return 0 if items is None else self._read(items, cluster & self._slice_mask)

    def _read(self, items: array[int], index: int) -> int:
        if self._per_item == 1:
            return items[index]
        item, shift = self._split(index)
        return (items[item] >> shift) & ((1 << (1 << self._order)) - 1)

    def _store(self, items: array[int], index: int, count: int) -> None:
        if self._per_item == 1:
            items[index] = count
            return
        item, shift = self._split(index)
        mask = ((1 << (1 << self._order)) - 1) << shift
        items[item] = (items[item] & ~mask) | (count << shift)

    def _split(self, index: int) -> tuple[int, int]:
        """Item and shift of a count narrower than a byte; the lowest bits come first."""
        return index // self._per_item, (index % self._per_item) << self._order

    def _set(self, cluster: int, count: int) -> None:
        """Changes one count. Its block must exist."""
        number, index = cluster >> self.geometry.ref_slice_bits, cluster & self._slice_mask
        items = self.cache.edit(number)
        assert items is not None, "only counts in existing blocks are changed"
        self._store(items, index, count)
        self.cache.mark(number, index // self._per_item, index // self._per_item)

    # -- giving back -----------------------------------------------------------------------------

    def release(self, runs: Sequence[tuple[int, int]]) -> None:
        """One reference less to each cluster of ``(first, count)`` runs. A count that is 0 already stays so:
        the image was wrong about it, and ``check`` will tell."""
        for first, count in runs:
            for cluster in range(first, first + count):
                left = self.get(cluster)
                if left:
                    self._set(cluster, left - 1)
                    if left == 1:
                        self._hint = min(self._hint, cluster)
                        if cluster == self.packing:
                            self.packing = -1

    def unshared(self, runs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """The parts of ``runs`` that one release will free. The caller may discard them: from now on no unit
        is packed there."""
        freed: list[tuple[int, int]] = []
        for first, count in runs:
            for cluster in range(first, first + count):
                if self.get(cluster) != 1:
                    continue
                if cluster == self.packing:
                    self.packing = -1
                if freed and sum(freed[-1]) == cluster:
                    freed[-1] = freed[-1][0], freed[-1][1] + 1
                else:
                    freed.append((cluster, 1))
        return freed

    def end(self) -> int:
        """One more than the number of the last cluster in use."""
        g = self.geometry
        for block in range(len(self.table) - 1, -1, -1):
            if not self.table[block] & REFTABLE_OFFSET_MASK:
                continue
            for number in reversed(range(block << self._block_to_slice, (block + 1) << self._block_to_slice)):
                items = self.cache.get(number)
                used = len(items.tobytes().rstrip(b"\0")) if items is not None else 0
                if items is not None and used:
                    item = (used - 1) // items.itemsize
                    index = item * self._per_item
                    last = max(i for i in range(index, index + self._per_item) if self._read(items, i))
                    return (number << g.ref_slice_bits) + last + 1
        return 0

    def drop_empty_blocks(self) -> list[int]:
        """Takes blocks that count nothing but themselves off the table; returns the clusters they are in."""
        g = self.geometry
        dropped: list[int] = []
        for block in range(len(self.table) - 1, -1, -1):
            place = (self.table[block] & REFTABLE_OFFSET_MASK) >> g.cluster_bits
            numbers = range(block << self._block_to_slice, (block + 1) << self._block_to_slice)
            if not place or any(self._counts_others(number, place) for number in numbers):
                continue
            for number in numbers:
                self.cache.drop(number)
            self.table[block] = 0
            self.table_changed.add(block // _SECTOR_ENTRIES)
            self._hint = min(self._hint, place)
            dropped.append(place)
        return dropped

    def _counts_others(self, number: int, place: int) -> bool:
        """Whether a slice has a count that is not 0, for another cluster than ``place``."""
        items = self.cache.get(number)
        if items is None or not any(items):
            return False
        others = array(items.typecode, items)
        if place >> self.geometry.ref_slice_bits == number:
            self._store(others, place & self._slice_mask, 0)
        return any(others)

    # -- for those who choose places themselves ----------------------------------------------------

    def used(self, first: int = 0) -> int:
        """How many clusters from ``first`` on are in use."""
        import numpy as np

        count = 0
        for block in range(len(self.table)):
            if self.table[block] & REFTABLE_OFFSET_MASK:
                for number in range(block << self._block_to_slice, (block + 1) << self._block_to_slice):
                    items = self.cache.get(number)
                    below = max(0, first - (number << self.geometry.ref_slice_bits))
                    if items is not None and below <= self._slice_mask:
                        count += int(np.count_nonzero(expand(items, self._order)[below:]))
        return count

    def free_run(self, count: int, start: int) -> tuple[int, int]:
        """``(first, n)``: the first run of free clusters from ``start`` on, cut at ``count``. Nothing is taken."""
        return self._find(count, start)

    def take_at(self, first: int, count: int) -> None:
        """Takes clusters that are free; their refcount is now 1. Raises as ``allocate`` does."""
        self._ensure_blocks(first, count)
        self._take(first, count)

    def put(self, cluster: int, count: int) -> None:
        """Sets the refcount of a cluster whose block exists."""
        self._set(cluster, count)
        if not count:
            self._hint = min(self._hint, cluster)

    def take_from(self, cluster: int) -> None:
        """Later allocations begin at ``cluster``: for space that is to be in one piece at the file's end."""
        self._hint = max(self._hint, cluster)

    # -- taking ----------------------------------------------------------------------------------

    def allocate(self, count: int) -> tuple[int, int]:
        """``(first, n)``: the first run of free clusters, cut at ``count``; their refcount is now 1.

        Raises TableFull, with nothing changed, when the refcount table must grow first; CorruptImage when a
        cluster counted as free holds metadata; OSError.
        """
        first, n = self._find(count)
        if (first + n) << self.geometry.cluster_bits > MAX_HOST_OFFSET:
            raise LimitExceeded(f"{self.path}: a qcow2 image cannot use more than {MAX_HOST_OFFSET} bytes of its file")
        if self.is_metadata(first, n):
            raise CorruptImage(
                self.path, f"refcount of host cluster {first}" + (f" to {first + n - 1}" if n > 1 else ""), 0, None,
                "metadata lies there; repair the image before writing to it",
            )  # fmt: skip
        self._ensure_blocks(first, n)
        self._take(first, n)
        self._hint = first + n
        return first, n

    def allocate_exactly(self, count: int) -> int:
        """The first of ``count`` adjoining clusters, otherwise as ``allocate``. For tables in one piece."""
        hint, start = self._hint, self._hint
        while True:
            first, n = self._find(count, start)
            if n == count:
                break
            start = first + n
        self._hint = first
        try:
            self.allocate(count)
        finally:
            self._hint = min(hint, first)
        return first

    def add(self, cluster: int) -> None:
        """One reference more to a cluster that is in use, and has fewer than ``most``."""
        count = self.get(cluster)
        assert 0 < count < self.most
        self._set(cluster, count + 1)

    def _take(self, first: int, count: int) -> None:
        end, bits = first + count, self.geometry.ref_slice_bits
        if first <= self.packing < end:
            self.packing = -1
        while first < end:
            number = first >> bits
            stop = min(end, (number + 1) << bits)
            items = self.cache.edit(number)
            assert items is not None, "blocks were ensured"
            low, high = first & self._slice_mask, (stop - 1) & self._slice_mask
            if self._per_item == 1:
                items[low : high + 1] = array(items.typecode, (1,)) * (high + 1 - low)
            else:
                for index in range(low, high + 1):
                    self._store(items, index, 1)
            self.cache.mark(number, low // self._per_item, high // self._per_item)
            first = stop

    def _find(self, count: int, start: int | None = None) -> tuple[int, int]:
        """The first run of free clusters from ``start`` (the hint) on, cut at ``count``."""
        g = self.geometry
        cluster = self._hint if start is None else start
        while True:
            number = cluster >> g.ref_slice_bits
            items = self.cache.get(number)
            if items is None:
                break  # no counts: all free
            index = self._first_free(items, cluster & self._slice_mask)
            cluster = (number << g.ref_slice_bits) + index
            if index <= self._slice_mask:
                break
        first, end = cluster, cluster + count
        while cluster < end:
            number = cluster >> g.ref_slice_bits
            stop = min(end, (number + 1) << g.ref_slice_bits)
            items = self.cache.get(number)
            if items is not None:
                low, high = cluster & self._slice_mask, (stop - 1) & self._slice_mask
                used = self._first_used(items, low, high)
                if used <= high:
                    return first, (number << g.ref_slice_bits) + used - first
            cluster = stop
        return first, count

    def _first_used(self, items: array[int], low: int, high: int) -> int:
        """The first index from ``low`` to ``high`` in use; ``high + 1`` when there is none."""
        if self._per_item == 1 and not any(items[low : high + 1]):
            return high + 1
        for index in range(low, high + 1):
            if self._read(items, index):
                return index
        return high + 1

    def _first_free(self, items: array[int], index: int) -> int:
        """The first free index from ``index`` on; one more than the last when there is none."""
        if not self._read(items, index):
            return index
        if self._per_item > 1:
            import numpy as np

            free = np.flatnonzero(expand(items, self._order)[index:] == 0)
            return index + int(free[0]) if len(free) else self._slice_mask + 1
        raw, size = items.tobytes(), items.itemsize
        at = raw.find(bytes(size), index * size)
        while at % size and at >= 0:
            at = raw.find(bytes(size), at + 1)
        return at // size if at >= 0 else self._slice_mask + 1

    # -- blocks and the table --------------------------------------------------------------------

    def _ensure_blocks(self, first: int, count: int) -> None:
        """Makes the refcount blocks that count ``count`` clusters from ``first`` on. New blocks lie behind these."""
        bits = self.geometry.block_bits
        after = first + count
        self.file.announce("refblock_alloc")
        for block in range(first >> bits, ((after - 1) >> bits) + 1):
            if block >= len(self.table) or not self.table[block] & REFTABLE_OFFSET_MASK:
                after = self._new_block(block, after)

    def _new_block(self, block: int, after: int) -> int:
        """Makes block ``block`` in the first free cluster from ``after`` on; returns the cluster behind it."""
        g = self.geometry
        place, _ = self._find(1, after)
        if self.is_metadata(place, 1):
            raise CorruptImage(self.path, f"refcount of host cluster {place}", 0, None, "metadata lies there")
        if block >= len(self.table):
            # As QEMU does it: the new table goes to the first block's worth of clusters that is wholly unused.
            begun = block << g.block_bits
            raise TableFull(block, -(-max(begun + 1, place) // (1 << g.block_bits)))
        after = place + 1
        own = place >> g.block_bits
        if own != block and (own >= len(self.table) or not self.table[own] & REFTABLE_OFFSET_MASK):
            after = self._new_block(own, after)
        for number in range(block << self._block_to_slice, (block + 1) << self._block_to_slice):
            self.cache.put(number)
        self.table[block] = place << g.cluster_bits
        self.table_changed.add(block // _SECTOR_ENTRIES)
        self._take(place, 1)
        self.added(place)
        return after

    def grown(self, full: TableFull) -> tuple[int, array[int], list[Piece]]:
        """A larger refcount table: ``(first cluster, entries, pieces)`` of a copy that begins in the area of
        ``full``, with the blocks that count the area itself; ``pieces`` are those blocks and the table as they
        belong into the file. Nothing here refers to them before ``install``."""
        g = self.geometry
        per_table, per_block = 1 << (g.cluster_bits - 3), 1 << g.block_bits
        first, blocks = full.area << g.block_bits, 0
        while True:  # blocks count themselves and the table, and the table has to have room for them
            entries = full.area + blocks + 1
            clusters = -(-(entries + -(-entries // 2)) // per_table)
            needed = -(-(blocks + clusters) // per_block)
            if needed <= blocks:
                break
            blocks = needed
        if clusters * g.cluster_size > MAX_REFTABLE_BYTES:
            clusters = MAX_REFTABLE_BYTES >> g.cluster_bits
            if entries > clusters * per_table or clusters * per_table <= len(self.table):
                raise LimitExceeded(
                    f"{self.path}: the refcount table would exceed {MAX_REFTABLE_BYTES} bytes, the most that is "
                    "accepted; a larger cluster size allows larger images"
                )
        if (first + blocks + clusters) << g.cluster_bits > MAX_HOST_OFFSET:
            raise LimitExceeded(f"{self.path}: a qcow2 image cannot use more than {MAX_HOST_OFFSET} bytes of its file")
        table = array("Q", self.table)
        table.extend([0] * (clusters * per_table - len(table)))
        for i in range(blocks):
            table[full.area + i] = (first + i) << g.cluster_bits
        pieces = [((first << g.cluster_bits), _ones(blocks + clusters, blocks << g.cluster_bits, self._order))]
        pieces.append(((first + blocks) << g.cluster_bits, big_endian(table)))
        return first + blocks, table, pieces

    def install(self, first: int, table: array[int]) -> tuple[int, int]:
        """Goes on with the table that ``grown`` gave, now that it is durable and the header points at it.
        Returns the run of clusters of the table that is given up."""
        g = self.geometry
        old = self.table_offset >> g.cluster_bits, len(self.table) >> (g.cluster_bits - 3)
        for block in range(len(self.table), len(table)):
            if table[block]:
                self.added(table[block] >> g.cluster_bits)
        self.table, self.table_offset = table, first << g.cluster_bits
        return old

    # -- writing back ----------------------------------------------------------------------------

    def capture_table(self) -> tuple[list[Piece], set[int]]:
        """Changed sectors of the table, and their numbers for ``restore_table``."""
        sectors, self.table_changed = self.table_changed, set()
        return sector_pieces(self.table, self.table_offset, sectors), sectors

    def restore_table(self, sectors: set[int]) -> None:
        self.table_changed |= sectors


def expand(items: array[int], order: int) -> NDArray[np.uint64] | NDArray[np.uint8] | NDArray[np.uint16]:
    """One array item per count, whatever the width; a view where widths allow."""
    import numpy as np

    counts: NDArray[np.uint8] = np.frombuffer(items, dtype=f"u{items.itemsize}")
    return expand_bytes(counts, order) if order < 3 else counts


def expand_bytes(raw: NDArray[np.uint8], order: int) -> NDArray[np.uint8]:
    """Counts of less than 8 bits, one a byte."""
    import numpy as np

    shifts = np.arange(0, 8, 1 << order, dtype=np.uint8)
    return ((raw[:, None] >> shifts) & np.uint8((1 << (1 << order)) - 1)).ravel()


def sector_pieces(table: array[int], offset: int, sectors: set[int]) -> list[Piece]:
    """The given sectors of a table of 64-bit entries, as they belong into the file."""
    return [
        (offset + sector * 512, big_endian(table[sector * _SECTOR_ENTRIES : (sector + 1) * _SECTOR_ENTRIES]))
        for sector in sorted(sectors)
    ]


def big_endian(table: array[int]) -> memoryview:
    """The bytes of a copy of ``table``."""
    copy = array(table.typecode, table)
    if sys.byteorder == "little":
        copy.byteswap()
    return memoryview(copy).cast("B")


def _ones(count: int, length: int, order: int) -> memoryview:
    """``length`` bytes of refcount blocks in which the first ``count`` clusters have the refcount 1."""
    block = bytearray(length)
    if order >= 3:
        width = 1 << (order - 3)
        for i in range(count):
            block[(i + 1) * width - 1] = 1
    else:
        per = 8 >> order
        for i in range(count):
            block[i // per] |= 1 << ((i % per) << order)
    return memoryview(block)


def _nothing(cluster: int, count: int) -> bool:
    return False


def _ignore(cluster: int) -> None:
    return None
