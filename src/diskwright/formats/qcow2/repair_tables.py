"""Mending L1 and L2 tables, once refcounts are right: copied flags, zero clusters, tables that somebody else shares.

A table is written to only where its cluster belongs to L1 tables alone. One that is something else as well, say a
guest's cluster, is first given a cluster of its own.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from diskwright.core.driver import CheckReport
from diskwright.errors import DiskwrightError
from diskwright.formats.qcow2.header import AT_L1, Header
from diskwright.formats.qcow2.layout import COMPRESSED, COPIED, L1_RESERVED, MAX_L1_BYTES, OFFSET_MASK, ZERO
from diskwright.formats.qcow2.refcounts import Refcounts, TableFull
from diskwright.formats.qcow2.scan import Scan, read_padded
from diskwright.formats.qcow2.snapshots import read_snapshots

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from diskwright.core.node import Node

    Entries = NDArray[np.uint64]
    Hosts = NDArray[np.int64]

_NOT_COPIED: Final = ~COPIED & (1 << 64) - 1
_BATCH: Final = 4 << 20
"""Bytes of L2 tables looked at together."""
_MOST_MOVED: Final = 4096
"""Tables that are given a place of their own: more are no accident, and each costs a few flushes."""


def scans(
    file: Node,
    header: Header,
    windows: list[int],
    *,
    structures: bool = True,
    beyond: Hosts | None = None,
) -> Iterator[Scan]:
    """A silent walk for each window. Without ``structures`` the present refcount structures do not count. ``beyond``
    is filled with the references to clusters behind the end of the file."""
    for number in windows:
        scan = Scan(file, header, CheckReport(), number, quiet=True)
        scan.with_refcount_structures = structures
        scan.beyond = beyond if number == windows[0] else None
        scan.run()
        yield scan


def move_apart(file: Node, header: Header, windows: list[int]) -> bool:
    """Gives the L1 table, and L2 tables, clusters of their own when something else has theirs too. Refcounts are right
    before; afterwards those of the clusters given up are too high. Returns whether anything was changed."""
    changed = False
    for scan in scans(file, header, windows):
        if (scan.refcounts < scan.references).any():
            continue
        table = _L1(file, header)
        if not table.alone(scan):
            changed |= table.move()
            continue  # what else is wrong can wait for another repair: counts are not right any more
        shared = table.not_only_tables(scan)
        if shared:
            changed |= _copy_tables(file, header, table, shared[:_MOST_MOVED])
    return changed


def mend_entries(file: Node, header: Header, windows: list[int]) -> None:
    """Sets copied flags by the refcounts, and makes zero clusters with an impossible place plain ones. Flags are
    only touched when refcounts are right now: what they allow is overwriting."""
    for number, scan in zip(windows, scans(file, header, windows), strict=True):
        table = _L1(file, header)
        shared = set(table.not_only_tables(scan))
        _Mender(file, header, scan, first=number == windows[0]).mend(table, shared)


class _L1:
    """The active L1 table as it is in the file, and where its L2 tables lie."""

    def __init__(self, file: Node, header: Header) -> None:
        self.file, self.header, self.g = file, header, header.geometry
        entries = np.frombuffer(read_padded(file, header.l1_table_offset, header.l1_size), np.uint64)
        self.entries: Entries = entries.copy()

    @property
    def places(self) -> Hosts:
        """Of L2 tables that can be read and written, in order."""
        places: Hosts = np.unique((self.entries & np.uint64(OFFSET_MASK)).astype(np.int64))
        usable: Hosts = places[(places > 0) & (places < self.file.size) & (places & self.g.cluster_mask == 0)]
        return usable

    def not_only_tables(self, scan: Scan) -> list[int]:
        """Places of L2 tables in the window's clusters that something else than an L1 table refers to as well."""
        places = self.places
        hosts = places >> self.g.cluster_bits
        inside = (hosts >= scan.low) & (hosts < scan.high)
        places, hosts = places[inside], hosts[inside]
        references = scan.references[hosts - scan.low].astype(np.int64)
        if not len(places) or int(references.max()) <= 1:
            return []
        named = np.zeros(len(places), np.int64)
        _count_named(self.entries, places, named)
        for snapshot in read_snapshots(self.file, self.header)[0]:
            offset, size = snapshot.l1_table_offset, snapshot.l1_size
            if not offset & self.g.cluster_mask and offset < 1 << 63 and size * 8 <= MAX_L1_BYTES:
                _count_named(np.frombuffer(read_padded(self.file, offset, size), np.uint64), places, named)
        return [int(place) for place in places[references > named]]

    def alone(self, scan: Scan) -> bool:
        """Whether it has its clusters for itself; also when these are in another window."""
        first = self.header.l1_table_offset >> self.g.cluster_bits
        last = (self.header.l1_table_offset + len(self.entries) * 8 - 1) >> self.g.cluster_bits
        inside = scan.references[max(0, first - scan.low) : max(0, last + 1 - scan.low)]
        return not len(inside) or int(inside.max()) <= 1

    def move(self) -> bool:
        """Puts a copy in free clusters, durable before the header names it."""
        place = take_clusters(self.file, self.header, self.g.clusters(len(self.entries) * 8))
        if place is None:
            return False
        self.file.pwrite(place, self.entries.astype(">u8").tobytes())
        self.file.flush()
        self.file.pwrite(AT_L1, struct.pack(">IQ", len(self.entries), place))
        self.file.flush()
        self.header.l1_table_offset = place
        return True

    def write(self, entries: Entries, scan: Scan) -> None:
        """Writes the table, unless something else lies in its clusters too."""
        if not np.array_equal(entries, self.entries) and self.alone(scan):
            self.file.flush()
            self.file.pwrite(self.header.l1_table_offset, entries.astype(">u8").tobytes())
            self.file.flush()
            self.entries = entries


