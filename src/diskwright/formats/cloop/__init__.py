"""cloop: the compressed loop device's images, which can only be read.

Source: the driver and tools of the Debian package ``cloop``, version 2.x, and images they make. Numbers are big-endian:
after 128 bytes of shell script the size of a block and the number of blocks, 32 bits each, and then one more offset of
64 bits than there are blocks. A block is one zlib stream between its offset and the next one.
"""

from __future__ import annotations

import struct
import sys
from array import array
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

from diskwright.core.chunkmap import MAX_CHUNK, MAX_CHUNKS, ChunkMap, check_stored, inflate, refuse_writing
from diskwright.core.driver import OpenContext
from diskwright.errors import CorruptImage, LimitExceeded
from diskwright.extents import SPECIAL
from diskwright.units import SECTOR

if TYPE_CHECKING:
    from diskwright.core.node import Node

MAGIC: Final = b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n"
_AT_SIZES: Final = 128
_TABLE: Final = 136


class Cloop(ChunkMap):
    """One open cloop image of version 2."""

    name = "cloop"
    suffixes = (".cloop",)

    @staticmethod
    def probe(head: bytes, filename: str) -> int:
        # A script is anybody's: whoever knows more of the file may have it.
        return 2 if head.startswith(MAGIC) else 0

    @classmethod
    def open(cls, context: OpenContext, options: Any) -> Cloop:
        refuse_writing(context)
        block, offsets = read_table(context.file)
        count = len(offsets) - 1
        places = offsets[:count]
        stored = array("q", (end - start for start, end in pairwise(offsets)))
        size = count * block
        return cls(context.file, size, range(0, size + 1, block), bytes([SPECIAL]) * count, places, stored)

    def unpack_chunk(self, chunk: int, raw: memoryview, size: int) -> bytes:
        return inflate(raw, size)


def read_table(file: Node) -> tuple[int, array[int]]:
    """The size of a block and the offsets, checked. Raises CorruptImage, LimitExceeded."""
    path = file.filename
    if file.size < _TABLE:
        raise CorruptImage(path, "length of the file", file.size, None, "shorter than a cloop header")
    block, count = struct.unpack(">II", file.pread(_AT_SIZES, 8))
    if not block or block % SECTOR:
        raise CorruptImage(path, "block size", block, _AT_SIZES, f"it must be a multiple of {SECTOR}")
    if block > MAX_CHUNK:
        raise LimitExceeded(f"{path}: has blocks of {block} bytes; at most {MAX_CHUNK} are possible")
    if count > MAX_CHUNKS:
        raise LimitExceeded(f"{path}: has {count} blocks; at most {MAX_CHUNKS} are possible")
    end = _TABLE + 8 * (count + 1)
    if end > file.size:
        raise CorruptImage(path, "number of blocks", count, 132, f"the table ends at {end}, the file at {file.size}")
    raw = file.pread(_TABLE, 8 * (count + 1))
    offsets = array("q", raw)
    if sys.byteorder == "little":
        offsets.byteswap()
    last = end
    for index, offset in enumerate(offsets):
        if offset < last:
            raise CorruptImage(
                path,
                f"offset of block {index}",
                f"{offset:#x}",
                _TABLE + 8 * index,
                f"what is before ends at {last:#x}",
            )
        check_stored(file, f"block {max(0, index - 1)}", last, offset - last, packed=index > 0)
        last = offset
    return block, offsets


DRIVERS: Final[tuple[Any, ...]] = (Cloop,)
