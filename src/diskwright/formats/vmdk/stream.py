"""vmdk: sparse extents with compressed grains, and writing them in one pass.

After "Virtual Disk Format 5.0", section "Stream-Optimized Compressed Sparse Extents". Each grain is a zlib stream
behind a marker that tells its sector and length. A file that was written in one pass begins with a header that does
not know where the grain directory is; a footer, a copy of the header at the end of the file, does.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, NoReturn

from diskwright.core.blockmap import NOWHERE, STORED, ZEROS
from diskwright.core.chunkmap import inflate
from diskwright.core.driver import Reservation
from diskwright.errors import CorruptImage, LimitExceeded, OptionError, UnsupportedFeature
from diskwright.extents import SPECIAL, Extent
from diskwright.formats.vmdk.header import (
    FOOTER_MARKER,
    GD_AT_END,
    GRAIN_MARKER,
    MARKERS,
    TABLE_ENTRIES,
    Header,
    marker,
)
from diskwright.formats.vmdk.sparse import Sparse
from diskwright.units import SECTOR, MiB, align_up

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from diskwright.core.node import Node

_TABLE: Final = TABLE_ENTRIES * 4
_GT, _GD = 1, 2  # types of markers, beside that of the footer
_MOST_GRAIN: Final = 16 * MiB
"""Bytes of a compressed grain's contents at most: it is decoded in one piece."""
_KEPT: Final = 16
"""Decoded grains kept, for readers that want less than one at a time."""
MAX_LEVEL: Final = 9
_LEVEL: Final = 3
_ISAL_LEVELS: Final = {1: 0, 2: 3, 3: 3}
"""zlib levels for which ISA-L is used, where it is installed, and what it calls them; as for qcow2."""

ONCE: Final = "streamOptimized grains are written once, from the beginning of the disk to its end"


class Compressed(Sparse):
    """An open extent with compressed grains, to be read."""

    compressed = True

    def __init__(self, file: Node, header: Header, size: int) -> None:
        """Raises LimitExceeded."""
        if header.grain_size * SECTOR > _MOST_GRAIN:
            raise LimitExceeded(f"{file.filename}: has compressed grains of {header.grain_size} sectors")
        super().__init__(file, header, size)
        self.marked = GRAIN_MARKER.size if header.flags & MARKERS else 0
        self._kept: dict[int, bytes] = {}
        self._kept_lock = threading.Lock()

    def place_of(self, entry: int) -> int:
        if entry == 0:
            return NOWHERE
        return ZEROS if entry == 1 and self._has_zeroed else STORED

    def places_of(self, entries: NDArray[Any]) -> NDArray[np.int64]:
        import numpy as np

        places = np.full(len(entries), STORED, np.int64)
        places[entries == 0] = NOWHERE
        if self._has_zeroed:
            places[entries == 1] = ZEROS
        return places

    def stored_unit(self, block: int, entry: int) -> tuple[int, int]:
        """Only the grain's marker tells how long it is, so this is as much as it may be, like QEMU two grains."""
        place, end = entry * SECTOR, self.file.size
        if place + self.marked >= end:
            self._bad(block, entry, f"the file ends at {end:#x}")
        return place, min(2 * self.cluster_size, end - place)

    def decode(self, extent: Extent, raw: memoryview, into: memoryview) -> None:
        block, inside = divmod(extent.offset, self.cluster_size)
        data = self._kept.get(block)
        if data is None:
            data = self._grain(block, extent.file_offset, raw)
            if len(into) < self.cluster_size:
                self._keep(block, data)
        if inside + len(into) > len(data):
            self._damaged(extent.file_offset, f"it decodes to {len(data)} bytes")
        into[:] = memoryview(data)[inside : inside + len(into)]

    def _grain(self, block: int, place: int, raw: memoryview) -> bytes:
        if self.marked:
            sector, length = GRAIN_MARKER.unpack_from(raw)
            if sector != block * self.header.grain_size:
                self._damaged(place, f"its marker says sector {sector}, not {block * self.header.grain_size}")
            if not 0 < length <= len(raw) - self.marked:
                self._damaged(place, f"its marker says {length} bytes")
            raw = raw[self.marked : self.marked + length]
        try:
            data = inflate(raw, self.cluster_size)
        except MemoryError:
            raise
        except Exception as error:  # each library has errors of its own
            self._damaged(place, f"it does not decode: {error}")
        if len(data) > self.cluster_size:
            self._damaged(place, "it decodes to more than a grain")
        return data

    def _damaged(self, place: int, why: str) -> NoReturn:
        raise CorruptImage(self.path, "compressed grain", "damaged", place, why)

    def _keep(self, block: int, data: bytes) -> None:
        with self._kept_lock:
            while len(self._kept) >= _KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[block] = data

    def in_place(self, offset: int, length: int) -> int:
        return -1

    def reserve(self, offset: int, length: int) -> NoReturn:
        raise UnsupportedFeature(f"{self.path}: {ONCE}, compressed")

    def discard(self, offset: int, length: int) -> None:
        return

    def make_empty(self) -> None:
        raise UnsupportedFeature(f"{self.path}: {ONCE}")


