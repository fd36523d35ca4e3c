"""Mending an image: refcounts, the structures that hold them, and copied flags.

Done on the file, with nothing cached. The order is that of a checkpoint: refcounts are made right and durable before
anything relies on them, and new refcount structures are durable before the header names them. A crash leaves an image
that can be mended again.
"""

from __future__ import annotations

import struct
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from diskwright.core.driver import CheckReport
from diskwright.errors import LimitExceeded
from diskwright.formats.qcow2.check import inspect
from diskwright.formats.qcow2.header import AT_INCOMPATIBLE, AT_REFTABLE, CORRUPT, DIRTY, Header, read_header
from diskwright.formats.qcow2.layout import (
    COMPRESSED,
    COPIED,
    MAX_REFTABLE_BYTES,
    OFFSET_MASK,
    REFTABLE_OFFSET_MASK,
    ZERO,
)
from diskwright.formats.qcow2.mapping import read_table
from diskwright.formats.qcow2.scan import Scan

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from diskwright.core.node import Node


def mend(file: Node, repair: str) -> CheckReport:
    """Checks and repairs. ``repair`` leaks lowers refcounts that are too high; all mends everything that can be.

    The report tells what was fixed and what is left. Raises OSError, LimitExceeded.
    """
    header = read_header(file)
    found = inspect(file, header)
    before = found.report
    if repair == "all" and found.rebuild:
        _rebuild(file, header, found.windows)
    elif before.leaks or before.corruptions:
        _adjust(file, header, found.windows, raising=repair == "all")
    if repair == "all" and before.corruptions:
        _mend_entries(file, header, found.windows)
    after = inspect(file, header).report if before.leaks or before.corruptions else before
    after.leaks_fixed = max(0, before.leaks - after.leaks)
    after.corruptions_fixed = max(0, before.corruptions - after.corruptions)
    if after is not before:
        after.messages = [f"Repairing: {message}" for message in before.messages] + after.messages
    if repair == "all" and not after.corruptions and not after.check_errors:
        _mark_consistent(file, header)
    return after


def _mark_consistent(file: Node, header: Header) -> None:
    features = header.incompatible_features & ~(DIRTY | CORRUPT)
    if features != header.incompatible_features:
        file.flush()
        file.pwrite(AT_INCOMPATIBLE, struct.pack(">Q", features))
        file.flush()
        header.incompatible_features = features


def _scans(file: Node, header: Header, windows: list[int], *, structures: bool) -> Iterator[Scan]:
    """A silent walk for each window. Without ``structures`` the present refcount structures do not count."""
    for number in windows:
        scan = Scan(file, header, CheckReport(), number, quiet=True)
        scan.with_refcount_structures = structures
        scan.run()
        yield scan


# -- refcounts -----------------------------------------------------------------------------------------


def _adjust(file: Node, header: Header, windows: list[int], *, raising: bool) -> None:
    """Corrects refcounts in the blocks there are: those too high, and with ``raising`` also those too low."""
    g = header.geometry
    for scan in _scans(file, header, windows, structures=True):
        wrong = scan.refcounts > scan.references
        if raising:
            wrong |= (scan.refcounts < scan.references) & (scan.refcounts > 0)
        changed = np.flatnonzero(wrong)
        if not len(changed):
            continue
        affected = set(np.unique((changed + scan.low) >> g.block_bits).tolist())
        for block, entry in scan.blocks():
            offset = entry & REFTABLE_OFFSET_MASK
            if block not in affected or offset & g.cluster_mask or offset >= file.size:
                continue
            first = block << g.block_bits
            start, stop = max(first, scan.low), min(first + (1 << g.block_bits), scan.high)
            counts = _wide_counts(file, header, offset)
            part = slice(start - scan.low, stop - scan.low)
            inside = counts[start - first : stop - first]
            inside[wrong[part]] = scan.references[part][wrong[part]]
            file.pwrite(offset, encode_counts(counts, header.refcount_order))
    file.flush()


def _wide_counts(file: Node, header: Header, offset: int) -> NDArray[np.uint64]:
    """The refcounts of a block, none clipped."""
    raw = np.frombuffer(file.pread(offset, header.geometry.cluster_size), np.uint8)
    order = header.refcount_order
    if order < 3:
        from diskwright.formats.qcow2.refcounts import expand_bytes

        return expand_bytes(raw, order).astype(np.uint64)
    return raw.view(f">u{1 << (order - 3)}").astype(np.uint64)


def encode_counts(counts: NDArray[Any], order: int) -> bytes:
    """A refcount block's bytes."""
    if order >= 3:
        return bytes(counts.astype(f">u{1 << (order - 3)}").tobytes())
    per = 8 >> order
    shifts = np.arange(0, 8, 1 << order, dtype=np.uint8)
    packed = np.bitwise_or.reduce(counts.astype(np.uint8).reshape(-1, per) << shifts, axis=1)
    return bytes(packed.astype(np.uint8).tobytes())


