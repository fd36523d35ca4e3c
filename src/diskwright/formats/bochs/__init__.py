"""bochs: the growing disk images ("redologs") of the Bochs emulator, which can only be read.

Source: "Harddisk images" in the Bochs documentation, and images that bximage makes. Numbers are little-endian. A
catalog has one entry for each extent of the disk: which one it is in the file, or all ones. An extent in the file
begins with a bitmap that has a bit for each of its sectors, of those that were written; a sector that was not reads as
zeros. Redologs of the types Undoable and Volatile, which lie on another image, are refused.
"""

from __future__ import annotations

import struct
import sys
import threading
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from diskwright.core.chunkmap import refuse_writing
from diskwright.core.driver import Format, OpenContext
from diskwright.errors import CorruptImage, LimitExceeded, UnsupportedFeature
from diskwright.extents import DATA, UNALLOCATED, Extent, Extents
from diskwright.units import SECTOR, MiB

if TYPE_CHECKING:
    from diskwright.core.node import Node

MAGIC: Final = b"Bochs Virtual HD Image".ljust(32, b"\0")
REDOLOG: Final = b"Redolog".ljust(16, b"\0")
GROWING: Final = b"Growing".ljust(16, b"\0")
VERSION_1: Final = 0x10000
VERSION_2: Final = 0x20000
FREE: Final = 0xFFFFFFFF
MAX_CATALOG: Final = 1 << 20
"""Extents of a disk at most: 4 MiB of catalog."""
MAX_EXTENT: Final = 8 * MiB
"""What Bochs itself uses at most."""

_HEAD: Final = struct.Struct("<32s16s16sIIIII")
_KEPT: Final = 256
"""Bitmaps kept, of at most 16 KiB each, a byte for every sector."""
_BITS: Final = tuple(bytes(byte >> bit & 1 for bit in range(8)) for byte in range(256))


@dataclass(frozen=True)
class Header:
    """The header's fields. Offsets and sizes in bytes."""

    catalog_offset: int
    catalog_entries: int
    bitmap_size: int
    extent_size: int
    disk_size: int


def read_header(file: Node) -> Header:
    """The header, checked. Raises CorruptImage, UnsupportedFeature or LimitExceeded."""
    path = file.filename
    if file.size < SECTOR:
        raise CorruptImage(path, "length of the file", file.size, None, "shorter than a Bochs header")
    raw = file.pread(0, SECTOR)
    magic, kind, subtype, version, length, entries, bitmap, extent = _HEAD.unpack_from(raw)
    if magic != MAGIC:
        raise CorruptImage(path, "magic", repr(magic.rstrip(b"\0"))[1:], 0, "it should be 'Bochs Virtual HD Image'")
    if kind != REDOLOG or subtype != GROWING:
        names = " ".join(name.rstrip(b"\0").decode("ascii", "backslashreplace") for name in (kind, subtype))
        raise UnsupportedFeature(f"{path}: is of the type {names!r}, not 'Redolog Growing'")
    if version not in (VERSION_1, VERSION_2):
        raise UnsupportedFeature(f"{path}: is of version {version >> 16}.{version & 0xFFFF}, not 1.0 or 2.0")
    (size,) = struct.unpack_from("<Q", raw, 84 if version == VERSION_1 else 88)
    header = Header(length, entries, bitmap, extent, size)
    _check(file, header)
    return header


def _check(file: Node, header: Header) -> None:
    path, extent = file.filename, header.extent_size
    if header.catalog_offset < SECTOR:
        raise CorruptImage(path, "header size", header.catalog_offset, 68, f"it is at least {SECTOR}")
    if extent < SECTOR or extent & (extent - 1):
        raise CorruptImage(path, "extent size", extent, 80, f"it must be a power of two from {SECTOR} on")
    if extent > MAX_EXTENT:
        raise LimitExceeded(f"{path}: has extents of {extent} bytes; at most {MAX_EXTENT} are possible")
    if header.bitmap_size * 8 * SECTOR < extent or header.bitmap_size > MAX_EXTENT:
        raise CorruptImage(path, "bitmap size", header.bitmap_size, 76, f"extents have {extent // SECTOR} sectors")
    if header.catalog_entries > MAX_CATALOG:
        raise LimitExceeded(
            f"{path}: has a catalog of {header.catalog_entries} extents; at most {MAX_CATALOG} are possible"
        )
    if header.disk_size > header.catalog_entries * extent:
        what = f"{header.catalog_entries} extents cannot hold it"
        raise CorruptImage(path, "disk size", header.disk_size, None, what)
    end = header.catalog_offset + 4 * header.catalog_entries
    if end > file.size:
        raise CorruptImage(
            path, "catalog entries", header.catalog_entries, 72, f"the catalog ends at {end}, the file at {file.size}"
        )


