"""Which host clusters hold metadata, so that guest data is never written over it.

Refcounts alone would do for an image whose refcounts are right. This is for the others: a damaged or hostile
image may count a table's cluster as free, or let a guest cluster share it.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING, Final

from diskwright.formats.qcow2 import encryption
from diskwright.formats.qcow2.layout import MAX_L1_BYTES, OFFSET_MASK, REFTABLE_OFFSET_MASK
from diskwright.formats.qcow2.snapshots import read_snapshots

if TYPE_CHECKING:
    from diskwright.formats.qcow2.header import Header
    from diskwright.formats.qcow2.mapping import Mapping
    from diskwright.formats.qcow2.refcounts import Refcounts

_FEW: Final = 1 << 16


class MetadataMap:
    """Host clusters of header, tables and refcount blocks. The user serialises all calls."""

    def __init__(self, header: Header, mapping: Mapping, refcounts: Refcounts) -> None:
        """Collects what the tables of the open image point at. Raises LimitExceeded."""
        self._header, self._mapping, self._refcounts = header, mapping, refcounts
        self._bits = header.cluster_bits
        file = mapping.file
        self._fixed: list[tuple[int, int]] = []  # (first, end) of what lies in one piece and stays there
        luks = encryption.region(header)
        if luks is not None:
            self._fix(*luks)
        snapshots, length = read_snapshots(file, header)
        if length:
            self._fix(header.snapshots_offset, length)
        for snapshot in snapshots:
            self._fix(snapshot.l1_table_offset, min(snapshot.l1_size * 8, MAX_L1_BYTES))
        self._tables = _sorted_clusters(mapping.l1, OFFSET_MASK, self._bits)
        self._blocks = _sorted_clusters(refcounts.table, REFTABLE_OFFSET_MASK, self._bits)
        self._new: set[int] = set()
        self._gone: set[int] = set()  # L2 tables of the beginning that are no longer any

    def _fix(self, offset: int, length: int) -> None:
        self._fixed.append((offset >> self._bits, (offset + length - 1 >> self._bits) + 1))

    def add(self, cluster: int) -> None:
        """``cluster`` has become an L2 table or a refcount block."""
        self._new.add(cluster)

    def remove(self, cluster: int) -> None:
        """``cluster`` is an L2 table no longer."""
        self._new.discard(cluster)
        self._gone.add(cluster)

    def contains(self, first: int, count: int) -> bool:
        """Whether one of ``count`` clusters from ``first`` on holds metadata."""
        end = first + count
        if self._in_one_piece(first, end) or self._among(self._blocks, first, end):
            return True
        if self._among(self._tables, first, end):
            return True
        if count <= len(self._new):
            return not self._new.isdisjoint(range(first, end))
        return any(first <= cluster < end for cluster in self._new)

    def conflicts(self, table: int) -> bool:
        """Whether the L2 table in cluster ``table`` is something else as well, or is named by two L1 entries."""
        if self._in_one_piece(table, table + 1) or self._among(self._blocks, table, table + 1):
            return True
        return bisect_right(self._tables, table) - bisect_left(self._tables, table) > 1

    def _among(self, ordered: array[int], first: int, end: int) -> bool:
        at = bisect_left(ordered, first)
        while at < len(ordered) and ordered[at] < end:
            if ordered[at] not in self._gone:
                return True
            at += 1
        return False

    def _in_one_piece(self, first: int, end: int) -> bool:
        if first < 1:
            return True
        bits, mapping, refcounts = self._bits, self._mapping, self._refcounts
        low = mapping.l1_offset >> bits
        if first < low - (-len(mapping.l1) * 8 >> bits) and end > low:
            return True
        low = refcounts.table_offset >> bits
        if first < low - (-len(refcounts.table) * 8 >> bits) and end > low:
            return True
        return any(first < stop and end > start for start, stop in self._fixed)


def _sorted_clusters(table: array[int], mask: int, bits: int) -> array[int]:
    if len(table) <= _FEW:  # NumPy takes longer to be imported than this takes
        return array("Q", sorted((entry & mask) >> bits for entry in table if entry & mask))
    import numpy as np

    clusters = (np.frombuffer(table, np.uint64) & np.uint64(mask)) >> np.uint64(bits)
    return array("Q", np.sort(clusters[clusters != 0]).tobytes())
