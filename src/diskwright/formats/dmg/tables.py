"""dmg: the trailer and the tables of chunks.

There is no published specification; the facts are those that images of several writers show. The last 512 bytes
("koly") tell where the property list is, or in older images the resource fork; these hold tables ("mish") of
chunks, each for a part of the disk. All numbers are big-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from diskwright.core.chunkmap import MAX_CHUNK, MAX_CHUNKS, MISSING, check_stored
from diskwright.errors import CorruptImage, LimitExceeded, UnsupportedFeature
from diskwright.extents import DATA, SPECIAL, ZERO
from diskwright.units import SECTOR, MiB

if TYPE_CHECKING:
    from diskwright.core.node import Node

TRAILER: Final = 512
MAX_LIST: Final = 80 * MiB
"""Bytes of the property list, or of the resource fork."""
MAX_ELEMENTS: Final = 500_000
"""Tags of the property list: each becomes an object."""
MAX_SECTORS: Final = 1 << 54
"""8 EiB, the largest offset there is."""

MAX_WRITTEN: Final = 1 << 20
"""Chunks of images that are made here: their property list stays within ``MAX_LIST``."""

IGNORE: Final = 2
_ZERO, _RAW, _COMMENT, _END = 0, 1, 0x7FFFFFFE, 0xFFFFFFFF
_CRC32: Final = 2
_CHUNK: Final = struct.Struct(">IIQQQQ")
_MISH: Final = 204

Chunk = tuple[int, int, int, int, int, int]
"""``(start, length, kind, place, stored, type)``; in bytes, kind as in ``chunkmap``."""


@dataclass(frozen=True)
class Trailer:
    """The trailer's fields, in bytes."""

    data_offset: int
    data_length: int
    fork_offset: int
    fork_length: int
    list_offset: int
    list_length: int
    disk_size: int
    fork: int | None
    """The CRC-32 that the data fork should have, when it tells one."""
    master: int | None
    """That of the tables' checksums."""


@dataclass(frozen=True)
class Table:
    """One table of chunks, without the empty ones."""

    chunks: list[Chunk]
    checksum: int | None
    """The CRC-32 that its data should have, when it tells one."""
    comment: bytes
    """What is said beside its first chunk, when that is a comment: four bytes."""


def _checksum(raw: bytes, at: int) -> int | None:
    """The CRC-32 of a field for a checksum of any kind: its kind, its length in bits, and 128 bytes of room."""
    kind, bits, value = struct.unpack_from(">III", raw, at)
    return int(value) if kind == _CRC32 and bits == 32 else None


def read_trailer(file: Node) -> Trailer:
    """The trailer, checked. Raises CorruptImage, UnsupportedFeature, LimitExceeded."""
    path = file.filename
    if file.size >= 8 and file.pread(0, 8) == b"encrcdsa":
        raise UnsupportedFeature(f"{path}: is encrypted")
    start = max(0, file.size - 2 * TRAILER + 1)  # something may follow it
    raw = file.pread(start, file.size - start)
    at = raw.rfind(b"koly", 0, max(0, len(raw) - TRAILER + 4))
    if at < 0:
        raise CorruptImage(path, "trailer", "missing", None, "no 'koly' at its end; perhaps it is a raw image")
    raw, start = raw[at:], start + at
    data = struct.unpack_from(">QQ", raw, 24)
    fork = struct.unpack_from(">QQ", raw, 40)
    segments = struct.unpack_from(">II", raw, 56)
    plist = struct.unpack_from(">QQ", raw, 216)
    (sectors,) = struct.unpack_from(">Q", raw, 492)
    if segments[1] > 1:
        raise UnsupportedFeature(f"{path}: is segment {segments[0]} of {segments[1]}")
    if sectors >= MAX_SECTORS:
        raise LimitExceeded(f"{path}: has {sectors} sectors; less than {MAX_SECTORS} are possible")
    for name, (offset, length), field in (("resource fork", fork, 40), ("property list", plist, 216)):
        if length > MAX_LIST:
            raise LimitExceeded(f"{path}: has a {name} of {length} bytes; at most {MAX_LIST} are possible")
        if length and offset + length > start:
            raise CorruptImage(
                path, name, f"{length} bytes at {offset:#x}", start + field, "it reaches into the trailer"
            )
    return Trailer(
        data[0],
        data[1],
        fork[0],
        fork[1],
        plist[0],
        plist[1],
        sectors * SECTOR,
        _checksum(raw, 80),
        _checksum(raw, 352),
    )


def read_tables(file: Node, trailer: Trailer) -> Iterator[Table]:
    """All tables, as they come. Raises as ``read_trailer``."""
    count = 0
    for table in _tables(file, trailer):
        entries = _checked(file, table)
        count += entries
        if count > MAX_CHUNKS:
            raise LimitExceeded(f"{file.filename}: has more than {MAX_CHUNKS} chunks")
        kind, comment = struct.unpack_from(">I4s", table, _MISH) if entries else (0, b"")
        chunks = list(_chunks(file, trailer, table, entries))
        yield Table(chunks, _checksum(table, 64), comment if kind == _COMMENT else b"")