def _count_named(entries: Entries, places: Hosts, named: Hosts) -> None:
    """Adds to ``named`` how often ``entries`` name each of the ordered ``places``."""
    found = (entries & np.uint64(OFFSET_MASK)).astype(np.int64)
    at = np.minimum(np.searchsorted(places, found), len(places) - 1)
    named += np.bincount(at[places[at] == found], minlength=len(places))


class _Mender:
    """Makes entries right whose clusters are in one window."""

    def __init__(self, file: Node, header: Header, scan: Scan, *, first: bool) -> None:
        """``first``: whether it also does what is to be done once, whatever the window."""
        self.file, self.header, self.scan, self.first = file, header, scan, first
        self.trusted = not bool((scan.refcounts < scan.references).any())

    def mend(self, table: _L1, spared: set[int]) -> None:
        """L2 tables but those at places in ``spared``, then the L1 table."""
        entries = self._flags(table.entries, table.entries & np.uint64(OFFSET_MASK) != 0)
        if self.first:
            entries &= np.uint64(~L1_RESERVED & (1 << 64) - 1)
        places = np.array([place for place in table.places.tolist() if place not in spared], np.int64)
        per_batch = max(1, _BATCH >> self.scan.g.cluster_bits)
        for at in range(0, len(places), per_batch):
            batch = places[at : at + per_batch]
            for place, words in zip(batch.tolist(), self.scan.read_tables(batch), strict=True):
                self._mend_table(table, place, words)
        self.file.flush()
        table.write(entries, self.scan)

    def _flags(self, entries: Entries, standard: NDArray[np.bool_]) -> Entries:
        """``entries`` with the copied flag right where ``standard`` is true and the place is in the window."""
        scan = self.scan
        places = (entries & np.uint64(OFFSET_MASK)).astype(np.int64)
        hosts = places >> scan.g.cluster_bits
        mended = entries.copy()
        inside = standard & (hosts >= scan.low) & (hosts < scan.high)
        single = np.zeros(len(entries), np.bool_)
        single[inside] = scan.refcounts[hosts[inside] - scan.low] == 1
        # Taking the flag away is always safe; giving it is not while refcounts may be too low.
        nowhere = standard & (hosts > scan.last)
        mended[(inside & ~single) | nowhere] &= np.uint64(_NOT_COPIED)
        if self.trusted:
            mended[inside & single] |= np.uint64(COPIED)
        return mended

    def _mend_table(self, table: _L1, place: int, words: Entries) -> None:
        scan, g = self.scan, self.scan.g
        entries = words[::2] if scan.extended else words
        compressed = entries & np.uint64(COMPRESSED) != 0
        if scan.data_file:
            mended = self._data_file_flags(table, place, entries, compressed)
        else:
            standard = ~compressed & (entries & np.uint64(OFFSET_MASK) != 0)
            mended = self._flags(entries, standard)
            if self.first and not scan.extended:
                astray = entries & np.uint64(OFFSET_MASK & g.cluster_mask) != 0
                mended[standard & astray & (entries & np.uint64(ZERO) != 0)] = ZERO
        mended[compressed] &= np.uint64(_NOT_COPIED)
        if not np.array_equal(mended, entries):
            entries[:] = mended
            self.file.pwrite(place, (words.byteswap() if sys.byteorder == "little" else words).tobytes())

    def _data_file_flags(self, table: _L1, place: int, entries: Entries, compressed: NDArray[np.bool_]) -> Entries:
        """Clusters of a data file belong to who lies at the same guest offset, and to nobody else."""
        mended = entries.copy()
        at = np.flatnonzero(table.entries & np.uint64(OFFSET_MASK) == np.uint64(place))
        if len(at) == 1:
            first = int(at[0]) << self.scan.l2_bits
            own = (np.arange(first, first + len(entries)) << self.scan.g.cluster_bits).astype(np.uint64)
            places = entries & np.uint64(OFFSET_MASK)
            mended[~compressed & (places != 0) & (places == own)] |= np.uint64(COPIED)
        return mended


