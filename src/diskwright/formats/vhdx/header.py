"""vhdx: the two headers and the two region tables, at fixed places in the first MiB. MS-VHDX 2.2.

A header is changed by writing a new one over the older of the two; so at any moment one is whole, and the one with the
greater sequence number is current. What lies elsewhere (log, block allocation table, metadata) begins and ends at whole
MiB; nothing overlaps.
"""

from __future__ import annotations

import os
import struct
import uuid
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Final, Protocol

from diskwright.codecs.crc32c import crc32c
from diskwright.errors import CorruptImage, UnsupportedFeature
from diskwright.units import KiB, MiB

if TYPE_CHECKING:
    from diskwright.core.driver import Segments
    from diskwright.core.node import Node


class Bytes(Protocol):
    """What metadata is read from: the file, or the file as it is once its log has been replayed."""

    filename: str

    @property
    def size(self) -> int: ...

    def pread(self, offset: int, length: int) -> bytes: ...

    def readv(self, segments: Segments, *, nowait: bool = False) -> None: ...


SIGNATURE: Final = b"vhdxfile"
HEADER_PLACES: Final = (64 * KiB, 128 * KiB)
TABLE_PLACES: Final = (192 * KiB, 256 * KiB)
SECTION: Final = MiB
"""The first MiB holds what this module is about; nothing else lies there."""
NO_GUID: Final = bytes(16)

_HEADER: Final = struct.Struct("<4sIQ16s16s16sHHIQ")
HEADER_SIZE: Final = 4 * KiB
_TABLE: Final = struct.Struct("<4sIII")
_REGION: Final = struct.Struct("<16sQII")
TABLE_SIZE: Final = 64 * KiB
_MOST_REGIONS: Final = 2047

BAT_REGION: Final = uuid.UUID("2dc27766-f623-4200-9d64-115e9bfd4a08").bytes_le
METADATA_REGION: Final = uuid.UUID("8b7ca206-4790-4b9a-b8fe-575f050f886e").bytes_le
_REGION_NAMES: Final = {BAT_REGION: "BAT", METADATA_REGION: "metadata"}


@dataclass(frozen=True)
class Header:
    """MS-VHDX 2.2.2. GUIDs as they are in the file; the log's place and length in bytes."""

    sequence_number: int
    file_write_guid: bytes
    data_write_guid: bytes
    log_guid: bytes
    log_version: int
    version: int
    log_length: int
    log_offset: int

    def encode(self) -> bytes:
        return with_checksum(_HEADER.pack(b"head", 0, *vars(self).values()).ljust(HEADER_SIZE, b"\0"))


@dataclass(frozen=True)
class Region:
    """Where a region lies, in bytes."""

    offset: int
    length: int

    @property
    def end(self) -> int:
        return self.offset + self.length


def with_checksum(data: bytes) -> bytes:
    """A structure with its checksum put in at byte 4, where all of them have it."""
    blank = data[:4] + bytes(4) + data[8:]
    return blank[:4] + crc32c(blank).to_bytes(4, "little") + blank[8:]


def is_whole(data: bytes) -> bool:
    """Whether the checksum at byte 4 is right."""
    return int.from_bytes(data[4:8], "little") == crc32c(data[:4] + bytes(4) + data[8:])


def new_guid() -> bytes:
    """A GUID that nobody else has."""
    return uuid.UUID(bytes=os.urandom(16), version=4).bytes_le


def guid_text(raw: bytes) -> str:
    return str(uuid.UUID(bytes_le=raw))


class Taken:
    """Ranges of the file that are in use."""

    def __init__(self, ranges: Iterable[tuple[int, int]]) -> None:
        """``(start, end)`` each, in any order; they may overlap."""
        rows = sorted(ranges)
        self._starts = [start for start, _ in rows]
        self._ends = list(accumulate((end for _, end in rows), max))  # the furthest of those up to each

    def touches(self, start: int, end: int) -> bool:
        """Whether any of them has a byte of ``start`` to ``end``."""
        at = bisect_left(self._starts, end) - 1
        return at >= 0 and self._ends[at] > start

    def holds(self, start: int, end: int) -> bool:
        """Whether one of them has all of it."""
        at = bisect_right(self._starts, start) - 1
        return at >= 0 and self._ends[at] >= end


# -- the headers -----------------------------------------------------------------------------------


def read_header(file: Node) -> tuple[Header, int]:
    """The current header, checked, and which of the two places it is in. Raises CorruptImage, UnsupportedFeature."""
    path = file.filename
    if file.size < SECTION:
        raise CorruptImage(path, "length of the file", file.size, None, "shorter than the header section of a VHDX")
    if file.pread(0, 8) != SIGNATURE:
        raise CorruptImage(path, "Signature", file.pread(0, 8).hex(), 0, "this is no VHDX file")
    raw = [file.pread(place, HEADER_SIZE) for place in HEADER_PLACES]
    found = [_decode(data) for data in raw]
    first, second = found
    if first is None and second is None:
        raise CorruptImage(path, "Header", "damaged", HEADER_PLACES[0], "neither of the two has the right checksum")
    if (
        first is not None
        and second is not None
        and first.sequence_number == second.sequence_number
        and raw[0] != raw[1]
    ):
        raise CorruptImage(
            path, "SequenceNumber", first.sequence_number, HEADER_PLACES[0] + 8, "two different headers have it"
        )
    # Disk2vhd writes one and the same header to both places.
    index = int(first is None or (second is not None and second.sequence_number > first.sequence_number))
    header = found[index]
    assert header is not None
    _check_header(file, header, HEADER_PLACES[index])
    return header, index


