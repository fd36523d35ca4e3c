"""The order in which changes of metadata reach the file, and when given-up clusters may be used again.

One lock (``lock``) guards everything that changes in memory; no guest data is moved under it. Table bytes reach
the file only under ``flush_lock``, which is taken before ``lock`` where both are needed.

What makes a crash harmless, whenever it comes:

* ``checkpoint`` writes refcounts, then L2 tables, then the L1 table, with a flush after each; guest data was
  written before the map in memory named its place, so the first flush covers it. Nothing in the file points at
  something that is not durable.
* Guest data in an external data file is flushed before the tables that point at it, like that in the file itself.
* A place that is given up keeps its refcount until the map without it is durable and no lease can reach it.
  Until then nobody else gets it, and afterwards the worst a crash can do is to leave it counted.
"""

from __future__ import annotations

import struct
import threading
from array import array
from collections import deque
from collections.abc import Callable, Iterable
from enum import Enum
from typing import Final, NamedTuple, TypeVar

from diskwright.core.leases import Leases, Quarantine
from diskwright.core.node import Node
from diskwright.core.tables import Piece
from diskwright.errors import CorruptImage
from diskwright.formats.qcow2.header import AT_REFTABLE, Header
from diskwright.formats.qcow2.layout import COMPRESSED, OFFSET_MASK
from diskwright.formats.qcow2.mapping import Mapping
from diskwright.formats.qcow2.metadata import MetadataMap
from diskwright.formats.qcow2.refcounts import Refcounts, TableFull, sector_pieces
from diskwright.units import MiB

T = TypeVar("T")

_TABLE: Final = ("refblock_alloc_hookup",)
_L2: Final = ("l2_update",)
_NEW_L2: Final = ("l2_alloc_write", "l2_update")
_L1: Final = ("l1_update",)
"""What is announced before tables are written."""

_MOST_FREED_BYTES: Final = 256 * MiB
"""Given-up space that may wait for a flush of the user's before we make one, to be able to use it again."""


class Cause(Enum):
    """Why clusters became free. Options choose of which the file is told, so that it can give up their space."""

    REQUEST = "a guest's request"
    SNAPSHOT = "a change of snapshots, or the emptying of an image that has been committed"
    OTHER = "anything else: what was copied on write, tables that moved"
    ALWAYS = "an operation that is there to give space back"


class _Freed(NamedTuple):
    """Clusters given up. ``era`` is the checkpoint that makes the map without them durable; ``tell``: the file."""

    era: int
    runs: list[tuple[int, int]]  # (first host cluster, count)
    tell: bool


