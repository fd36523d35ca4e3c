"""Chunk maps: what the formats share that keep a disk as a list of packed chunks.

Such an image has a list of chunks in the order of the disk: each is zeros, bytes as they are, or a stream that has to
be decoded. A driver reads and checks the list, hands it over as columns, and says how a stream is unpacked; extents and
the cache of decoded chunks are here. What no chunk describes is a chunk too, of the kind ``MISSING``.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from diskwright.core.driver import Format, OpenContext
from diskwright.errors import CorruptImage, LimitExceeded, UnsupportedFeature
from diskwright.extents import DATA, SPECIAL, ZERO, Extent, Extents
from diskwright.units import SECTOR, MiB

if TYPE_CHECKING:
    from array import array

    from diskwright.core.node import Node

MISSING: Final = 255
"""Kind of a range that the image should describe and does not: reading it is an error."""

MAX_CHUNK: Final = 64 * MiB
"""Bytes a stored chunk has at most, packed or unpacked."""
MAX_CHUNKS: Final = 1 << 22
"""Chunks of an image at most: their list takes 26 bytes each."""

_KEPT_BYTES: Final = 8 * MiB
_KEPT_MOST: Final = 16
"""Decoded chunks kept; one is kept even when it is larger than ``_KEPT_BYTES``."""


def refuse_writing(context: OpenContext) -> None:
    """For the formats that can only be read. Raises UnsupportedFeature, in qemu-img's words."""
    if context.writable:
        raise UnsupportedFeature("Image is read-only")


def inflate(raw: memoryview, size: int) -> bytes:
    """The bytes of a zlib stream (RFC 1950), which should be ``size``; at most one more, so that a longer stream is
    noticed and the checksum behind the last byte is looked at. Raises the library's errors and EOFError."""
    try:
        from isal import isal_zlib as library
    except ImportError:
        import zlib as library  # type: ignore[no-redef]
    return unpack(library.decompressobj(), raw, size)


def unpack(stream: Any, raw: memoryview, size: int) -> bytes:
    """``inflate`` by any object with ``decompress`` and ``eof``."""
    data: bytes = stream.decompress(raw, size + 1)
    parts, have = [data], len(data)
    while data and have <= size and not stream.eof:
        data = stream.decompress(getattr(stream, "unconsumed_tail", b""), size + 1 - have)
        parts.append(data)
        have += len(data)
    if have <= size and not stream.eof:
        raise EOFError("its end is missing")
    return parts[0] if len(parts) == 1 else b"".join(parts)


