"""CipheredNode: a format whose guest bytes are encrypted where they are stored.

The format stays a map; what its DATA runs hold is decrypted after it has been read from the child and encrypted
before it is written. A cipher knows whole sectors only: a request that covers parts of some is widened, and a write
puts together old and new bytes of those sectors while no other write touches them.

Special (compressed) runs are not encrypted; that is so in every format that has both.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from diskwright.core.compression import read_stored
from diskwright.core.driver import FilePlace, Format, Reservation, Segment, Segments, not_supported
from diskwright.core.node import FormatNode, Node, fill_zeros
from diskwright.errors import ImageError
from diskwright.extents import DATA, SPECIAL, UNALLOCATED, Extent
from diskwright.units import align_up


class Cipher(Protocol):
    """What a format encrypts its data with. Thread-safe."""

    sector: int
    """Bytes that are encrypted together: a power of two, at least 512, dividing the format's clusters."""

    def encrypt(self, source: memoryview, into: memoryview, position: int) -> None:
        """Whole sectors, into a buffer of the same length."""

    def decrypt(self, buffer: memoryview, position: int) -> None:
        """Whole sectors, where they are."""


class Locked:
    """The cipher of an image that was opened without its key: it refuses."""

    sector = 512

    def __init__(self, path: str) -> None:
        self._path = path

    def encrypt(self, source: memoryview, into: memoryview, position: int) -> None:
        raise ImageError(f"{self._path}: is encrypted, and was opened without its key")

    def decrypt(self, buffer: memoryview, position: int) -> None:
        raise ImageError(f"{self._path}: is encrypted, and was opened without its key")


