"""vhdx: making the disk larger.

The entries of new blocks say zeros. They are behind the table's old end, so they can be written before anything else;
then the disk's new size, and the place of a longer table where the old one has no room, change in one entry of the log.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from diskwright.core.tables import Piece
from diskwright.errors import LimitExceeded, OptionError, UnsupportedFeature
from diskwright.extents import windows
from diskwright.formats.vhdx.create import ZERO_STATE, table_entries
from diskwright.formats.vhdx.header import METADATA_REGION, TABLE_PLACES, Region, encode_regions
from diskwright.formats.vhdx.metadata import MAX_SIZE, VIRTUAL_DISK_SIZE, Disk
from diskwright.units import MiB, align_up

if TYPE_CHECKING:
    from diskwright.formats.vhdx.driver import Vhdx

_STEP: Final = 1 << 20
"""Bytes of a table worked on at a time."""


def grow(image: Vhdx, size: int, conceal: Callable[[], None] | None) -> None:
    """Makes the disk ``size`` bytes large, durably. Raises OptionError, LimitExceeded, UnsupportedFeature, OSError."""
    about = image.about
    if size < image.size:
        raise UnsupportedFeature("VHDX images cannot be made smaller")
    if size > MAX_SIZE:
        raise LimitExceeded("Image size too large; max of 64TB")
    if size % about.logical_sector:
        raise OptionError(f"The size of this image must be a multiple of {about.logical_sector} bytes")
    image.survey()
    image.write_back()
    old_about, old_bat = about, image.bat
    new = replace(about, size=size)
    _clear_rest(image, old_about.size, min(size, old_about.blocks * about.block_size))
    moved = 8 * table_entries(new) > old_bat.length
    if moved:
        _copy_table(
            image, Region(image.take(align_up(8 * table_entries(new), MiB)), align_up(8 * table_entries(new), MiB))
        )
    _fill(image, old_about.blocks, new.blocks)
    _end_table(image, old_about, new)
    image.about, image.size = new, size
    image.table.clear()
    image.grown()
    try:
        if conceal is not None:
            conceal()
        image.write_back()
        _commit(image, moved)
    except BaseException:
        image.about, image.size, image.bat = old_about, old_about.size, old_bat
        image.table.clear()
        raise


def _clear_rest(image: Vhdx, offset: int, end: int) -> None:
    """What the last block has behind the disk's old end may be anything; it becomes part of the disk."""
    if offset < end:
        block = offset // image.cluster_size
        place = image.data_place(block)
        if place >= 0:
            image.file.write_zeros(place + offset % image.cluster_size, end - offset)


def _copy_table(image: Vhdx, bat: Region) -> None:
    """Writes the table to a new region as well, which nothing names yet."""
    image.file.resize(max(image.file.size, bat.end))
    for at, length in windows(0, image.bat.length, _STEP):
        image.file.writev([(bat.offset + at, memoryview(image.file.pread(image.bat.offset + at, length)))])
    image.file.write_zeros(bat.offset + image.bat.length, bat.length - image.bat.length)
    image.bat = bat


def _fill(image: Vhdx, first: int, end: int) -> None:
    """Entries of new blocks; those between, of the sector bitmap, stay as they are or are not there."""
    import numpy as np

    ratio = image.about.chunk_ratio
    for at, count in windows(first, end - first, _STEP // 8):
        blocks = np.arange(at, at + count, dtype=np.int64)
        index = blocks + blocks // ratio
        entries = np.zeros(int(index[-1] - index[0]) + 1, "<u8")
        entries[index - index[0]] = ZERO_STATE
        for chunk, entry in image.bitmap_entries(at // ratio, (at + count - 1) // ratio):
            entries[(chunk + 1) * ratio + chunk - int(index[0])] = entry
        image.file.writev([(image.bat.offset + 8 * int(index[0]), memoryview(entries.tobytes()))])


def _end_table(image: Vhdx, old: Disk, new: Disk) -> None:
    """A differencing image's table ends with the entry of a block of the sector bitmap: a new last one."""
    ratio = new.chunk_ratio
    last = -(-new.blocks // ratio) - 1
    if new.has_parent and last >= -(-old.blocks // ratio):
        image.file.writev([(image.bat.offset + 8 * ((last + 1) * ratio + last), memoryview(bytes(8)))])


def _commit(image: Vhdx, moved: bool) -> None:
    """The new size, and where the table lies, at once."""
    assert image.about.places is not None
    pieces: list[Piece] = [(image.about.places[VIRTUAL_DISK_SIZE][0], memoryview(struct.pack("<Q", image.size)))]
    if moved:
        table = encode_regions(image.bat, image.regions[METADATA_REGION])
        pieces += [(place, memoryview(table)) for place in TABLE_PLACES]
    with image.flush_lock:
        flushed = image.flushable_size()
        image.file.flush()
        image.put_pieces(pieces, flushed)
