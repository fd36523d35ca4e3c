"""vhdx: the sector bitmap of a differencing image: which sectors of a partly present block it has itself. MS-VHDX 2.4.

A block of the bitmap has 1 MiB and tells of one chunk, 2^23 sectors; the table has an entry for each. Only the bits of
blocks that are partly present mean anything, so a new block of the bitmap need not be cleared: the bits of a block of
the disk are all set when it becomes partly present.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from diskwright.core.tables import Piece, SliceCache
from diskwright.errors import CorruptImage
from diskwright.formats.vhdx.header import SECTION, Taken
from diskwright.units import MiB, align_up

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from diskwright.formats.vhdx.driver import Vhdx

PRESENT: Final = 6
_SLICE: Final = 4096
_BITS: Final = _SLICE * 8
_PER_BLOCK: Final = MiB // _SLICE
_CACHE: Final = 4 * MiB
_MOST_PLACE: Final = 1 << 47


class SectorBitmap:
    """The bitmap of one open image. Who changes it holds the image's lock."""

    def __init__(self, image: Vhdx) -> None:
        self._image, self._path, self._sector = image, image.path, image.about.logical_sector
        self.places = self._read_places()
        """Where the block of each chunk lies; 0 where there is none, -1 where its entry is wrong."""
        self._changed: set[int] = set()
        self._writing: set[int] = set()
        self.cache = SliceCache(image.file, self._locate, typecode="B", items=_SLICE, byteorder="little", budget=_CACHE)

    # -- where its blocks lie ------------------------------------------------------------------------

    def _entry_at(self, chunk: int) -> int:
        """Where in the file the table's entry for a chunk is."""
        ratio = self._image.about.chunk_ratio
        return self._image.bat.offset + 8 * ((chunk + 1) * ratio + chunk)

    def _read_places(self) -> list[int]:
        count = self._count()
        raw = memoryview(bytearray(8 * count))
        if count:
            self._image.file.readv([(self._entry_at(chunk), raw[8 * chunk : 8 * chunk + 8]) for chunk in range(count)])
        places = [self._place_of(entry) for (entry,) in struct.iter_unpack("<Q", raw)]
        counts = Counter(places)
        taken = Taken(self._image.regions_taken())
        size = align_up(self._image.file.size, MiB)

        def possible(place: int) -> bool:
            return counts[place] == 1 and place + MiB <= size and not taken.touches(place, place + MiB)

        # Bits from the wrong place would show the parent's data for the image's own, or the other way round.
        return [place if place <= 0 or possible(place) else -1 for place in places]

    def _count(self) -> int:
        about = self._image.about
        return -(-about.blocks // about.chunk_ratio)

    def grown(self) -> None:
        """The disk has more blocks than before."""
        self.places += [0] * (self._count() - len(self.places))

    @staticmethod
    def _place_of(entry: int) -> int:
        state, place = entry & 7, entry >> 20 << 20
        if state == 0:
            return 0
        return place if state == PRESENT and SECTION <= place < _MOST_PLACE else -1

    def has(self, chunk: int) -> bool:
        return self.places[chunk] > 0

    def put(self, chunk: int, place: int) -> None:
        """A new block lies at ``place``."""
        self.places[chunk] = place
        self._changed.add(chunk)

    def tables(self) -> Iterator[tuple[int, int]]:
        """``(start, end)`` of its blocks in the file."""
        for place in self.places:
            if place > 0:
                yield place, place + MiB

    def _locate(self, number: int) -> int:
        place = self.places[number // _PER_BLOCK]
        return place + number % _PER_BLOCK * _SLICE if place > 0 else -1

    def _slice(self, number: int) -> Any:
        items = self.cache.young.get(number)
        if items is None:
            items = self.cache.get(number)
        if items is None:
            chunk = number // _PER_BLOCK
            raise CorruptImage(
                self._path, f"entry of sector bitmap block {chunk}", self.places[chunk], self._entry_at(chunk),
                "it has no place, but a block it tells of is partly present",
            )  # fmt: skip
        return items

    # -- bits ----------------------------------------------------------------------------------------

    def run_at(self, offset: int, length: int) -> tuple[bool, int]:
        """Whether the sector at guest offset ``offset`` is in this image, and for how many bytes, at most ``length``,
        the next ones are the same. No lock is held."""
        sector = offset // self._sector
        number, bit = divmod(sector, _BITS)
        value = int.from_bytes(self._slice(number).tobytes(), "little") >> bit
        present = value & 1
        room = _BITS - bit
        others = (~value if present else value) & ((1 << room) - 1)
        run = (others & -others).bit_length() - 1 if others else room
        return bool(present), min(length, (sector + run) * self._sector - offset)

    def runs(self, offset: int, length: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """``(offsets, present)`` of the runs of a range of whole sectors (but for its end at the disk's)."""
        import numpy as np

        size = self._sector
        first, end = offset // size, -(-(offset + length) // size)
        low, high = first // _BITS, (end - 1) // _BITS
        raw = np.concatenate([np.frombuffer(self._slice(number), np.uint8) for number in range(low, high + 1)])
        bits = np.unpackbits(raw, bitorder="little")[first - low * _BITS : end - low * _BITS]
        heads = np.concatenate((np.zeros(1, np.int64), np.flatnonzero(np.diff(bits)) + 1))
        return (heads + first) * size, bits[heads].astype(bool)

    def set(self, offset: int, length: int, value: bool) -> None:
        """Sets the bits of a range of whole sectors."""
        size = self._sector
        at, end = offset // size, -(-(offset + length) // size)
        while at < end:
            number, low = divmod(at, _BITS)
            high = min(_BITS, low + end - at)
            items = self.cache.edit(number)
            assert items is not None, "its block has been put"
            first, last = low // 8, (high - 1) // 8
            old = int.from_bytes(items[first : last + 1].tobytes(), "little")
            mask = ((1 << (high - low)) - 1) << (low - first * 8)
            new = old | mask if value else old & ~mask
            items[first : last + 1] = type(items)("B", new.to_bytes(last - first + 1, "little"))
            self.cache.mark(number, first, last)
            at += high - low

    def full(self, offset: int, length: int) -> bool:
        """Whether all bits of a range are set."""
        end = offset + length
        while offset < end:
            present, run = self.run_at(offset, end - offset)
            if not present:
                return False
            offset += run
        return True

    # -- writing back --------------------------------------------------------------------------------

    @property
    def changed(self) -> int:
        return self.cache.changed + len(self._changed)

    def capture(self) -> list[Piece]:
        self._writing, self._changed = self._changed, set()
        pieces = self.cache.capture()
        for chunk in sorted(self._writing):
            pieces.append((self._entry_at(chunk), memoryview(struct.pack("<Q", self.places[chunk] | PRESENT))))
        return pieces

    def settle(self) -> None:
        self._writing = set()
        self.cache.settle()

    def restore(self) -> None:
        self._changed |= self._writing
        self._writing = set()
        self.cache.restore()

    def clear(self) -> None:
        """It has no blocks any more."""
        self.places = [0] * len(self.places)
        self._changed.clear()
        self.cache.clear()