class Bochs(Format):
    """One open redolog."""

    name = "bochs"

    def __init__(self, file: Node, header: Header) -> None:
        self.children = (file,)
        self.file, self.header, self.path = file, header, file.filename
        self.size = header.disk_size // SECTOR * SECTOR
        self.cluster_size = SECTOR
        self._catalog = array("I", file.pread(header.catalog_offset, 4 * header.catalog_entries))
        if sys.byteorder == "big":
            self._catalog.byteswap()
        self._data = header.catalog_offset + 4 * header.catalog_entries
        self._bitmap = -(-header.bitmap_size // SECTOR) * SECTOR
        self._written: dict[int, bytes] = {}  # extent -> a byte for each sector; the oldest first
        self._lock = threading.Lock()

    @staticmethod
    def probe(head: bytes, filename: str) -> int:
        if len(head) < SECTOR or head[:64] != MAGIC + REDOLOG + GROWING:
            return 0
        return 100 if int.from_bytes(head[64:68], "little") in (VERSION_1, VERSION_2) else 0

    @classmethod
    def open(cls, context: OpenContext, options: Any) -> Bochs:
        refuse_writing(context)
        return cls(context.file, read_header(context.file))

    def _place(self, entry: int) -> int:
        """Where the bitmap of an extent lies that is the ``entry``-th in the file."""
        return self._data + entry * (self._bitmap + self.header.extent_size)

    def _sectors(self, extent: int, entry: int) -> bytes:
        """A byte for each sector of an extent: whether it was written."""
        found = self._written.get(extent)
        if found is None:
            place = self._place(entry)
            self._check_place(extent, entry, place)
            raw = self.file.pread(place, -(-self.header.extent_size // SECTOR // 8))
            found = b"".join([_BITS[byte] for byte in raw])
            with self._lock:
                while len(self._written) >= _KEPT:
                    del self._written[next(iter(self._written))]
                self._written[extent] = found
        return found

    def _check_place(self, extent: int, entry: int, place: int) -> None:
        if place + self._bitmap > self.file.size:
            raise CorruptImage(
                self.path, f"catalog entry {extent}", f"{entry:#x}", self.header.catalog_offset + 4 * extent,
                f"the extent would be at {place:#x}, the file has {self.file.size} bytes",
            )  # fmt: skip

    def extent_at(self, offset: int, length: int) -> Extent:
        size = self.header.extent_size
        extent, inside = divmod(offset, size)
        entry = self._catalog[extent]
        if entry == FREE:
            end = (extent + 1) * size
            while end < offset + length and self._catalog[end // size] == FREE:
                end += size
            return Extent(offset, min(length, end - offset), UNALLOCATED)
        sectors = self._sectors(extent, entry)
        sector = inside // SECTOR
        written = sectors[sector]
        end = sectors.find(1 - written, sector, size // SECTOR)
        run = min(length, (end * SECTOR if end >= 0 else size) - inside)
        if not written:
            return Extent(offset, run, UNALLOCATED)
        place = self._place(entry) + self._bitmap + inside
        if place + run > self.file.size:
            raise self._cut(offset)
        return Extent(offset, run, DATA, place)

    def _cut(self, offset: int) -> CorruptImage:
        what = f"sectors from guest offset {offset:#x} on"
        return CorruptImage(self.path, what, "missing", None, f"the file ends before them, at {self.file.size}")

    def extents(self, offset: int, length: int) -> Extents:
        """A bit for each sector of the range, read at once, and then the places where the answer changes."""
        import numpy as np

        size, per = self.header.extent_size, self.header.extent_size // SECTOR
        first, last = offset // size, -(-(offset + length) // size)
        entries = np.frombuffer(self._catalog, np.uint32)[first:last].astype(np.int64)
        bases = self._data + entries * (self._bitmap + size)
        width = -(-per // 8)
        bits = np.zeros((last - first, width), np.uint8)
        present = np.flatnonzero(entries != FREE).tolist()
        for at in present:
            self._check_place(first + at, int(entries[at]), int(bases[at]))
        rows = memoryview(bits.reshape(-1).data)
        if present:
            self.file.readv([(int(bases[at]), rows[at * width : (at + 1) * width]) for at in present])
        written = np.unpackbits(bits, axis=1, bitorder="little")[:, :per].reshape(-1)
        turns = np.flatnonzero(np.diff(written)) + 1
        # Data of two extents may only be one run where they follow each other in the file; merge() finds that out.
        heads = np.union1d(turns, np.arange(0, len(written), per))
        kinds = np.where(written[heads] != 0, DATA, UNALLOCATED).astype(np.uint8)
        index, within = np.divmod(heads, per)
        places = np.where(kinds == DATA, bases[index] + self._bitmap + within * SECTOR, -1)
        lengths = np.diff(heads, append=len(written)) * SECTOR
        beyond = (kinds == DATA) & (places + lengths > self.file.size)
        if beyond.any():
            raise self._cut(max(offset, int(heads[np.argmax(beyond)]) * SECTOR + first * size))
        none = np.zeros(len(heads), np.int64)
        found = Extents(heads * SECTOR + first * size, lengths, kinds, places, none.astype(np.int16), none)
        return found.slice(offset, length).merge()


DRIVERS: Final[tuple[Any, ...]] = (Bochs,)
