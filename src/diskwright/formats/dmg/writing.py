"""dmg: images being written.

Chunks are appended, packed or as they are; a chunk written again gets another place, and the old one is left. While the
image is open its file is longer than it has to be: at its end are room for two property lists, and the trailer.
A flush writes the list that the trailer does not name and then, when that is durable, the trailer. When the file has to
become longer a trailer is written at its new end first. So at every moment the file ends with a trailer whose
list is whole, and data goes only where no such list is. Closing puts list and trailer behind the data and cuts the
file there.

Checksums of chunks come from their packing and are put together, so nothing is read twice; only what was written in
pieces, or before this opening, is read again when the image is closed.
"""

from __future__ import annotations

import threading
import zlib
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from diskwright.core.driver import Reservation
from diskwright.errors import UnsupportedFeature
from diskwright.extents import DATA, SPECIAL, ZERO, Extent, Extents
from diskwright.formats.dmg import layout
from diskwright.formats.dmg.checksums import joined, of_zeros
from diskwright.formats.dmg.driver import Dmg
from diskwright.formats.dmg.layout import TRAILER, Checksums, Row
from diskwright.formats.dmg.packing import KINDS, RAW, Kind, packer, unit_of
from diskwright.units import SECTOR, MiB, align_up

if TYPE_CHECKING:
    from diskwright.core.node import Node
    from diskwright.formats.dmg.tables import Chunk, Trailer

_LEAST_ROOM: Final = 16 * MiB
"""The file grows by this, or by half of its data, at a time."""
_PIECE: Final = 4 * MiB
_UNKNOWN: Final = -1


