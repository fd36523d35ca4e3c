"""Growing a VDI image.

The table stands before the blocks. Where a longer one has no room there, the first blocks move behind the last, as any
block would that is written anew; then the longer table is written where they were, and the header, which is one sector,
changes from the old one to the new one at once. So whenever a crash comes the file holds the old disk or the new one.
"""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from diskwright.errors import LimitExceeded
from diskwright.extents import windows
from diskwright.formats.vdi.header import AT_ALLOCATED, DISCARDED, MAX_BLOCKS, Header
from diskwright.units import SECTOR, align_up

if TYPE_CHECKING:
    from diskwright.formats.vdi.driver import Vdi

_STEP: Final = 1 << 20
"""Table entries worked on at a time."""
_PIECE: Final = 1 << 20
"""Bytes of a block copied at a time."""


def grown(image: Vdi, size: int) -> Header:
    """Makes the image ``size`` bytes large, durably; returns the header it has then. All that was cached has been
    written. Raises LimitExceeded, OSError."""
    header = image.header
    block = header.block_size
    blocks = -(-size // block)
    if blocks > MAX_BLOCKS:
        raise LimitExceeded(f"{image.path}: would have {blocks} blocks; at most {MAX_BLOCKS} are possible")
    blocks = max(blocks, header.blocks_in_image)  # an image may have more than it needs
    new = replace(header, disk_size=align_up(size, SECTOR), blocks_in_image=blocks)
    if header.offset_bmap + 4 * blocks <= header.offset_data:
        _fill(image, header.offset_bmap, header.blocks_in_image, blocks)
    else:
        moved = -(-4 * blocks // block)
        end = _make_room(image, moved)
        new.offset_bmap, new.offset_data = header.offset_data, header.offset_data + moved * block
        new.blocks_allocated = max(0, end - moved)
        _write_table(image, new, moved)
    image.file.flush()
    image.file.writev([(0, memoryview(new.encode()))])
    image.file.flush()
    return new


def _make_room(image: Vdi, count: int) -> int:
    """Moves the blocks in the first ``count`` places behind all others, durably; returns behind which place the last
    one lies then."""
    file, header, stride = image.file, image.header, image.stride
    first = [
        (block, place)
        for blocks, places in image.used_places()
        for block, place in zip(blocks.tolist(), places.tolist(), strict=True)
        if place < image.first_place + count * stride
    ]
    end = start = max(header.blocks_allocated, count)
    entries = []
    for block, place in first:
        for offset, length in windows(0, stride, _PIECE):
            data = file.pread(place + offset, length)
            file.writev([(image.first_place + end * stride + offset, memoryview(data))])
        entries.append((header.offset_bmap + 4 * block, memoryview(struct.pack("<I", end))))
        end += 1
    if end == start:
        return header.blocks_allocated
    file.writev([(AT_ALLOCATED, memoryview(struct.pack("<I", min(end, header.blocks_in_image))))])
    file.flush()
    file.writev(entries)
    file.flush()
    image.table.clear()
    return end


def _write_table(image: Vdi, new: Header, moved: int) -> None:
    """Writes the longer table to its place, in which nobody looks yet."""
    old = image.header.blocks_in_image
    for first in range(0, old, _STEP):
        entries = image.entries(first, min(_STEP, old - first))
        assert entries is not None
        entries[entries < DISCARDED] -= moved
        image.file.writev([(new.offset_bmap + 4 * first, memoryview(entries.astype("<u4").tobytes()))])
    _fill(image, new.offset_bmap, old, new.blocks_in_image)


def _fill(image: Vdi, table: int, first: int, end: int) -> None:
    """Entries of blocks that are not there."""
    for at, count in windows(first, end - first, _STEP):
        image.file.writev([(table + 4 * at, memoryview(b"\xff" * (4 * count)))])
