"""The parts of a scan that concern internal snapshots and persistent bitmaps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from diskwright.errors import LimitExceeded
from diskwright.formats.qcow2.bitmap_check import Stored, examine
from diskwright.formats.qcow2.bitmaps import TABLE_RESERVED
from diskwright.formats.qcow2.layout import MAX_L1_BYTES, OFFSET_MASK
from diskwright.formats.qcow2.snapshots import read_snapshots
from diskwright.units import GiB

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from diskwright.formats.qcow2.scan import Scan

_BATCH: Final = 1 << 18
"""Table entries looked at together: 2 MiB of them."""

_MAX_ALL_L1: Final = GiB
"""L1 tables of all snapshots together: bounds the time a hostile table can cost. Enough for 600 snapshots of a disk of
100 TiB at 64 KiB clusters."""


def walk_snapshots(scan: Scan) -> None:
    """The snapshot table, and the L1 tables it names. Raises OSError, LimitExceeded."""
    header, g = scan.header, scan.g
    snapshots, length = read_snapshots(scan.file, header)
    total = 0
    for number, snapshot in enumerate(snapshots):
        if header.version >= 3 and snapshot.extra_data_size < 16:
            scan.corrupt(f"ERROR snapshot {number} lacks the extra data that version 3 asks for")
        offset, size = snapshot.l1_table_offset, snapshot.l1_size
        if offset & g.cluster_mask or offset >= 1 << 63 or size * 8 > MAX_L1_BYTES:
            scan.corrupt(f"ERROR snapshot {number} has an impossible L1 table, at {offset:#x}")
            continue
        total += size * 8
        if total > _MAX_ALL_L1:
            raise LimitExceeded(f"{scan.file.filename}: L1 tables of its snapshots take more than {_MAX_ALL_L1} bytes")
        scan.walk_l1(f"the L1 table of snapshot {number}", offset, size, active=False)
    scan.region("the snapshot table", header.snapshots_offset, length)


def walk_bitmaps(scan: Scan) -> None:
    """The bitmap directory, the tables it names, and what hangs from them. Raises OSError, LimitExceeded."""
    directory = examine(scan.file, scan.header)
    if directory is None:
        return
    for wrong in directory.wrong:
        scan.corrupt(f"ERROR {wrong}")
    scan.region("the bitmap directory", directory.offset, directory.size)
    for number, stored in enumerate(directory.bitmaps):
        for wrong in stored.wrong:
            scan.corrupt(f"ERROR bitmap {number}: {wrong}")
        if stored.readable:
            scan.region(f"the table of bitmap {number}", stored.bitmap_table_offset, stored.bitmap_table_size * 8)
            _walk_bitmap(scan, stored, number)


def _walk_bitmap(scan: Scan, stored: Stored, number: int) -> None:
    from diskwright.formats.qcow2.scan import read_padded

    for at in range(0, stored.bitmap_table_size, _BATCH):
        count = min(_BATCH, stored.bitmap_table_size - at)
        entries = np.frombuffer(read_padded(scan.file, stored.bitmap_table_offset + at * 8, count), np.uint64)
        entries = entries[entries != 0]
        if len(entries):
            bad = impossible(entries, scan.g.cluster_mask)
            what = f"entries in the table of bitmap {number}"
            scan.corrupt(f"ERROR impossible {what}", int(np.count_nonzero(bad)))
            places = (entries[~bad] & np.uint64(OFFSET_MASK)).view(np.int64)
            scan.count_places(places[places != 0], None, f"clusters that {what} name,")


def impossible(entries: NDArray[np.uint64], cluster_mask: int) -> NDArray[np.bool_]:
    """Which entries of a bitmap's table contradict the specification."""
    named = entries & np.uint64(OFFSET_MASK) != 0
    bad: NDArray[np.bool_] = entries & np.uint64(TABLE_RESERVED | cluster_mask & ~1) != 0
    bad |= named & (entries & np.uint64(1) != 0)
    return bad
