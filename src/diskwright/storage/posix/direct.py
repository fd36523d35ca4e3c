"""O_DIRECT: requests of any offset, length and buffer over a descriptor that takes only aligned ones.

What is aligned goes straight through. The rest goes through page-aligned buffers, and a block that is
written in part is read first, while its range is held so that no other write of this storage comes
between. The block in which the file ends is written through a second, cached descriptor: an aligned
write would move the end.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Final

from diskwright.core.driver import Segments
from diskwright.storage.posix import syscalls
from diskwright.storage.posix.ranges import Ranges
from diskwright.storage.posix.transfer import IOV_MAX, Cursor, runs, write_run, zero_fill
from diskwright.units import MiB, align_down, align_up, is_power_of_two

BOUNCE: Final = MiB
"""Length of an aligned buffer: long enough that the medium, not the copying, is what takes time."""

MAX_IDLE: Final = 4
"""Aligned buffers kept for the next request; more threads than this at once make their own."""

_PROBED: Final = (512, 1024, 2048, 4096)
_SAFEST: Final = _PROBED[-1]
_MAX_TRIES: Final = 8


def discover_alignment(fd: int, *, block: bool) -> int:
    """The alignment in bytes that ``fd``, opened with O_DIRECT, wants of offsets and lengths."""
    if block:
        return syscalls.sector_size(fd)
    stated = syscalls.direct_alignment(fd)
    if stated is not None and is_power_of_two(stated) and stated <= BOUNCE:
        return stated
    if os.lseek(fd, 0, os.SEEK_END) < _SAFEST:
        return _SAFEST  # reading at the end of a file is not refused, so trying proves nothing
    with memoryview(mmap.mmap(-1, _SAFEST)) as buffer:
        for candidate in _PROBED:
            try:
                if os.preadv(fd, (buffer[:candidate],), 0) == candidate:
                    return candidate
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
    return _SAFEST


class DirectIO:
    """Transfers on one O_DIRECT descriptor. Thread-safe."""

    def __init__(self, fd: int, alignment: int, cached_fd: int) -> None:
        """``cached_fd`` is the same file, open for writing without O_DIRECT; -1 for devices and read-only use."""
        self._fd, self.alignment, self.cached_fd = fd, alignment, cached_fd
        self._ranges = Ranges()
        self._idle: list[memoryview] = []

    def close(self) -> None:
        """Closes ``cached_fd``; the O_DIRECT descriptor is the caller's."""
        self._idle.clear()
        if self.cached_fd >= 0:
            fd, self.cached_fd = self.cached_fd, -1
            os.close(fd)

    def hold(self, start: int, end: int, *, exclusive: bool) -> AbstractContextManager[None]:
        """Held by whoever changes bytes by another way than ``writev``: no block of the range is read,
        changed and written back meanwhile. With ``exclusive`` nothing else is written there either."""
        return self._ranges.hold(align_down(start, self.alignment), align_up(end, self.alignment), exclusive=exclusive)

    def readv(self, segments: Segments) -> None:
        for offset, buffers in runs(segments):
            for first in range(0, len(buffers), IOV_MAX):
                part = buffers[first : first + IOV_MAX]
                self._read(offset, part)
                offset += sum(map(len, part))

    def writev(self, segments: Segments) -> None:
        for offset, buffers in runs(segments):
            for first in range(0, len(buffers), IOV_MAX):
                part = buffers[first : first + IOV_MAX]
                end = offset + sum(map(len, part))
                with self.hold(offset, end, exclusive=bool((offset | end) & (self.alignment - 1))):
                    self.write_held(offset, part)
                offset = end

    def write_held(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Writes while the caller holds the blocks of the range."""
        total = sum(map(len, buffers))
        if self._straight(offset, buffers) and self._try_write(offset, buffers) == total:
            return
        end, cursor = offset + total, Cursor(buffers)
        low, high = align_up(offset, self.alignment), align_down(end, self.alignment)
        bounce = self._take()
        try:
            if offset < low:
                self._write_part(offset, min(low, end), cursor, bounce)
            for start in range(low, high, BOUNCE):
                piece = bounce[: min(BOUNCE, high - start)]
                cursor.take(piece)
                self._write_blocks(start, piece)
            if low <= high < end:
                self._write_part(high, end, cursor, bounce)
        finally:
            self._give(bounce)

    def _straight(self, offset: int, buffers: Sequence[memoryview]) -> bool:
        """Whether offset and lengths are aligned. Of the buffers' addresses the kernel will judge."""
        mask = self.alignment - 1
        return not offset & mask and not any(len(buffer) & mask for buffer in buffers)

    # -- reading ---------------------------------------------------------------------------------

    def _read(self, offset: int, buffers: Sequence[memoryview]) -> None:
        total = sum(map(len, buffers))
        if self._straight(offset, buffers):
            try:
                if os.preadv(self._fd, buffers, offset) == total:
                    return
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
        # Buffers in unsuitable memory, unaligned ranges and short reads all go this way, from the start.
        end, cursor = offset + total, Cursor(buffers)
        bounce = self._take()
        try:
            for start in range(align_down(offset, self.alignment), end, BOUNCE):
                stop = min(start + BOUNCE, end)
                piece = bounce[: align_up(stop - start, self.alignment)]
                self._read_blocks(start, piece)
                cursor.put(piece[max(0, offset - start) : stop - start])
        finally:
            self._give(bounce)

    def _read_blocks(self, offset: int, into: memoryview) -> None:
        """Aligned in every respect; zeros beyond the end."""
        done = tries = 0
        while done < len(into):
            got = os.preadv(self._fd, (into[done:],), offset + done)
            ragged = got % self.alignment
            if got == 0 or (ragged and offset + done + got >= os.lseek(self._fd, 0, os.SEEK_END)):
                zero_fill(into[done + got :])
                return
            done += got - ragged
            # Ending inside a block that is not the last one happens when the file grows just now.
            tries = 0 if got > ragged else tries + 1
            if tries > _MAX_TRIES:
                raise OSError(errno.EIO, "Direct reads end inside a block")

    # -- writing ---------------------------------------------------------------------------------

    def _try_write(self, offset: int, buffers: Sequence[memoryview]) -> int:
        """Bytes written by one call; 0 when the kernel refuses these buffers."""
        try:
            return os.pwritev(self._fd, buffers, offset)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return 0

    def _write_blocks(self, offset: int, piece: memoryview) -> None:
        """Aligned in every respect."""
        done = 0
        while done < len(piece):
            put = os.pwritev(self._fd, (piece[done:],), offset + done)
            whole = align_down(put, self.alignment)
            if whole == 0:
                raise OSError(errno.EIO, "A direct write ended inside a block")
            done += whole

    def _write_part(self, start: int, end: int, cursor: Cursor, bounce: memoryview) -> None:
        """Writes ``[start, end)``, which is part of one block."""
        low = align_down(start, self.alignment)
        if low + self.alignment <= os.lseek(self._fd, 0, os.SEEK_END):
            block = bounce[: self.alignment]
            self._read_blocks(low, block)
            cursor.take(block[start - low : end - low])
            self._write_blocks(low, block)
            return
        if self.cached_fd < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # a device, which ends here
        part = bounce[: end - start]
        cursor.take(part)
        # RWF_DSYNC, so that no dirty page of this block is left for a later direct write to meet.
        write_run(self.cached_fd, start, [part], os.RWF_DSYNC)

    # -- aligned buffers -------------------------------------------------------------------------

    def _take(self) -> memoryview:
        try:
            return self._idle.pop()
        except IndexError:
            return memoryview(mmap.mmap(-1, BOUNCE))

    def _give(self, bounce: memoryview) -> None:
        if len(self._idle) < MAX_IDLE:
            self._idle.append(bounce)