class Ordering:
    """Refcounts and map of one open image, as far as writing them back goes. Thread-safe."""

    def __init__(
        self, file: Node, header: Header, mapping: Mapping, refcounts: Refcounts, leases: Leases, cache_bytes: int
    ) -> None:
        """``cache_bytes`` bounds the changed slices that wait to be written. Raises LimitExceeded when the snapshot
        table is too long."""
        self.file, self.path, self.header, self.map, self.refcounts = file, file.filename, header, mapping, refcounts
        self.lock = threading.Lock()
        self.flush_lock = threading.Lock()
        self.data_file: Node | None = None
        """The external data file, where there is one."""
        g = self.geometry = mapping.geometry
        self._cluster_bits, self._cluster_mask, self._cluster_size = g.cluster_bits, g.cluster_mask, g.cluster_size
        self.metadata = MetadataMap(header, mapping, refcounts)
        refcounts.is_metadata, refcounts.added = self.metadata.contains, self._added_block
        self._fresh = g.clusters(file.size)
        """Host clusters from here on have never been written to, nor handed out."""
        self._l1_changed: set[int] = set()  # sectors of the L1 table
        self._most_changed = max(16, cache_bytes // g.slice_bytes)
        self._era, self._durable = 0, -1
        self._quarantine: Quarantine[_Freed] = Quarantine(leases)
        self._passed: deque[_Freed] = deque()  # out of quarantine, not yet durable
        self._freed_clusters = 0  # since the last checkpoint
        self._begun = self._completed = 0  # checkpoints
        self.told = frozenset((Cause.REQUEST, Cause.SNAPSHOT, Cause.ALWAYS))
        """For what causes the file is told to discard clusters that became free."""

    # -- taking ------------------------------------------------------------------------------------

    def growing(self, action: Callable[[], T]) -> T:
        """``action`` under the lock, again after the refcount table has been made larger when it must be."""
        while True:
            try:
                with self.lock:
                    return action()
            except TableFull as full:
                wanted = full
            self._grow_reftable(wanted)

    def _allocate(self, count: int) -> tuple[int, int]:
        """``Refcounts.allocate``, under the lock."""
        self.file.announce("cluster_alloc")
        host, count = self.refcounts.allocate(count)
        self._fresh = max(self._fresh, host + count)
        return host, count

    def take(self, count: int) -> tuple[int, int]:
        """``(first, n)``: some host clusters, at most ``count``, now taken."""
        return self.growing(lambda: self._allocate(count))

    def take_adjoining(self, count: int) -> int:
        """The first of ``count`` adjoining host clusters, now taken."""
        self.file.announce("cluster_alloc")
        first = self.growing(lambda: self.refcounts.allocate_exactly(count))
        self._fresh = max(self._fresh, first + count)
        return first

    def has_written(self, end: int) -> None:
        """Somebody else has written to host clusters before ``end``, which may or may not be in use now."""
        with self.lock:
            self._fresh = max(self._fresh, end)

    def _added_block(self, cluster: int) -> None:
        self.metadata.add(cluster)
        self._fresh = max(self._fresh, cluster + 1)

    def _set_l1(self, index: int, host: int, flags: int) -> None:
        """Points an L1 entry at the L2 table in host cluster ``host``; 0 takes the table off the map."""
        self.map.l1[index] = host << self._cluster_bits | flags
        self._l1_changed.add(index >> 6)
        if host:
            self.metadata.add(host)

    def switch_l1(self, table: array[int], offset: int) -> None:
        """Goes on with a larger L1 table, which is durable, and so is the header that names it."""
        with self.lock:
            old = self.map.l1_offset >> self._cluster_bits, self.geometry.clusters(len(self.map.l1) * 8)
            self.map.l1, self.map.l1_offset = table, offset
            self.header.l1_size, self.header.l1_table_offset = len(table), offset
            self.refcounts.release([old])

    # -- giving up -----------------------------------------------------------------------------------

    def _give_up(self, entries: Iterable[int], cause: Cause) -> None:
        """What ``entries`` refer to, which are no longer on the map in memory, is freed when it may be."""
        runs = self._host_runs(entries)
        if runs:
            self._give_up_runs(runs, cause)

    def _give_up_runs(self, runs: list[tuple[int, int]], cause: Cause) -> None:
        self._freed_clusters += sum(count for _, count in runs)
        self._quarantine.put(_Freed(self._era, runs, cause in self.told))

    def give_back(self, runs: list[tuple[int, int]]) -> None:
        """Host clusters that held other things than guest data, and that nothing in the file refers to any more."""
        with self.lock:
            for first, count in runs:
                for host in range(first, first + count):
                    self.metadata.remove(host)
            self._give_up_runs(runs, Cause.ALWAYS)

    def _host_runs(self, entries: Iterable[int]) -> list[tuple[int, int]]:
        """Host clusters that entries refer to; one that two compressed clusters share is there twice."""
        bits = self._cluster_bits
        runs: list[tuple[int, int]] = []
        for entry in entries:
            if entry & COMPRESSED:
                place, stored = self.geometry.compressed_place(entry)
                runs.append((place >> bits, ((place + stored - 1) >> bits) - (place >> bits) + 1))
            elif entry & OFFSET_MASK:
                host = (entry & OFFSET_MASK) >> bits
                if runs and sum(runs[-1]) == host:
                    runs[-1] = runs[-1][0], runs[-1][1] + 1
                else:
                    runs.append((host, 1))
        return runs

    def _overdue(self) -> bool:
        return (
            self.map.l2.changed > self._most_changed
            or self.refcounts.cache.changed > self._most_changed
            or self._freed_clusters << self._cluster_bits > _MOST_FREED_BYTES
        )

    # -- the order of things -------------------------------------------------------------------------

    def checkpoint(self) -> None:
        """Makes all that was published before the call durable. With no metadata changed it is one flush of the
        file. After an error nothing is lost: what was to be written stays changed, and a later call tries again.
        """
        begun = self._begun
        with self.flush_lock:
            if self._completed > begun:
                return  # another call's has begun since ours was made, and covers it
            self._begun += 1
            ticket = self._begun
            self._write_back()
            self._completed = ticket

    def _write_back(self) -> None:
        refcounts, l2 = self.refcounts, self.map.l2
        with self.lock:
            era = self._era
            self._era += 1
            self._freed_clusters = 0
            # Taken together: these tables name no place that these refcounts do not count.
            blocks, slices = refcounts.cache.capture(), l2.capture()
            table, table_sectors = refcounts.capture_table()
            l1_sectors, self._l1_changed = self._l1_changed, set()
            l1 = sector_pieces(self.map.l1, self.map.l1_offset, l1_sectors)
        try:
            if table:
                self.file.announce("refblock_alloc_write")
            if blocks:
                self.file.announce("refblock_update_part")
                self.file.writev(blocks)
            if self.data_file is not None:
                self.data_file.flush()
            if not (table or slices or l1):
                self.file.announce("flush_to_disk")
            self.file.flush()
            for pieces, events in ((table, _TABLE), (slices, _NEW_L2 if l1 else _L2), (l1, _L1)):
                if pieces:
                    for event in events:
                        self.file.announce(event)
                    self.file.writev(pieces)
                    if pieces is l1 or not (l1 or (pieces is table and slices)):
                        self.file.announce("flush_to_disk")
                    self.file.flush()
        except BaseException:
            with self.lock:
                refcounts.cache.restore()
                refcounts.restore_table(table_sectors)
                l2.restore()
                self._l1_changed |= l1_sectors
            raise
        refcounts.cache.settle()
        l2.settle()
        self._durable = era
        self._reclaim()

    def _reclaim(self) -> None:
        """Frees what has been given up, as far as the map without it is durable and no lease reaches it."""
        ready: list[_Freed] = []
        with self.lock:
            self._passed.extend(self._quarantine.take_passed())
            while self._passed and self._passed[0].era <= self._durable:
                ready.append(self._passed.popleft())
            unmapped = [run for freed in ready if freed.tell for run in self.refcounts.unshared(freed.runs)]
        if ready:
            self.file.announce("cluster_free")
        for first, count in unmapped:
            # Still counted, so still nobody's: nothing can be written there meanwhile.
            self.file.discard(first << self._cluster_bits, count << self._cluster_bits)
        with self.lock:
            for freed in ready:
                self.refcounts.release(freed.runs)

    @property
    def changed(self) -> bool:
        """Whether something waits to be written or freed."""
        return bool(
            self.map.l2.changed or self.refcounts.cache.changed or self.refcounts.table_changed
            or self._l1_changed or self._passed or len(self._quarantine)
        )  # fmt: skip

    def close(self) -> None:
        """Writes everything back. Raises OSError; then something may be lost that no flush had promised."""
        for _ in range(3):  # tables; then refcounts of what they gave up; then nothing
            if not self.changed:
                return
            self.checkpoint()

    def _grow_reftable(self, full: TableFull) -> None:
        """Moves the refcount table to a larger place: the new one durable first, then the header that names it."""
        refcounts = self.refcounts
        with self.flush_lock, self.lock:
            if full.block < len(refcounts.table):
                return  # somebody else has done it
            self._write_blocks()
            first, table, pieces = refcounts.grown(full)
            start = full.area << self.geometry.block_bits
            end = first + (len(table) * 8 >> self._cluster_bits)
            if self.metadata.contains(start, end - start):
                raise CorruptImage(self.path, f"refcount of host cluster {start}", 0, None, "metadata lies there")
            self._fresh = max(self._fresh, end)
            for event in ("reftable_grow", "refblock_alloc_write_blocks", "refblock_alloc_write_table"):
                self.file.announce(event)
            self.file.writev(pieces)
            self.file.flush()
            clusters = end - first
            self.file.announce("refblock_alloc_switch_table")
            self.write_header(AT_REFTABLE, struct.pack(">QI", first << self._cluster_bits, clusters))
            self.header.refcount_table_offset = first << self._cluster_bits
            self.header.refcount_table_clusters = clusters
            old = refcounts.install(first, table)
            refcounts.table_changed.clear()
            refcounts.release([old])

    def _write_blocks(self) -> None:
        """Makes refcount blocks durable, so that a new table may name them. Under both locks."""
        cache = self.refcounts.cache
        pieces: list[Piece] = cache.capture()
        try:
            if pieces:
                self.file.announce("refblock_update_part")
                self.file.writev(pieces)
            self.file.flush()
        except BaseException:
            cache.restore()
            raise
        cache.settle()

    def write_header(self, offset: int, data: bytes) -> None:
        """Changes fields of the header, and returns when they are durable. They must share a sector, so that
        a crash leaves either all or none of them changed."""
        assert offset // 512 == (offset + len(data) - 1) // 512
        self.file.pwrite(offset, data)
        self.file.flush()
