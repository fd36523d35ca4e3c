"""Making, applying and deleting internal snapshots: changes of the whole image in one step.

Nearly every refcount changes, and with it the copied flag of nearly every L2 entry; changed in place, refcounts and
flags would contradict each other until the last of them is written. So nothing is changed in place. Refcount blocks,
refcount table, L1 table, L2 tables with other flags and snapshot table are written to clusters that are free in the
image as it is, and made durable; then one write into the header's first sector, where all their places are, puts the
new state in place of the old. Whatever fails or stops before leaves the old image as it was. The places of what was
replaced are free in the new one; nothing is written there before the header is durable.
"""

from __future__ import annotations

import os
import struct
from contextlib import suppress
from time import time_ns
from typing import TYPE_CHECKING, Final

import numpy as np

from diskwright.core.snapshots import SnapshotInfo, VmState, find
from diskwright.errors import ImageError, LimitExceeded, OptionError, UnsupportedFeature
from diskwright.formats.qcow2.counts import Counts
from diskwright.formats.qcow2.header import AT_SIZE, DATA_FILE, read_header
from diskwright.formats.qcow2.layout import (
    COPIED,
    MAX_SNAPSHOT_TABLE_BYTES,
    MAX_SNAPSHOTS,
    OFFSET_MASK,
)
from diskwright.formats.qcow2.ordering import Cause
from diskwright.formats.qcow2.snapshots import MAX_NAME, Snapshot, entry, load_snapshots, view
from diskwright.formats.qcow2.trees import Tree, big_endian_words
from diskwright.formats.qcow2.vmstate import store
from diskwright.units import MiB

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from diskwright.core.tables import Piece
    from diskwright.formats.qcow2.driver import Qcow2

    Hosts = NDArray[np.int64]

SWITCHED: Final = struct.Struct(">QIIQQIIQ")
"""The header's fields from ``size`` to ``snapshots_offset``, within one sector."""

_AT_ONCE: Final = 4 * MiB
"""Bytes written together."""


class Change:
    """An image's next state while it is put together."""

    def __init__(self, image: Qcow2) -> None:
        """Writes back what waits, so that the file alone tells the present state. Raises ImageError for a read-only
        image, UnsupportedFeature, CorruptImage, LimitExceeded, OSError."""
        writer, file = image.writer, image.children[0]
        if writer is None:
            raise ImageError(f"{file.filename}: is open read-only")
        if image.header.incompatible_features & DATA_FILE:
            raise UnsupportedFeature(f"{file.filename}: has an external data file, and so cannot have snapshots")
        writer.close()
        self.image, self.writer, self.file = image, writer, file
        self.header = read_header(file)
        self.g = self.header.geometry
        self.counts = Counts(file, self.header, writer.metadata.contains)
        self.table = load_snapshots(file, self.header)
        self.infos = [snapshot.info(self.header) for snapshot in self.table]
        self._old_end: int | None = file.size

    def index(self, id: str) -> int:
        """Where in the table the snapshot ``id`` is. Raises SnapshotNotFound."""
        return self.infos.index(find(self.infos, id=id))

    def write(self, pieces: list[Piece]) -> None:
        """Into places that ``counts`` gave. A failure leaves nothing but a longer file."""
        bits = self.g.cluster_bits
        end = max((at + len(data) for at, data in pieces), default=0)
        # From here on the places hold something, whether or not they will be used.
        self.writer.has_written(-(-end >> bits))
        part: list[Piece] = []
        size = 0
        for piece in pieces:
            part.append(piece)
            size += len(piece[1])
            if size >= _AT_ONCE:
                self.file.writev(part)
                part, size = [], 0
        if part:
            self.file.writev(part)

    def write_l1(self, entries: NDArray[np.uint64]) -> int:
        """Puts an L1 table into new clusters; returns its offset, 0 for an empty one."""
        if not len(entries):
            return 0
        clusters = self.g.clusters(len(entries) * 8)
        padded = np.zeros(clusters << (self.g.cluster_bits - 3), np.uint64)
        padded[: len(entries)] = entries
        offset = self.counts.take_adjoining(clusters) << self.g.cluster_bits
        self.write([(offset, big_endian_words(padded))])
        return offset

    def _write_table(self, table: list[Snapshot]) -> int:
        data = b"".join(snapshot.raw for snapshot in table)
        if len(data) > MAX_SNAPSHOT_TABLE_BYTES:
            raise LimitExceeded(
                f"{self.file.filename}: the snapshot table would be longer than {MAX_SNAPSHOT_TABLE_BYTES} bytes"
            )
        if not data:
            return 0
        clusters = self.g.clusters(len(data))
        offset = self.counts.take_adjoining(clusters) << self.g.cluster_bits
        self.write([(offset, memoryview(data.ljust(clusters << self.g.cluster_bits, b"\0")))])
        return offset

    def count(self, tree: Tree) -> None:
        """Everything below an L1 table has one user more."""
        for hosts in tree.hosts():
            self.counts.add(hosts)

    def uncount(self, tree: Tree) -> None:
        for hosts in tree.hosts():
            self.counts.drop(hosts)

    def set_flags(self, tree: Tree, users: int) -> None:
        """Gives L2 tables of the active ``tree`` in which a copied flag will be wrong a new place, where it is right.
        ``users``: how many of the L1 tables that this change writes have the tree."""
        g, counts = self.g, self.counts
        for indices, words in tree.batches():
            descriptors = tree.descriptors(words)
            standard = tree.standard(descriptors)
            hosts = (descriptors[standard] & np.uint64(OFFSET_MASK)).astype(np.int64) >> g.cluster_bits
            copied = np.zeros(descriptors.shape, np.bool_)
            copied[standard] = counts.of(hosts) == 1
            wrong = (copied != (descriptors >= np.uint64(COPIED))).any(axis=1)
            if not wrong.any():
                continue
            descriptors &= np.uint64(~COPIED & (1 << 64) - 1)
            descriptors |= np.where(copied, np.uint64(COPIED), np.uint64(0))
            old = tree.tables[indices[wrong]] >> g.cluster_bits
            new = counts.take(len(old))
            for _ in range(users):
                counts.replace(old)
            for _ in range(users - 1):
                counts.add(new)
            tree.tables[indices[wrong]] = new << g.cluster_bits
            rows = zip(new.tolist(), words[wrong], strict=True)
            self.write([(host << g.cluster_bits, big_endian_words(row)) for host, row in rows])

    def entries(self, tree: Tree) -> NDArray[np.uint64]:
        """The entries of the active L1 table."""
        found = tree.tables.astype(np.uint64)
        named = np.flatnonzero(tree.tables)
        single = self.counts.of(tree.tables[named] >> self.g.cluster_bits) == 1
        found[named[single]] |= np.uint64(COPIED)
        return found

    def finish(self, tree: Tree, table: list[Snapshot], size: int) -> None:
        """Makes this the image's state: the active ``tree``, its flags set, the snapshots of ``table``, and a disk of
        ``size`` bytes."""
        header = self.header
        old_l1 = header.l1_size * 8
        l1_size, l1_offset = len(tree.tables), self.write_l1(self.entries(tree))
        self.counts.drop_region(header.l1_table_offset, old_l1)
        snapshots = self._write_table(table)
        self.counts.drop_region(header.snapshots_offset, sum(len(snapshot.raw) for snapshot in self.table))
        reftable, reftable_clusters, pieces = self.counts.move()
        self.write(pieces)
        self.file.flush()
        fields = SWITCHED.pack(
            size, header.crypt_method, l1_size, l1_offset, reftable, reftable_clusters, len(table), snapshots
        )
        self._old_end = None  # from here on the file has to keep its length
        self.image.switch(fields, self.file.pread(AT_SIZE, SWITCHED.size))
        writer = self.image.writer
        for first, count in self.counts.freed() if writer is not None and Cause.SNAPSHOT in writer.told else ():
            with suppress(OSError):  # it is done; this only gives back space
                self.file.discard(first << self.g.cluster_bits, count << self.g.cluster_bits)

    def undo(self) -> None:
        """Gives back what the file has grown by, as far as that can be done."""
        with suppress(Exception):
            if self._old_end is not None and self.file.size > self._old_end:
                self.file.resize(self._old_end)


