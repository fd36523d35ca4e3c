"""Nodes: the vertices of the block graph. Everything that moves guest bytes by extents is here.

A node wraps one driver and offers one interface above all three kinds:

* ``StorageNode``  bytes at offsets, handed to a Storage;
* ``FormatNode``   a Format's map, followed to its children and, where it says nothing, to ``backing``;
* ``FilterNode``   a Filter's child, with the filter in between.

Nodes check nothing that a ``Disk`` or a driver has checked already, and count no requests: whoever
calls them holds a lease of the graph (see ``Disk.begin``), and keeps within ``size`` except where a
format makes its file grow.
"""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final

from diskwright.core.compression import StoredWriter, read_stored
from diskwright.core.driver import (
    COMPRESSION,
    FilePlace,
    Filter,
    Format,
    Progress,
    Reservation,
    Segment,
    Segments,
    Storage,
    not_supported,
)
from diskwright.core.permissions import Access
from diskwright.errors import GraphError
from diskwright.extents import DATA, SPECIAL, UNALLOCATED, ZERO, Extent, Extents
from diskwright.units import MiB

if TYPE_CHECKING:
    from diskwright.core.bitmap import DirtyBitmap

ZEROS: Final = memoryview(bytes(MiB))
"""What zeros are copied from; long ranges are written this much at a time."""


