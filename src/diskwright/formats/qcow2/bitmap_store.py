"""Loading, keeping and storing an image's persistent bitmaps (section Bitmaps).

What is in the file is right or says that it is not. A bitmap's IN_USE flag is set, durably, before the bitmap in
memory can first differ from the one in the file: for those that record writes when the image is opened, for the others
when they are first changed. It is cleared only by a new directory, which is written, with all it names, to new
places and is durable before the header names it. A crash leaves a bitmap as it was stored last, or in use, which
makes it inconsistent: then it can only be removed.
"""

from __future__ import annotations

import os
import struct
import sys
import threading
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Final

from diskwright.core.driver import BitmapStore
from diskwright.errors import CorruptImage, ImageError, LimitExceeded
from diskwright.formats.qcow2 import bitmap_header, bitmaps
from diskwright.formats.qcow2.bitmaps import ALL_ONES, AUTO, IN_USE, Entry
from diskwright.formats.qcow2.layout import MAX_BITMAP_DIRECTORY_BYTES, MAX_BITMAPS
from diskwright.units import MiB

if TYPE_CHECKING:
    from diskwright.core.bitmap import DirtyBitmap
    from diskwright.core.node import Node
    from diskwright.formats.qcow2.driver import Qcow2
    from diskwright.formats.qcow2.header import Header
    from diskwright.formats.qcow2.writing import Writer

MAX_BITS_BYTES: Final = 512 * MiB
"""Memory that all bitmaps of an image may take: as much as other programs accept for a single one."""
MAX_TABLES_BYTES: Final = 64 * MiB
"""All tables of an image together: they are read whole."""

_AT_ONCE: Final = 4 * MiB
"""Bytes of bitmap data written together."""

Runs = list[tuple[int, int]]


@dataclass
class _Kept:
    """A bitmap of the image: its directory entry, None when it has never been stored, and what is in memory."""

    bitmap: DirtyBitmap
    entry: Entry | None
    changed: bool
    """Whether memory may differ from the file, which then says IN_USE."""
    clusters: Runs = field(default_factory=list)
    """Host clusters of its table and data; only known while the image is written to."""


