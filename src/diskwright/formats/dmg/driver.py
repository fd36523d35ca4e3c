"""dmg: the driver."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Any, Final

from diskwright.core.chunkmap import ChunkMap
from diskwright.core.driver import CheckReport, MeasuredSource, Measurement, OpenContext
from diskwright.errors import LimitExceeded, UnsupportedFeature
from diskwright.formats.dmg.codecs import CODECS
from diskwright.formats.dmg.options import DmgCreateOptions, DmgOptions
from diskwright.formats.dmg.tables import MAX_SECTORS, Chunk, in_order, read_tables, read_trailer
from diskwright.units import SECTOR, align_up

if TYPE_CHECKING:
    from diskwright.core.node import Node


class Dmg(ChunkMap):
    """One open UDIF image."""

    name = "dmg"
    options = DmgOptions
    create_options = DmgCreateOptions
    suffixes = (".dmg",)
    compresses = True
    packs = True

    def __init__(self, file: Node, size: int, chunks: list[Chunk]) -> None:
        starts, places, stored = array("q", [0]), array("q"), array("q")
        kinds, self._methods = bytearray(), array("I")
        for start, length, kind, place, packed, method in in_order(file.filename, chunks, size):
            starts.append(start + length)
            kinds.append(kind)
            places.append(place)
            stored.append(packed)
            self._methods.append(method)
        super().__init__(file, size, starts, bytes(kinds), places, stored)

    @staticmethod
    def probe(head: bytes, filename: str) -> int:
        # What tells such an image stands at its end, so all there is to go by is the name.
        return 2 if filename.endswith(".dmg") else 0

    @classmethod
    def open(cls, context: OpenContext, options: DmgOptions) -> Dmg:
        trailer = read_trailer(context.file)
        tables = list(read_tables(context.file, trailer))
        chunks = [chunk for table in tables for chunk in table.chunks]
        if not context.writable:
            return cls(context.file, trailer.disk_size, chunks)
        from diskwright.formats.dmg.writing import WritableDmg

        if len(tables) != 1 or trailer.data_offset:
            raise UnsupportedFeature("Image is read-only")
        return WritableDmg(context.file, trailer, chunks, tables[0].comment, options.compression_level)

    def unpack_chunk(self, chunk: int, raw: memoryview, size: int) -> bytes:
        method = self._methods[chunk]
        if method not in CODECS:  # only now: the rest of the disk can be read
            raise UnsupportedFeature(f"{self.path}: has chunks of the unknown type {method:#x}")
        return CODECS[method](raw, size)

    # -- the whole -------------------------------------------------------------------------------

    @classmethod
    def create(cls, file: Node, options: DmgCreateOptions) -> None:
        """See ``Format.create``."""
        from diskwright.formats.dmg import layout
        from diskwright.formats.dmg.checksums import of_zeros

        size, unit = _planned(options)
        checksums = layout.Checksums(of_zeros(size), 0)
        rows = [(0, 0, size // SECTOR, 0, 0)] if size else []
        listed = layout.property_list(layout.table(size, unit, rows, options.subformat.encode(), checksums))
        end = align_up(len(listed), SECTOR)
        file.pwrite(0, listed.ljust(end, b"\0") + layout.trailer(size, 0, 0, len(listed), checksums))

    @classmethod
    def measure(cls, options: DmgCreateOptions, source: MeasuredSource | None) -> Measurement:
        """See ``Format.measure``: as if nothing became smaller by packing."""
        from diskwright.formats.dmg import layout

        size, unit = _planned(options)
        more = layout.longest_list(-(-size // unit)) + 2 * SECTOR
        data = 0 if source is None else source.allocated(unit)
        return Measurement(data + more, size + more)

    def check(self, repair: str) -> CheckReport:
        """See ``Format.check``: whether every chunk decodes, and all checksums are right. Nothing can be repaired."""
        from diskwright.formats.dmg.verify import verify

        return verify(self)


def _planned(options: DmgCreateOptions) -> tuple[int, int]:
    """Size and unit of a new image. Raises LimitExceeded, UnsupportedFeature."""
    from diskwright.formats.dmg.packing import KINDS, packer, unit_of

    kind = KINDS[options.subformat]
    packer(kind, None)  # a library that is missing is told before there is a file
    size = align_up(options.size, SECTOR)
    if size // SECTOR >= MAX_SECTORS:
        raise LimitExceeded(f"The image size is too large: {size} bytes")
    return size, unit_of(kind, size)


DRIVERS: Final[tuple[Any, ...]] = (Dmg,)