# -- tables with a cluster of their own ----------------------------------------------------------------


class _Clusters:
    """Free clusters, for a repair that has made refcounts right."""

    def __init__(self, file: Node, header: Header) -> None:
        self.file, self.bits = file, header.cluster_bits
        self.refcounts = Refcounts(file, header, 1 << 20)

    def take(self, count: int) -> int | None:
        """The place of ``count`` adjoining free clusters, now counted durably; None when there are none to be had."""
        refcounts = self.refcounts
        try:
            first = refcounts.allocate_exactly(count)
        except (TableFull, DiskwrightError):
            return None
        pieces: list[Any] = refcounts.cache.capture()
        if pieces:
            self.file.writev(pieces)
            self.file.flush()
        refcounts.cache.settle()
        pieces = refcounts.capture_table()[0]
        if pieces:
            self.file.writev(pieces)
            self.file.flush()
        return first << self.bits


def take_clusters(file: Node, header: Header, count: int) -> int | None:
    """See ``_Clusters.take``."""
    try:
        return _Clusters(file, header).take(count)
    except DiskwrightError:
        return None


def _copy_tables(file: Node, header: Header, table: _L1, shared: list[int]) -> bool:
    """Gives each L1 entry that names a table in ``shared`` a copy of it. The copy is durable before it is named."""
    try:
        clusters = _Clusters(file, header)
    except DiskwrightError:
        return False
    size, changed = 1 << header.cluster_bits, False
    named = table.entries & np.uint64(OFFSET_MASK)
    for at in np.flatnonzero(np.isin(named, np.array(shared, np.uint64)))[:_MOST_MOVED].tolist():
        place = clusters.take(1)
        if place is None:
            break
        file.pwrite(place, file.pread(int(named[at]), size))
        file.flush()
        file.pwrite(header.l1_table_offset + 8 * at, struct.pack(">Q", place | COPIED))
        file.flush()
        changed = True
    return changed
