"""Giving the refcounts of an image another width.

The new blocks and their table are built behind everything the file has, where nothing points yet, and made durable;
then one write within the header's first sector names them. A crash leaves the old structure or the new one, whole.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import numpy as np

from diskwright.errors import LimitExceeded, OptionError
from diskwright.formats.qcow2.header import AT_REFTABLE
from diskwright.formats.qcow2.layout import MAX_HOST_OFFSET, MAX_REFTABLE_BYTES, REFTABLE_OFFSET_MASK
from diskwright.formats.qcow2.refcounts import expand_bytes

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from diskwright.core.driver import Progress
    from diskwright.formats.qcow2.driver import Qcow2
    from diskwright.formats.qcow2.refcounts import Refcounts

_AT_ORDER: Final = 96


def change_width(image: Qcow2, order: int, progress: Progress) -> None:
    """Makes refcounts ``1 << order`` bits wide. Raises OptionError, with nothing changed, when one of them would not
    fit; LimitExceeded when the table would become too large."""
    writer = image.writer
    assert writer is not None
    writer.close()  # freed clusters have their final count now
    refcounts, g, file = writer.refcounts, writer.geometry, writer.file
    old = _Counts(refcounts)
    per_block = g.cluster_size * 8 >> order
    used = _needed_blocks(old, order, per_block)
    first = max(g.clusters(file.size), refcounts.end())
    blocks, table_clusters = _layout(used, first, per_block, g.cluster_size)
    end = first + len(blocks) + table_clusters
    if table_clusters * g.cluster_size > MAX_REFTABLE_BYTES or end << g.cluster_bits > MAX_HOST_OFFSET:
        raise LimitExceeded(
            f"Cannot change the refcount width: the refcount table would exceed {MAX_REFTABLE_BYTES} bytes"
        )
    table = np.zeros(table_clusters * g.cluster_size // 8, ">u8")
    for at, block in enumerate(blocks):
        counts = old.read(block * per_block, per_block)
        _assign(counts, block * per_block, _structure(refcounts), 0)
        _assign(counts, block * per_block, [(first, end - first)], 1)
        place = (first + at) << g.cluster_bits
        file.pwrite(place, _packed(counts, order))
        table[block] = place
        progress(at + 1, len(blocks) + 1)
    offset = (first + len(blocks)) << g.cluster_bits
    file.pwrite(offset, table.tobytes())
    file.flush()
    fields = bytearray(file.pread(AT_REFTABLE, _AT_ORDER + 4 - AT_REFTABLE))
    struct.pack_into(">QI", fields, 0, offset, table_clusters)
    struct.pack_into(">I", fields, _AT_ORDER - AT_REFTABLE, order)
    try:
        writer.write_header(AT_REFTABLE, bytes(fields))
    finally:
        image.reload()
    progress(len(blocks) + 1, len(blocks) + 1)


def _needed_blocks(old: _Counts, order: int, per_block: int) -> set[int]:
    """The new blocks that have something to count. Raises OptionError for a count that does not fit."""
    most = (1 << (1 << order)) - 1
    used: set[int] = set()
    for start, counts in old.blocks():
        if 1 << order < 64:
            over = np.flatnonzero(counts > np.uint64(most))
            if len(over):
                at = int(over[0])
                raise OptionError(
                    f"Cannot decrease refcount entry width to {1 << order} bits: Cluster at offset "
                    f"{(start + at) * old.cluster_size:#x} has a refcount of {int(counts[at])}"
                )
        used.update(np.unique((np.flatnonzero(counts) + start) // per_block).tolist())
    return used


def _layout(used: set[int], first: int, per_block: int, cluster_size: int) -> tuple[list[int], int]:
    """The new blocks, in order, and the clusters of their table. Both are counted too, from cluster ``first`` on."""
    # Both only ever grow from one round to the next, so this ends.
    blocks, table_clusters = sorted(used), 1
    while True:
        end = first + len(blocks) + table_clusters
        wanted = sorted(used | set(range(first // per_block, (end - 1) // per_block + 1)))
        needed = max(table_clusters, -(-(wanted[-1] + 1) * 8 // cluster_size))
        if (len(wanted), needed) == (len(blocks), table_clusters):
            return wanted, needed
        blocks, table_clusters = wanted, needed


def _structure(refcounts: Refcounts) -> list[tuple[int, int]]:
    """Where the old table and blocks are, which will be free: runs ``(first cluster, count)``."""
    g = refcounts.geometry
    places = [(entry & REFTABLE_OFFSET_MASK) >> g.cluster_bits for entry in refcounts.table]
    runs = [(place, 1) for place in places if place]
    runs.append((refcounts.table_offset >> g.cluster_bits, len(refcounts.table) * 8 >> g.cluster_bits))
    return runs


def _assign(counts: NDArray[np.uint64], start: int, runs: list[tuple[int, int]], value: int) -> None:
    """Sets the counts of the clusters in ``runs``, as far as they are among those from ``start`` on."""
    for first, count in runs:
        low, high = max(first - start, 0), min(first + count - start, len(counts))
        if low < high:
            counts[low:high] = value


class _Counts:
    """The counts as they are, read from the file block by block."""

    def __init__(self, refcounts: Refcounts) -> None:
        self._refcounts, self._file = refcounts, refcounts.file
        g = refcounts.geometry
        self.cluster_size, self._bits, self._order = g.cluster_size, g.block_bits, g.refcount_order
        self._last = -1
        self._cached: NDArray[np.uint64] = np.zeros(0, np.uint64)

    def blocks(self) -> Iterator[tuple[int, NDArray[np.uint64]]]:
        """``(first cluster, counts)`` of every block there is."""
        for number, entry in enumerate(self._refcounts.table):
            if entry & REFTABLE_OFFSET_MASK:
                yield number << self._bits, self._block(number)

    def read(self, start: int, count: int) -> NDArray[np.uint64]:
        """A copy of the counts of ``count`` clusters from ``start`` on."""
        found = np.zeros(count, np.uint64)
        at = 0
        while at < count:
            number, inside = (start + at) >> self._bits, (start + at) & ((1 << self._bits) - 1)
            step = min(count - at, (1 << self._bits) - inside)
            if number < len(self._refcounts.table) and self._refcounts.table[number] & REFTABLE_OFFSET_MASK:
                found[at : at + step] = self._block(number)[inside : inside + step]
            at += step
        return found

    def _block(self, number: int) -> NDArray[np.uint64]:
        if number != self._last:
            place = self._refcounts.table[number] & REFTABLE_OFFSET_MASK
            raw = self._file.pread(place, self.cluster_size)
            if self._order < 3:
                found = expand_bytes(np.frombuffer(raw, np.uint8), self._order).astype(np.uint64)
            else:
                found = np.frombuffer(raw, f">u{1 << (self._order - 3)}").astype(np.uint64)
            self._last, self._cached = number, found
        return self._cached


def _packed(counts: NDArray[np.uint64], order: int) -> bytes:
    """A refcount block with these counts; those narrower than a byte lie lowest bits first."""
    if order >= 3:
        return counts.astype(f">u{1 << (order - 3)}").tobytes()
    per_byte = 8 >> order
    parts = counts.astype(np.uint8).reshape(-1, per_byte) << (np.arange(per_byte, dtype=np.uint8) << order)
    return bytes(np.bitwise_or.reduce(parts, axis=1).astype(np.uint8))
