"""Mending what hangs beside the guest's disk: the snapshot table and persistent bitmaps."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

import numpy as np

from diskwright.formats.qcow2.bitmap_check import IN_USE, Stored, examine
from diskwright.formats.qcow2.header import AT_AUTOCLEAR, BITMAPS, Header
from diskwright.formats.qcow2.layout import OFFSET_MASK
from diskwright.formats.qcow2.repair_tables import take_clusters
from diskwright.formats.qcow2.scan import read_padded
from diskwright.formats.qcow2.scan_extras import impossible

if TYPE_CHECKING:
    from diskwright.core.node import Node

_AT_SNAPSHOTS: Final = 60
_SNAPSHOT: Final = struct.Struct(">QIHHIIQII")
_LEAST_EXTRA: Final = 16
"""Version 3 wants the size of the VM state and of the disk behind each entry."""
_AT_BITMAP_FLAGS: Final = 12
_BATCH: Final = 1 << 18


# -- bitmaps -------------------------------------------------------------------------------------------


def mend_bitmaps(file: Node, header: Header) -> bool:
    """A bitmap whose table contradicts the specification is marked as not to be relied on, and loses the entries in
    question. When the directory itself is wrong all bitmaps are void: the header then says so, and what they
    occupied is leaked. Whoever used them has to begin with a full copy, which is always right.

    Returns whether anything was changed.
    """
    directory = examine(file, header)
    if directory is None:
        return False
    if directory.wrong or any(stored.wrong for stored in directory.bitmaps) or directory.offset >= file.size:
        header.autoclear_features &= ~BITMAPS
        file.pwrite(AT_AUTOCLEAR, struct.pack(">Q", header.autoclear_features))
        file.flush()
        return True
    return sum(_mend_bitmap(file, header, stored) for stored in directory.bitmaps) > 0


def _mend_bitmap(file: Node, header: Header, stored: Stored) -> bool:
    changed = False
    for at in range(0, stored.bitmap_table_size, _BATCH):
        count, place = min(_BATCH, stored.bitmap_table_size - at), stored.bitmap_table_offset + at * 8
        entries = np.frombuffer(read_padded(file, place, count), np.uint64)
        bad = impossible(entries, (1 << header.cluster_bits) - 1)
        bad |= (entries & np.uint64(OFFSET_MASK)) >= np.uint64(file.size)
        if not bad.any():
            continue
        if not changed:
            file.pwrite(stored.place + _AT_BITMAP_FLAGS, struct.pack(">I", stored.flags | IN_USE))
            file.flush()
            changed = True
        for index in np.flatnonzero(bad).tolist():
            file.pwrite(place + index * 8, bytes(8))
    file.flush()
    return changed


# -- snapshots -----------------------------------------------------------------------------------------


def mend_snapshot_table(file: Node, header: Header) -> None:
    """Gives every entry the extra data that version 3 wants, in a new table that the header then names: the VM state
    has the size it had, and the disk the one it has now. Refcounts are right before."""
    if header.version < 3 or not header.nb_snapshots:
        return
    table, changed = _complete(file, header)
    if not changed:
        return
    place = take_clusters(file, header, header.geometry.clusters(len(table)))
    if place is None:
        return
    file.pwrite(place, table)
    file.flush()
    file.pwrite(_AT_SNAPSHOTS, struct.pack(">IQ", header.nb_snapshots, place))
    file.flush()
    header.snapshots_offset = place


def _complete(file: Node, header: Header) -> tuple[bytes, bool]:
    """The snapshot table with complete entries, and whether any was not. ``read_snapshots`` has bounded its length."""
    table, changed, at = bytearray(), False, header.snapshots_offset
    for _ in range(header.nb_snapshots):
        fixed = list(_SNAPSHOT.unpack(file.pread(at, _SNAPSHOT.size)))
        id_size, name_size, vm_state_size, extra_size = fixed[2], fixed[3], fixed[7], fixed[8]
        length = _SNAPSHOT.size + extra_size + id_size + name_size
        rest = file.pread(at + _SNAPSHOT.size, extra_size + id_size + name_size)
        extra = rest[:extra_size]
        if extra_size < _LEAST_EXTRA:
            changed = True
            whole = struct.pack(">QQ", vm_state_size, header.size)
            extra = (extra if extra_size >= 8 else b"") + whole[len(extra) if extra_size >= 8 else 0 :]
            extra = extra[:8] + whole[8:]
            fixed[8] = _LEAST_EXTRA
        table += _SNAPSHOT.pack(*fixed) + extra + rest[extra_size:]
        table += bytes(-len(table) % 8)
        at += length + -length % 8
    return bytes(table), changed