class Qcow2Bitmaps(BitmapStore):
    """The persistent bitmaps of one open image. Thread-safe."""

    def __init__(self, image: Qcow2) -> None:
        """Nothing is read yet."""
        self._image = image
        self._lock = threading.RLock()
        self._kept: list[_Kept] | None = None
        self._directory: Runs = []

    @property
    def available(self) -> bool:  # type: ignore[override]
        return self._image.header.version >= 3

    def entries(self) -> list[Entry]:
        """What the file's directory says. Raises CorruptImage."""
        with self._lock:
            if self._kept is None:
                return bitmaps.read_entries(self._image.children[0], self._image.header)
            return [kept.entry for kept in self._kept if kept.entry is not None]

    # -- loading -----------------------------------------------------------------------------------

    def load(self) -> Sequence[DirtyBitmap]:
        """See ``BitmapStore.load``. In an image that is written to, those that record are then marked in use."""
        with self._lock:
            if self._kept is not None:
                return []
            image = self._image
            file, header = image.children[0], image.header
            entries = bitmaps.read_entries(file, header)
            self._check_limits(file, header, entries)
            if image.writer is not None:
                directory = _directory_runs(header)
                self._claim(image.writer, directory)
                self._directory = directory
            self._kept = kept = [self._load_one(file, header, entry) for entry in entries]
            if image.writer is not None:
                self._mark_in_use([each for each in kept if each.entry is not None and each.entry.flags & AUTO])
            return [each.bitmap for each in kept]

    def _check_limits(self, file: Node, header: Header, entries: list[Entry]) -> None:
        """Raises LimitExceeded before anything is read or allocated for a bitmap; ImageError for one that would have
        to be kept up to date, but by rules that are not known."""
        path = file.filename
        bits = sum(_granules(header.size, e) // 8 + 1 for e in entries if not e.flags & IN_USE)
        if bits > MAX_BITS_BYTES:
            raise LimitExceeded(f"{path}: its bitmaps take {bits} bytes, more than the {MAX_BITS_BYTES} accepted")
        tables = sum(entry.bitmap_table_size * 8 for entry in entries)
        if tables > MAX_TABLES_BYTES:
            raise LimitExceeded(
                f"{path}: the tables of its bitmaps take {tables} bytes, more than the {MAX_TABLES_BYTES} accepted"
            )
        for entry in entries:
            if self._image.writer is not None and not entry.usable and entry.flags & (AUTO | IN_USE) == AUTO:
                raise ImageError(
                    f"{path}: bitmap '{os.fsdecode(entry.name)}' would have to record writes, but has flags "
                    f"{entry.flags:#x} and {len(entry.extra_data)} bytes of extra data that are not known here"
                )

    def _load_one(self, file: Node, header: Header, entry: Entry) -> _Kept:
        """The bitmap of an entry. One whose table makes no sense is as inconsistent as one marked in use."""
        from diskwright.core.bitmap import DirtyBitmap

        writer = self._image.writer

        bad = bool(entry.flags & IN_USE) or not entry.usable
        clusters: Runs = []
        table = array("Q")
        try:
            table = self._read_table(file, header, entry, exact=not bad)
            clusters = _clusters_of(header, entry, table)
            if writer is not None:
                self._claim(writer, clusters)
        except CorruptImage:
            bad, clusters = True, []
        name = os.fsdecode(entry.name)
        # An inconsistent one says nothing, and takes no memory to say it.
        bitmap = DirtyBitmap(
            0 if bad else header.size, 1 << entry.granularity_bits, name=name, enabled=bool(entry.flags & AUTO)
        )
        if not bad:
            bad = not _read_bits(file, header, table, bitmap)
        if bad:
            bitmap.resize(0)
            bitmap.enabled = False
        bitmap.persistent, bitmap.inconsistent = True, bad
        bitmap.readonly = writer is None
        kept = _Kept(bitmap, entry, False, clusters)
        if not bad and writer is not None:
            bitmap.guard = partial(self._mark_in_use, [kept])
        return kept

    def _read_table(self, file: Node, header: Header, entry: Entry, *, exact: bool) -> array[int]:
        """A bitmap's table, checked. Raises CorruptImage for what is impossible."""
        path, size = file.filename, 1 << header.cluster_bits
        wanted = _table_size(header, entry)
        if exact and entry.bitmap_table_size != wanted:
            raise CorruptImage(path, "bitmap_table_size", entry.bitmap_table_size, None, f"must be {wanted}")
        if entry.bitmap_table_size and (not entry.bitmap_table_offset or entry.bitmap_table_offset & (size - 1)):
            raise CorruptImage(path, "bitmap_table_offset", f"{entry.bitmap_table_offset:#x}")
        table = bitmaps.read_bitmap_table(file, bitmaps.BitmapTable(entry.bitmap_table_offset, entry.bitmap_table_size))
        own = entry.bitmap_table_offset
        seen = set(range(own, own + entry.bitmap_table_size * 8, size))
        for value in table:
            place = bitmaps.cluster_of(value, size)
            if place is None or place in seen:
                raise CorruptImage(path, "bitmap table entry", f"{value:#x}")
            if place:
                seen.add(place)
                if place >= file.size or len(seen) << header.cluster_bits > MAX_BITS_BYTES:
                    raise CorruptImage(path, "bitmap table entry", f"{value:#x}")
        return table

    def _claim(self, writer: Writer, clusters: Runs) -> None:
        """From now on guest data never goes there. What other metadata lies in, other bitmaps included, cannot be a
        bitmap's, and must never be freed as such: CorruptImage then."""
        with writer.lock:
            for first, count in clusters:
                for host in range(first, first + count):
                    if writer.metadata.contains(host, 1) or writer.refcounts.get(host) != 1:
                        raise CorruptImage(
                            writer.path, "place of a bitmap", f"host cluster {host}", None,
                            "something else lies there too, or its refcount is not 1",
                        )  # fmt: skip
            _protect(writer, clusters)

    def protect(self, writer: Writer) -> None:
        """As ``_claim`` for all that is known to be the bitmaps', for a new ``writer``."""
        with self._lock, writer.lock:
            for runs in (self._directory, *(kept.clusters for kept in self._kept or ())):
                _protect(writer, runs)

    # -- marking -----------------------------------------------------------------------------------

    def _mark_in_use(self, changing: list[_Kept]) -> None:
        """Durably says of stored bitmaps that what is stored may no longer be right."""
        with self._lock:
            pieces = []
            for kept in changing:
                if kept.entry is not None and not kept.entry.flags & IN_USE:
                    at = (self._directory[0][0] << self._image.header.cluster_bits) + kept.entry.at + bitmaps.AT_FLAGS
                    pieces.append((at, memoryview(struct.pack(">I", kept.entry.flags | IN_USE))))
            if pieces:
                file = self._image.children[0]
                file.writev(pieces)
                file.flush()
            for kept in changing:
                kept.changed = not kept.bitmap.inconsistent
                kept.bitmap.guard = None
                if kept.entry is not None:
                    kept.entry.flags |= IN_USE

    def before_resize(self, size: int) -> None:
        """The disk's size is going to change, and with it the sizes of all bitmaps. Raises GraphError when one of
        them could not follow, LimitExceeded."""
        with self._lock:
            self.load()
            kept = self._kept or []
            for each in kept:
                each.bitmap.check()
            total = sum((size >> each.bitmap.granularity.bit_length() - 1) // 8 + 1 for each in kept)
            if kept and total > MAX_BITS_BYTES:
                raise LimitExceeded(
                    f"{self._image.children[0].filename}: its bitmaps would take {total} bytes, more than the "
                    f"{MAX_BITS_BYTES} accepted; remove some first"
                )
            self._mark_in_use(kept)

    # -- adding and removing -----------------------------------------------------------------------

    def check_new(self, name: str, granularity: int) -> None:
        """See ``BitmapStore.check_new``."""
        with self._lock:
            header, kept = self._image.header, self._kept or []
            entry = Entry(0, 0, 0, granularity.bit_length() - 1, os.fsencode(name))
            if header.version < 3:
                raise ImageError("Cannot store dirty bitmaps in qcow2 v2 files")
            if len(entry.name) > bitmaps.MAX_NAME:
                raise ImageError(f"Name length exceeds maximum ({bitmaps.MAX_NAME} characters)")
            if "\0" in name:
                raise ImageError("A bitmap's name cannot contain NUL")
            if len(kept) >= MAX_BITMAPS:
                raise ImageError(f"Maximum number of persistent bitmaps ({MAX_BITMAPS}) is already reached")
            directory = sum(len(_entry_of(each).encode()) for each in kept) + len(entry.encode())
            if directory > MAX_BITMAP_DIRECTORY_BYTES:
                raise ImageError("Not enough space in the bitmap directory")
            bits = sum(len(each.bitmap.buffer) for each in kept) + _granules(header.size, entry) // 8 + 1
            tables = sum(_table_size(header, _entry_of(each)) for each in kept) + _table_size(header, entry)
            if bits > MAX_BITS_BYTES or tables * 8 > MAX_TABLES_BYTES:
                raise ImageError("Too much space will be occupied by the bitmap. Use larger granularity")

    def add(self, bitmap: DirtyBitmap) -> None:
        """See ``BitmapStore.add``."""
        with self._lock:
            assert self._kept is not None, "loaded when the image was opened for writing"
            self._kept.append(_Kept(bitmap, None, True))

    def remove(self, bitmap: DirtyBitmap) -> None:
        """See ``BitmapStore.remove``."""
        with self._lock:
            kept = next(each for each in self._kept or [] if each.bitmap is bitmap)
            assert self._kept is not None
            if kept.entry is not None:
                writer = self._image.writer
                assert writer is not None
                left = [(each, each.entry) for each in self._kept if each is not kept and each.entry is not None]
                taken: Runs = []
                self._switch(writer, left, taken)
                writer.give_back(kept.clusters)
            self._kept.remove(kept)
            bitmap.persistent, bitmap.guard = False, None

    # -- storing -----------------------------------------------------------------------------------

    def store(self) -> None:
        """Stores what has changed: afterwards all bitmaps in the file are as in memory, and durable. Nobody writes to
        the disk any more. Raises ImageError; then those that had changed stay marked in use."""
        with self._lock:
            changed = [kept for kept in self._kept or [] if kept.changed]
            writer = self._image.writer
            if not changed or writer is None:
                return
            taken: Runs = []
            places: list[tuple[_Kept, Runs]] = []
            entries: list[tuple[_Kept, Entry]] = []
            try:
                writer.checkpoint()  # what they speak of comes first
                for kept in self._kept or []:
                    if kept.changed:
                        start = len(taken)
                        entries.append((kept, self._write_one(writer, kept, taken)))
                        places.append((kept, taken[start:]))
                    elif kept.entry is not None:
                        entries.append((kept, kept.entry))
                self._switch(writer, entries, taken)
            except (OSError, ImageError) as error:
                writer.give_back(taken)
                names = ", ".join(f"'{kept.bitmap.name}'" for kept in changed)
                raise ImageError(f"{writer.path}: could not store bitmap {names}, which is lost: {error}") from error
            for kept, clusters in places:
                writer.give_back(kept.clusters)
                kept.clusters, kept.changed = clusters, False
                kept.bitmap.guard = partial(self._mark_in_use, [kept])

    def _write_one(self, writer: Writer, kept: _Kept, taken: Runs) -> Entry:
        """Writes a bitmap to new places, which are put into ``taken``; returns the entry for them."""
        bitmap, size = kept.bitmap, writer.geometry.cluster_size
        if bitmap.size != writer.header.size:
            bitmap.resize(writer.header.size)  # a resize that failed half way
        old = _entry_of(kept)
        table = array("Q", bytes(8 * _table_size(writer.header, old)))
        step = size * 8 * bitmap.granularity  # bytes of the disk for which a cluster has the bits
        zeros, ones = bytes(size), b"\xff" * size
        waiting: list[tuple[int, bytes]] = []
        for index in range(len(table)):
            bits = bitmap.read_bits(index * step, min(step, bitmap.size - index * step))
            if bits == ones:
                table[index] = ALL_ONES
            elif bits != zeros[: len(bits)]:
                waiting.append((index, bits.ljust(size, b"\0")))
                if len(waiting) << writer.geometry.cluster_bits >= _AT_ONCE:
                    _write_clusters(writer, table, waiting, taken)
        _write_clusters(writer, table, waiting, taken)
        offset = 0
        if len(table):
            offset = _write_in_one_piece(writer, big_endian_table(table), taken)
        flags = (old.flags & ~(IN_USE | AUTO)) | (AUTO if bitmap.enabled else 0)
        return Entry(offset, len(table), flags, old.granularity_bits, old.name, old.extra_data)

    def _switch(self, writer: Writer, entries: list[tuple[_Kept, Entry]], taken: Runs) -> None:
        """Makes ``entries`` the image's bitmaps, durably. What they name has been written. Places this takes are added
        to ``taken``; when it raises, ``taken`` has what can be given back."""
        encoded = [replace(entry) for _, entry in entries]
        directory: Runs = []
        if encoded:
            data = bitmaps.encode_directory(encoded)
            try:
                offset = _write_in_one_piece(writer, data, directory)
            finally:
                taken += directory
            extension = bitmaps.encode_extension(len(encoded), len(data), offset)
        writer.checkpoint()  # makes durable what the header will name, and that it is counted
        keeping, taken[:] = list(taken), []
        # A failure from here on leaves open which directory the header names: neither's places can be freed then.
        if encoded:
            bitmap_header.point_at(writer, extension)
        else:
            bitmap_header.point_nowhere(writer)
        taken[:] = keeping
        for (kept, _), entry in zip(entries, encoded, strict=True):
            kept.entry = entry
        old, self._directory = self._directory, directory
        writer.give_back(old)


def _write_clusters(writer: Writer, table: array[int], waiting: list[tuple[int, bytes]], taken: Runs) -> None:
    """Writes clusters of bitmap data and enters them into the table; ``waiting`` is empty afterwards."""
    bits = writer.geometry.cluster_bits
    done = 0
    while done < len(waiting):
        first, count = writer.take(len(waiting) - done)
        taken.append((first, count))
        with writer.lock:
            _protect(writer, [(first, count)])
        part = waiting[done : done + count]
        writer.file.pwrite(first << bits, b"".join(data for _, data in part))
        for i, (index, _) in enumerate(part):
            table[index] = (first + i) << bits
        done += count
    waiting.clear()


def _write_in_one_piece(writer: Writer, data: bytes, taken: Runs) -> int:
    """Writes a table to adjoining clusters; returns the offset."""
    bits = writer.geometry.cluster_bits
    count = writer.geometry.clusters(len(data))
    first = writer.take_adjoining(count)
    taken.append((first, count))
    with writer.lock:
        _protect(writer, [(first, count)])
    writer.file.pwrite(first << bits, data.ljust(count << bits, b"\0"))
    return first << bits


def _protect(writer: Writer, runs: Runs) -> None:
    for first, count in runs:
        for host in range(first, first + count):
            writer.metadata.add(host)


def big_endian_table(table: array[int]) -> bytes:
    swapped = array("Q", table)
    if sys.byteorder == "little":
        swapped.byteswap()
    return swapped.tobytes()


def _read_bits(file: Node, header: Header, table: array[int], bitmap: DirtyBitmap) -> bool:
    """Loads a bitmap's contents; False when the file ends before they do."""
    size = 1 << header.cluster_bits
    step = size * 8 * bitmap.granularity
    total = len(bitmap.buffer)
    for index, entry in enumerate(table):
        length = min(size, total - index * size)
        if entry == ALL_ONES:
            bitmap.load_bits(index * step, b"\xff" * length)
        elif entry:
            place = bitmaps.cluster_of(entry, size)
            assert place
            if place + length > file.size:
                return False
            bitmap.load_bits(index * step, file.pread(place, length))
    return True


def _granules(size: int, entry: Entry) -> int:
    return -(-size >> entry.granularity_bits)


def _table_size(header: Header, entry: Entry) -> int:
    """How many entries the table of such a bitmap has."""
    return -(-_granules(header.size, entry) // (8 << header.cluster_bits))


def _entry_of(kept: _Kept) -> Entry:
    """Its entry, or what will be one."""
    if kept.entry is not None:
        return kept.entry
    bitmap = kept.bitmap
    assert bitmap.name is not None
    return Entry(0, 0, 0, bitmap.granularity.bit_length() - 1, os.fsencode(bitmap.name))


def _clusters_of(header: Header, entry: Entry, table: array[int]) -> Runs:
    """Host clusters of a bitmap's table and data."""
    bits, size = header.cluster_bits, 1 << header.cluster_bits
    runs: Runs = []
    if entry.bitmap_table_size:
        runs.append((entry.bitmap_table_offset >> bits, -(-entry.bitmap_table_size * 8 >> bits)))
    for value in table:
        place = bitmaps.cluster_of(value, size)
        if place:
            host = place >> bits
            if runs and sum(runs[-1]) == host:
                runs[-1] = runs[-1][0], runs[-1][1] + 1
            else:
                runs.append((host, 1))
    return runs


def _directory_runs(header: Header) -> Runs:
    found = bitmaps.directory(header)
    if found is None:
        return []
    offset, size, _ = found
    return [(offset >> header.cluster_bits, -(-size >> header.cluster_bits))]
