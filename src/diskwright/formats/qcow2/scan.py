"""Counting references: one walk over everything an image's tables point at.

Walks are vectorised and bounded in memory: tables are looked at in batches of a few MiB, and counts are held for a
window of host clusters at a time. All but enormous images fit into one window; for others the walk is
repeated, window by window. A table that several entries name is read once and counted several times, so that time
is bounded by the size of the metadata.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from diskwright.core.driver import CheckReport
from diskwright.formats.qcow2 import encryption, references
from diskwright.formats.qcow2.header import DATA_FILE, EXTENDED_L2
from diskwright.formats.qcow2.layout import (
    COMPRESSED,
    COPIED,
    L1_RESERVED,
    L2_RESERVED,
    OFFSET_MASK,
    REFTABLE_OFFSET_MASK,
    REFTABLE_RESERVED,
)
from diskwright.formats.qcow2.refcounts import expand_bytes
from diskwright.formats.qcow2.references import TOP, References
from diskwright.formats.qcow2.scan_extras import walk_bitmaps, walk_snapshots

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from diskwright.core.node import Node
    from diskwright.formats.qcow2.header import Header
    from diskwright.formats.qcow2.references import Counts, Hosts

    Entries = NDArray[np.uint64]

_BATCH: Final = 256 << 10
"""Bytes of L2 tables looked at together: what is made of them stays in a processor's cache."""

_L1_BATCH: Final = 1 << 18
"""L1 entries looked at together: 2 MiB of them."""

_MOST_NEARBY: Final = 1 << 20

_CLIPPED: Final = 1 << 20
"""Counts looked at together."""

_FEW_RUNS: Final = 64
"""Entries a run needs on average for runs to be quicker than entries."""


def _u64(value: int) -> np.uint64:
    return np.uint64(value)


