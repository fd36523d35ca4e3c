"""android-sparse: Android's sparse images, which can only be read.

Source: AOSP, system/core/libsparse/sparse_format.h. Numbers are little-endian. A header of 28 bytes tells the size of a
block and how many blocks and chunks there are; then come the chunks in the order of the disk, each with a header of 12
bytes: blocks as they are, blocks filled with four bytes over and over, or blocks that nobody cares for, which read as
zeros. Checksums, which writers as a rule leave out, are not verified.
"""

from __future__ import annotations

import struct
from array import array
from typing import TYPE_CHECKING, Any, Final

from diskwright.core.chunkmap import MAX_CHUNKS, MISSING, ChunkMap, check_stored, refuse_writing
from diskwright.core.driver import OpenContext
from diskwright.errors import CorruptImage, LimitExceeded, UnsupportedFeature
from diskwright.extents import DATA, SPECIAL, ZERO
from diskwright.units import SECTOR, MiB

if TYPE_CHECKING:
    from diskwright.core.node import Node

MAGIC: Final = b"\x3a\xff\x26\xed"
RAW, FILL, DONT_CARE, CRC32 = 0xCAC1, 0xCAC2, 0xCAC3, 0xCAC4

_HEADER: Final = struct.Struct("<4sHHHHIIII")
_CHUNK: Final = struct.Struct("<HHII")
_MAX_HEADER: Final = 4096
_MAX_BLOCK: Final = 64 * MiB
_FILL_PIECE: Final = 1 * MiB
"""A filled chunk is told in pieces of this length, or of a block when that is longer: what is made to read a byte."""
_PATTERN: Final = 4


class _Columns:
    """The chunks as ``ChunkMap`` wants them."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.starts, self.places, self.stored = array("q", [0]), array("q"), array("q")
        self.kinds = bytearray()

    def expect(self, count: int) -> None:
        """Raises LimitExceeded when so many more are too many."""
        if len(self.kinds) + count > MAX_CHUNKS:
            raise LimitExceeded(f"{self.path}: has more than {MAX_CHUNKS} chunks")

    def add(self, length: int, kind: int, place: int, stored: int) -> None:
        self.expect(1)
        self.starts.append(self.starts[-1] + length)
        self.kinds.append(kind)
        self.places.append(place)
        self.stored.append(stored)


class AndroidSparse(ChunkMap):
    """One open sparse image of version 1."""

    name = "android-sparse"
    suffixes = (".simg",)

    def __init__(self, file: Node, size: int, columns: _Columns) -> None:
        super().__init__(file, size, columns.starts, bytes(columns.kinds), columns.places, columns.stored)

    @staticmethod
    def probe(head: bytes, filename: str) -> int:
        return 100 if head[:4] == MAGIC and head[4:6] == b"\1\0" else 0

    @classmethod
    def open(cls, context: OpenContext, options: Any) -> AndroidSparse:
        refuse_writing(context)
        size, columns = read_chunks(context.file)
        return cls(context.file, size, columns)

    def unpack_chunk(self, chunk: int, raw: memoryview, size: int) -> bytes:
        return bytes(raw) * (size // _PATTERN)


def read_chunks(file: Node) -> tuple[int, _Columns]:
    """The disk's size in bytes and the chunks, checked. Raises CorruptImage, UnsupportedFeature, LimitExceeded."""
    path = file.filename
    if file.size < _HEADER.size:
        raise CorruptImage(path, "length of the file", file.size, None, "shorter than its header")
    magic, major, minor, header, step, block, blocks, chunks, _ = _HEADER.unpack(file.pread(0, _HEADER.size))
    if magic != MAGIC:
        raise CorruptImage(path, "magic", magic.hex(), 0, f"it should be {MAGIC.hex()}")
    if major != 1:
        raise UnsupportedFeature(f"{path}: is of version {major}.{minor}, not 1.0")
    if not _HEADER.size <= header <= _MAX_HEADER:
        raise CorruptImage(path, "file_hdr_sz", header, 8, f"it is {_HEADER.size} to {_MAX_HEADER}")
    if not _CHUNK.size <= step <= _MAX_HEADER:
        raise CorruptImage(path, "chunk_hdr_sz", step, 10, f"it is {_CHUNK.size} to {_MAX_HEADER}")
    if not block or block % _PATTERN:
        raise CorruptImage(path, "blk_sz", block, 12, f"it must be a multiple of {_PATTERN}")
    if block % SECTOR or block > _MAX_BLOCK:
        raise LimitExceeded(f"{path}: has blocks of {block} bytes; multiples of {SECTOR} to {_MAX_BLOCK} are possible")
    if chunks > MAX_CHUNKS or header + chunks * step > file.size:
        raise CorruptImage(path, "total_chunks", chunks, 20, f"the file has {file.size} bytes; at most {MAX_CHUNKS}")
    columns, at = _Columns(path), header
    for number in range(chunks):
        at = _read_chunk(file, columns, (number, at, step), block, blocks)
    size = blocks * block
    if columns.starts[-1] < size:
        columns.add(size - columns.starts[-1], MISSING, -1, 0)
    return size, columns


def _read_chunk(file: Node, columns: _Columns, where: tuple[int, int, int], block: int, blocks: int) -> int:
    """Adds one chunk; answers where the next one begins."""
    number, at, step = where
    path = file.filename
    if at + step > file.size:
        raise CorruptImage(path, f"chunk {number}", "missing", at, f"the file ends at {file.size}")
    kind, _, count, total = _CHUNK.unpack(file.pread(at, _CHUNK.size))
    length, place = count * block, at + step
    if columns.starts[-1] + length > blocks * block:
        raise CorruptImage(path, f"chunk_sz of chunk {number}", count, at + 4, f"the disk has {blocks} blocks")
    wanted: int | None = {RAW: length, FILL: _PATTERN, DONT_CARE: 0, CRC32: _PATTERN}.get(kind)
    if wanted is None:
        raise CorruptImage(path, f"chunk_type of chunk {number}", f"{kind:#x}", at, "it is not known")
    if total != step + wanted:
        raise CorruptImage(path, f"total_sz of chunk {number}", total, at + 8, f"it should be {step + wanted}")
    check_stored(file, f"chunk {number}", place, wanted, packed=False)
    if length and kind == RAW:
        columns.add(length, DATA, place, length)
    elif length and kind == FILL and any(file.pread(place, _PATTERN)):
        piece = max(block, _FILL_PIECE // block * block)
        columns.expect(length // piece)
        for done in range(0, length, piece):
            columns.add(min(piece, length - done), SPECIAL, place, _PATTERN)
    elif length and kind != CRC32:
        columns.add(length, ZERO, -1, 0)
    return at + step + wanted


DRIVERS: Final[tuple[Any, ...]] = (AndroidSparse,)
