"""vmdk: growing a disk. Its last extent grows; whenever a crash comes the files hold the old disk or the new one.

A flat extent becomes longer, and then the descriptor says so. Of a sparse one, directories for the new size, and tables
for what is new, are written behind everything else; the header, which is one sector, then changes at once, and the
descriptor after it (who opens a disk in one file goes by the header).
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from diskwright.errors import LimitExceeded, UnsupportedFeature
from diskwright.formats.vmdk import descriptor
from diskwright.formats.vmdk.create import SPLIT
from diskwright.formats.vmdk.header import MAX_TABLES, REDUNDANT, TABLE_ENTRIES, Header
from diskwright.formats.vmdk.part import Flat
from diskwright.formats.vmdk.sparse import Sparse
from diskwright.units import SECTOR, align_up

if TYPE_CHECKING:
    from diskwright.core.tables import Directory
    from diskwright.formats.vmdk.part import Part

_TABLE: Final = TABLE_ENTRIES * 4
_GEOMETRY: Final = re.compile(rb'^(ddb\.geometry\.(cylinders|heads|sectors)[ \t]*=[ \t]*")(\d{1,9})(")', re.M)


def growing(part: Part, kind: str, size: int) -> Callable[[], None]:
    """Makes the last extent of a disk of ``kind`` ``size`` bytes large, as far as memory is concerned, so that the new
    bytes can be written to; what is returned makes that durable. Raises UnsupportedFeature, LimitExceeded, OSError."""
    if kind.startswith("twoGb") and size > SPLIT:
        raise UnsupportedFeature(f"an extent of a {kind} disk has at most {SPLIT} bytes; convert it into a new image")
    if type(part) is Flat:
        return _flat(part, size)
    if type(part) is Sparse:
        return _sparse(part, size)
    raise UnsupportedFeature(f"an extent of the type {part.kind} cannot grow; convert the disk into a new image")


def described(text: bytes, old: int, new: int, sectors: int) -> bytes:
    """The descriptor of a disk that has grown from ``old`` bytes to ``new``, and its last extent to ``sectors``. The
    number of its cylinders follows, unless it has none or the user's own."""
    text = descriptor.with_sectors(text, sectors)
    found = {match[2]: int(match[3]) for match in _GEOMETRY.finditer(text)}
    track = found.get(b"heads", 0) * found.get(b"sectors", 0) * SECTOR
    if not track or found.get(b"cylinders") != old // track:
        return text
    cylinders = b"%d" % (new // track)
    return _GEOMETRY.sub(lambda m: m[1] + (cylinders if m[2] == b"cylinders" else m[3]) + m[4], text)


def _flat(part: Flat, size: int) -> Callable[[], None]:
    if part.start + part.size < part.file.size:
        raise UnsupportedFeature(f"{part.file.filename}: goes on behind the extent, which so cannot grow")
    part.before_change()
    part.file.resize(part.start + size)
    part.size = size
    return part.file.flush


def _sparse(part: Sparse, size: int) -> Callable[[], None]:
    part.survey()
    part.write_back()
    _clear_tail(part)
    header = replace(part.header, capacity=size // SECTOR)
    if header.tables > MAX_TABLES:
        raise LimitExceeded(f"{part.path}: would have {header.tables} grain tables; at most {MAX_TABLES} are possible")
    if header.tables > len(part.directory.entries):
        header = _enlarged(part, header)
    hook = part.before_change
    part.__init__(part.file, header, size)  # type: ignore[misc]
    part.before_change = hook

    def durable() -> None:
        part.write_back()
        part.file.writev([(0, memoryview(header.encode()))])
        part.file.flush()

    return durable


def _clear_tail(part: Sparse) -> None:
    """What is behind the old end in the last grain becomes part of the disk, and has to read as zeros."""
    inside = part.size % part.cluster_size
    if inside:
        run = part.extent_at(part.size - 1, 1)
        if run.file_offset >= 0:
            part.file.write_zeros(run.file_offset + 1, part.cluster_size - inside)


def _enlarged(part: Sparse, header: Header) -> Header:
    """Writes directories of the new size, durably, behind everything else; the header that names them."""
    place = align_up(part.file.size, part.cluster_size)
    redundant = 0
    if part.redundant is not None:
        redundant, place = place, _write_directory(part, part.redundant, header.tables, place)
    end = _write_directory(part, part.directory, header.tables, place)
    part.file.resize(align_up(end, part.cluster_size))
    part.file.flush()
    flags = header.flags if redundant else header.flags & ~REDUNDANT
    return replace(header, gd_offset=place // SECTOR, rgd_offset=redundant // SECTOR, flags=flags)


def _write_directory(part: Sparse, old: Directory, tables: int, place: int) -> int:
    """A directory of ``tables`` entries, and empty tables for the new ones, at ``place``; returns where they end."""
    first = place + align_up(4 * tables, SECTOR)
    added = tables - len(old.entries)
    end = first + added * _TABLE
    part.entry_for(end)
    entries = array("I", old.entries)
    entries.extend(range(first // SECTOR, end // SECTOR, _TABLE // SECTOR))
    if part.table.swapped:
        entries.byteswap()
    part.file.writev([(place, memoryview(entries.tobytes()))])
    part.file.write_zeros(place + 4 * tables, end - place - 4 * tables)
    return end