def _tables(file: Node, trailer: Trailer) -> Iterator[bytes]:
    """The tables, from the property list when there is one."""
    path = file.filename
    if trailer.list_length:
        yield from _from_list(path, file.pread(trailer.list_offset, trailer.list_length), trailer.list_offset)
    elif trailer.fork_length:
        yield from _from_fork(path, file.pread(trailer.fork_offset, trailer.fork_length), trailer.fork_offset)
    else:
        raise CorruptImage(path, "trailer", "incomplete", None, "it names neither a property list nor a resource fork")


def _from_list(path: str, raw: bytes, at: int) -> Iterator[bytes]:
    import plistlib

    if raw.count(b"<") > 2 * MAX_ELEMENTS:
        raise LimitExceeded(f"{path}: has more than {MAX_ELEMENTS} elements in its property list")
    try:
        found: Any = plistlib.loads(raw, fmt=plistlib.FMT_XML)
        tables = [item["Data"] for item in found["resource-fork"]["blkx"]]
    except MemoryError:
        raise
    except Exception as error:  # the parser raises whatever its conversions do
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise CorruptImage(path, "property list", "damaged", at, why) from error
    for table in tables:
        if not isinstance(table, bytes):
            raise CorruptImage(path, "property list", "damaged", at, "a table of chunks is no data")
        yield table


def _from_fork(path: str, raw: bytes, at: int) -> Iterator[bytes]:
    """A resource fork's data: pieces with their lengths before them, of which the tables of chunks are some."""
    if len(raw) < 16:
        raise CorruptImage(path, "resource fork", f"{len(raw)} bytes", at, "shorter than its header")
    offset, _, length, _ = struct.unpack_from(">4I", raw)
    if offset + length > len(raw):
        raise CorruptImage(path, "resource fork", "damaged", at, f"its data would end at {offset + length}")
    end = offset + length
    while offset + 4 <= end:
        (size,) = struct.unpack_from(">I", raw, offset)
        offset += 4
        if offset + size > end:
            raise CorruptImage(path, "resource fork", "damaged", at + offset - 4, f"a resource of {size} bytes")
        if raw[offset : offset + 4] == b"mish":
            yield raw[offset : offset + size]
        offset += size


def _checked(file: Node, table: bytes) -> int:
    """How many entries a table has."""
    if len(table) < _MISH or table[:4] != b"mish":
        raise CorruptImage(file.filename, "table of chunks", "damaged", None, "it does not begin with 'mish'")
    (entries,) = struct.unpack_from(">I", table, 200)
    if entries > (len(table) - _MISH) // _CHUNK.size:
        raise CorruptImage(
            file.filename,
            "table of chunks",
            f"{entries} entries",
            None,
            f"there is room for {len(table) - _MISH} bytes",
        )
    return int(entries)


def _chunks(file: Node, trailer: Trailer, table: bytes, entries: int) -> Iterator[Chunk]:
    first, _, offset = struct.unpack_from(">QQQ", table, 8)
    base = trailer.data_offset + offset
    view = memoryview(table)[_MISH : _MISH + entries * _CHUNK.size]
    for kind, _, sector, count, place, stored in _CHUNK.iter_unpack(view):
        if kind == _END:
            return
        if kind == _COMMENT or not count:
            continue
        start, length = (first + sector) * SECTOR, count * SECTOR
        what = f"chunk of guest offset {start:#x}"
        if first + sector + count >= MAX_SECTORS:
            raise CorruptImage(file.filename, what, f"{count} sectors", None, "no disk is that large")
        if kind in (_ZERO, IGNORE):
            yield start, length, ZERO, -1, 0, kind
            continue
        check_stored(file, what, base + place, stored, packed=kind != _RAW)
        if kind == _RAW:
            if stored < length:
                raise CorruptImage(file.filename, what, f"{stored} bytes", None, f"it should have {length}")
            yield start, length, DATA, base + place, length, kind
            continue
        if length > MAX_CHUNK:
            raise LimitExceeded(f"{file.filename}: {what} has {length} bytes; at most {MAX_CHUNK} are possible")
        yield start, length, SPECIAL, base + place, stored, kind


def in_order(path: str, chunks: list[Chunk], size: int) -> Iterator[Chunk]:
    """The chunks in the order of the disk, with those of the kind MISSING in the gaps, up to ``size``. Raises
    CorruptImage when two overlap."""
    chunks.sort()
    end = 0
    for start, length, kind, place, stored, method in chunks:
        if start < end:
            raise CorruptImage(path, f"chunk of guest offset {start:#x}", "damaged", None, "another has its place too")
        if start >= size:
            break
        if start > end:
            yield end, start - end, MISSING, -1, 0, 0
        yield start, length, kind, place, stored, method
        end = start + length
    if end < size:
        yield end, size - end, MISSING, -1, 0, 0