def _rebuild(file: Node, header: Header, windows: list[int]) -> None:
    """Makes a new refcount table and blocks behind everything that is in use, the old ones included, and then
    points the header at them."""
    g = header.geometry
    per_block, per_table = 1 << g.block_bits, 1 << (g.cluster_bits - 3)
    counted: dict[int, NDArray[np.uint16]] = {}  # block number -> its counts
    end = 1
    for scan in _scans(file, header, windows, structures=False):
        used = np.flatnonzero(scan.references)
        if not len(used):
            continue
        end = max(end, scan.low + int(used[-1]) + 1)
        for block in np.unique((used + scan.low) >> g.block_bits).tolist():
            part = np.zeros(per_block, np.uint16)
            have = scan.references[(block << g.block_bits) - scan.low :][:per_block]
            part[: len(have)] = have
            counted[block] = part
    start = max(end, _end_of_structures(file, header))
    blocks, clusters = len(counted), 1
    while True:  # the new structures count themselves as well
        new = range(start >> g.block_bits, ((start + blocks + clusters - 1) >> g.block_bits) + 1)
        wanted = sorted({*counted, *new})
        needed = -(-(wanted[-1] + 1) // per_table)
        if len(wanted) == blocks and needed == clusters:
            break
        blocks, clusters = len(wanted), max(needed, clusters)
        if clusters << g.cluster_bits > MAX_REFTABLE_BYTES:
            raise LimitExceeded(f"{file.filename}: refcounts for all its clusters do not fit into a refcount table")
    for host in range(start, start + blocks + clusters):
        counted.setdefault(host >> g.block_bits, np.zeros(per_block, np.uint16))[host & (per_block - 1)] = 1
    table = np.zeros(clusters * per_table, ">u8")
    for i, block in enumerate(wanted):
        place = (start + i) << g.cluster_bits
        file.pwrite(place, encode_counts(counted[block], header.refcount_order))
        table[block] = place
    place = (start + blocks) << g.cluster_bits
    file.pwrite(place, table.tobytes())
    file.flush()
    file.pwrite(AT_REFTABLE, struct.pack(">QI", place, clusters))
    file.flush()
    header.refcount_table_offset, header.refcount_table_clusters = place, clusters


def _end_of_structures(file: Node, header: Header) -> int:
    """One more than the last cluster of the present refcount structures: until the header names others, these are
    all there is, however damaged."""
    g = header.geometry
    count = header.refcount_table_clusters << (g.cluster_bits - 3)
    end = (header.refcount_table_offset >> g.cluster_bits) + header.refcount_table_clusters
    for entry in read_table(file, "refcount_table_offset", header.refcount_table_offset, count):
        offset = entry & REFTABLE_OFFSET_MASK
        if offset < file.size:
            end = max(end, (offset >> g.cluster_bits) + 1)
    return end


# -- L1 and L2 entries ---------------------------------------------------------------------------------


def _mend_entries(file: Node, header: Header, windows: list[int]) -> None:
    """Sets copied flags by the refcounts, and makes zero clusters with an impossible place plain ones. Flags are
    only touched when refcounts are right now: what they allow is overwriting."""
    g = header.geometry
    table = read_table(file, "l1_table_offset", header.l1_table_offset, header.l1_size)
    for number, scan in zip(windows, _scans(file, header, windows, structures=True), strict=True):
        trusted = not bool((scan.refcounts < scan.references).any())
        flags = _Flags(scan, trusted)
        l1 = np.frombuffer(table, np.uint64).copy()
        new_l1 = flags.corrected(l1, l1 & np.uint64(OFFSET_MASK) != 0)
        places = np.unique((l1 & np.uint64(OFFSET_MASK)).astype(np.int64))
        places = places[(places > 0) & (places < file.size) & (places & g.cluster_mask == 0)]
        per_batch = max(1, (4 << 20) >> g.cluster_bits)
        for at in range(0, len(places), per_batch):
            _mend_tables(file, scan, flags, places[at : at + per_batch], zeros=number == windows[0])
        if not np.array_equal(new_l1, l1):
            file.flush()
            file.pwrite(header.l1_table_offset, new_l1.astype(">u8").tobytes())
            table[:] = type(table)("Q", new_l1.tobytes())
    file.flush()


class _Flags:
    """What copied flags have to be, for hosts of one window."""

    def __init__(self, scan: Scan, trusted: bool) -> None:
        self._scan, self._trusted = scan, trusted

    def corrected(self, entries: NDArray[np.uint64], standard: NDArray[np.bool_]) -> NDArray[np.uint64]:
        """``entries`` with the flag right where ``standard`` is true and the place is in the window."""
        scan = self._scan
        places = (entries & np.uint64(OFFSET_MASK)).astype(np.int64)
        hosts = places >> scan.g.cluster_bits
        mended = entries.copy()
        inside = standard & (hosts >= scan.low) & (hosts < scan.high) & (places & scan.g.cluster_mask == 0)
        single = np.zeros(len(entries), np.bool_)
        single[inside] = scan.refcounts[hosts[inside] - scan.low] == 1
        # Taking the flag away is always safe; giving it is not while refcounts may be too low.
        nowhere = standard & ((hosts > scan.last) | (places & scan.g.cluster_mask != 0))
        mended[(inside & ~single) | nowhere] &= np.uint64(~COPIED & (1 << 64) - 1)
        if self._trusted:
            mended[inside & single] |= np.uint64(COPIED)
        return mended


def _mend_tables(file: Node, scan: Scan, flags: _Flags, places: NDArray[np.int64], *, zeros: bool) -> None:
    tables = scan.read_tables(places)
    for place, entries in zip(places.tolist(), tables, strict=True):
        compressed = entries & np.uint64(COMPRESSED) != 0
        standard = ~compressed & (entries & np.uint64(OFFSET_MASK) != 0)
        mended = flags.corrected(entries, standard)
        if zeros:
            mended[compressed] &= np.uint64(~COPIED & (1 << 64) - 1)
            astray = entries & np.uint64(OFFSET_MASK & scan.g.cluster_mask) != 0
            plain = standard & astray & (entries & np.uint64(ZERO) != 0)
            mended[plain] = ZERO
        if not np.array_equal(mended, entries):
            if sys.byteorder == "little":
                mended = mended.byteswap()
            file.pwrite(place, mended.tobytes())
