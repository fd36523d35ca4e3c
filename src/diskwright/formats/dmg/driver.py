"""dmg: the driver."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Any, Final

from diskwright.core.chunkmap import ChunkMap, refuse_writing
from diskwright.core.driver import OpenContext
from diskwright.errors import UnsupportedFeature
from diskwright.formats.dmg.codecs import CODECS
from diskwright.formats.dmg.tables import Chunk, in_order, read_chunks, read_trailer

if TYPE_CHECKING:
    from diskwright.core.node import Node


class Dmg(ChunkMap):
    """One open UDIF image."""

    name = "dmg"
    suffixes = (".dmg",)

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
    def open(cls, context: OpenContext, options: Any) -> Dmg:
        refuse_writing(context)
        trailer = read_trailer(context.file)
        return cls(context.file, trailer.disk_size, list(read_chunks(context.file, trailer)))

    def unpack_chunk(self, chunk: int, raw: memoryview, size: int) -> bytes:
        method = self._methods[chunk]
        if method not in CODECS:  # only now: the rest of the disk can be read
            raise UnsupportedFeature(f"{self.path}: has chunks of the unknown type {method:#x}")
        return CODECS[method](raw, size)


DRIVERS: Final[tuple[Any, ...]] = (Dmg,)
