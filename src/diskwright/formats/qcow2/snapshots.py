"""The table of internal snapshots, as far as its places are concerned (section Snapshots)."""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from diskwright.core.node import Node
from diskwright.errors import LimitExceeded
from diskwright.formats.qcow2.header import Header
from diskwright.formats.qcow2.layout import MAX_SNAPSHOT_TABLE_BYTES

_FIXED: Final = struct.Struct(">QIHHIIQII")


class Snapshot(NamedTuple):
    """``l1_table_offset`` and ``extra_data_size`` in bytes, ``l1_size`` in entries; nothing is checked yet."""

    l1_table_offset: int
    l1_size: int
    extra_data_size: int


def read_snapshots(file: Node, header: Header) -> tuple[list[Snapshot], int]:
    """The snapshots and the length of their table in bytes.

    Raises LimitExceeded when the table is longer than ``MAX_SNAPSHOT_TABLE_BYTES``.
    """
    found: list[Snapshot] = []
    start = at = header.snapshots_offset
    for _ in range(header.nb_snapshots):
        offset, size, id_length, name_length, *_, extra_length = _FIXED.unpack(file.pread(at, _FIXED.size))
        found.append(Snapshot(offset, size, extra_length))
        length = _FIXED.size + extra_length + id_length + name_length
        at += length + (-length % 8)
        if at - start > MAX_SNAPSHOT_TABLE_BYTES:
            raise LimitExceeded(
                f"{file.filename}: the snapshot table is longer than the {MAX_SNAPSHOT_TABLE_BYTES} bytes accepted"
            )
    return found, at - start
