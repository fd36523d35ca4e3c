"""Mending an image: refcounts, the structures that hold them, and copied flags.

Done on the file, with nothing cached. The order is that of a checkpoint: refcounts are made right and durable before
anything relies on them, and new refcount structures are durable before the header names them. A crash leaves an image
that can be mended again.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

import numpy as np

from diskwright.core.driver import CheckReport
from diskwright.errors import LimitExceeded
from diskwright.formats.qcow2 import references
from diskwright.formats.qcow2.check import inspect
from diskwright.formats.qcow2.header import (
    AT_AUTOCLEAR,
    AT_INCOMPATIBLE,
    AT_REFTABLE,
    BITMAPS,
    CORRUPT,
    DIRTY,
    RAW_DATA_FILE,
    Header,
    read_header,
)
from diskwright.formats.qcow2.layout import MAX_REFTABLE_BYTES, REFTABLE_OFFSET_MASK
from diskwright.formats.qcow2.repair_extras import mend_bitmaps, mend_snapshot_table
from diskwright.formats.qcow2.repair_tables import mend_entries, move_apart, scans
from diskwright.formats.qcow2.scan import Scan, nearby, read_padded

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from diskwright.core.node import Node


def mend(file: Node, repair: str) -> CheckReport:
    """Checks and repairs. ``repair`` leaks lowers refcounts that are too high; all mends everything that can be.

    The report tells what was fixed and what is left. Raises OSError, LimitExceeded.
    """
    header = read_header(file)
    found = inspect(file, header)
    before = found.report
    if not before.leaks and not before.corruptions:
        if repair == "all" and not before.check_errors:
            _mark_consistent(file, header)
        return before
    _clear_unknown_autoclear(file, header)
    if repair == "all" and before.corruptions and mend_bitmaps(file, header):
        found = inspect(file, header)
    if repair == "all" and (found.rebuild or found.beyond):
        _rebuild(file, header, found.windows)
    else:
        _adjust(file, header, found.windows, raising=repair == "all")
    if repair == "all" and before.corruptions:
        mend_snapshot_table(file, header)
        if move_apart(file, header, found.windows):
            # What has been given up is counted too high; and it is the refcounts that flags go by.
            found = inspect(file, header)
        _adjust(file, header, found.windows, raising=False)
        mend_entries(file, header, found.windows)
    found = inspect(file, header)
    if found.report.leaks and repair == "all":  # of what has been moved
        _adjust(file, header, found.windows, raising=False)
        found = inspect(file, header)
    after = found.report
    after.leaks_fixed = max(0, before.leaks - after.leaks)
    after.corruptions_fixed = max(0, before.corruptions - after.corruptions)
    after.messages = [f"Repairing: {message}" for message in before.messages] + after.messages
    if repair == "all" and not after.corruptions and not after.check_errors:
        _mark_consistent(file, header)
    return after


def _clear_unknown_autoclear(file: Node, header: Header) -> None:
    """Whoever writes without knowing what a bit stands for has to clear it first. A repair changes nothing that a
    guest reads, so that what bitmaps say stays true."""
    kept = header.autoclear_features & (BITMAPS | RAW_DATA_FILE)
    if kept != header.autoclear_features:
        file.pwrite(AT_AUTOCLEAR, struct.pack(">Q", kept))
        file.flush()
        header.autoclear_features = kept


def _mark_consistent(file: Node, header: Header) -> None:
    features = header.incompatible_features & ~(DIRTY | CORRUPT)
    if features != header.incompatible_features:
        file.flush()
        file.pwrite(AT_INCOMPATIBLE, struct.pack(">Q", features))
        file.flush()
        header.incompatible_features = features


# -- refcounts -----------------------------------------------------------------------------------------


def _adjust(file: Node, header: Header, windows: list[int], *, raising: bool) -> None:
    """Corrects refcounts in the blocks there are: those too high, and with ``raising`` also those too low. A block
    whose cluster is something else as well is left alone: writing to it would damage that."""
    trusted = _trusted_blocks(file, header, windows) if len(windows) > 1 else None
    for scan in scans(file, header, windows):
        _adjust_window(file, header, scan, _sole_blocks(scan) if trusted is None else trusted, raising)
    file.flush()


def _trusted_blocks(file: Node, header: Header, windows: list[int]) -> set[int]:
    trusted: set[int] = set()
    for scan in scans(file, header, windows):
        trusted |= _sole_blocks(scan)
    return trusted


def _sole_blocks(scan: Scan) -> set[int]:
    """Host clusters in the window that are one refcount block and nothing else."""
    hosts = [(entry & REFTABLE_OFFSET_MASK) >> scan.g.cluster_bits for entry in scan.table if entry]
    return {host for host in hosts if scan.low <= host < scan.high and scan.references[host - scan.low] == 1}


def _adjust_window(file: Node, header: Header, scan: Scan, trusted: set[int], raising: bool) -> None:
    g = scan.g
    for block, entry in scan.blocks():
        offset = entry & REFTABLE_OFFSET_MASK
        if offset & g.cluster_mask or offset >= file.size or offset >> g.cluster_bits not in trusted:
            continue
        first = block << g.block_bits
        # What lies behind the end of the file is not counted as referred to; it may be all the same.
        start, stop = max(first, scan.low), min(first + (1 << g.block_bits), scan.high, scan.last)
        if start >= stop:
            continue
        part = slice(start - scan.low, stop - scan.low)
        counted, found = scan.refcounts[part], scan.references[part]
        wrong = counted > found
        if raising:
            wrong |= (counted < found) & (counted > 0)
        if wrong.any():
            counts = _wide_counts(file, header, offset)
            counts[start - first : stop - first][wrong] = found[wrong]
            file.pwrite(offset, encode_counts(counts, header.refcount_order))


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
    per_table = 1 << (g.cluster_bits - 3)
    used: set[int] = set()  # numbers of blocks with something in them
    end = 1
    astray = nearby(file, header)
    """Clusters behind the end of the file that are referred to. They are counted, so that nobody else gets them: what
    is read there would then be another's."""
    for scan in scans(file, header, windows, structures=False, beyond=astray):
        top = _count_used(scan, used)
        end = max(end, top)
    behind = np.flatnonzero(astray)
    last = g.clusters(file.size)
    if len(behind):
        used |= set(np.unique((behind + last) >> g.block_bits).tolist())
        end = max(end, last + int(behind[-1]) + 1)
    start = max(end, _end_of_structures(file, header))
    blocks, clusters = len(used), 1
    while True:  # the new structures count themselves as well
        new = range(start >> g.block_bits, ((start + blocks + clusters - 1) >> g.block_bits) + 1)
        wanted = sorted({*used, *new})
        needed = -(-(wanted[-1] + 1) // per_table)
        if len(wanted) == blocks and needed == clusters:
            break
        blocks, clusters = len(wanted), max(needed, clusters)
        if clusters << g.cluster_bits > MAX_REFTABLE_BYTES:
            raise LimitExceeded(f"{file.filename}: refcounts for all its clusters do not fit into a refcount table")
    own = range(start, start + blocks + clusters)
    place_of = {block: (start + i) << g.cluster_bits for i, block in enumerate(wanted)}
    left = set(wanted)
    for scan in scans(file, header, windows, structures=False):
        stop = scan.low + references.WINDOW
        for block in sorted(block for block in left if scan.low <= block << g.block_bits < stop):
            left.discard(block)
            first = (block << g.block_bits) - scan.low
            _write_block(file, header, place_of[block], block, own, scan.references[first:], astray, last)
    for block in left:
        _write_block(file, header, place_of[block], block, own, np.zeros(0, np.uint16), astray, last)
    table = np.zeros(clusters * per_table, ">u8")
    for block, place in place_of.items():
        table[block] = place
    place = (start + blocks) << g.cluster_bits
    file.pwrite(place, table.tobytes())
    file.flush()
    file.pwrite(AT_REFTABLE, struct.pack(">QI", place, clusters))
    file.flush()
    header.refcount_table_offset, header.refcount_table_clusters = place, clusters


def _count_used(scan: Scan, used: set[int]) -> int:
    """Adds the blocks a window's references need to ``used``; returns one more than the last cluster referred to."""
    top, per_block = 0, 1 << scan.g.block_bits
    for at in range(0, len(scan.references), per_block):
        inside = np.flatnonzero(scan.references[at : at + per_block])
        if len(inside):
            used.add((scan.low + at) >> scan.g.block_bits)
            top = scan.low + at + int(inside[-1]) + 1
    return top


def _write_block(
    file: Node,
    header: Header,
    place: int,
    block: int,
    own: range,
    references: NDArray[np.uint16],
    astray: NDArray[np.int64],
    last: int,
) -> None:
    """Writes refcount block ``block`` to ``place``: its ``references``, the clusters astray, which begin with ``last``,
    and the ``own`` ones of the structures being made."""
    g = header.geometry
    first, per_block = block << g.block_bits, 1 << g.block_bits
    counts = np.zeros(per_block, np.int64)
    have = references[:per_block]
    counts[: len(have)] = have
    low, high = max(first, last), min(first + per_block, last + len(astray))
    if low < high:
        counts[low - first : high - first] += astray[low - last : high - last]
    counts[max(0, own.start - first) : max(0, own.stop - first)] = 1
    np.minimum(counts, min((1 << (1 << g.refcount_order)) - 1, 0xFFFF), out=counts)
    file.pwrite(place, encode_counts(counts.astype(np.uint16), g.refcount_order))


def _end_of_structures(file: Node, header: Header) -> int:
    """One more than the last cluster of the present refcount structures: until the header names others, these are
    all there is, however damaged."""
    g = header.geometry
    count = header.refcount_table_clusters << (g.cluster_bits - 3)
    end = 0
    if header.refcount_table_offset < file.size:
        end = (header.refcount_table_offset >> g.cluster_bits) + header.refcount_table_clusters
    for entry in read_padded(file, header.refcount_table_offset, count):
        offset = entry & REFTABLE_OFFSET_MASK
        if offset < file.size:
            end = max(end, (offset >> g.cluster_bits) + 1)
    return end
