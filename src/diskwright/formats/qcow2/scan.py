"""Counting references: one walk over everything an image's tables point at.

Walks are vectorised and bounded in memory: tables are looked at in batches of a few MiB, and counts are held for a
window of host clusters at a time. All but enormous images fit into one window; for others the walk is
repeated, window by window. A table that several entries name is read once and counted several times, so that time
is bounded by the size of the metadata.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from diskwright.core.driver import CheckReport
from diskwright.errors import CorruptImage, DiskwrightError, LimitExceeded
from diskwright.formats.qcow2 import bitmaps, encryption
from diskwright.formats.qcow2.layout import (
    COMPRESSED,
    COPIED,
    L1_RESERVED,
    L2_RESERVED,
    MAX_L1_BYTES,
    OFFSET_MASK,
    REFTABLE_OFFSET_MASK,
    REFTABLE_RESERVED,
)
from diskwright.formats.qcow2.mapping import read_table
from diskwright.formats.qcow2.refcounts import expand_bytes
from diskwright.formats.qcow2.snapshots import read_snapshots

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from diskwright.core.node import Node
    from diskwright.formats.qcow2.header import Header

    Hosts = NDArray[np.int64]
    Entries = NDArray[np.uint64]
    Counts = NDArray[np.uint16]

WINDOW: Final = 1 << 25
"""Host clusters whose counts are held at a time: 128 MiB for both kinds, 2 TiB of image at 64 KiB clusters."""

MAX_WINDOWS: Final = 1024
"""Windows looked at, at most: as many as the largest refcount table with 64 KiB clusters can span."""

_BATCH: Final = 256 << 10
"""Bytes of L2 tables looked at together: what is made of them stays in a processor's cache."""

_FEW_RUNS: Final = 64
"""Entries a run needs on average for runs to be quicker than entries."""

_TOP: Final = 0xFFFF
"""Counts above this are not told apart."""


def _u64(value: int) -> np.uint64:
    return np.uint64(value)