class WritableDmg(Dmg):
    """An image that may be written to: one table of equal chunks, as those made here have it."""

    def __init__(self, file: Node, trailer: Trailer, chunks: list[Chunk], comment: bytes, level: int | None) -> None:
        kind = KINDS.get(comment.decode("latin-1"))
        if kind is None:
            raise UnsupportedFeature("Image is read-only")
        self.kind, self.cluster_size = kind, unit_of(kind, trailer.disk_size)
        size, unit = trailer.disk_size, self.cluster_size
        _refuse_mixed(chunks, trailer)
        super().__init__(file, size, _divided(chunks, size, kind, unit))
        self._pack = packer(kind, level)
        self._lock_map = threading.Condition(threading.Lock())
        self._kinds: bytearray = bytearray(self._kinds)
        self._crcs = array("q", [_UNKNOWN]) * len(self._kinds)
        self._packed_crcs = array("q", [_UNKNOWN]) * len(self._kinds)
        self._ours = bytearray(len(self._kinds))  # whether a chunk's place was taken since the image was opened
        self._busy: set[int] = set()
        self._pending: dict[tuple[int, int], tuple[int, int, bool]] = {}
        self._fill = max((place + stored for _, _, what, place, stored, _ in chunks if what != ZERO), default=0)
        self._limit = 0  # where data has to end for now; until there is room it is nowhere
        self._slots = [0, 0]
        self._list = trailer.list_offset, trailer.list_length
        self._changed = self._dirty = False

    # -- the map ---------------------------------------------------------------------------------

    def extent_at(self, offset: int, length: int) -> Extent:
        with self._lock_map:
            return super().extent_at(offset, length)

    def extents(self, offset: int, length: int) -> Extents:
        with self._lock_map:
            return super().extents(offset, length)

    def in_place(self, offset: int, length: int) -> int:
        """A chunk that is there as it is, and that no checksum covers, in memory or in the file: so one of this
        opening, whose list has none until the image is closed."""
        chunk = offset // self.cluster_size
        with self._lock_map:
            self._dirty = True
            if (offset + length - 1) // self.cluster_size != chunk or not self._plain(chunk):
                return -1
            return self._places[chunk] + offset % self.cluster_size

    def _plain(self, chunk: int) -> bool:
        return bool(self._ours[chunk]) and self._kinds[chunk] == DATA and self._crcs[chunk] == _UNKNOWN

    def length_of(self, chunk: int) -> int:
        """Bytes of the disk."""
        return self._end(chunk) - chunk * self.cluster_size

    # -- writing ---------------------------------------------------------------------------------

    def encode_at(self, offset: int, data: memoryview) -> bytes | None:
        """See ``Format.encode_at``. What does not get smaller is stored as it is."""
        stored = data if self._pack is None else self._pack(data)
        plain = len(stored) >= len(data)
        made = bytes(data if plain else stored)
        crc = zlib.crc32(data)
        packed_crc = crc if plain else zlib.crc32(made)
        self._pending[threading.get_ident(), offset] = crc, packed_crc, plain
        return made

    def reserve_stored(self, units: Sequence[tuple[int, int]]) -> Reservation:
        """See ``Format.reserve_stored``."""
        me = threading.get_ident()
        told = [self._pending.pop((me, offset)) for offset, _ in units]
        with self._lock_map:
            self._wait_for({offset // self.cluster_size for offset, _ in units})
            place = self._take(sum(stored for _, stored in units))
            made = _Stored(self, units, told, place)
            self._busy.update(made.chunks)
            return made

    def reserve(self, offset: int, length: int) -> Reservation:
        """See ``Format.reserve``: places for one chunk, as it is."""
        chunk = offset // self.cluster_size
        start, whole = chunk * self.cluster_size, self.length_of(chunk)
        length = min(length, start + whole - offset)
        with self._lock_map:
            self._wait_for({chunk})
            old = self._plain(chunk)
            place = self._places[chunk] if old else self._take(whole)
            self._busy.add(chunk)
        return _Plain(self, chunk, place, (start, whole), (offset, length), filled=old)

    def _wait_for(self, chunks: set[int]) -> None:
        self._lock_map.wait_for(lambda: not chunks & self._busy)

    def _take(self, length: int) -> int:
        place = self._fill
        if place + length > self._limit:
            self._make_room(place + length)
        self._fill = place + length
        return place

    def put(self, rows: Sequence[tuple[int, int, int, int, int, int]]) -> None:
        """Puts chunks on the map: ``(chunk, kind, place, stored, checksum, that of what is stored)``."""
        with self._lock_map:
            for chunk, kind, place, stored, crc, packed in rows:
                self._places[chunk], self._stored[chunk], self._kinds[chunk] = place, stored, kind
                self._crcs[chunk], self._packed_crcs[chunk] = crc, packed
                self._ours[chunk] = True
                self._methods[chunk] = RAW if kind == DATA else self.kind.method
            self._changed = self._dirty = True

    def release(self, chunks: Sequence[int]) -> None:
        """Others may write to these chunks again."""
        with self._lock_map:
            self._busy.difference_update(chunks)
            self._lock_map.notify_all()

    def zero(self, offset: int, length: int, *, unmap: bool) -> tuple[int, int]:
        """See ``Format.zero``: whole chunks."""
        unit, end = self.cluster_size, offset + length
        first, last = -(-offset // unit), end // unit if end < self.size else len(self._kinds)
        if first >= last:
            return offset, 0
        self.put([(chunk, ZERO, -1, 0, _UNKNOWN, _UNKNOWN) for chunk in range(first, last)])
        return first * unit, self._end(last - 1) - first * unit

    def discard(self, offset: int, length: int) -> None:
        """See ``Format.discard``: whole chunks then read as zeros."""
        self.zero(offset, length, unmap=True)

    # -- the file's end --------------------------------------------------------------------------

    def _make_room(self, end: int) -> None:
        """Moves the trailer and the room for lists away, for data up to ``end``. With the lock held."""
        file, list_room = self.children[0], align_up(layout.longest_list(len(self._kinds)), SECTOR)
        limit = align_up(max(end + _LEAST_ROOM, file.size, end + end // 2), SECTOR)
        slots = [limit, limit + list_room]
        at = limit + 2 * list_room
        file.pwrite(at, self._trailer(*self._list))
        file.flush()
        # The list goes along, so that its old place is free for data.
        place, length = self._list
        file.pwrite(slots[0], file.pread(place, length))
        file.flush()
        file.pwrite(at, self._trailer(slots[0], length))
        file.flush()
        self._limit, self._slots, self._list = limit, slots[::-1], (slots[0], length)

    def flush(self) -> None:
        """See ``Format.flush``."""
        super().flush()
        with self._lock_map:
            if not self._changed:
                return
            self._changed = False
            if not self._limit:
                self._make_room(self._fill)
            listed = layout.property_list(self._table(None))
            place = self._slots[0]
            file = self.children[0]
            file.pwrite(place, listed)
            file.flush()
            file.pwrite(file.size - TRAILER, self._trailer(place, len(listed)))
            file.flush()
            self._slots.reverse()
            self._list = place, len(listed)

    def close(self) -> None:
        """See ``Format.close``. Completes the image."""
        if not self._dirty:
            return
        super().flush()
        checksums = self._checksums()
        listed = layout.property_list(self._table(checksums))
        with self._lock_map:
            file, place = self.children[0], align_up(self._fill, SECTOR)
            end = align_up(place + len(listed), SECTOR) + TRAILER
            if end > self._limit:
                self._make_room(end)
            file.pwrite(place, listed)
            file.pwrite(end - TRAILER, layout.trailer(self.size, self._fill, place, len(listed), checksums))
            file.flush()
            file.resize(end)
            file.flush()
            self._dirty = self._changed = False

    def _trailer(self, place: int, length: int) -> bytes:
        return layout.trailer(self.size, self._fill, place, length, None)

    def _table(self, checksums: Checksums | None) -> bytes:
        comment = self.kind.name.encode()
        return layout.table(self.size, self.cluster_size, self._rows(), comment, checksums)

    def _rows(self) -> list[Row]:
        """The table's rows; chunks of zeros that adjoin are one."""
        rows: list[Row] = []
        for chunk, kind in enumerate(self._kinds):
            start, sectors = chunk * self.cluster_size // SECTOR, self.length_of(chunk) // SECTOR
            if kind != ZERO:
                rows.append((self._methods[chunk], start, sectors, self._places[chunk], self._stored[chunk]))
            elif rows and rows[-1][0] == 0:
                rows[-1] = (0, rows[-1][1], rows[-1][2] + sectors, 0, 0)
            else:
                rows.append((0, start, sectors, 0, 0))
        return rows

    # -- checksums -------------------------------------------------------------------------------

    def _checksums(self) -> Checksums:
        disk, places = 0, []
        for chunk, kind in enumerate(self._kinds):
            length = self.length_of(chunk)
            if kind == ZERO:
                disk = joined(disk, of_zeros(length), length)
                continue
            if self._crcs[chunk] == _UNKNOWN:
                self._read_again(chunk, length)
            disk = joined(disk, self._crcs[chunk], length)
            places.append((self._places[chunk], self._stored[chunk], self._packed_crcs[chunk]))
        places.sort()
        return Checksums(disk, self._fork(places))

    def _read_again(self, chunk: int, length: int) -> None:
        raw = memoryview(self.children[0].pread(self._places[chunk], self._stored[chunk]))
        plain = raw if self._kinds[chunk] == DATA else self._chunk(chunk, raw, length)
        self._crcs[chunk], self._packed_crcs[chunk] = zlib.crc32(plain), zlib.crc32(raw)

    def _fork(self, places: list[tuple[int, int, int]]) -> int:
        """The data fork's: chunks, and what has been left between them."""
        fork = at = 0
        for place, length, crc in [*places, (self._fill, 0, 0)]:
            while at < place:
                piece = self.children[0].pread(at, min(_PIECE, place - at))
                fork = zlib.crc32(piece, fork)
                at += len(piece)
            fork = joined(fork, crc, length)
            at += length
        return fork


class _Stored(Reservation):
    """Places for packed chunks, one behind the other."""

    def __init__(
        self,
        image: WritableDmg,
        units: Sequence[tuple[int, int]],
        told: Sequence[tuple[int, int, bool]],
        place: int,
    ) -> None:
        self._image = image
        self.chunks: list[int] = []
        self._rows: list[tuple[int, int, int, int, int, int]] = []
        extents = []
        for (offset, stored), (crc, packed, plain) in zip(units, told, strict=True):
            chunk = offset // image.cluster_size
            extents.append(Extent(offset, image.length_of(chunk), SPECIAL, place, 0, stored))
            self._rows.append((chunk, DATA if plain else SPECIAL, place, stored, crc, packed))
            self.chunks.append(chunk)
            place += stored
        self.extents = extents

    def publish(self) -> None:
        self._image.put(self._rows)
        self._image.release(self.chunks)

    def abort(self) -> None:
        self._image.release(self.chunks)


class _Plain(Reservation):
    """A place for one chunk as it is."""

    def __init__(
        self,
        image: WritableDmg,
        chunk: int,
        place: int,
        whole: tuple[int, int],
        part: tuple[int, int],
        *,
        filled: bool,
    ) -> None:
        self._image, self._chunk, self._place, self._whole = image, chunk, place, whole[1]
        (start, length), (offset, wanted) = whole, part
        self.extents = [Extent(offset, wanted, DATA, place + offset - start)]
        fills = [(start, offset - start), (offset + wanted, start + length - offset - wanted)]
        self.fills = [] if filled else [Extent(at, size, DATA, place + at - start) for at, size in fills if size]

    def publish(self) -> None:
        self._image.put([(self._chunk, DATA, self._place, self._whole, _UNKNOWN, _UNKNOWN)])
        self._image.release([self._chunk])

    def abort(self) -> None:
        self._image.release([self._chunk])


def _refuse_mixed(chunks: list[Chunk], trailer: Trailer) -> None:
    """A chunk may be overwritten where it is: none may lie on another, nor on the list. Raises UnsupportedFeature."""
    end = 0
    for place, stored in sorted((place, stored) for _, _, what, place, stored, _ in chunks if what != ZERO):
        if place < end or place + stored > trailer.list_offset:
            raise UnsupportedFeature("Image is read-only")
        end = place + stored


def _divided(chunks: list[Chunk], size: int, kind: Kind, unit: int) -> list[Chunk]:
    """The chunks, those of zeros divided, when all are of one unit. Raises UnsupportedFeature."""
    found: list[Chunk] = []
    for start, length, what, place, stored, method in chunks:
        if start % unit or (length % unit and start + length != size) or (what == SPECIAL and method != kind.method):
            raise UnsupportedFeature("Image is read-only")
        if what == ZERO:
            end = min(size, start + length)
            found += [(at, min(unit, end - at), ZERO, -1, 0, 0) for at in range(start, end, unit)]
        elif length > unit:
            raise UnsupportedFeature("Image is read-only")
        else:
            found.append((start, length, what, place, stored, method))
    if sum(chunk[1] for chunk in found) != size:
        raise UnsupportedFeature("Image is read-only")
    return found
