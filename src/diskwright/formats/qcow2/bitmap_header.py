"""Pointing the header at another bitmap directory, so that a crash leaves either the old one or the new one.

The bitmaps extension lies among other extensions, and the backing file name follows them: writing all of that anew
would not be atomic, and a torn write could cost the image its backing file. So nothing but one sector at a time is
changed, each step is valid by itself and durable before the next.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, NamedTuple

from diskwright.errors import ImageError
from diskwright.formats.qcow2.header import AT_AUTOCLEAR, BITMAPS, EXT_BITMAPS, EXT_END

if TYPE_CHECKING:
    from diskwright.formats.qcow2.writing import Writer

EXT_VACANT: Final = 0x4457_5641
"""What becomes of a bitmaps extension that others follow, when the last bitmap is removed: a type that nobody knows
and everybody therefore skips. The next bitmap takes its place again."""

_DATA: Final = 24
_AT_BACKING: Final = 8
_SECTOR: Final = 512


class _Place(NamedTuple):
    """File offsets. ``at`` is where the extension begins, ``kind`` what it is now (EXT_END: none is there yet)."""

    at: int
    kind: int
    last: bool


def point_at(writer: Writer, data: bytes) -> None:
    """Makes ``data`` (24 bytes) the bitmaps extension, durably, and the bitmaps valid. What it names is durable.

    Raises ImageError, with nothing changed, when there is no room for it; OSError.
    """
    header = writer.header
    if len(header.extension(EXT_BITMAPS) or data) != _DATA:
        raise ImageError(f"{writer.path}: its bitmaps extension is not of the kind that is known here")
    place = _find(writer)
    if place.kind == EXT_END:
        _make_room(writer, place.at + 8 + _DATA + 8)
        # Behind the end marker nothing counts; then the marker itself becomes the extension's beginning.
        _write(writer, place.at + 8, data + bytes(8))
        writer.write_header(place.at, struct.pack(">II", EXT_BITMAPS, _DATA))
    elif place.kind == EXT_VACANT:
        _write(writer, place.at + 8, data)
        writer.write_header(place.at, struct.pack(">II", EXT_BITMAPS, _DATA))
    else:
        if (place.at + 8) // _SECTOR != (place.at + 7 + _DATA) // _SECTOR:
            _set_valid(writer, False)  # it cannot be exchanged at once
        _write(writer, place.at + 8, data)
    header.extensions = [
        (EXT_BITMAPS, data) if kind == place.kind and kind != EXT_END else (kind, old)
        for kind, old in header.extensions
    ]
    if place.kind == EXT_END:
        header.extensions.append((EXT_BITMAPS, data))
    _set_valid(writer, True)


def point_nowhere(writer: Writer) -> None:
    """There are no bitmaps any more, durably."""
    _set_valid(writer, False)
    place = _find(writer)
    if place.kind != EXT_BITMAPS:
        return
    kind = EXT_END if place.last else EXT_VACANT
    writer.write_header(place.at, struct.pack(">II", kind, 0 if place.last else _DATA))
    header = writer.header
    header.extensions = [
        (EXT_VACANT, data) if found == EXT_BITMAPS else (found, data)
        for found, data in header.extensions
        if found != EXT_BITMAPS or not place.last
    ]


def _set_valid(writer: Writer, valid: bool) -> None:
    header = writer.header
    features = header.autoclear_features & ~BITMAPS | (BITMAPS if valid else 0)
    if features != header.autoclear_features:
        writer.write_header(AT_AUTOCLEAR, struct.pack(">Q", features))
        header.autoclear_features = features


def _write(writer: Writer, offset: int, data: bytes) -> None:
    writer.file.pwrite(offset, data)
    writer.file.flush()


def _find(writer: Writer) -> _Place:
    """The bitmaps extension, else a vacant one, else the end marker."""
    size = writer.geometry.cluster_size
    area = writer.file.pread(0, size)
    (backing,) = struct.unpack_from(">Q", area, _AT_BACKING)
    (at,) = struct.unpack_from(">I", area, 100)
    end = min(backing or size, size)
    found: _Place | None = None
    while at + 8 <= end:
        kind, length = struct.unpack_from(">II", area, at)
        if kind == EXT_END:
            break
        better = found is None or (found.kind, kind) == (EXT_VACANT, EXT_BITMAPS)
        if kind in (EXT_BITMAPS, EXT_VACANT) and length == _DATA and better:
            found = _Place(at, kind, False)
        at += 8 + (length + 7 & ~7)
    if found is None:
        return _Place(at, EXT_END, True)
    return found._replace(last=found.at + 8 + _DATA == at)


def _make_room(writer: Writer, end: int) -> None:
    """Sees to it that extensions can reach to ``end``: moves the backing file name, which is all that can be in the
    way. Raises ImageError."""
    header, size = writer.header, writer.geometry.cluster_size
    offset, length = struct.unpack(">QI", writer.file.pread(_AT_BACKING, 12))
    if offset and offset < end:
        name = writer.file.pread(offset, length)
        if size == _SECTOR and end + length <= size:
            sector = bytearray(writer.file.pread(0, size))
            sector[end : end + length] = name
            struct.pack_into(">Q", sector, _AT_BACKING, end)
            writer.write_header(0, bytes(sector))
            header.backing_file_offset = end
            return
        # Beside the old name, which counts until the header says otherwise.
        new = max(end, offset + length + (-(offset + length) % 8))
        if new + length <= size:
            _write(writer, new, name)
            writer.write_header(_AT_BACKING, struct.pack(">QI", new, length))
            header.backing_file_offset = new
            return
        end = size + 1
    if end > size:
        raise ImageError(f"{writer.path}: there is no room for bitmaps in the header, which has {size} bytes")
