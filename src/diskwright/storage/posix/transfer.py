"""Moving segments through a file descriptor: whole runs, however short each call falls."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from typing import Final

from diskwright.core.driver import FilePlace, Segments, not_supported

IOV_MAX: Final = 1024
"""Buffers the kernel takes in one call (UIO_MAXIOV)."""

_ZEROS: Final = bytes(64 << 10)

_KERNEL_WILL_NOT: Final = frozenset(
    {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EPERM, errno.EBADF, errno.ETXTBSY}
)
"""Errnos by which copy_file_range says "not between these files", as opposed to a failing medium."""


def runs(segments: Segments) -> Iterator[tuple[int, list[memoryview]]]:
    """``(offset, buffers)`` with segments that adjoin, in the order given, put together."""
    start = end = -1
    buffers: list[memoryview] = []
    for offset, buffer in segments:
        if offset != end:
            if buffers:
                yield start, buffers
            start, buffers = offset, []
        buffers.append(buffer)
        end = offset + len(buffer)
    if buffers:
        yield start, buffers


def read_segments(fd: int, segments: Segments, flags: int = 0) -> None:
    """``read_run`` for every run of segments that adjoin; for the many that do not, little besides the call."""
    index, count = 0, len(segments)
    while index < count:
        offset, buffer = segments[index]
        end = offset + len(buffer)
        index += 1
        if index == count or segments[index][0] != end:
            got = os.preadv(fd, (buffer,), offset, flags)
            if got != len(buffer):
                read_run(fd, offset + got, [buffer[got:]], flags)
            continue
        buffers = [buffer]
        while index < count and segments[index][0] == end:
            buffers.append(segments[index][1])
            end += len(buffers[-1])
            index += 1
        read_run(fd, offset, buffers, flags)


def read_run(fd: int, offset: int, buffers: list[memoryview], flags: int = 0) -> None:
    """Fills ``buffers`` with what follows ``offset``; zeros beyond the end.

    With RWF_NOWAIT in ``flags`` raises BlockingIOError at the first byte that is not in the page cache.
    """
    while buffers:
        got = os.preadv(fd, buffers[:IOV_MAX], offset, flags)
        if got == 0:
            for buffer in buffers:
                zero_fill(buffer)
            return
        offset += got
        buffers = _rest(buffers, got)


def write_run(fd: int, offset: int, buffers: list[memoryview], flags: int = 0) -> None:
    """Writes all of ``buffers`` from ``offset`` on. Raises OSError."""
    while buffers:
        put = os.pwritev(fd, buffers[:IOV_MAX], offset, flags)
        if put == 0:
            # No file or device does this for a non-empty write; going on would be an endless loop.
            raise OSError(errno.EIO, "The kernel wrote nothing and gave no reason")
        offset += put
        buffers = _rest(buffers, put)


def copy_range(fd: int, offset: int, source: FilePlace) -> None:
    """copy_file_range(2) of all of ``source`` to ``offset`` of ``fd``.

    Raises ENOTSUP when the kernel will not, or when the source ends early: then bytes beyond its end are
    to read as zeros, and only a caller that reads can do that.
    """
    done = 0
    while done < source.length:
        try:
            copied = os.copy_file_range(source.fd, fd, source.length - done, source.offset + done, offset + done)
        except InterruptedError:
            continue
        except OSError as error:
            if error.errno in _KERNEL_WILL_NOT:
                raise not_supported("copy_file_range") from error
            raise
        if copied == 0:
            raise not_supported("copy_file_range beyond the end of its source")
        done += copied


def zero_fill(buffer: memoryview) -> None:
    """Sets every byte of ``buffer`` to zero."""
    for start in range(0, len(buffer), len(_ZEROS)):
        piece = buffer[start : start + len(_ZEROS)]
        piece[:] = _ZEROS[: len(piece)]


class Cursor:
    """A place in a row of buffers, from or to which bytes are copied in order."""

    __slots__ = ("_at", "_buffers", "_index")

    def __init__(self, buffers: Sequence[memoryview]) -> None:
        self._buffers = buffers
        self._index = 0
        self._at = 0

    def take(self, into: memoryview) -> None:
        """Copies the next ``len(into)`` bytes of the buffers to ``into``."""
        done = 0
        while done < len(into):
            piece = self._next(len(into) - done)
            into[done : done + len(piece)] = piece
            done += len(piece)

    def put(self, data: memoryview) -> None:
        """Copies ``data`` to the next bytes of the buffers."""
        done = 0
        while done < len(data):
            piece = self._next(len(data) - done)
            piece[:] = data[done : done + len(piece)]
            done += len(piece)

    def _next(self, most: int) -> memoryview:
        buffer = self._buffers[self._index]
        piece = buffer[self._at : self._at + most]
        self._at += len(piece)
        if self._at == len(buffer):
            self._index, self._at = self._index + 1, 0
        return piece


def _rest(buffers: list[memoryview], done: int) -> list[memoryview]:
    """What is left of ``buffers`` after the first ``done`` bytes."""
    for index, buffer in enumerate(buffers):
        if done < len(buffer):
            return [buffer[done:], *buffers[index + 1 :]]
        done -= len(buffer)
    return []