class Node(ABC):
    """One vertex. Thread-safe; lengths and offsets are bytes."""

    driver_name: str
    filename: str
    writable: bool
    backing: Node | None = None
    event: Callable[[str], None] | None = None
    """Where it is not None, who works on this node calls it with the name of what is about to be done (out of QAPI's
    ``BlkdebugEvent``), so that a fault can be injected right there. It may keep the caller waiting."""

    def __init__(self, name: str, driver_name: str, filename: str, writable: bool) -> None:
        self.name, self.driver_name, self.filename, self.writable = name, driver_name, filename, writable
        self.bitmaps: tuple[DirtyBitmap, ...] = ()
        self.unmaps = True
        """Whether discards are carried out, and a storage's space is given back for zeros (option ``discard``)."""
        self.detect_zeroes = "off"
        """Whether writes of nothing but zeros become zeros on the map: off, on, or unmap (space is given back)."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name} {self.driver_name} {self.filename!r}>"

    # -- what kinds of node differ in ------------------------------------------------------------

    @property
    @abstractmethod
    def size(self) -> int: ...

    @property
    @abstractmethod
    def alignment(self) -> int:
        """Requests that keep to this need no copying below."""

    @property
    @abstractmethod
    def zero_init(self) -> bool:
        """Whether a newly created image here reads as zeros."""

    @abstractmethod
    def children(self) -> dict[str, Node]:
        """Children by role, ``backing`` included."""

    @abstractmethod
    def readv(self, segments: Segments, *, nowait: bool = False) -> None:
        """Fills every buffer; see ``Storage.readv`` for ``nowait``."""

    @abstractmethod
    def extent_at(self, offset: int, length: int) -> Extent:
        """The first run at ``offset`` as this layer alone sees it."""

    @abstractmethod
    def extents(self, offset: int, length: int) -> Extents:
        """All runs of at most ``extents.WINDOW`` bytes as this layer alone sees them."""

    @abstractmethod
    def place(self, offset: int, length: int) -> FilePlace | None:
        """Where the kernel finds the first bytes at ``offset``, through all layers; see ``Storage.place``."""

    @abstractmethod
    def flush(self) -> None:
        """Returns when every write that had returned is durable."""

    @abstractmethod
    def resize(self, size: int, *, preallocation: str = "off") -> None: ...

    @abstractmethod
    def close(self) -> None:
        """Closes the driver; children are the graph's to close."""

    @abstractmethod
    def _writev(self, segments: Segments) -> None: ...

    @abstractmethod
    def _write_zeros(self, offset: int, length: int, unmap: bool, fast: bool) -> None: ...

    @abstractmethod
    def _discard(self, offset: int, length: int) -> None: ...

    @abstractmethod
    def _copy_from(self, offset: int, source: FilePlace) -> None: ...

    # -- shared ----------------------------------------------------------------------------------

    def announce(self, name: str) -> None:
        """See ``event``."""
        if self.event is not None:
            self.event(name)

    @property
    def file(self) -> Node | None:
        """The child an image lies in, or a filter's; None for a storage."""
        return self.children().get("file")

    @property
    def cluster_size(self) -> int:
        """Allocation unit; 1 where there is none."""
        return 1

    def writev(self, segments: Segments) -> None:
        """Writes every buffer, in order. When it raises, any part may have been written."""
        write = self._writev if self.detect_zeroes == "off" else self._write_detecting
        if not self.bitmaps:
            return write(segments)
        try:
            return write(segments)
        finally:
            for bitmap in self.bitmaps:
                bitmap.set_segments(segments)

    @property
    def compresses(self) -> bool:
        """Whether ``write_compressed`` is possible."""
        return False

    @property
    def packs(self) -> bool:
        """See ``Format.packs``."""
        return False

    @property
    def only_compressed(self) -> bool:
        """Whether ``write_compressed`` is the only way, in ascending order; see ``Format.only_compressed``."""
        return False

    def write_compressed(self, segments: Segments, *, turn: Callable[[], None] | None = None) -> None:
        """Writes whole clusters, each compressed, or as it is where that makes it no smaller. Segments begin and end
        where clusters do, or at the end of the disk. ``turn`` is called when all have been compressed and nothing has
        been written. Raises ENOTSUP, naming compression, where the format has none."""
        try:
            self._write_compressed(segments, turn)
        finally:
            for bitmap in self.bitmaps:
                bitmap.set_segments(segments)

    def _write_compressed(self, segments: Segments, turn: Callable[[], None] | None) -> None:
        raise not_supported(COMPRESSION)

    def write_unchanged(self, segments: Segments) -> None:
        """Writes what reads there already, so that this layer has it itself. It makes nothing dirty."""
        for offset, buffer in segments:
            if is_zero(buffer):
                self._write_zeros(offset, len(buffer), False, False)
            else:
                self._writev([(offset, buffer)])

    def write_zeros_unchanged(self, offset: int, length: int) -> None:
        """The same for a range that reads as zeros already."""
        self._write_zeros(offset, length, True, False)

    def write_zeros(self, offset: int, length: int, *, unmap: bool = False, fast: bool = False) -> None:
        """Makes the whole range read as zeros. ``unmap`` lets space be given back; ``fast`` raises ENOTSUP
        rather than write zeros out."""
        try:
            self._write_zeros(offset, length, unmap, fast)
        finally:
            self._mark(offset, length)

    def discard(self, offset: int, length: int) -> None:
        """The range's contents no longer matter; space may be given back. Never fails for want of support."""
        if not self.unmaps:
            return
        try:
            self._discard(offset, length)
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.EOPNOTSUPP):
                raise
        finally:
            self._mark(offset, length)

    def copy_from(self, offset: int, source: FilePlace) -> None:
        """Writes ``source``'s bytes at ``offset`` without bringing them into this process. Raises ENOTSUP
        when the kernel will not; the caller then writes the whole range."""
        try:
            self._copy_from(offset, source)
        finally:
            self._mark(offset, source.length)

    def pread(self, offset: int, length: int) -> bytes:
        """``length`` bytes at ``offset``. For metadata and tests: hot paths bring their own buffers."""
        buffer = bytearray(length)
        if length:
            self.readv([(offset, memoryview(buffer))])
        return bytes(buffer)

    def pwrite(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        if len(data):
            self.writev([(offset, memoryview(data).cast("B"))])

    def add_bitmap(self, bitmap: DirtyBitmap) -> None:
        """From now on ``bitmap`` has a bit set for what a write touched, once that write has ended."""
        self.bitmaps = (*self.bitmaps, bitmap)

    def remove_bitmap(self, bitmap: DirtyBitmap) -> None:
        self.bitmaps = tuple(b for b in self.bitmaps if b is not bitmap)

    def _mark(self, offset: int, length: int) -> None:
        for bitmap in self.bitmaps:
            bitmap.set(offset, length)

    def _write_detecting(self, segments: Segments) -> None:
        """Writes in which segments of zeros are told as zeros."""
        unmap, pending = self.detect_zeroes == "unmap", []
        for segment in segments:
            offset, buffer = segment
            if not is_zero(buffer):
                pending.append(segment)
                continue
            if pending:  # before this one: two writes of a batch to one place must land in their order
                self._writev(pending)
                pending = []
            self._write_zeros(offset, len(buffer), unmap, False)
        if pending:
            self._writev(pending)

    def _write_out_zeros(self, offset: int, length: int) -> None:
        end = offset + length
        while offset < end:
            step = min(len(ZEROS), end - offset)
            self._writev([(offset, ZEROS[:step])])
            offset += step


class StorageNode(Node):
    """A Storage in the graph."""

    def __init__(self, name: str, storage: Storage, writable: bool) -> None:
        super().__init__(name, storage.name, storage.filename, writable)
        self.storage = storage
        self.reopened: Callable[[bool], Storage] | None = None
        """Opens the same bytes anew, for writing or not; see ``core.reopen``. None: it was made outside a graph."""
        self.access_when: Callable[[bool], Access] | None = None
        """What its locks then say."""
        # Reading is the hottest path there is and this node adds nothing to it.
        self.readv = storage.readv  # type: ignore[method-assign]

    @property
    def size(self) -> int:
        return self.storage.size

    @property
    def alignment(self) -> int:
        return self.storage.alignment

    @property
    def zero_init(self) -> bool:
        return self.storage.zero_init

    def children(self) -> dict[str, Node]:
        return {}

    def readv(self, segments: Segments, *, nowait: bool = False) -> None:
        self.storage.readv(segments, nowait=nowait)

    def extent_at(self, offset: int, length: int) -> Extent:
        return self.storage.extent_at(offset, length)

    def extents(self, offset: int, length: int) -> Extents:
        return self.storage.extents(offset, length)

    def place(self, offset: int, length: int) -> FilePlace | None:
        return self.storage.place(offset, length)

    def flush(self) -> None:
        self.storage.flush()

    def resize(self, size: int, *, preallocation: str = "off") -> None:
        self.storage.truncate(size, preallocation=preallocation)

    def close(self) -> None:
        self.storage.close()

    def _writev(self, segments: Segments) -> None:
        self.storage.writev(segments)

    def _write_zeros(self, offset: int, length: int, unmap: bool, fast: bool) -> None:
        try:
            self.storage.write_zeros(offset, length, unmap=unmap and self.unmaps, fast=fast)
        except OSError as error:
            if fast or error.errno not in (errno.ENOTSUP, errno.EOPNOTSUPP):
                raise
            self._write_out_zeros(offset, length)

    def _discard(self, offset: int, length: int) -> None:
        self.storage.discard(offset, length)

    def _copy_from(self, offset: int, source: FilePlace) -> None:
        self.storage.copy_from(offset, source)


class FormatNode(Node):
    """A Format's map in the graph: turns requests on the guest's bytes into requests on children."""

    def __init__(self, name: str, format: Format, writable: bool) -> None:
        super().__init__(name, format.name, format.children[0].filename, writable)
        self.format = format
        self.reopened: Callable[[bool], Format] | None = None
        """Opens the image anew over the children it has, for writing or not; see ``core.reopen``."""
        self._announce = format.children[0].event  # the file of a format is not exchanged while it is open
        if format.linear is not None:
            self.event = self._announce
        if writable and format.bitmap_store is not None:
            # Who writes has to record it. Who only reads loads them when they are asked for (core.bitmaps).
            self.bitmaps = tuple(format.bitmap_store.load())

    def exchange(self, format: Format) -> None:
        """Goes on with ``format``, the same image opened anew. Called with no request in flight."""
        self.format = format

    @property
    def size(self) -> int:
        return self.format.size

    @property
    def alignment(self) -> int:
        return max(child.alignment for child in self.format.children)

    @property
    def zero_init(self) -> bool:
        return self.format.zero_init() and (self.format.linear is None or self.format.children[0].zero_init)

    @property
    def cluster_size(self) -> int:
        return self.format.cluster_size

    def children(self) -> dict[str, Node]:
        roles: dict[str, Node] = {"file": self.format.children[0]}
        names = self.format.roles
        for i, child in enumerate(self.format.children[1:], 1):
            roles[names[i - 1] if i <= len(names) else f"extent{i}"] = child
        if self.backing is not None:
            roles["backing"] = self.backing
        return roles

    def extent_at(self, offset: int, length: int) -> Extent:
        return self.format.extent_at(offset, length)

    def extents(self, offset: int, length: int) -> Extents:
        return self.format.extents(offset, length)

    def flush(self) -> None:
        if self._announce is not None:
            self._announce("flush_to_os")
            if self.format.linear is not None:
                self._announce("flush_to_disk")
        self.format.flush()

    def resize(self, size: int, *, preallocation: str = "off") -> None:
        old = self.size
        backed = min(size, self.backing.size) if self.backing is not None else 0
        if backed > old:
            # What the backing image has beyond this one's old end must not show: new bytes read as zeros.
            conceal = partial(self._write_zeros, old, backed - old, True, False)
            self.format.resize(size, preallocation=preallocation, conceal=conceal)
        else:
            self.format.resize(size, preallocation=preallocation)
        for bitmap in self.bitmaps:
            bitmap.resize(size)

    def amend(self, options: object, *, force: bool = False, progress: Progress | None = None) -> None:
        """See ``Format.amend``."""
        self.format.amend(options, resize=self.resize, force=force, progress=progress)

    def close(self) -> None:
        self.format.close()

    def place(self, offset: int, length: int) -> FilePlace | None:
        linear = self.format.linear
        if linear is not None:
            return self.format.children[0].place(offset + linear, length)
        run = self.format.extent_at(offset, length)
        if run.kind == DATA:
            return self.format.children[run.child].place(run.file_offset, run.length)
        if run.kind == UNALLOCATED and self.backing is not None and offset < self.backing.size:
            return self.backing.place(offset, min(run.length, self.backing.size - offset))
        return None

    # -- reading ---------------------------------------------------------------------------------

    def readv(self, segments: Segments, *, nowait: bool = False) -> None:
        form = self.format
        if self._announce is not None:
            return self._readv_announced(segments, nowait)
        if form.linear is not None:
            if form.linear:
                segments = [(offset + form.linear, buffer) for offset, buffer in segments]
            return form.children[0].readv(segments, nowait=nowait)
        extent_at = form.extent_at
        direct: list[Segment] = []  # in child 0
        others: dict[int, list[Segment]] = {}  # by child; -1 is the backing node
        special: list[tuple[Extent, memoryview]] = []
        for offset, buffer in segments:
            length = len(buffer)
            run = extent_at(offset, length)
            if run[1] == length and run[2] == DATA and run[4] == 0:
                direct.append((run[3], buffer))
            else:
                self._follow(run, buffer, direct, others, special)
        if direct:
            form.children[0].readv(direct, nowait=nowait)
        for child, wanted in others.items():
            self._child(child).readv(wanted, nowait=nowait)
        if special:
            read_stored(form, special, nowait)
        return None

    def _readv_announced(self, segments: Segments, nowait: bool) -> None:
        """``readv`` one run at a time, each announced."""
        announce, form = self._announce, self.format
        assert announce is not None
        if nowait:
            raise BlockingIOError(errno.EAGAIN, "Events may keep a request waiting")
        for offset, buffer in segments:
            if form.linear is not None:
                announce("read_aio")
                form.children[0].readv([(offset + form.linear, buffer)])
                continue
            direct: list[Segment] = []
            others: dict[int, list[Segment]] = {}
            special: list[tuple[Extent, memoryview]] = []
            self._follow(form.extent_at(offset, len(buffer)), buffer, direct, others, special)
            for segment in direct:
                announce("read_aio")
                form.children[0].readv([segment])
            for child, wanted in others.items():
                for segment in wanted:
                    announce("read_aio" if child >= 0 else "read_backing_aio")
                    self._child(child).readv([segment])
            for item in special:
                announce("read_compressed")
                read_stored(form, [item], False)

    def _follow(
        self,
        run: Extent,
        buffer: memoryview,
        direct: list[Segment],
        others: dict[int, list[Segment]],
        special: list[tuple[Extent, memoryview]],
    ) -> None:
        """Sorts the runs of one request, of which ``run`` is the first, by where they are read."""
        done, length = 0, len(buffer)
        while True:
            part = buffer[done : done + run.length]
            if run.kind == DATA:
                wanted = direct if run.child == 0 else others.setdefault(run.child, [])
                wanted.append((run.file_offset, part))
            elif run.kind == UNALLOCATED and self.backing is not None:
                self._follow_backing(run.offset, part, others.setdefault(-1, []))
            elif run.kind == SPECIAL:
                special.append((run, part))
            else:
                fill_zeros(part)
            done += run.length
            if done >= length:
                return
            run = self.format.extent_at(run.end, length - done)

    def _follow_backing(self, offset: int, part: memoryview, wanted: list[Segment]) -> None:
        """A shorter backing node reads as zeros beyond its end."""
        assert self.backing is not None
        inside = min(len(part), max(0, self.backing.size - offset))
        if inside:
            wanted.append((offset, part[:inside]))
        if inside < len(part):
            fill_zeros(part[inside:])

    def _child(self, index: int) -> Node:
        if index >= 0:
            return self.format.children[index]
        assert self.backing is not None
        return self.backing

    # -- writing ---------------------------------------------------------------------------------

    def _writev(self, segments: Segments) -> None:
        form, announce = self.format, self._announce
        target = form.children[form.data_child]
        if form.linear is not None:
            if announce is not None:
                return self._write_announced(segments, form.linear, announce)
            if form.linear:
                segments = [(offset + form.linear, buffer) for offset, buffer in segments]
            return target.writev(segments)
        in_place = form.in_place
        direct: list[Segment] = []
        for offset, buffer in segments:
            place = in_place(offset, len(buffer))
            if place >= 0:
                if announce is not None:
                    announce("write_aio")
                    target.writev([(place, buffer)])
                else:
                    direct.append((place, buffer))
                continue
            if direct:  # Before this one: two writes of a batch to one place must land in their order.
                target.writev(direct)
                direct = []
            self._write_new(offset, buffer)
        if direct:
            target.writev(direct)
        return None

    def _write_announced(self, segments: Segments, shift: int, announce: Callable[[str], None]) -> None:
        """Writes of a straight-line format, one at a time. What such a format is told, its file is told too."""
        for offset, buffer in segments:
            for name in ("pwritev", "write_aio"):
                announce(name)
            self.format.children[0].writev([(offset + shift, buffer)])
            announce("pwritev_done")

    def write_beyond_end(self, segments: Segments) -> None:
        """Writes to guest offsets behind the disk's end, for which the format has made room: a machine's state. It is
        no part of the disk, so it makes nothing dirty."""
        self.format.children[0].announce("vmstate_save")
        self._writev(segments)

    @property
    def compresses(self) -> bool:
        return self.format.compresses

    @property
    def packs(self) -> bool:
        return self.format.packs

    @property
    def only_compressed(self) -> bool:
        return self.format.only_compressed

    def _write_compressed(self, segments: Segments, turn: Callable[[], None] | None) -> None:
        if not self.format.compresses:
            raise not_supported(COMPRESSION)
        writer = StoredWriter(self.format, segments)
        if turn is not None:
            turn()
        writer.write()
        if writer.plain:
            self._writev(writer.plain)

    def _write_new(self, offset: int, buffer: memoryview) -> None:
        """A write for which the map has to change: reserve, move the bytes, publish or abort."""
        done = 0
        while done < len(buffer):
            reservation = self.format.reserve(offset + done, len(buffer) - done)
            try:
                done = self._move(reservation, buffer, done)
            except BaseException:
                reservation.abort()
                raise
            reservation.publish()

    def _move(self, reservation: Reservation, buffer: memoryview, done: int) -> int:
        """Writes what ``reservation`` covers and its fills; returns how much of ``buffer`` is written then."""
        writes: dict[int, list[Segment]] = {}
        for run in reservation.extents:
            writes.setdefault(run.child, []).append((run.file_offset, buffer[done : done + run.length]))
            done += run.length
        self._collect_fills(reservation, writes)
        self._announce_write(reservation)
        for child, segments in writes.items():
            segments.sort(key=_by_offset)  # head, data and tail adjoin: the storage makes one write of them
            self.format.children[child].writev(segments)
        return done

    def _announce_write(self, reservation: Reservation) -> None:
        if self._announce is not None:
            self._announce("write_aio")
            if reservation.fills:
                self._announce("cow_write")

    def _collect_fills(self, reservation: Reservation, writes: dict[int, list[Segment]]) -> None:
        for fill in reservation.fills:
            readable = min(fill.length, max(0, self.size - fill.offset))
            if self._reads_zero(fill.offset, readable):
                if self._announce is not None:
                    self._announce("cluster_alloc_space")
                if not reservation.zeroed:
                    writes.setdefault(fill.child, []).extend(_zero_segments(fill.file_offset, fill.length))
                continue
            if self._announce is not None:
                self._announce("cow_read")
            old = memoryview(bytearray(fill.length))
            self.readv([(fill.offset, old[:readable])])
            writes.setdefault(fill.child, []).append((fill.file_offset, old))

    def _reads_zero(self, offset: int, length: int) -> bool:
        """Whether the map alone shows that the range reads as zeros."""
        end = offset + length
        while offset < end:
            run = self.format.extent_at(offset, end - offset)
            if run.kind != ZERO and (run.kind != UNALLOCATED or self._backed(offset)):
                return False
            offset = run.end
        return True

    def _backed(self, offset: int) -> bool:
        return self.backing is not None and offset < self.backing.size

    def _copy_from(self, offset: int, source: FilePlace) -> None:
        form, done = self.format, 0
        while done < source.length:
            left = source.length - done
            place = offset + done + form.linear if form.linear is not None else form.in_place(offset + done, left)
            if place >= 0:
                return form.children[form.data_child].copy_from(place, FilePlace(source.fd, source.offset + done, left))
            reservation = form.reserve(offset + done, left)
            try:
                done = self._move_in_kernel(reservation, source, done)
            except BaseException:
                reservation.abort()
                raise
            reservation.publish()
        return None

    def _move_in_kernel(self, reservation: Reservation, source: FilePlace, done: int) -> int:
        for run in reservation.extents:
            piece = FilePlace(source.fd, source.offset + done, run.length)
            self.format.children[run.child].copy_from(run.file_offset, piece)
            done += run.length
        writes: dict[int, list[Segment]] = {}
        self._collect_fills(reservation, writes)
        for child, segments in writes.items():
            self.format.children[child].writev(segments)
        return done

    # -- zeros and discards ----------------------------------------------------------------------

    def _write_zeros(self, offset: int, length: int, unmap: bool, fast: bool) -> None:
        if self.format.linear is not None:
            place = offset + self.format.linear
            return self.format.children[0].write_zeros(place, length, unmap=unmap, fast=fast)
        if self.format.zeroes_by_discard and self.backing is None:
            self.format.discard(offset, length)  # what is left are parts of clusters
        end = offset + length
        while offset < end:
            start, covered = self.format.zero(offset, end - offset, unmap=unmap)
            if not covered:
                return self._zero_ragged(offset, end - offset, unmap, fast)
            if start > offset:
                self._zero_ragged(offset, start - offset, unmap, fast)
            offset = start + covered
        return None

    def _zero_ragged(self, offset: int, length: int, unmap: bool, fast: bool) -> None:
        """Zeros what the map cannot: parts of clusters, and clusters that keep their place."""
        end = offset + length
        while offset < end:
            run = self.format.extent_at(offset, end - offset)
            if not self._reads_zero(offset, run.length):
                self._zero_run(offset, run.length, unmap, fast)
            offset = run.end

    def _zero_run(self, offset: int, length: int, unmap: bool, fast: bool) -> None:
        place = self.format.in_place(offset, length)
        if place >= 0:
            child = self.format.children[self.format.data_child]
            child.write_zeros(place, length, unmap=unmap, fast=fast)
        elif fast:
            raise not_supported("Fast zeroing of part of a cluster")
        else:
            self._write_out_zeros(offset, length)

    def _discard(self, offset: int, length: int) -> None:
        if self.format.linear is not None:
            self.format.children[0].discard(offset + self.format.linear, length)
        else:
            self.format.discard(offset, length)


class FilterNode(Node):
    """A Filter and its child."""

    def __init__(self, name: str, filter: Filter, writable: bool) -> None:
        super().__init__(name, filter.name, filter.child.filename, writable)
        self.filter = filter
        self.event = filter.event

    @property
    def child(self) -> Node:
        return self.filter.child

    @property
    def file(self) -> Node:
        return self.filter.child

    @property
    def size(self) -> int:
        return self.filter.size

    @property
    def alignment(self) -> int:
        return self.filter.alignment

    @property
    def zero_init(self) -> bool:
        return self.filter.child.zero_init

    @property
    def cluster_size(self) -> int:
        return self.filter.child.cluster_size

    def children(self) -> dict[str, Node]:
        return {self.filter.roles[0].name: self.filter.child, **self.filter.further}

    def readv(self, segments: Segments, *, nowait: bool = False) -> None:
        self.filter.readv(segments, nowait=nowait)

    def extent_at(self, offset: int, length: int) -> Extent:
        self.filter.look_up(offset, length)
        return self.filter.extent_at(offset, length)

    def extents(self, offset: int, length: int) -> Extents:
        self.filter.look_up(offset, length)
        return self.filter.extents(offset, length)

    def place(self, offset: int, length: int) -> FilePlace | None:
        return self.filter.child.place(offset, length) if self.filter.transparent() else None

    def flush(self) -> None:
        self.filter.flush()

    def resize(self, size: int, *, preallocation: str = "off") -> None:
        self.filter.resize(size, preallocation=preallocation)
        for bitmap in self.bitmaps:
            bitmap.resize(size)

    def close(self) -> None:
        self.filter.close()

    @property
    def compresses(self) -> bool:
        return self.filter.child.compresses

    @property
    def packs(self) -> bool:
        return self.filter.child.packs

    @property
    def only_compressed(self) -> bool:
        return self.filter.child.only_compressed

    def _write_compressed(self, segments: Segments, turn: Callable[[], None] | None) -> None:
        self.filter.write_compressed(segments, turn)

    def _writev(self, segments: Segments) -> None:
        self.filter.writev(segments)

    def _write_zeros(self, offset: int, length: int, unmap: bool, fast: bool) -> None:
        self.filter.write_zeros(offset, length, unmap=unmap, fast=fast)

    def _discard(self, offset: int, length: int) -> None:
        self.filter.discard(offset, length)

    def _copy_from(self, offset: int, source: FilePlace) -> None:
        # A filter sees bytes; what the kernel moves it would not see.
        raise not_supported(f"Filter '{self.driver_name}' cannot copy in the kernel")


def is_zero(buffer: memoryview) -> bool:
    """Whether there is nothing but zeros in it."""
    if buffer[0] or buffer[-1]:  # the ends first: most data has something there
        return False
    import numpy as np

    return not np.frombuffer(buffer, np.uint8).any()


def fill_zeros(part: memoryview) -> None:
    """Overwrites ``part`` with zeros."""
    length = len(part)
    if length <= len(ZEROS):
        part[:] = ZEROS[:length]
        return
    for start in range(0, length, len(ZEROS)):
        stop = min(length, start + len(ZEROS))
        part[start:stop] = ZEROS[: stop - start]


def below_filters(node: Node) -> Node:
    """The first node at or below ``node`` that is not a filter, or one with a map of its own."""
    while isinstance(node, FilterNode) and not node.filter.opaque:
        node = node.child
    return node


def looked_through(node: Node, offset: int, length: int) -> Node:
    """``below_filters``, for asking of the map of a range, which the filters are told."""
    while isinstance(node, FilterNode) and not node.filter.opaque:
        node.filter.look_up(offset, length)
        node = node.child
    return node


def format_of(node: Node) -> Format:
    """The Format of ``node`` below any filters. Raises GraphError for a storage."""
    node = below_filters(node)
    if not isinstance(node, FormatNode):
        raise GraphError(f"Node '{node.name}' ({node.driver_name}) has no format")
    return node.format


def _by_offset(segment: Segment) -> int:
    return segment[0]


def _zero_segments(offset: int, length: int) -> list[Segment]:
    return [(offset + start, ZEROS[: min(len(ZEROS), length - start)]) for start in range(0, length, len(ZEROS))]