def _decode(data: bytes) -> Header | None:
    if data[:4] != b"head" or not is_whole(data):
        return None
    return Header(*_HEADER.unpack_from(data)[2:])


def _check_header(file: Node, header: Header, at: int) -> None:
    path = file.filename
    if header.version != 1:
        raise UnsupportedFeature(f"{path}: is of VHDX version {header.version}; only 1 is known")
    if header.log_version and header.log_guid != NO_GUID:
        raise UnsupportedFeature(f"{path}: has a log of version {header.log_version}; only 0 is known")
    if header.log_length % MiB:
        raise CorruptImage(path, "LogLength", header.log_length, at + 68, "it must be a multiple of 1 MiB")
    if header.log_offset % MiB or header.log_offset < SECTION:
        raise CorruptImage(path, "LogOffset", f"{header.log_offset:#x}", at + 72, "no log can lie there")
    if header.log_guid != NO_GUID and header.log_offset + header.log_length > file.size:
        raise CorruptImage(
            path, "LogLength", header.log_length, at + 68, f"the log would end behind the file ({file.size} bytes)"
        )


class Headers:
    """The two headers of an open file, and how they change (MS-VHDX 2.2.2.1)."""

    def __init__(self, file: Node, current: Header, index: int) -> None:
        self._file, self.current, self._index = file, current, index

    def update(self, **changes: object) -> None:
        """Writes a header with some fields changed over the older one, and then over the other, each durably."""
        for _ in HEADER_PLACES:
            header = replace(self.current, **changes, sequence_number=self.current.sequence_number + 1)  # type: ignore[arg-type]
            index = 1 - self._index
            self._file.writev([(HEADER_PLACES[index], memoryview(header.encode()))])
            self._file.flush()
            self.current, self._index = header, index


# -- the region tables -----------------------------------------------------------------------------


def read_regions(source: Bytes) -> tuple[dict[bytes, Region], list[Region]]:
    """The known regions, by GUID, and the others. Raises CorruptImage, UnsupportedFeature."""
    path = source.filename
    for place in TABLE_PLACES:
        data = source.pread(place, TABLE_SIZE)
        if data[:4] == b"regi" and is_whole(data):
            break
    else:
        raise CorruptImage(
            path, "Region Table", "damaged", TABLE_PLACES[0], "neither of the two has the right checksum"
        )
    _, _, count, _ = _TABLE.unpack_from(data)
    if count > _MOST_REGIONS:
        raise CorruptImage(path, "EntryCount", count, place + 8, f"at most {_MOST_REGIONS} are possible")
    regions: dict[bytes, Region] = {}
    others: list[Region] = []
    for number in range(count):
        at = _TABLE.size + number * _REGION.size
        guid, offset, length, required = _REGION.unpack_from(data, at)
        if guid not in _REGION_NAMES and required & 1:
            raise UnsupportedFeature(f"{path}: needs the region {guid_text(guid)}, which is not known")
        if offset % MiB or length % MiB or offset < SECTION or not length:
            raise CorruptImage(
                path, f"region {_REGION_NAMES.get(guid, guid_text(guid))}", f"{length} bytes at {offset:#x}",
                place + at, "a region begins and ends at a multiple of 1 MiB behind the first",
            )  # fmt: skip
        if guid in regions:
            raise CorruptImage(path, "Region Table", "damaged", place + at, f"{_REGION_NAMES[guid]} is there twice")
        if guid in _REGION_NAMES:
            regions[guid] = Region(offset, length)
        else:
            others.append(Region(offset, length))
    for guid, name in _REGION_NAMES.items():
        if guid not in regions:
            raise CorruptImage(path, "Region Table", "damaged", place, f"there is no {name} region")
    for before, after in pairwise(sorted([*regions.values(), *others], key=lambda region: region.offset)):
        if after.offset < before.end:
            raise CorruptImage(path, "Region Table", "damaged", place, f"two regions overlap at {after.offset:#x}")
    return regions, others


def encode_regions(bat: Region, metadata: Region) -> bytes:
    """A region table."""
    body = _TABLE.pack(b"regi", 0, 2, 0)
    for guid, region in ((BAT_REGION, bat), (METADATA_REGION, metadata)):
        body += _REGION.pack(guid, region.offset, region.length, 1)
    return with_checksum(body.ljust(TABLE_SIZE, b"\0"))
