"""From guest offsets to host offsets: the L1 table and cached slices of L2 tables (section Cluster mapping).

Reading takes no lock (see ``core.tables``). Slices are numbered by where they lie in the guest: slice ``n``
maps the guest clusters from ``n << slice_bits`` on, whatever L2 table holds it.
"""

from __future__ import annotations

import sys
from array import array
from typing import TYPE_CHECKING, Final, NoReturn

from diskwright.core.node import Node
from diskwright.core.tables import SliceCache
from diskwright.errors import CorruptImage
from diskwright.extents import DATA, SPECIAL, UNALLOCATED, Extent, Extents
from diskwright.extents import ZERO as ZERO_KIND
from diskwright.formats.qcow2.header import Header
from diskwright.formats.qcow2.layout import COMPRESSED, COPIED, L2_RESERVED, OFFSET_MASK, ZERO

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_BULK: Final = 1 << 18
"""Clusters looked at together in bulk work: 2 MiB of entries, and a few such arrays beside it."""

_UNALLOCATED_RUN: Final = 1 << 40
"""How far one answer goes through L1 entries that are 0: enough for any request."""

_make = tuple.__new__


class Mapping:
    """The active L1 table and what hangs from it. Changed only by ``writing``, under its lock."""

    def __init__(self, file: Node, header: Header, cache_bytes: int) -> None:
        """Reads the L1 table. Raises CorruptImage when it is not all in the file."""
        self.file, self.path, self.version = file, file.filename, header.version
        self.geometry = g = header.geometry
        self.l1_offset = header.l1_table_offset
        self.l1 = read_table(file, "l1_table_offset", header.l1_table_offset, header.l1_size)
        self.l2 = SliceCache(
            file,
            self.locate,
            typecode="Q",
            items=g.slice_bytes // 8,
            byteorder="big",
            budget=cache_bytes,
            event="l2_load",
        )
        self._young = self.l2.young.get
        self._cluster_bits, self._cluster_mask, self._cluster_size = g.cluster_bits, g.cluster_mask, g.cluster_size
        self._slice_shift = g.cluster_bits + g.slice_bits
        self._index_mask = (1 << g.slice_bits) - 1
        self._to_l1 = g.l2_bits - g.slice_bits
        self._odd = COMPRESSED | g.cluster_mask
        """Bits of an L2 entry that make it anything else than an aligned standard cluster or nothing."""

    def locate(self, number: int) -> int:
        """Where slice ``number`` lies in the file, or -1. Raises CorruptImage for an impossible place."""
        index = number >> self._to_l1
        table = self.l1[index] & OFFSET_MASK
        if not table:
            return -1
        if table & self._cluster_mask:
            self._bad_l1(index, "not aligned to a cluster")
        within = number & ((1 << self._to_l1) - 1)
        return table + within * self.geometry.slice_bytes

    def load(self, number: int) -> array[int] | None:
        """Slice ``number`` from the cache or the file, None when it has no L2 table."""
        index = number >> self._to_l1
        table = self.l1[index] & OFFSET_MASK
        if not table:
            return None
        # A table of ours that is not yet written lies beyond the end too, but that one is cached.
        if self.l2.peek(number) is None and table >= self.file.size:
            self._bad_l1(index, "beyond the end of the file")
        return self.l2.get(number)

    # -- one run ---------------------------------------------------------------------------------

    def extent_at(self, offset: int, length: int) -> Extent:
        """See ``Format.extent_at``. A slice that is not cached is read from the file, so this may wait for the
        medium even in a read that should not wait. Raises CorruptImage for an entry that contradicts the
        specification.
        """
        number = offset >> self._slice_shift
        items = self._young(number)
        if items is None:
            items = self.load(number)
            if items is None:
                return self._no_table(offset, length)
        index = (offset >> self._cluster_bits) & self._index_mask
        entry = items[index]
        inside = offset & self._cluster_mask
        if entry & self._odd:
            return self._odd_extent(offset, length, items, index)
        place = entry & OFFSET_MASK
        run = self._cluster_size - inside
        if place:
            if run < length:
                expected, odd = place, self._odd
                for entry in items[index + 1 : index + 1 + ((length - run + self._cluster_mask) >> self._cluster_bits)]:
                    expected += self._cluster_size
                    if entry & odd or entry & OFFSET_MASK != expected:
                        break
                    run += self._cluster_size
            return _make(Extent, (offset, run if run < length else length, DATA, place + inside, 0, 0))
        if run < length:
            for entry in items[index + 1 : index + 1 + ((length - run + self._cluster_mask) >> self._cluster_bits)]:
                if entry & (self._odd | OFFSET_MASK):
                    break
                run += self._cluster_size
        return _make(Extent, (offset, run if run < length else length, UNALLOCATED, -1, 0, 0))

    def _no_table(self, offset: int, length: int) -> Extent:
        """A run without L2 tables."""
        shift = self._cluster_bits + self.geometry.l2_bits
        index, end = (offset >> shift) + 1, offset + min(length, _UNALLOCATED_RUN)
        while index << shift < end and not self.l1[index] & OFFSET_MASK:
            index += 1
        return Extent(offset, min(end, index << shift) - offset, UNALLOCATED)

    def _odd_extent(self, offset: int, length: int, items: array[int], index: int) -> Extent:
        """A run that begins with neither a plain data cluster nor nothing."""
        entry = items[index]
        inside = offset & self._cluster_mask
        run = self._cluster_size - inside
        if entry & COMPRESSED:
            place, stored = self.geometry.compressed_place(entry)
            return Extent(offset, min(run, length), SPECIAL, place, 0, stored)
        place = entry & OFFSET_MASK
        kind = ZERO_KIND if entry & ZERO else DATA if place else UNALLOCATED
        self.check_entry(offset >> self._cluster_bits, entry)
        step = self._cluster_size if place else 0
        wanted = entry & (OFFSET_MASK | ZERO)
        while run < length and index + 1 < len(items):
            index += 1
            wanted += step
            if items[index] & COMPRESSED or items[index] & (OFFSET_MASK | ZERO) != wanted:
                break
            run += self._cluster_size
        return Extent(offset, min(run, length), kind, place + inside if place else -1)

    def check_entry(self, cluster: int, entry: int) -> None:
        """Raises CorruptImage when the standard descriptor of guest cluster ``cluster`` cannot be right."""
        if entry & OFFSET_MASK & self._cluster_mask:
            self._bad_l2(cluster, entry, "its host offset is not aligned to a cluster")
        if entry & ZERO and self.version < 3:
            self._bad_l2(cluster, entry, "version 2 has no zero clusters")

    # -- runs in bulk ----------------------------------------------------------------------------

    def extents(self, offset: int, length: int) -> Extents:
        """See ``Format.extents``."""
        first = offset >> self._cluster_bits
        count = ((offset + length + self._cluster_mask) >> self._cluster_bits) - first
        if count <= _BULK:
            found = self._bulk(first, count)
        else:
            parts = [self._bulk(first + at, min(_BULK, count - at)) for at in range(0, count, _BULK)]
            found = Extents.join(parts).merge()
        # Only the first and the last run can reach out of the range.
        inside = offset & self._cluster_mask
        if inside:
            found.offset[0] += inside
            found.length[0] -= inside
            if found.file_offset[0] >= 0 and found.kind[0] != SPECIAL:
                found.file_offset[0] += inside
        found.length[-1] -= int(found.offset[-1] + found.length[-1]) - (offset + length)
        return found

    def _bulk(self, first: int, count: int) -> Extents:
        """The runs of ``count`` guest clusters from ``first`` on."""
        import numpy as np

        g = self.geometry
        entries = self.entries(first, count)
        if entries is None:
            entries = np.zeros(1, np.uint64)
            heads = np.zeros(1, np.int64)
        else:
            heads = self._heads(entries)
            entries = entries[heads]
        compressed = entries & np.uint64(COMPRESSED) != 0
        zero = ~compressed & (entries & np.uint64(ZERO) != 0)
        place = (entries & np.uint64(OFFSET_MASK)).astype(np.int64)
        self._check_bulk(first, heads, entries, place, compressed, zero)
        kind = np.where(place != 0, np.uint8(DATA), np.uint8(UNALLOCATED))
        kind[zero] = ZERO_KIND
        place[place == 0] = -1
        stored = np.zeros(len(heads), np.int64)
        if compressed.any():
            kind[compressed] = SPECIAL
            special = entries[compressed]
            place[compressed] = (special & np.uint64(g.compressed_mask)).astype(np.int64)
            sectors = ((special >> np.uint64(g.sectors_shift)) & np.uint64(g.sectors_mask)).astype(np.int64) + 1
            stored[compressed] = sectors * 512 - (place[compressed] & 511)
        return Extents(
            (heads + first) << g.cluster_bits,
            np.diff(heads, append=count) << g.cluster_bits,
            kind,
            place,
            np.zeros(len(heads), np.int16),
            stored,
        )

    def _heads(self, entries: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Indices at which a new run begins. Removes what does not matter from ``entries``, in place."""
        import numpy as np

        entries &= np.uint64(~COPIED & (1 << 64) - 1)
        union = int(np.bitwise_or.reduce(entries))
        compressed = None
        if union & COMPRESSED:
            compressed = entries & np.uint64(COMPRESSED) != 0
        if union & L2_RESERVED:
            keep = np.uint64(OFFSET_MASK | ZERO)
            if compressed is None:
                entries &= keep
            else:
                np.bitwise_and(entries, keep, out=entries, where=~compressed)
        step = np.diff(entries)
        # Either host offsets go on, or there are none and nothing changes.
        goes_on = (step == np.uint64(self._cluster_size)) & (entries[:-1] >= np.uint64(512))
        goes_on |= (step == 0) & (entries[1:] <= np.uint64(ZERO))
        if compressed is not None:
            goes_on &= ~(compressed[1:] | compressed[:-1])
        return np.concatenate((np.zeros(1, np.int64), np.flatnonzero(~goes_on) + 1))

    def _check_bulk(
        self,
        first: int,
        heads: NDArray[np.int64],
        entries: NDArray[np.uint64],
        place: NDArray[np.int64],
        compressed: NDArray[np.bool_],
        zero: NDArray[np.bool_],
    ) -> None:
        import numpy as np

        bad = ~compressed & (place & self._cluster_mask != 0)
        if self.version < 3:
            bad |= zero
        if bad.any():
            at = int(np.argmax(bad))
            self.check_entry(first + int(heads[at]), int(entries[at]))

    def entries(self, first: int, count: int) -> NDArray[np.uint64] | None:
        """Copies of the words of guest clusters' L2 entries, as native integers; None when none has an L2 table.

        Nothing enters the cache: a walk over a whole disk must not displace what its users need.
        """
        import numpy as np

        g = self.geometry
        l1_first, l1_last = first >> g.l2_bits, (first + count - 1) >> g.l2_bits
        if not any(self.l1[l1_first : l1_last + 1]):
            return None
        words = g.entry_words
        found = np.zeros(count * words, np.uint64)
        raw = memoryview(found.view(np.uint8).data)
        wanted: list[tuple[int, memoryview]] = []
        swapped: list[tuple[int, int]] = []
        at = first
        while at < first + count:
            number = at >> g.slice_bits
            stop = min(first + count, (number + 1) << g.slice_bits)
            table = self.l1[number >> self._to_l1] & OFFSET_MASK
            if table:
                cached = self.l2.peek(number)
                begin = (at & self._index_mask) * words
                low, high = (at - first) * words, (stop - first) * words
                if cached is not None:
                    found[low:high] = np.frombuffer(cached, np.uint64)[begin : begin + high - low]
                else:
                    wanted.append((self.locate(number) + begin * 8, raw[low * 8 : high * 8]))
                    _extend(swapped, low, high)
            at = stop
        if wanted:
            self._read_entries(wanted, first)
            if sys.byteorder == "little":
                for start, end in swapped:
                    found[start:end].byteswap(inplace=True)
        return found

    def _read_entries(self, wanted: list[tuple[int, memoryview]], first: int) -> None:
        end = self.file.size
        for place, _ in wanted:
            if place >= end:
                raise CorruptImage(
                    self.path, "offset of an L2 table", f"{place:#x}", None,
                    f"beyond the end of the file (guest offset {first << self._cluster_bits:#x} or later)",
                )  # fmt: skip
        self.file.announce("l2_load")
        self.file.readv(wanted)

    # -- errors ----------------------------------------------------------------------------------

    def _bad_l1(self, index: int, why: str) -> NoReturn:
        raise CorruptImage(self.path, f"L1 entry {index}", f"{self.l1[index]:#x}", self.l1_offset + index * 8, why)

    def _bad_l2(self, cluster: int, entry: int, why: str) -> NoReturn:
        number = cluster >> self.geometry.slice_bits
        where = self.locate(number) + (cluster & self._index_mask) * 8 * self.geometry.entry_words
        raise CorruptImage(
            self.path, f"L2 entry of guest offset {cluster << self._cluster_bits:#x}", f"{entry:#x}", where, why
        )


def read_table(file: Node, field: str, offset: int, count: int) -> array[int]:
    """``count`` big-endian 64-bit entries at ``offset``, as native integers. The caller has checked ``count``
    against a limit. Raises CorruptImage when the file ends before they do."""
    if count and offset + count * 8 > file.size:
        raise CorruptImage(
            file.filename, field, f"{offset:#x}", None,
            f"a table of {count * 8} bytes there reaches beyond the end of the file ({file.size} bytes)",
        )  # fmt: skip
    table = array("Q", bytes(count * 8))
    if count:
        file.readv([(offset, memoryview(table).cast("B"))])
        if sys.byteorder == "little":
            table.byteswap()
    return table


def _extend(ranges: list[tuple[int, int]], start: int, end: int) -> None:
    """Appends a range, as one with the last when it adjoins."""
    if ranges and ranges[-1][1] == start:
        ranges[-1] = ranges[-1][0], end
    else:
        ranges.append((start, end))