class Stream(Compressed):
    """An extent that is being written. Grains, and each table once nothing more can come into it, are appended; flush
    completes the file, and what is written then begins where that completion did."""

    only_compressed = True

    def __init__(self, file: Node, header: Header, size: int, level: int | None) -> None:
        """``level``: of the compression, 1 to 9. Raises OptionError; UnsupportedFeature when something is in it."""
        super().__init__(file, header, size)
        self._encode = encoder(level)
        if header.gd_offset == GD_AT_END or any(self.directory.entries) or self.redundant is not None:
            raise UnsupportedFeature(f"{file.filename}: {ONCE}; convert it into a new image instead")
        self._end = header.over_head * SECTOR  # where the next thing goes
        self._last = -1  # the block written last
        self._failed = False
        self._complete = True

    def encode(self, data: memoryview, offset: int) -> bytes:
        """See ``Format.encode``; whatever does not get smaller is stored in a zlib stream too."""
        packed = self._encode(data)
        return GRAIN_MARKER.pack(offset // SECTOR, len(packed)) + packed

    def reserve_stored(self, units: Sequence[tuple[int, int]]) -> Reservation:
        with self.lock:
            self._check_whole()
            index = units[0][0] // self.cluster_size // TABLE_ENTRIES
            if self._last >= 0 and index != self._last // TABLE_ENTRIES:
                self._end_table()
            placed, blocks = [], []
            for offset, length in units:
                block = offset // self.cluster_size
                if block // TABLE_ENTRIES != index:
                    break
                if block <= self._last:
                    raise UnsupportedFeature(f"{self.path}: {ONCE}")
                stored = align_up(length, SECTOR)
                self.entry_for(self._end + stored)
                placed.append(Extent(offset, self.cluster_size, SPECIAL, self._end, 0, stored))
                blocks.append(block)
                self._end += stored
                self._last = block
            if not self.directory.entries[index]:
                # In memory only, so that readers look for the table, which stays cached until it has its place.
                self.directory.entries[index] = self.entry_for(self._end)
                self.table.put(index)
            self._complete = False
            return _Grains(self, placed, blocks)

    def _check_whole(self) -> None:
        if self._failed:
            raise UnsupportedFeature(f"{self.path}: a write to it has failed, so it cannot be completed")

    def placed(self, blocks: Sequence[int], places: Sequence[int]) -> None:
        """Puts grains on the map."""
        with self.lock:
            items = self.own_slice(blocks[0] // TABLE_ENTRIES)
            for block, place in zip(blocks, places, strict=True):
                items[block % TABLE_ENTRIES] = place // SECTOR

    def fail(self) -> None:
        """A grain that was promised its place is not there."""
        self._failed = True

    def _table_bytes(self, index: int) -> bytes:
        items = array("I", self.own_slice(index))
        if self.table.swapped:
            items.byteswap()
        return items.tobytes()

    def _end_table(self) -> None:
        """Appends the table of the grain written last; no more will come into it."""
        index = self._last // TABLE_ENTRIES
        data = marker(_TABLE // SECTOR, _GT) + self._table_bytes(index)
        self.file.writev([(self._end, memoryview(data))])
        self.directory.entries[index] = self.entry_for(self._end + SECTOR)
        self.table.drop(index)
        self._end += len(data)

    def flush(self) -> None:
        """Completes the file: the last table, the directory, the footer and the end."""
        with self.flush_lock, self.lock:
            self._check_whole()
            if not self._complete:
                parts, place = b"", self._end
                entries = array("I", self.directory.entries)
                if self._last >= 0:
                    index = self._last // TABLE_ENTRIES
                    parts = marker(_TABLE // SECTOR, _GT) + self._table_bytes(index)
                    entries[index] = self.entry_for(place + SECTOR)
                if self.table.swapped:
                    entries.byteswap()
                parts += tail(self.header, entries.tobytes(), place + len(parts))
                self.file.writev([(place, memoryview(parts))])
                self.file.resize(place + len(parts))
                self._complete = True
            self.file.flush()

    def close(self) -> None:
        if not self._complete and not self._failed:
            self.flush()


class _Grains(Reservation):
    def __init__(self, owner: Stream, extents: Sequence[Extent], blocks: Sequence[int]) -> None:
        self._owner, self.extents, self._blocks = owner, extents, blocks

    def publish(self) -> None:
        self._owner.placed(self._blocks, [run.file_offset for run in self.extents])

    def abort(self) -> None:
        self._owner.fail()


def tail(header: Header, directory: bytes, place: int) -> bytes:
    """What completes a stream from ``place`` on: the directory, the footer and the end-of-stream marker."""
    sectors = -(-len(directory) // SECTOR)
    footer = Header(**{**vars(header), "gd_offset": place // SECTOR + 1})
    return b"".join([
        marker(sectors, _GD), directory.ljust(sectors * SECTOR, b"\0"), marker(1, FOOTER_MARKER), footer.encode(),
        bytes(SECTOR),
    ])  # fmt: skip


def encoder(level: int | None) -> Callable[[memoryview], bytes]:
    """Makes zlib streams. Raises OptionError for a level that is none."""
    level = _LEVEL if level is None else level
    if not 1 <= level <= MAX_LEVEL:
        raise OptionError(f"compression-level must be 1 to {MAX_LEVEL}, not {level}")
    if level in _ISAL_LEVELS:
        try:
            from isal import igzip_lib
        except ImportError:
            pass
        else:
            number = _ISAL_LEVELS[level]
            return lambda data: igzip_lib.compress(data, number, igzip_lib.COMP_ZLIB, igzip_lib.MEM_LEVEL_DEFAULT, 15)
    import zlib

    return lambda data: zlib.compress(data, level)
