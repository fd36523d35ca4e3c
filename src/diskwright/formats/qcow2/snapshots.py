"""The table of internal snapshots, and what a snapshot says of itself (section Snapshots)."""

from __future__ import annotations

import os
import struct
from dataclasses import replace
from typing import TYPE_CHECKING, Final, NamedTuple

from diskwright.errors import CorruptImage, LimitExceeded
from diskwright.formats.qcow2.layout import MAX_L1_BYTES, MAX_SNAPSHOT_TABLE_BYTES
from diskwright.units import MAX_DISK_SIZE

if TYPE_CHECKING:
    from diskwright.core.node import Node
    from diskwright.core.snapshots import SnapshotInfo
    from diskwright.formats.qcow2.header import Header

_FIXED: Final = struct.Struct(">QIHHIIQII")
_EXTRA: Final = struct.Struct(">QQQ")  # 64-bit size of the VM state, disk size, icount

_PIECE: Final = 1 << 16
"""Bytes of the table read together."""

_NO_ICOUNT: Final = (1 << 64) - 1

MAX_NAME: Final = 255
"""Longest name in bytes that is given to a snapshot: QEMU knows none longer."""

MAX_EXTRA: Final = 1024
"""Most bytes of extra data of a snapshot that is worked with; QEMU opens no image with more."""


class Snapshot(NamedTuple):
    """An entry of the table. ``l1_table_offset`` and sizes in bytes, ``l1_size`` in entries; nothing is checked yet."""

    l1_table_offset: int
    l1_size: int
    extra_data_size: int
    raw: bytes
    """The whole entry as it is in the file, with its padding and whatever extra data it has."""

    def info(self, header: Header) -> SnapshotInfo:
        """What it says of itself. The disk's size is that of now when the entry is too old to tell."""
        from diskwright.core.snapshots import SnapshotInfo

        _, _, id_length, name_length, sec, nsec, clock, state, extra = _FIXED.unpack_from(self.raw)
        start = _FIXED.size + extra
        more = self.raw[_FIXED.size : start]
        icount, size = _NO_ICOUNT, header.size
        if len(more) >= 8:
            state = int.from_bytes(more[:8], "big")
        if len(more) >= 16:
            size = int.from_bytes(more[8:16], "big")
        if len(more) >= 24:
            icount = int.from_bytes(more[16:24], "big")
        return SnapshotInfo(
            os.fsdecode(self.raw[start : start + id_length]),
            os.fsdecode(self.raw[start + id_length : start + id_length + name_length]),
            sec,
            nsec,
            clock,
            state,
            None if icount == _NO_ICOUNT else icount,
            size,
        )


def entry(info: SnapshotInfo, l1_table_offset: int, l1_size: int) -> Snapshot:
    """A new entry of the table."""
    id, name = os.fsencode(info.id), os.fsencode(info.name)
    # The old field has no room for a large state; whoever reads only that one must not take a part for the whole.
    old_size = info.vm_state_size if info.vm_state_size < 1 << 32 else 0
    fixed = _FIXED.pack(
        l1_table_offset, l1_size, len(id), len(name), info.date_sec & 0xFFFF_FFFF, info.date_nsec,
        info.vm_clock_nsec, old_size, _EXTRA.size,
    )  # fmt: skip
    extra = _EXTRA.pack(info.vm_state_size, info.disk_size, _NO_ICOUNT if info.icount is None else info.icount)
    raw = fixed + extra + id + name
    return Snapshot(l1_table_offset, l1_size, _EXTRA.size, raw + bytes(-len(raw) % 8))


def read_snapshots(file: Node, header: Header) -> tuple[list[Snapshot], int]:
    """The snapshots and the length of their table in bytes; what lies beyond the end of the file reads as zeros.

    Raises LimitExceeded when the table is longer than ``MAX_SNAPSHOT_TABLE_BYTES``.
    """
    found: list[Snapshot] = []
    start = at = header.snapshots_offset
    window, begin = b"", start
    for _ in range(header.nb_snapshots):
        if at + _FIXED.size > begin + len(window):
            window, begin = file.pread(at, _PIECE), at
        offset, size, id_length, name_length, *_, extra = _FIXED.unpack_from(window, at - begin)
        length = _FIXED.size + extra + id_length + name_length
        length += -length % 8
        if at + length - start > MAX_SNAPSHOT_TABLE_BYTES:
            raise LimitExceeded(
                f"{file.filename}: the snapshot table is longer than the {MAX_SNAPSHOT_TABLE_BYTES} bytes accepted"
            )
        if at + length > begin + len(window):
            window, begin = file.pread(at, max(length, _PIECE)), at
        found.append(Snapshot(offset, size, extra, window[at - begin : at - begin + length]))
        at += length
    return found, at - start


def load_snapshots(file: Node, header: Header) -> list[Snapshot]:
    """The snapshots, as something that is to be shown or worked with. Raises CorruptImage, LimitExceeded."""
    found, length = read_snapshots(file, header)
    start = header.snapshots_offset
    if length and start + length - file.size >= 8:  # padding of the last entry may be missing
        raise CorruptImage(
            file.filename, "snapshots_offset", f"{start:#x}", 64,
            f"a table of {length} bytes there reaches beyond the end of the file ({file.size} bytes)",
        )  # fmt: skip
    for number, snapshot in enumerate(found):
        if snapshot.extra_data_size > MAX_EXTRA:
            raise LimitExceeded(
                f"{file.filename}: snapshot {number} has {snapshot.extra_data_size} bytes of extra data; "
                f"at most {MAX_EXTRA} are accepted"
            )
    return found


def view(file: Node, header: Header, snapshot: Snapshot) -> Header:
    """The header of an image whose active state is ``snapshot``. Raises CorruptImage, LimitExceeded."""
    info = snapshot.info(header)
    path = file.filename
    what = f"snapshot {info.id!r}"
    if snapshot.l1_size * 8 > MAX_L1_BYTES:
        raise LimitExceeded(
            f"{path}: the L1 table of {what} has {snapshot.l1_size} entries; at most {MAX_L1_BYTES // 8} are accepted"
        )
    place = snapshot.l1_table_offset
    if snapshot.l1_size and (place & ((1 << header.cluster_bits) - 1) or not 0 < place < 1 << 63):
        raise CorruptImage(path, f"L1 table offset of {what}", f"{place:#x}", None, "not a possible place")
    if info.disk_size > MAX_DISK_SIZE:
        raise CorruptImage(path, f"disk size of {what}", info.disk_size, None, f"at most {MAX_DISK_SIZE} are possible")
    if header.geometry.l1_entries(info.disk_size) * 8 > MAX_L1_BYTES:
        raise LimitExceeded(f"{path}: the disk of {what} has {info.disk_size} bytes, too many for its cluster size")
    return replace(header, l1_table_offset=place, l1_size=snapshot.l1_size, size=info.disk_size)
