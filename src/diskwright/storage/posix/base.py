"""What every storage over a file descriptor does alike."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from os import preadv, pwritev
from typing import Final

from diskwright.core.driver import FilePlace, Segments, Storage, not_supported
from diskwright.extents import Extent, Extents
from diskwright.storage.posix import holes, preallocate
from diskwright.storage.posix.direct import DirectIO
from diskwright.storage.posix.space import Space
from diskwright.storage.posix.transfer import copy_range, read_run, read_segments, runs, write_run

_BEYOND_ALL: Final = 1 << 63
"""Above every offset a file can have."""


class DescriptorStorage(Storage):
    """Bytes of one open descriptor, which the storage owns. Thread-safe, except where a text says otherwise."""

    _space: Space
    _direct: DirectIO | None = None
    _write_through = False
    _is_device = False

    def __init__(self, fd: int, filename: str, *, writable: bool) -> None:
        self._fd, self.filename, self._writable = fd, filename, writable
        self._nowait: int = os.RWF_NOWAIT
        self._flushing = threading.Lock()
        self._flushes = 0
        self._flush_errno = 0

    @property
    def size(self) -> int:
        # Three times as fast as fstat, and right for block devices too. Nobody uses the position it moves.
        return os.lseek(self._fd, 0, os.SEEK_END)

    # -- moving bytes ----------------------------------------------------------------------------

    def readv(self, segments: Segments, *, nowait: bool = False) -> None:
        flags = self._nowait if nowait else 0
        try:
            if self._direct is not None:
                self._read_direct(self._direct, segments, nowait)
            elif len(segments) == 1:  # the hottest path there is: one system call and little else
                offset, buffer = segments[0]
                got = preadv(self._fd, (buffer,), offset, flags)
                if got != len(buffer):
                    read_run(self._fd, offset + got, [buffer[got:]], flags)
            else:
                read_segments(self._fd, segments, flags)
        except OSError as error:
            if flags and error.errno == errno.EOPNOTSUPP:
                # tmpfs and others cannot tell. Sending every read to another thread would cost more than waiting.
                self._nowait = 0
                return self.readv(segments)
            self._name(error)
            raise

    def writev(self, segments: Segments) -> None:
        try:
            if self._direct is not None:
                self._direct.writev(segments)
            elif len(segments) == 1:
                offset, buffer = segments[0]
                put = pwritev(self._fd, (buffer,), offset)
                if put != len(buffer):
                    write_run(self._fd, offset + put, [buffer[put:]])
            else:
                for offset, buffers in runs(segments):
                    write_run(self._fd, offset, buffers)
        except OSError as error:
            self._name(error)
            raise
        if self._write_through:
            self.flush()

    def copy_from(self, offset: int, source: FilePlace) -> None:
        direct = self._direct
        if direct is not None and (offset | source.length) & (direct.alignment - 1):
            raise not_supported("An unaligned copy past the page cache")
        with self._changing(offset, offset + source.length):
            copy_range(self._fd, offset, source)
        if self._write_through:
            self.flush()

    def flush(self) -> None:
        """Raises OSError; once it has, always the same one."""
        if not self._writable:
            return
        seen = self._flushes
        with self._flushing:
            # The kernel reports a lost write to one caller only, so callers take turns: each one sees
            # what the others were told.
            if self._flush_errno:
                raise OSError(self._flush_errno, os.strerror(self._flush_errno), self.filename)
            if self._flushes != seen:
                return  # another call's flush has begun, and ended, since this call was made
            self._flushes += 1
            try:
                self._sync()
            except OSError as error:
                self._flush_errno = error.errno or errno.EIO
                self._name(error)
                raise

    def _sync(self) -> None:
        os.fdatasync(self._fd)

    # -- zeros, space and size -------------------------------------------------------------------

    def write_zeros(self, offset: int, length: int, *, unmap: bool, fast: bool) -> None:
        with self._changing(offset, offset + length, exclusive=self._is_device):
            self._space.zero(offset, length, unmap=unmap, fast=fast)
        if self._write_through:
            self.flush()

    def discard(self, offset: int, length: int) -> None:
        with self._changing(offset, offset + length):
            self._space.discard(offset, length)

    def truncate(self, size: int, *, preallocation: str = "off") -> None:
        """As ``Storage.truncate``. Not to be called together with a write beyond the new end."""
        with self._changing(min(size, self.size), _BEYOND_ALL, exclusive=True):
            preallocate.resize(self._fd, size, preallocation, self._write_held)
        if self._write_through:
            self.flush()

    def _write_held(self, offset: int, data: memoryview) -> None:
        """Writes within ``_changing``."""
        if self._direct is not None:
            self._direct.write_held(offset, [data])
        else:
            write_run(self._fd, offset, [data])

    def _grow(self, size: int) -> None:
        """Makes the file at least ``size`` long, whatever others write meanwhile; within ``_changing``.

        ftruncate could cut off what another thread has just appended, a byte written at the end cannot.
        The caller is zeroing the range that byte is in.
        """
        write_run(self._cached_fd(), size - 1, [memoryview(b"\0")])

    def _cached_fd(self) -> int:
        return self._fd if self._direct is None else self._direct.cached_fd

    @contextmanager
    def _changing(self, start: int, end: int, *, exclusive: bool = False) -> Iterator[None]:
        """Names the file in errors, and with O_DIRECT keeps read-modify-writes away from the range."""
        try:
            if self._direct is None:
                yield
            else:
                with self._direct.hold(start, end, exclusive=exclusive):
                    yield
        except OSError as error:
            self._name(error)
            raise

    # -- where bytes are -------------------------------------------------------------------------

    def extent_at(self, offset: int, length: int) -> Extent:
        return holes.first_run(self._fd, offset, length)

    def extents(self, offset: int, length: int) -> Extents:
        return Extents.of(holes.runs(self._fd, offset, length))

    def place(self, offset: int, length: int) -> FilePlace | None:
        if self._direct is not None:
            return None  # it would read through the page cache, which this user does not want to fill
        inside = self.size - offset
        return FilePlace(self._fd, offset, min(length, inside)) if inside > 0 else None

    def allocated_size(self) -> int | None:
        return os.fstat(self._fd).st_blocks * 512

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if self._direct is not None:
            self._direct.close()
        if fd >= 0:
            os.close(fd)

    def _read_direct(self, direct: DirectIO, segments: Segments, nowait: bool) -> None:
        if nowait:
            raise BlockingIOError(errno.EAGAIN, "Every direct read waits for the medium")
        direct.readv(segments)

    def _name(self, error: OSError) -> None:
        if error.filename is None:
            error.filename = self.filename