def create(image: Qcow2, name: str, vm_state: VmState | None) -> SnapshotInfo:
    """See ``Snapshots.create_snapshot``."""
    if len(os.fsencode(name)) > MAX_NAME:
        raise OptionError(f"The name of a snapshot has at most {MAX_NAME} bytes")
    change = Change(image)
    try:
        header, table = change.header, change.table
        if len(table) >= MAX_SNAPSHOTS:
            raise LimitExceeded(f"{change.file.filename}: there are {len(table)} snapshots already, the most possible")
        now = time_ns()
        info = SnapshotInfo(
            _next_id(change.infos), name, now // 10**9, now % 10**9,
            vm_state.clock_nsec if vm_state else 0, vm_state.size if vm_state else 0,
            vm_state.icount if vm_state else 0, header.size,
        )  # fmt: skip
        tree = Tree.read(change.file, header)
        entries = change.g.l1_entries(header.size)
        # What the active table has beyond the disk's end is no part of the snapshot.
        kept, rest = tree.part(0, entries), tree.part(entries)
        change.count(kept)
        state = store(change, vm_state, entries) if vm_state else np.zeros(0, np.uint64)
        change.set_flags(kept, 2)
        change.set_flags(rest, 1)
        tree.tables = np.concatenate((kept.tables, rest.tables))
        l1 = np.concatenate((kept.tables.astype(np.uint64), state))
        snapshot = entry(info, change.write_l1(l1), len(l1))
        change.finish(tree, [*table, snapshot], header.size)
        return info
    except BaseException:
        change.undo()
        raise


def _next_id(infos: list[SnapshotInfo]) -> str:
    """One more than the largest number there is; what is no number counts as 0."""
    numbers = (int(info.id) for info in infos if info.id.isascii() and info.id.isdigit() and len(info.id) < 19)
    return str(max(numbers, default=0) + 1)


def apply(image: Qcow2, id: str) -> None:
    """See ``Snapshots.apply_snapshot``."""
    change = Change(image)
    try:
        number = change.index(id)
        header = view(change.file, change.header, change.table[number])
        # The machine's state, which lies beyond the disk's end, stays with the snapshot.
        tree = Tree.read(change.file, header).part(0, change.g.l1_entries(header.size))
        # In this order, for a refcount need not be able to count both.
        change.uncount(Tree.read(change.file, change.header))
        change.count(tree)
        change.set_flags(tree, 1)
        change.finish(tree, change.table, header.size)
    except BaseException:
        change.undo()
        raise


def delete(image: Qcow2, id: str) -> None:
    """See ``Snapshots.delete_snapshot``."""
    change = Change(image)
    try:
        number = change.index(id)
        snapshot = change.table[number]
        change.uncount(Tree.read(change.file, view(change.file, change.header, snapshot)))
        change.counts.drop_region(snapshot.l1_table_offset, snapshot.l1_size * 8)
        tree = Tree.read(change.file, change.header)
        change.set_flags(tree, 1)
        rest = [each for at, each in enumerate(change.table) if at != number]
        change.finish(tree, rest, change.header.size)
    except BaseException:
        change.undo()
        raise