class Scan(References):
    """One walk, with the references to and refcounts of the clusters of one window, ``[low, high)``.

    What it finds goes into ``report``; when ``quiet`` only counts of the window are made, and what concerns the
    image as a whole has been reported by an earlier walk.
    """

    def __init__(self, file: Node, header: Header, report: CheckReport, number: int, *, quiet: bool) -> None:
        """``number`` is the window's; ``low`` and ``high`` bound the clusters in it."""
        self.file, self.header, self.report, self.quiet = file, header, report, quiet
        self.g = header.geometry
        self.extended = bool(header.incompatible_features & EXTENDED_L2)
        self.data_file = bool(header.incompatible_features & DATA_FILE)
        self.l2_bits = self.g.cluster_bits - (4 if self.extended else 3)
        self.end = file.size
        self.last = self.g.clusters(self.end)
        """No reference that counts goes beyond this cluster."""
        self.table = self._reftable()
        last_block = max((i for i, entry in enumerate(self.table) if entry), default=-1)
        self.reach = reach = (last_block + 1) << self.g.block_bits
        """No cluster from here on has a refcount."""
        low = number * references.WINDOW
        # Most images are much smaller than a window.
        high = min(low + references.WINDOW, max(self.last + 1, reach, low + 1))
        super().__init__(file.filename, low, high)
        self._most = (1 << (1 << header.refcount_order)) - 1
        self.refcounts: Counts = np.zeros(high - low, np.uint16)
        self.beyond: NDArray[np.int64] | None = None
        """When there is one: how often the clusters behind the end of the file are referred to all the same."""
        self.unknown: list[tuple[int, int]] = []
        """Ranges ``[start, stop)`` of the window whose refcounts cannot be read."""
        self._room: Entries | None = None  # where L2 tables are read to, one batch after the other
        self._doubtful: NDArray[np.bool_] | None = None  # the same, cluster by cluster
        self.rebuild = False
        """Whether refcount structures themselves are damaged."""
        self.with_refcount_structures = True

    # -- reporting -------------------------------------------------------------------------------

    def corrupt(self, message: str | Callable[[], str], count: int = 1) -> None:
        """``count`` corruptions of one kind; messages are made only when they will be kept."""
        if self.quiet or not count:
            return
        self.report.corruptions += count
        if len(self.report.messages) < CheckReport.MAX_MESSAGES:
            self.report.say(message if isinstance(message, str) else message())

    # -- counting --------------------------------------------------------------------------------

    def region(self, what: str, offset: int, length: int) -> None:
        """One reference to each cluster that ``length`` bytes at ``offset`` touch."""
        g = self.g
        if length <= 0:
            return
        if offset + length - self.end >= g.cluster_size:
            self.corrupt(f"ERROR {what} at {offset:#x}, {length} bytes long, lies beyond the end of the file")
            return
        self.add_run(offset >> g.cluster_bits, (offset + length - 1) >> g.cluster_bits)

    # -- the walk --------------------------------------------------------------------------------

    def run(self) -> None:
        """Counts everything. Raises OSError, LimitExceeded."""
        header, g = self.header, self.g
        if self.with_refcount_structures:
            self._counted = self._windows_with_blocks()
            self.load_refcounts()
        self.region("the header", 0, g.cluster_size)
        self.walk_l1("the L1 table", header.l1_table_offset, header.l1_size, active=True)
        walk_snapshots(self)
        luks = encryption.region(header)
        if luks is not None:
            self.region("the LUKS header", *luks)
        if self.with_refcount_structures:
            table = header.refcount_table_clusters << g.cluster_bits
            self.region("the refcount table", header.refcount_table_offset, table)
        walk_bitmaps(self)
        if self.with_refcount_structures:
            self._walk_refblocks()
        self._clip()

    def _clip(self) -> None:
        """A refcount has a largest value; more references than that cannot be counted."""
        most = self._most
        if most >= TOP:
            return
        clusters = excess = 0
        for at in range(0, len(self.references), _CLIPPED):
            part = self.references[at : at + _CLIPPED]
            over = np.flatnonzero(part > most)
            if len(over):
                clusters += len(over)
                excess += int(part[over].astype(np.int64).sum()) - most * len(over)
                part[over] = most
        if excess:
            self.report.corruptions += excess
            self.report.say(f"ERROR {clusters} clusters have more references than fit into a refcount: {most}")

    # -- refcount structures ---------------------------------------------------------------------

    def load_refcounts(self) -> None:
        """Reads what the refcount blocks say of the window."""
        g = self.g
        per_block = 1 << g.block_bits
        for block, entry in self.blocks():
            offset = entry & REFTABLE_OFFSET_MASK
            first = block << g.block_bits
            start, stop = max(first, self.low), min(first + per_block, self.high)
            if offset & g.cluster_mask or offset >= 1 << 63:
                self.unknown.append((start, stop))
                if self._doubtful is None:
                    self._doubtful = np.zeros(self.high - self.low, np.bool_)
                self._doubtful[start - self.low : stop - self.low] = True
                self.report.check_errors += max(0, min(stop, g.clusters(self.end)) - start)
            elif offset < self.end:  # beyond it all counts read as 0
                self._read_counts(offset, start - first, self.refcounts[start - self.low : stop - self.low])

    def blocks(self) -> Iterator[tuple[int, int]]:
        """``(number, table entry)`` of the refcount blocks that there are for the window."""
        bits = self.g.block_bits
        table = self.table
        for block in range(self.low >> bits, min(len(table), -(-self.high >> bits))):
            if table[block] & REFTABLE_OFFSET_MASK:
                yield block, table[block]

    def _windows_with_blocks(self) -> Hosts:
        """Numbers of all windows of which some counts exist."""
        if not len(self.table):
            return np.zeros(0, np.int64)
        places = np.frombuffer(self.table, np.uint64) & _u64(REFTABLE_OFFSET_MASK)
        there = (places != 0) & (places < _u64(self.end)) & (places & _u64(self.g.cluster_mask) == 0)
        return np.unique((np.flatnonzero(there) << self.g.block_bits) // references.WINDOW)

    def _read_counts(self, offset: int, skipped: int, into: Counts) -> None:
        """The refcounts of the block at ``offset``, after the first ``skipped``; those above ``TOP`` as that."""
        order = self.header.refcount_order
        if order == 4:  # nearly all images: what is read is what is kept
            self.file.readv([(offset + skipped * 2, memoryview(into.view(np.uint8).data))])
            if sys.byteorder == "little":
                into.byteswap(inplace=True)
            return
        raw = np.frombuffer(self.file.pread(offset, self.g.cluster_size), np.uint8)
        counts = expand_bytes(raw, order) if order < 3 else raw.view(f">u{1 << (order - 3)}")
        counts = counts[skipped : skipped + len(into)]
        into[:] = np.minimum(counts, TOP) if order > 4 else counts

    def _reftable(self) -> array[int]:
        header = self.header
        count = header.refcount_table_clusters << (self.g.cluster_bits - 3)
        return read_padded(self.file, header.refcount_table_offset, count)

    def _walk_refblocks(self) -> None:
        g = self.g
        for block, entry in enumerate(self.table):
            if not entry:
                continue
            offset = entry & REFTABLE_OFFSET_MASK
            if entry & REFTABLE_RESERVED:
                self._bad_block(block, f"has reserved bits set: {entry:#x}")
            elif offset & g.cluster_mask:
                self._bad_block(block, f"is not aligned to a cluster: {offset:#x}")
            elif offset >= self.end:
                self.corrupt(f"ERROR refcount block {block} lies beyond the end of the file, at {offset:#x}")
                self.rebuild = True
            else:
                host = offset >> g.cluster_bits
                self.add_run(host, host)
                times = int(self.references[host - self.low]) if self.low <= host < self.high else 1
                if min(times, self._most) != 1:
                    quiet, self.quiet = self.quiet, False  # each window has its own blocks to tell of
                    self._bad_block(block, f"is referred to {times} times")
                    self.quiet = quiet

    def _bad_block(self, block: int, why: str) -> None:
        self.corrupt(f"ERROR refcount block {block} {why}")
        self.rebuild = True

    # -- L1 and L2 -------------------------------------------------------------------------------

    def walk_l1(self, what: str, offset: int, size: int, *, active: bool) -> None:
        """An L1 table of ``size`` entries, and all that hangs from it."""
        if not size:
            return
        self.region(what, offset, size * 8)
        for at in range(0, size, _L1_BATCH):
            entries = np.frombuffer(read_padded(self.file, offset + at * 8, min(_L1_BATCH, size - at)), np.uint64)
            entries = entries[entries != 0]
            if len(entries):
                self._walk_l1_entries(what, entries, active)

    def _walk_l1_entries(self, what: str, entries: Entries, active: bool) -> None:
        g = self.g
        self.corrupt(f"ERROR {what} has entries with reserved bits set", _count(entries & _u64(L1_RESERVED)))
        places = (entries & _u64(OFFSET_MASK)).astype(np.int64)
        self.count_places(places, None, "L2 tables")
        self.corrupt(f"ERROR {what} names L2 tables that are not aligned to a cluster", _count(places & g.cluster_mask))
        if active:
            named = places != 0
            self._check_copied(entries[named], places[named], None, "L1 entries")
        places, times = np.unique(places[places < self.end], return_counts=True)
        per_batch = max(1, _BATCH >> g.cluster_bits)
        self._room = np.empty((min(per_batch, max(1, len(places))), g.cluster_size >> 3), np.uint64)
        if len(places) and not places[0]:
            self._walk_l2(places[:1], times[:1], active)
            places, times = places[1:], times[1:]
        for at in range(0, len(places), per_batch):
            self._walk_l2(places[at : at + per_batch], times[at : at + per_batch], active)

    def read_tables(self, places: Hosts, room: Entries | None = None) -> Entries:
        """L2 tables as rows of native integers, in ``room`` where that is given: fresh memory takes as long as reading
        does. What lies beyond the end of the file reads as zeros."""
        size = self.g.cluster_size
        tables = np.empty((len(places), size >> 3), np.uint64) if room is None else room[: len(places)]
        raw = memoryview(tables.view(np.uint8).data).cast("B")
        self.file.readv([(place, raw[i * size : (i + 1) * size]) for i, place in enumerate(places.tolist())])
        if sys.byteorder == "little":
            tables.byteswap(inplace=True)
        return tables

    def _walk_l2(self, tables: Hosts, times: Hosts, active: bool) -> None:
        flat = self.read_tables(tables, self._room).reshape(-1)
        once = int(times.max()) == 1
        weights = None if once else np.repeat(times, 1 << self.l2_bits)
        if self.extended:
            flat, subclusters = np.ascontiguousarray(flat[::2]), flat[1::2]
            self._check_subclusters(flat, subclusters, weights)
        if once and not (self.data_file or self.unknown) and self._walk_runs(flat, active):
            return
        union = int(np.bitwise_or.reduce(flat))
        if not union:
            return
        if union & COMPRESSED:
            compressed = flat & _u64(COMPRESSED) != 0
            self._walk_compressed(flat[compressed], None if weights is None else weights[compressed], active)
            flat = np.where(compressed, _u64(0), flat)
        if union & L2_RESERVED:
            reserved = flat & _u64(L2_RESERVED) != 0
            self.corrupt("ERROR L2 entries have reserved bits set", _sum(reserved, weights))
        # At 0 lies the header: wrong as a table, and its flags say nothing.
        self._walk_standard(flat, weights, active, flags=active and bool(tables[0]))

    def _check_subclusters(self, flat: Entries, subclusters: Entries, weights: Hosts | None) -> None:
        """Subclusters that are there and zeros at once, or there although the cluster is not, and compressed clusters
        that have any. The latter are taken out of ``flat``: nobody can tell what they are."""
        compressed = flat & _u64(COMPRESSED) != 0
        nowhere = ~compressed & ~self._allocated(flat)
        both = (subclusters & (subclusters >> _u64(32)) != 0) & ~compressed & ~nowhere
        lost = (subclusters & _u64(0xFFFF_FFFF) != 0) & nowhere
        self.corrupt("ERROR subclusters are said to be zeros and allocated", _sum(both, weights))
        self.corrupt("ERROR subclusters of unallocated clusters are said to be allocated", _sum(lost, weights))
        mixed = compressed & (subclusters != 0)
        if mixed.any():
            copied = mixed & (flat >= _u64(COPIED))
            self.corrupt("ERROR compressed clusters have the copied flag", _sum(copied, weights))
            self.corrupt("ERROR compressed clusters have subclusters", _sum(mixed, weights))
            flat[mixed] = 0

    def _allocated(self, flat: Entries) -> NDArray[np.bool_]:
        """Which standard entries have a cluster. In a data file one may lie at 0; the flag tells."""
        mask = OFFSET_MASK | COPIED if self.data_file else OFFSET_MASK
        there: NDArray[np.bool_] = flat & _u64(mask) != 0
        return there

    def _walk_standard(self, flat: Entries, weights: Hosts | None, active: bool, *, flags: bool) -> None:
        """Standard entries, and 0 for others. ``flags``: whether the copied flag is to be right."""
        table = None
        there = self._allocated(flat)
        if not there.all():
            allocated = np.flatnonzero(there)
            flat = flat[allocated]
            weights = None if weights is None else weights[allocated]
            table = allocated >> self.l2_bits
        if not len(flat):
            return
        places = (flat & _u64(OFFSET_MASK)).view(np.int64)
        if active and not self.quiet:
            self._measure(places, table, weights)
        unaligned = places & self.g.cluster_mask != 0
        self.corrupt("ERROR L2 entries name places that are not aligned to a cluster", _sum(unaligned, weights))
        if not self.data_file:
            self.count_places(places, weights, "clusters")
            if flags:
                self._check_copied(flat, places, weights, "L2 entries")
        elif flags:
            # What lies in a data file belongs to nobody else.
            wrong = flat < _u64(COPIED)
            self.corrupt("ERROR L2 entries for the data file lack the copied flag", _sum(wrong, weights))

    def _walk_runs(self, flat: Entries, active: bool) -> bool:
        """The same for tables that consist of few long runs of plain clusters; False when these do not."""
        g = self.g
        per_table = 1 << self.l2_bits
        breaks = np.flatnonzero(np.diff(flat) != _u64(g.cluster_size)) + 1
        if len(breaks) > len(flat) // _FEW_RUNS:
            return False
        starts = np.concatenate((np.zeros(1, np.int64), breaks))
        heads = flat[starts].tolist()
        # Within a run only the place changes, and the bounds below keep it from running into the flags.
        if any(entry & (COMPRESSED | L2_RESERVED | g.cluster_mask) for entry in heads):
            return False
        lengths = np.diff(starts, append=len(flat)).tolist()
        hosts = [(entry & OFFSET_MASK) >> g.cluster_bits for entry in heads]
        top = min(self.high, self.last)
        if any(host < max(self.low, 1) or host + n > top for host, n in zip(hosts, lengths, strict=True)):
            return False
        for entry, host, length in zip(heads, hosts, lengths, strict=True):
            part = slice(host - self.low, host - self.low + length)
            references = self.references[part]
            if references.max() == TOP:
                references[references == TOP] -= 1  # it stays at the top
            references += 1
            if active and self.with_refcount_structures:
                single = int(np.count_nonzero(self.refcounts[part] == 1))
                self._report_copied(length - single if entry & COPIED else single, entry, "L2 entries")
        if active and not self.quiet:
            self.report.allocated_clusters += len(flat)
            self.report.fragmented_clusters += int(np.count_nonzero(breaks & (per_table - 1)))
        return True

    def count_places(self, places: Hosts, weights: Hosts | None, what: str) -> None:
        """References to whole clusters at ``places``, to two each where these are not aligned."""
        g = self.g
        if not len(places):
            return
        if int(places.max()) >= self.end:
            beyond = places >= self.end
            self.corrupt(f"ERROR {what} lie beyond the end of the file", _sum(beyond, weights))
            self._count_beyond(places[beyond], None if weights is None else weights[beyond])
            places = places[~beyond]
            weights = None if weights is None else weights[~beyond]
        hosts = places >> g.cluster_bits
        self.add(hosts, weights)
        astray = places & g.cluster_mask != 0
        if astray.any():
            self.add(hosts[astray] + 1, None if weights is None else weights[astray])

    def _count_beyond(self, places: Hosts, weights: Hosts | None) -> None:
        if self.beyond is None:
            return
        for step in (0, self.g.cluster_mask):  # what is not aligned touches two clusters
            hosts = ((places + step) >> self.g.cluster_bits) - self.last
            near = (hosts >= 0) & (hosts < len(self.beyond)) & ((places & self.g.cluster_mask != 0) | (step == 0))
            np.add.at(self.beyond, hosts[near], 1 if weights is None else weights[near])

    def _check_copied(self, entries: Entries, places: Hosts, weights: Hosts | None, what: str) -> None:
        """Bit 63 has to tell whether the refcount is exactly one."""
        if not self.with_refcount_structures or not len(places):
            return
        hosts = places >> self.g.cluster_bits
        copied = entries >= _u64(COPIED)
        if int(hosts.min()) >= self.low and int(hosts.max()) < self.high:
            wrong = (self.refcounts[hosts - self.low] == 1) != copied
        else:
            inside = (hosts >= self.low) & (hosts < self.high)
            wrong = np.zeros(len(hosts), np.bool_)
            wrong[inside] = (self.refcounts[hosts[inside] - self.low] == 1) != copied[inside]
            elsewhere = np.unique(hosts[~inside] // references.WINDOW)
            for number in elsewhere[np.isin(elsewhere, self._counted)].tolist():
                self.touch(number)
            if not self.quiet:
                # Where nothing is counted no other walk will come by.
                alone = (hosts >= self.reach) | ~np.isin(hosts // references.WINDOW, self._counted)
                wrong |= ~inside & copied & (hosts > self.last) & alone
        if self._doubtful is not None:
            inside = (hosts >= self.low) & (hosts < self.high)
            wrong[inside] &= ~self._doubtful[hosts[inside] - self.low]
        self._report_copied(_sum(wrong, weights), int(entries[int(np.argmax(wrong))]), what)

    def _report_copied(self, bad: int, first: int, what: str) -> None:
        if bad:
            self.report.corruptions += bad
            self.report.say(
                f"ERROR {bad} {what} contradict the refcount with their copied flag; the first is {first:#x} or later"
            )

    def _walk_compressed(self, entries: Entries, weights: Hosts | None, active: bool) -> None:
        g = self.g
        self.corrupt("ERROR compressed clusters have the copied flag", _sum(entries >= _u64(COPIED), weights))
        if self.data_file:
            everyone = np.ones(len(entries), np.bool_)
            self.corrupt("ERROR compressed clusters in an image with a data file", _sum(everyone, weights))
            return
        place = (entries & _u64(g.compressed_mask)).astype(np.int64)
        sectors = ((entries >> _u64(g.sectors_shift)) & _u64(g.sectors_mask)).astype(np.int64) + 1
        end = place + sectors * 512 - (place & 511)
        beyond = end - self.end >= g.cluster_size
        self.corrupt("ERROR compressed clusters lie beyond the end of the file", _sum(beyond, weights))
        first, last = place >> g.cluster_bits, (end - 1) >> g.cluster_bits
        if beyond.any():
            for step in range(3):
                outside = beyond & (first + step <= last)
                counts = None if weights is None else weights[outside]
                self._count_beyond((first[outside] + step) << g.cluster_bits, counts)
        for step in range(3):  # compressed data is at most two clusters long, and so touches up to three
            touched = ~beyond & (first + step <= last)
            self.add(first[touched] + step, None if weights is None else weights[touched])
        if active and not self.quiet:
            total = _sum(np.ones(len(entries), np.bool_), weights)
            self.report.allocated_clusters += total
            self.report.compressed_clusters += total
            self.report.fragmented_clusters += total

    def _measure(self, places: Hosts, table: Hosts | None, weights: Hosts | None) -> None:
        """How many clusters have a place, and how many of them do not follow the one before in their table.
        ``table`` tells for each of ``places`` which table it is in; None: all are there."""
        apart = np.diff(places) != self.g.cluster_size
        if table is None:
            apart[(1 << self.l2_bits) - 1 :: 1 << self.l2_bits] = False
        else:
            apart &= table[1:] == table[:-1]
        if weights is None:
            self.report.allocated_clusters += len(places)
            self.report.fragmented_clusters += int(np.count_nonzero(apart))
        else:
            self.report.allocated_clusters += int(weights.sum())
            self.report.fragmented_clusters += int(weights[1:][apart].sum())


def nearby(file: Node, header: Header) -> Hosts:
    """Counts for the clusters behind the end of the file that a table may name and still be believed: as many as there
    are before it, so that a file that has lost its second half is among those that can be mended."""
    return np.zeros(min(_MOST_NEARBY, header.geometry.clusters(file.size)), np.int64)


def read_padded(file: Node, offset: int, count: int) -> array[int]:
    """``count`` big-endian 64-bit entries at ``offset``, as native integers; 0 where the file has ended."""
    table = array("Q", bytes(count * 8))
    inside = min(count * 8, max(0, file.size - offset))
    if inside:
        file.readv([(offset, memoryview(table).cast("B")[:inside])])
        if sys.byteorder == "little":
            table.byteswap()
    return table


def _count(bits: NDArray[Any]) -> int:
    return int(np.count_nonzero(bits))


def _sum(where: NDArray[np.bool_], weights: Hosts | None) -> int:
    return int(np.count_nonzero(where)) if weights is None else int(weights[where].sum())