class ChunkMap(Format):
    """One open image of this kind. See the module's text."""

    cluster_size = SECTOR

    def __init__(
        self,
        file: Node,
        size: int,
        starts: Sequence[int],
        kinds: bytes | bytearray,
        places: array[int],
        stored: array[int],
    ) -> None:
        """Columns with a row for each chunk, in bytes: where it begins on the disk, ascending from 0; DATA, ZERO,
        SPECIAL or MISSING; place and length in the file. ``starts`` has one more, the last one's end, which is
        ``size`` or above."""
        self.children = (file,)
        self.path, self.size = file.filename, size
        self._starts, self._kinds, self._places, self._stored = starts, kinds, places, stored
        self._kept: dict[tuple[int, int], bytes] = {}  # chunk and its place -> decoded; the oldest first
        self._kept_bytes = 0
        self._lock = threading.Lock()
        self._columns: Any = None

    @abstractmethod
    def unpack_chunk(self, chunk: int, raw: memoryview, size: int) -> bytes:
        """The bytes of a SPECIAL chunk. At most ``size + 1`` of them may be made, whatever ``raw`` holds; the caller
        checks their number. Errors of libraries may be raised as they are."""

    def _end(self, chunk: int) -> int:
        return self._starts[chunk + 1]

    # -- the map -------------------------------------------------------------------------------------

    def extent_at(self, offset: int, length: int) -> Extent:
        chunk = bisect_right(self._starts, offset) - 1
        kind, start, end = self._kinds[chunk], self._starts[chunk], self._end(chunk)
        if kind == SPECIAL:
            run = min(length, end - offset)
            return Extent(offset, run, SPECIAL, self._places[chunk], 0, self._stored[chunk])
        if kind == MISSING:
            raise self._missing(offset)
        place = self._places[chunk] + offset - start if kind == DATA else -1
        stop = offset + length
        while end < stop:
            chunk += 1
            if self._kinds[chunk] != kind or (kind == DATA and self._places[chunk] != place + end - offset):
                break
            end = self._end(chunk)
        return Extent(offset, min(length, end - offset), kind, place)

    def extents(self, offset: int, length: int) -> Extents:
        import numpy as np

        first = bisect_right(self._starts, offset) - 1
        last = bisect_right(self._starts, offset + length - 1)
        starts = np.array(self._starts[first : last + 1], np.int64)
        kinds = np.frombuffer(self._kinds, np.uint8)[first:last].copy()
        missing = kinds == MISSING
        if missing.any():
            raise self._missing(max(offset, int(starts[np.argmax(missing)])))
        places = np.array(self._places[first:last], np.int64)
        places[kinds == ZERO] = -1
        stored = np.array(self._stored[first:last], np.int64)
        stored[kinds != SPECIAL] = 0
        found = Extents(starts[:-1], np.diff(starts), kinds, places, np.zeros(last - first, np.int16), stored)
        return found.slice(offset, length).merge()

    def _missing(self, offset: int) -> CorruptImage:
        return CorruptImage(
            self.path, "the list of chunks", "incomplete", None, f"nothing describes offset {offset:#x}"
        )

    # -- chunks --------------------------------------------------------------------------------------

    def decode(self, extent: Extent, raw: memoryview, into: memoryview) -> None:
        chunk = bisect_right(self._starts, extent.offset) - 1
        size = self._end(chunk) - self._starts[chunk]
        if len(into) == size:  # nothing of it is left to be asked for
            into[:] = self._chunk(chunk, raw, size)
            return
        key = chunk, extent.file_offset
        data = self._kept.get(key)
        if data is None:
            data = self._chunk(chunk, raw, size)
            self._keep(key, data)
        inside = extent.offset - self._starts[chunk]
        into[:] = memoryview(data)[inside : inside + len(into)]

    def _keep(self, key: tuple[int, int], data: bytes) -> None:
        with self._lock:
            if key in self._kept:
                return
            kept = self._kept
            while kept and (len(kept) >= _KEPT_MOST or self._kept_bytes + len(data) > _KEPT_BYTES):
                self._kept_bytes -= len(kept.pop(next(iter(kept))))
            kept[key] = data
            self._kept_bytes += len(data)

    def _chunk(self, chunk: int, raw: memoryview, size: int) -> bytes:
        try:
            data = self.unpack_chunk(chunk, raw, size)
        except (UnsupportedFeature, MemoryError):
            raise
        except Exception as error:  # each library has errors of its own
            raise self._corrupt(chunk, f"it does not decode: {error}") from error
        if len(data) != size:
            what = f"{len(data)} bytes" if len(data) < size else "more"
            raise self._corrupt(chunk, f"it decodes to {what}, not to {size} bytes")
        return data

    def _corrupt(self, chunk: int, why: str) -> CorruptImage:
        field = f"stored chunk of guest offset {self._starts[chunk]:#x}"
        return CorruptImage(self.path, field, f"{self._stored[chunk]} bytes", self._places[chunk], why)


def check_stored(file: Node, what: str, place: int, length: int, *, packed: bool) -> None:
    """Raises CorruptImage when ``length`` bytes at ``place`` are not within the file, LimitExceeded when a packed
    chunk is longer than any may be."""
    if place < 0 or length < 0 or place + length > file.size:
        raise CorruptImage(
            file.filename, what, f"{length} bytes at {place:#x}", None, f"the file has {file.size} bytes"
        )
    if packed and length > MAX_CHUNK:
        raise LimitExceeded(f"{file.filename}: {what} has {length} bytes; at most {MAX_CHUNK} are possible")