class CipheredNode(FormatNode):
    """A FormatNode whose format has a ``cipher``."""

    def __init__(self, name: str, format: Format, writable: bool) -> None:
        super().__init__(name, format, writable)
        assert format.cipher is not None
        self._cipher = format.cipher
        self._sector = format.cipher.sector
        self._by_place = format.cipher_by_place
        self._ranges = _Ranges()

    def exchange(self, format: Format) -> None:
        assert format.cipher is not None
        self.format, self._cipher = format, format.cipher

    def place(self, offset: int, length: int) -> FilePlace | None:
        run = self.format.extent_at(offset, length)
        if run.kind == UNALLOCATED and self.backing is not None and offset < self.backing.size:
            return self.backing.place(offset, min(run.length, self.backing.size - offset))
        return None

    # -- reading ---------------------------------------------------------------------------------

    def readv(self, segments: Segments, *, nowait: bool = False) -> None:
        if self._announce is not None and nowait:
            raise BlockingIOError(errno.EAGAIN, "Events may keep a request waiting")
        extent_at = self.format.extent_at
        others: dict[int, list[Segment]] = {}  # by child, with their ciphertext; -1 is the backing node
        sealed: list[_Sealed] = []
        special: list[tuple[Extent, memoryview]] = []
        for offset, buffer in segments:
            done, length = 0, len(buffer)
            while done < length:
                run = extent_at(offset + done, length - done)
                part = buffer[done : done + run.length]
                if run.kind == DATA:
                    sealed.append(self._sealed(run, part))
                    others.setdefault(run.child, []).append(sealed[-1].read)
                elif run.kind == UNALLOCATED and self.backing is not None:
                    self._follow_backing(run.offset, part, others.setdefault(-1, []))
                elif run.kind == SPECIAL:
                    special.append((run, part))
                else:
                    fill_zeros(part)
                done += run.length
        for child, wanted in others.items():
            if self._announce is not None:
                self._announce("read_aio" if child >= 0 else "read_backing_aio")
            if wanted:
                self._child(child).readv(wanted, nowait=nowait)
        if special:
            read_stored(self.format, special, nowait)
        for one in sealed:
            self._cipher.decrypt(one.read[1], one.position)
            if one.part is not None:
                one.part[:] = one.read[1][one.head : one.head + len(one.part)]

    def _sealed(self, run: Extent, part: memoryview) -> _Sealed:
        """How a DATA run is read: where it lies and, when it is not whole sectors, by way of a wider buffer. Clusters
        are whole sectors, so what is around the run is there, be it beyond the guest's end."""
        head = run.offset % self._sector
        position = (run.file_offset if self._by_place else run.offset) - head
        if not head and not run.length % self._sector:
            return _Sealed((run.file_offset, part), position, None, 0)
        wide = memoryview(bytearray(align_up(head + run.length, self._sector)))
        return _Sealed((run.file_offset - head, wide), position, part, head)

    # -- writing ---------------------------------------------------------------------------------

    def _writev(self, segments: Segments) -> None:
        sector = self._sector
        if any(offset % sector or len(buffer) % sector for offset, buffer in segments):
            for offset, buffer in segments:
                self._write_any(offset, buffer)
            return
        begin = min(offset for offset, _ in segments)
        end = max(offset + len(buffer) for offset, buffer in segments)
        with self._ranges.held(begin, end, alone=False):
            self._write_sectors(segments)

    def _write_any(self, offset: int, buffer: memoryview) -> None:
        """One segment. Parts of sectors at its ends are completed with what is there, while nobody else writes."""
        sector, end = self._sector, offset + len(buffer)
        begin, stop = offset - offset % sector, align_up(end, sector)
        if begin == offset and stop == end:
            with self._ranges.held(begin, stop, alone=False):
                return self._write_sectors([(offset, buffer)])
        with self._ranges.held(begin, stop, alone=True):
            wide = memoryview(bytearray(stop - begin))
            edges = {begin: min(begin + sector, stop)} | {stop - sector: stop}
            self.readv([(at, wide[at - begin : until - begin]) for at, until in edges.items()])
            wide[offset - begin : end - begin] = buffer
            self._write_sectors([(begin, wide)])
        return None

    def _write_sectors(self, segments: Segments) -> None:
        """Whole sectors, within a held range."""
        form, cipher = self.format, self._cipher
        target = form.children[form.data_child]
        direct: list[Segment] = []
        for offset, buffer in segments:
            place = form.in_place(offset, len(buffer))
            if place < 0:
                if direct:
                    self._write_direct(target, direct)
                    direct = []
                self._write_new(offset, buffer)
                continue
            scratch = memoryview(bytearray(len(buffer)))
            cipher.encrypt(buffer, scratch, place if self._by_place else offset)
            direct.append((place, scratch))
        if direct:
            self._write_direct(target, direct)

    def _write_direct(self, target: Node, segments: list[Segment]) -> None:
        if self._announce is not None:
            self._announce("write_aio")
        target.writev(segments)

    def _move(self, reservation: Reservation, buffer: memoryview, done: int) -> int:
        writes: dict[int, list[Segment]] = {}
        for run in reservation.extents:
            writes.setdefault(run.child, []).append(self._encrypted(run, buffer[done : done + run.length]))
            done += run.length
        for fill in reservation.fills:
            # Never left out, whatever the place holds already: zeros there are not the ciphertext of zeros.
            old = memoryview(bytearray(fill.length))
            readable = min(fill.length, max(0, self.size - fill.offset))
            if not self._reads_zero(fill.offset, readable):
                self.readv([(fill.offset, old[:readable])])
            writes.setdefault(fill.child, []).append(self._encrypted(fill, old))
        self._announce_write(reservation)
        for child, segments in writes.items():
            segments.sort(key=lambda segment: segment[0])
            self.format.children[child].writev(segments)
        return done

    def _encrypted(self, run: Extent, plain: memoryview) -> Segment:
        scratch = memoryview(bytearray(len(plain)))
        self._cipher.encrypt(plain, scratch, run.file_offset if self._by_place else run.offset)
        return run.file_offset, scratch

    def _copy_from(self, offset: int, source: FilePlace) -> None:
        raise not_supported("Encrypted data cannot be copied by the kernel")

    # -- zeros and discards ----------------------------------------------------------------------

    def _write_zeros(self, offset: int, length: int, unmap: bool, fast: bool) -> None:
        if self.format.zeroes_by_discard and self.backing is None:
            self._discard(offset, length)
        end = offset + length
        while offset < end:
            with self._ranges.held(offset, end, alone=False):
                start, covered = self.format.zero(offset, end - offset, unmap=unmap)
            if not covered:
                return self._zero_ragged(offset, end - offset, unmap, fast)
            if start > offset:
                self._zero_ragged(offset, start - offset, unmap, fast)
            offset = start + covered
        return None

    def _zero_ragged(self, offset: int, length: int, unmap: bool, fast: bool) -> None:
        if self._reads_zero(offset, length):
            return
        if fast:
            raise not_supported("Fast zeroing of encrypted data")
        self._write_out_zeros(offset, length)

    def _discard(self, offset: int, length: int) -> None:
        with self._ranges.held(offset, offset + length, alone=False):
            self.format.discard(offset, length)


class _Sealed:
    """A read of ciphertext: the child's segment, its position for the cipher, and, when the segment is wider
    than what is wanted, ``part``: where the bytes from ``head`` on belong."""

    __slots__ = ("head", "part", "position", "read")

    def __init__(self, read: Segment, position: int, part: memoryview | None, head: int) -> None:
        self.read, self.position, self.part, self.head = read, position, part, head


class _Ranges:
    """Ranges being written to. Those held ``alone`` overlap with no other; the rest may overlap among themselves.

    There are as many as there are requests in flight, which whoever takes requests bounds.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._held: list[tuple[int, int, bool]] = []
        self._waiting = 0

    @contextmanager
    def held(self, begin: int, end: int, *, alone: bool) -> Iterator[None]:
        mine = (begin, end, alone)
        with self._changed:
            while any(
                begin < stop and start < end and (alone or other_alone) for start, stop, other_alone in self._held
            ):
                self._waiting += 1
                self._changed.wait()
                self._waiting -= 1
            self._held.append(mine)
        try:
            yield
        finally:
            with self._changed:
                self._held.remove(mine)
                if self._waiting:
                    self._changed.notify_all()
