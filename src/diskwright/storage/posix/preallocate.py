"""Changing a file's size, and making sure that there is space for what was added."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from functools import cache
from typing import Final

from diskwright.errors import OptionError
from diskwright.storage.posix import syscalls
from diskwright.storage.posix.syscalls import FALLOC_KEEP_SIZE, UNSUPPORTED
from diskwright.units import MAX_DISK_SIZE, MiB

MODES: Final = ("off", "falloc", "full")

_CHUNK: Final = MiB


def resize(fd: int, size: int, preallocation: str, write: Callable[[int, memoryview], None]) -> None:
    """Sets the size of the regular file ``fd``. New bytes read as zeros.

    ``falloc`` reserves space for them, ``full`` writes them with ``write(offset, zeros)``. When either fails
    the file gets its old size back. Raises OSError, and OptionError for a mode that does not fit.
    """
    if preallocation not in MODES:
        raise OptionError(f"Preallocation '{preallocation}' is unknown here; use one of {', '.join(MODES)}")
    if size > MAX_DISK_SIZE:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    old = os.lseek(fd, 0, os.SEEK_END)
    if preallocation == "off":
        os.ftruncate(fd, size)
        return
    if size < old:
        raise OptionError("Preallocation cannot be used for shrinking files")
    if size == old:
        return
    try:
        if preallocation == "full":
            # Reserving first tells at once, not after an hour of writing, that there is not enough space.
            _allocate(fd, FALLOC_KEEP_SIZE, old, size)
            _fill(old, size, write)
        elif not _allocate(fd, 0, old, size):
            _fill(old, size, write)
    except BaseException:
        _roll_back(fd, old)
        raise


def _allocate(fd: int, mode: int, start: int, end: int) -> bool:
    """False when the file system cannot reserve space."""
    try:
        syscalls.fallocate(fd, mode, start, end - start)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        return False
    return True


def _fill(start: int, end: int, write: Callable[[int, memoryview], None]) -> None:
    zeros = _zeros()
    while start < end:
        step = min(_CHUNK, end - start)
        write(start, zeros[:step])
        start += step


def _roll_back(fd: int, size: int) -> None:
    try:
        os.ftruncate(fd, size)
    except OSError:
        pass  # the error that led here is the one to tell


@cache
def _zeros() -> memoryview:
    """Page-aligned, so that it can be written with O_DIRECT as it is."""
    import mmap

    return memoryview(mmap.mmap(-1, _CHUNK)).toreadonly()
