"""Naming another backing file in the header, so that a crash leaves the old name and format or the new ones.

The name and its format lie apart, and others may lie between them: writing that anew in one go would not be atomic.
What is atomic is the first sector. It holds the pointer to the name and the first extension, so the format becomes
the first extension, and whatever does not fit into the sector is made durable elsewhere in the cluster before.
"""

from __future__ import annotations

import os
import struct
from copy import copy
from typing import TYPE_CHECKING, Final

from diskwright.errors import ImageError, OptionError, UnsupportedFeature
from diskwright.formats.qcow2 import header as fields
from diskwright.formats.qcow2.header import Header, read_header
from diskwright.units import MAX_BACKING_NAME, SECTOR, align_up

if TYPE_CHECKING:
    from diskwright.core.node import Node
    from diskwright.formats.qcow2.driver import Qcow2

_SKIPPED: Final = 0x4457_5350
"""The type of an extension that means nothing: readers step over what they do not know, so its length can lead them
past a part of the cluster that is still in use."""

_EXTENSION: Final = struct.Struct(">II")
_BACKING: Final = struct.Struct(">QI")
_AT_BACKING: Final = 8


def change_backing(image: Qcow2, filename: str | None, format: str | None) -> None:
    """See ``Format.change_backing``. Raises ImageError for a read-only image or when the header has no room."""
    if image.writer is None:
        raise ImageError(f"{image.children[0].filename}: is open read-only")
    name = os.fsencode(filename or "")
    if len(name) > MAX_BACKING_NAME or b"\0" in name:
        raise OptionError(f"A backing file name has 1 to {MAX_BACKING_NAME} bytes")
    image.writer.checkpoint()
    file = image.children[0]
    old = read_header(file)
    new = copy(old)
    new.backing_file = name
    new.extensions = [item for item in old.extensions if item[0] not in (fields.EXT_BACKING_FORMAT, _SKIPPED)]
    if name and format:
        new.extensions.insert(0, (fields.EXT_BACKING_FORMAT, os.fsencode(format)))
    replace_header(file, old, new)
    kept = image.header  # the writer holds on to this object, too
    kept.backing_file, kept.extensions = new.backing_file, new.extensions
    kept.backing_file_offset, kept.backing_file_size = new.backing_file_offset, new.backing_file_size
    kept.header_length = new.header_length
    image.backing = kept.backing


def replace_header(file: Node, old: Header, new: Header) -> None:
    """Puts ``new`` where ``old`` is, all of it or nothing, durably. Raises ImageError, with nothing changed."""
    cluster_size = 1 << old.cluster_bits
    beyond = file.pread(fields.LENGTH, max(0, old.header_length - fields.LENGTH))
    if any(beyond):
        raise UnsupportedFeature(f"{file.filename}: its header has fields that are not known here")
    whole = new.encode()
    used = _used(old)
    if max(used, len(whole)) > SECTOR:
        # First in a form that leaves everything behind the first sector where it is, then in the usual one. Each of
        # the two may overwrite only what the header at that moment does not need.
        detour = _beside(file, new, used, len(whole), cluster_size)
        _write(file, detour)
        used = detour[-1][0] + len(detour[-1][1])
        if len(whole) > detour[-1][0]:
            return  # the usual form would reach into what is in use; this one is as good
    _write(file, [(0, whole[:SECTOR].ljust(SECTOR, b"\0")), (SECTOR, whole[SECTOR:])])
    end = max(SECTOR, len(whole))
    if used > end:
        file.pwrite(end, bytes(used - end))
        file.flush()


def _used(header: Header) -> int:
    """How many of the first bytes of the file mean anything."""
    extensions = sum(8 + align_up(len(data), 8) for _, data in header.extensions) + 8
    return max(header.header_length + extensions, header.backing_file_offset + len(header.backing_file))


def _beside(file: Node, new: Header, used: int, length: int, cluster_size: int) -> list[tuple[int, bytes]]:
    """The pieces of a header of which only the first sector, the first of the pieces, lies where the old header (of
    which ``used`` bytes count) does; and the rest, if it can be, behind what the usual form (``length``) needs."""
    for without in (-1, fields.EXT_FEATURE_NAMES):  # names of features are for people; they come back in the end
        items = [item for item in new.extensions if item[0] != without]
        for start in (max(used, length, SECTOR), max(used, SECTOR)):
            found = _with_rest_at(new, items, align_up(start, 8), cluster_size)
            if found is not None:
                return found
    raise ImageError(
        f"{file.filename}: no room to change the backing file name safely: the header has {cluster_size} bytes"
    )


def _with_rest_at(
    new: Header, extensions: list[tuple[int, bytes]], start: int, cluster_size: int
) -> list[tuple[int, bytes]] | None:
    """Such pieces with the rest at ``start``; None when they do not fit."""
    bare = copy(new)
    bare.extensions, bare.backing_file = [], b""
    first = bytearray(bare.encode()[:-8])  # without the end marker
    waiting = list(extensions)
    while waiting and len(first) + len(_encoded(waiting[0])) + 8 <= SECTOR:
        first += _encoded(waiting.pop(0))
    far = b""
    if waiting:
        first += _EXTENSION.pack(_SKIPPED, start - len(first) - 8)
        far = b"".join(map(_encoded, waiting)) + bytes(8)
    else:
        first += bytes(8)
    if (waiting and waiting[0][0] == fields.EXT_BACKING_FORMAT) or start + len(far + new.backing_file) > cluster_size:
        return None
    if new.backing_file:
        # Readers take the name for the end of the extensions' area, so it comes last.
        _BACKING.pack_into(first, _AT_BACKING, start + len(far), len(new.backing_file))
    return [(0, bytes(first).ljust(SECTOR, b"\0")), (start, far + new.backing_file)]


def _encoded(extension: tuple[int, bytes]) -> bytes:
    kind, data = extension
    return _EXTENSION.pack(kind, len(data)) + data + bytes(-len(data) % 8)


def _write(file: Node, pieces: list[tuple[int, bytes]]) -> None:
    """Makes the later pieces durable, then the first one, which is a sector or less."""
    (start, first), *others = pieces
    if any(data for _, data in others):
        for offset, data in others:
            if data:
                file.pwrite(offset, data)
        file.flush()
    file.pwrite(start, first)
    file.flush()