class Scan:
    """One walk, with the references to and refcounts of the clusters of one window, ``[low, high)``.

    What it finds goes into ``report``; when ``quiet`` only counts of the window are made, and what concerns the
    image as a whole has been reported by an earlier walk.
    """

    def __init__(self, file: Node, header: Header, report: CheckReport, number: int, *, quiet: bool) -> None:
        """``number`` is the window's; ``low`` and ``high`` bound the clusters in it."""
        self.file, self.header, self.report, self.quiet = file, header, report, quiet
        self.g = header.geometry
        self.end = file.size
        self.last = self.g.clusters(self.end)
        """No reference that counts goes beyond this cluster."""
        table = self._reftable()
        last_block = max((i for i, entry in enumerate(table) if entry), default=-1)
        self.reach = reach = (last_block + 1) << self.g.block_bits
        """No cluster from here on has a refcount."""
        self.low = number * WINDOW
        # Most images are much smaller than a window.
        self.high = min(self.low + WINDOW, max(self.last + 1, reach, self.low + 1))
        low, high = self.low, self.high
        self._most = (1 << (1 << header.refcount_order)) - 1
        self.references: Counts = np.zeros(high - low, np.uint16)
        self.refcounts: Counts = np.zeros(high - low, np.uint16)
        self.unknown: list[tuple[int, int]] = []
        """Ranges ``[start, stop)`` of the window whose refcounts cannot be read."""
        self.rebuild = False
        """Whether refcount structures themselves are damaged."""
        self.windows: set[int] = set()
        """Numbers of other windows that are referred to."""
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

    def add_run(self, first: int, last: int, weight: int = 1) -> None:
        for number in range(first // WINDOW, last // WINDOW + 1):
            self._touch(number)
        start, stop = max(first, self.low), min(last + 1, self.high)
        if start < stop:
            part = self.references[start - self.low : stop - self.low]
            np.minimum(part.astype(np.uint32) + np.uint32(min(weight, _TOP)), _TOP, out=part, casting="unsafe")

    def add(self, hosts: Hosts, weights: Hosts | None = None) -> None:
        """A reference (or ``weights``) to each of ``hosts``, which may repeat."""
        if not len(hosts):
            return
        first, last = int(hosts.min()), int(hosts.max())
        if first < self.low or last >= self.high:
            for number in np.unique(hosts // WINDOW).tolist():
                self._touch(number)
            inside = (hosts >= self.low) & (hosts < self.high)
            hosts = hosts[inside]
            if not len(hosts):
                return
            weights = weights[inside] if weights is not None else None
            first, last = int(hosts.min()), int(hosts.max())
        span = last - first + 1
        if span <= 4 * len(hosts):
            added: NDArray[Any] = np.bincount(hosts - first, weights, span)
            part = self.references[first - self.low : last + 1 - self.low]
            np.minimum(part + added.astype(np.int64), _TOP, out=part, casting="unsafe")
            return
        places = hosts - self.low
        if weights is None and self._add_each(places):
            return
        # Far apart: counting by sorting takes no memory for what lies between.
        places, inverse = np.unique(places, return_inverse=True)
        sums = np.bincount(inverse, weights).astype(np.int64)
        self.references[places] = np.minimum(self.references[places] + sums, _TOP).astype(np.uint16)

    def _add_each(self, places: Hosts) -> bool:
        """One reference for each of ``places``; False, and nothing done, when a count might not fit any more."""
        if len(places) + int(self.references[places].max()) > _TOP:
            return False
        # Fast, unlike most uses of it, because all types agree.
        np.add.at(self.references, places, np.uint16(1))
        return True

    def _touch(self, number: int) -> None:
        if number * WINDOW < self.low or number * WINDOW >= self.high:
            self.windows.add(number)
            if len(self.windows) > MAX_WINDOWS:
                raise LimitExceeded(f"{self.file.filename}: its clusters lie too far apart to be checked")

    # -- the walk --------------------------------------------------------------------------------

    def run(self) -> None:
        """Counts everything. Raises OSError, LimitExceeded."""
        header, file, g = self.header, self.file, self.g
        if self.with_refcount_structures:
            self._counted = self._windows_with_blocks()
            for number in self._counted.tolist():
                self._touch(number)
            self.load_refcounts()
        self.region("the header", 0, g.cluster_size)
        self._walk_l1("the L1 table", header.l1_table_offset, header.l1_size, active=True)
        snapshots, length = read_snapshots(file, header)
        for number, snapshot in enumerate(snapshots):
            if header.version >= 3 and snapshot.extra_data_size < 16:
                self.corrupt(f"ERROR snapshot {number} lacks the extra data that version 3 asks for")
            if snapshot.l1_table_offset & g.cluster_mask or snapshot.l1_size * 8 > MAX_L1_BYTES:
                self.corrupt(f"ERROR snapshot {number} has an impossible L1 table, at {snapshot.l1_table_offset:#x}")
                continue
            what = f"the L1 table of snapshot {number}"
            self._walk_l1(what, snapshot.l1_table_offset, snapshot.l1_size, active=False)
        self.region("the snapshot table", header.snapshots_offset, length)
        luks = encryption.region(header)
        if luks is not None:
            self.region("the LUKS header", *luks)
        if self.with_refcount_structures:
            table = header.refcount_table_clusters << g.cluster_bits
            self.region("the refcount table", header.refcount_table_offset, table)
        self._walk_bitmaps()
        if self.with_refcount_structures:
            self._walk_refblocks()
        self._clip()

    def _clip(self) -> None:
        """A refcount has a largest value; more references than that cannot be counted."""
        most = self._most
        if most >= _TOP:
            return
        over = np.flatnonzero(self.references > most)
        if len(over):
            excess = int(self.references[over].astype(np.int64).sum()) - most * len(over)
            self.report.corruptions += excess
            self.report.say(f"ERROR {len(over)} clusters have more references than fit into a refcount: {most}")
            self.references[over] = most

    def _walk_bitmaps(self) -> None:
        found = bitmaps.directory(self.header)
        if found is None:
            return
        offset, size, count = found
        self.region("the bitmap directory", offset, size)
        try:
            for table in bitmaps.tables(self.file, offset, size, count):
                self.region("a bitmap's table", table.offset, table.size * 8)
                self._walk_bitmap(bitmaps.read_bitmap_table(self.file, table))
        except CorruptImage as error:
            self.corrupt(f"ERROR {error}")

    def _walk_bitmap(self, entries: Any) -> None:
        for entry in entries:
            if not entry:
                continue
            place = bitmaps.cluster_of(entry, self.g.cluster_size)
            if place is None:
                self.corrupt(f"ERROR entry {entry:#x} of a bitmap's table is impossible")
            elif place:
                self.region("a bitmap's cluster", place, self.g.cluster_size)

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
                self.report.check_errors += max(0, min(stop, g.clusters(self.end)) - start)
            elif offset < self.end:  # beyond it all counts read as 0
                counts = self.block_counts(offset)
                self.refcounts[start - self.low : stop - self.low] = counts[start - first : stop - first]

    def blocks(self) -> Iterator[tuple[int, int]]:
        """``(number, table entry)`` of the refcount blocks that there are for the window."""
        bits = self.g.block_bits
        table = self._reftable()
        for block in range(self.low >> bits, min(len(table), -(-self.high >> bits))):
            if table[block] & REFTABLE_OFFSET_MASK:
                yield block, table[block]

    def _windows_with_blocks(self) -> Hosts:
        """Numbers of all windows of which some counts exist."""
        table = self._reftable()
        if not len(table):
            return np.zeros(0, np.int64)
        there = np.frombuffer(table, np.uint64) & _u64(REFTABLE_OFFSET_MASK)
        return np.unique((np.flatnonzero(there) << self.g.block_bits) // WINDOW)

    def block_counts(self, offset: int) -> Counts:
        """The refcounts in the block at ``offset``, those above ``_TOP`` as that."""
        raw = np.frombuffer(self.file.pread(offset, self.g.cluster_size), np.uint8)
        order = self.header.refcount_order
        if order < 3:
            return expand_bytes(raw, order).astype(np.uint16)
        counts = raw.view(f">u{1 << (order - 3)}")
        return np.minimum(counts, _TOP).astype(np.uint16) if order > 4 else counts.astype(np.uint16)

    def _reftable(self) -> Any:
        header = self.header
        count = header.refcount_table_clusters << (self.g.cluster_bits - 3)
        return read_table(self.file, "refcount_table_offset", header.refcount_table_offset, count)

    def _walk_refblocks(self) -> None:
        g = self.g
        for block, entry in enumerate(self._reftable()):
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

    def _walk_l1(self, what: str, offset: int, size: int, *, active: bool) -> None:
        g = self.g
        if not size:
            return
        self.region(what, offset, size * 8)
        try:
            table = np.frombuffer(read_table(self.file, what, offset, size), np.uint64)
        except DiskwrightError as error:
            self.report.check_errors += not self.quiet
            self.report.say(f"ERROR {error}")
            return
        entries = table[table != 0]
        self.corrupt(f"ERROR {what} has entries with reserved bits set", _count(entries & _u64(L1_RESERVED)))
        places = (entries & _u64(OFFSET_MASK)).astype(np.int64)
        self._count_places(places, None, "L2 tables")
        self.corrupt(f"ERROR {what} names L2 tables that are not aligned to a cluster", _count(places & g.cluster_mask))
        if active:
            named = places != 0
            self._check_copied(entries[named], places[named], None, "L1 entries")
        places, times = np.unique(places[places < self.end], return_counts=True)
        if len(places) and not places[0]:
            self._walk_l2(places[:1], times[:1], active)
            places, times = places[1:], times[1:]
        per_batch = max(1, _BATCH >> g.cluster_bits)
        for at in range(0, len(places), per_batch):
            self._walk_l2(places[at : at + per_batch], times[at : at + per_batch], active)

    def read_tables(self, places: Hosts) -> Entries:
        """L2 tables as rows of native integers. What lies beyond the end of the file reads as zeros."""
        per_table = 1 << self.g.l2_bits
        tables = np.empty((len(places), per_table), np.uint64)
        raw = memoryview(tables.view(np.uint8).data).cast("B")
        size = self.g.cluster_size
        self.file.readv([(place, raw[i * size : (i + 1) * size]) for i, place in enumerate(places.tolist())])
        if sys.byteorder == "little":
            tables.byteswap(inplace=True)
        return tables

    def _walk_l2(self, tables: Hosts, times: Hosts, active: bool) -> None:
        g = self.g
        entries = self.read_tables(tables)
        flat = entries.ravel()
        union = int(np.bitwise_or.reduce(flat))
        if not union:
            return
        once = int(times.max()) == 1
        plain = once and not self.unknown and not union & (COMPRESSED | L2_RESERVED | g.cluster_mask)
        if plain and self._walk_runs(flat, active):
            return
        weights = None if once else np.repeat(times, entries.shape[1])
        if union & COMPRESSED:
            compressed = flat & _u64(COMPRESSED) != 0
            self._walk_compressed(flat[compressed], None if weights is None else weights[compressed], active)
            flat = np.where(compressed, _u64(0), flat)
        if union & L2_RESERVED:
            reserved = flat & _u64(L2_RESERVED) != 0
            self.corrupt("ERROR L2 entries have reserved bits set", _sum(reserved, weights))
        places = (flat & _u64(OFFSET_MASK)).view(np.int64)
        table = None
        if np.count_nonzero(places) < len(places):
            allocated = np.flatnonzero(places)
            places, flat = places[allocated], flat[allocated]
            weights = None if weights is None else weights[allocated]
            table = allocated >> g.l2_bits
        if active and not self.quiet:
            self._measure(places, table, weights)
        if union & g.cluster_mask & OFFSET_MASK:
            unaligned = places & g.cluster_mask != 0
            self.corrupt("ERROR L2 entries name places that are not aligned to a cluster", _sum(unaligned, weights))
        self._count_places(places, weights, "clusters")
        if active and tables[0]:  # at 0 lies the header: wrong as a table, and its flags say nothing
            self._check_copied(flat, places, weights, "L2 entries")

    def _walk_runs(self, flat: Entries, active: bool) -> bool:
        """The same for tables that consist of few long runs of plain clusters; False when these do not."""
        g = self.g
        per_table = 1 << g.l2_bits
        breaks = np.flatnonzero(np.diff(flat) != _u64(g.cluster_size)) + 1
        if len(breaks) > len(flat) // _FEW_RUNS:
            return False
        starts = np.concatenate((np.zeros(1, np.int64), breaks))
        heads = flat[starts].tolist()
        lengths = np.diff(starts, append=len(flat)).tolist()
        hosts = [(entry & OFFSET_MASK) >> g.cluster_bits for entry in heads]
        top = min(self.high, self.last)
        if any(host < max(self.low, 1) or host + n > top for host, n in zip(hosts, lengths, strict=True)):
            return False
        for entry, host, length in zip(heads, hosts, lengths, strict=True):
            part = slice(host - self.low, host - self.low + length)
            references = self.references[part]
            if references.max() == _TOP:
                references[references == _TOP] -= 1  # it stays at the top
            references += 1
            if active and self.with_refcount_structures:
                single = int(np.count_nonzero(self.refcounts[part] == 1))
                self._report_copied(length - single if entry & COPIED else single, entry, "L2 entries")
        if active and not self.quiet:
            self.report.allocated_clusters += len(flat)
            self.report.fragmented_clusters += int(np.count_nonzero(breaks & (per_table - 1)))
        return True

    def _count_places(self, places: Hosts, weights: Hosts | None, what: str) -> None:
        """References to whole clusters at ``places``, to two each where these are not aligned."""
        g = self.g
        if not len(places):
            return
        if int(places.max()) >= self.end:
            beyond = places >= self.end
            self.corrupt(f"ERROR {what} lie beyond the end of the file", _sum(beyond, weights))
            places = places[~beyond]
            weights = None if weights is None else weights[~beyond]
        hosts = places >> g.cluster_bits
        self.add(hosts, weights)
        astray = places & g.cluster_mask != 0
        if astray.any():
            self.add(hosts[astray] + 1, None if weights is None else weights[astray])

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
            if not self.quiet:
                # Where nothing is counted no other walk will come by.
                alone = (hosts >= self.reach) | ~np.isin(hosts // WINDOW, self._counted)
                wrong |= ~inside & copied & (hosts > self.last) & alone
        for start, stop in self.unknown:
            wrong &= (hosts < start) | (hosts >= stop)
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
        place = (entries & _u64(g.compressed_mask)).astype(np.int64)
        sectors = ((entries >> _u64(g.sectors_shift)) & _u64(g.sectors_mask)).astype(np.int64) + 1
        end = place + sectors * 512 - (place & 511)
        beyond = end - self.end >= g.cluster_size
        self.corrupt("ERROR compressed clusters lie beyond the end of the file", _sum(beyond, weights))
        first, last = place >> g.cluster_bits, (end - 1) >> g.cluster_bits
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
            apart[(1 << self.g.l2_bits) - 1 :: 1 << self.g.l2_bits] = False
        else:
            apart &= table[1:] == table[:-1]
        if weights is None:
            self.report.allocated_clusters += len(places)
            self.report.fragmented_clusters += int(np.count_nonzero(apart))
        else:
            self.report.allocated_clusters += int(weights.sum())
            self.report.fragmented_clusters += int(weights[1:][apart].sum())


def _count(bits: NDArray[Any]) -> int:
    return int(np.count_nonzero(bits))


def _sum(where: NDArray[np.bool_], weights: Hosts | None) -> int:
    return int(np.count_nonzero(where)) if weights is None else int(weights[where].sum())
