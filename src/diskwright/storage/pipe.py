"""What an image is written into from its beginning to its end: a pipe, or part of another file.

The last few MiB are held back, so that they can still be read and overwritten: a new image is made there, opened again,
and its end replaced by what is put into it. A flush lets everything go; whatever is written afterwards must follow.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable
from typing import ClassVar, Final, Self

from diskwright.core.driver import Segments, Storage
from diskwright.units import MiB

HELD: Final = 16 * MiB
"""Bytes that can be read and overwritten: twice the directory of the largest VMDK, 64 TiB."""


def is_pipe(filename: str) -> bool:
    """Whether that is a pipe or a socket, and not a file."""
    try:
        mode = os.stat(filename).st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


class StreamStorage(Storage):
    """Bytes on their way to ``let_go``, which is called with one piece after the other. Threads may write at the same
    time as long as each writes where the one before has ended."""

    name: ClassVar[str] = "stream"
    zero_init = True

    def __init__(self, filename: str, let_go: Callable[[memoryview], None]) -> None:
        self.filename, self._sink = filename, let_go
        self._gone = 0  # bytes that are out of reach
        self._held = bytearray()
        self._lock = threading.Lock()

    @classmethod
    def open(cls, options: object, *, writable: bool) -> Self:
        raise NotImplementedError("a stream is opened by who converts into it")

    @property
    def size(self) -> int:
        return self._gone + len(self._held)

    def _behind(self, offset: int) -> int:
        if offset < self._gone:
            raise OSError(errno.ESPIPE, f"{os.strerror(errno.ESPIPE)}: byte {offset} has left already", self.filename)
        return offset - self._gone

    def readv(self, segments: Segments, *, nowait: bool = False) -> None:
        with self._lock:
            for offset, buffer in segments:
                at = self._behind(offset)
                data = self._held[at : at + len(buffer)]
                buffer[: len(data)] = data
                buffer[len(data) :] = bytes(len(buffer) - len(data))

    def writev(self, segments: Segments) -> None:
        with self._lock:
            for offset, buffer in segments:
                at = self._behind(offset)
                if at > len(self._held):
                    self._held.extend(bytes(at - len(self._held)))
                self._held[at : at + len(buffer)] = buffer
                if len(self._held) >= 2 * HELD:
                    self._let_go(len(self._held) - HELD)

    def _let_go(self, length: int) -> None:
        with memoryview(self._held) as held:
            self._sink(held[:length])
        del self._held[:length]
        self._gone += length

    def truncate(self, size: int, *, preallocation: str = "off") -> None:
        with self._lock:
            keep = self._behind(size)
            del self._held[keep:]
            self._held.extend(bytes(keep - len(self._held)))

    def flush(self) -> None:
        """All of it has been let go; making it durable is another's affair."""
        with self._lock:
            self._let_go(len(self._held))


class PipeStorage(StreamStorage):
    """A pipe. What its reader does with the bytes nobody here can know."""

    def __init__(self, filename: str) -> None:
        """Opens it, which waits for a reader. Raises OSError."""
        self._fd = os.open(filename, os.O_WRONLY | os.O_CLOEXEC)
        super().__init__(filename, self._write)

    def _write(self, data: memoryview) -> None:
        done = 0
        while done < len(data):
            done += os.write(self._fd, data[done:])

    def close(self) -> None:
        os.close(self._fd)
