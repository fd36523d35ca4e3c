"""Zeroing and giving back ranges without writing them, on files and on block devices."""

from __future__ import annotations

import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Final

from diskwright.core.driver import not_supported
from diskwright.storage.posix import syscalls
from diskwright.storage.posix.syscalls import FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, FALLOC_ZERO_RANGE, UNSUPPORTED
from diskwright.units import GiB, align_down, align_up

_PUNCH: Final = FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE

_DEVICE_STEP: Final = GiB
"""Where a device has no quick way the kernel writes zeros itself and cannot be interrupted meanwhile, so it
is asked for no more than this at a time."""


class Space(ABC):
    """The space behind one descriptor. Errors carry no file name; the storage adds it."""

    @abstractmethod
    def zero(self, offset: int, length: int, *, unmap: bool, fast: bool) -> None:
        """See ``Storage.write_zeros``."""

    @abstractmethod
    def discard(self, offset: int, length: int) -> None:
        """See ``Storage.discard``. What cannot be discarded is left as it is."""


class FileSpace(Space):
    """A regular file, or one in memory. What its file system turned out to lack is not asked for again."""

    def __init__(self, fd: int, grow: Callable[[int], None], *, keep: bool = True) -> None:
        """``grow(size)`` makes the file at least that long. ``keep`` false: holes will do even where the
        caller did not allow ``unmap``, since space has no worth here."""
        self._fd, self._grow, self._keep = fd, grow, keep
        self._can_punch = self._can_zero = self._can_allocate = True
        self._proven = False  # that allocation and holes both work

    def zero(self, offset: int, length: int, *, unmap: bool, fast: bool) -> None:
        if (unmap or not self._keep) and self._can_punch and self._zero_by_hole(offset, length):
            return
        if self._can_zero:
            self._can_zero = self._try(FALLOC_ZERO_RANGE, offset, length)
            if self._can_zero:
                return
        if not self._zero_by_exchange(offset, length):
            raise not_supported("Zeroing a range of this file")

    def discard(self, offset: int, length: int) -> None:
        if self._can_punch:
            self._can_punch = self._try(_PUNCH, offset, length)

    def _zero_by_hole(self, offset: int, length: int) -> bool:
        """A hole instead of the range. False when that cannot be; then nothing has changed."""
        end, size = offset + length, os.lseek(self._fd, 0, os.SEEK_END)
        if offset < size:
            self._can_punch = self._try(_PUNCH, offset, length)
            if not self._can_punch:
                return False
        if end > size:
            # ``grow`` may store a byte to be sure that it never shrinks the file, and another thread may have
            # written here since the size was taken: the second hole undoes both.
            self._grow(end)
            self._can_punch = self._try(_PUNCH, max(offset, size), end - max(offset, size))
        return True

    def _zero_by_exchange(self, offset: int, length: int) -> bool:
        """New space for old, where a file system (tmpfs) has both but no zeroing. False: nothing has changed."""
        size = os.lseek(self._fd, 0, os.SEEK_END)
        if not (self._can_punch and self._can_allocate):
            return False
        if not self._proven or offset + length > size:
            # Allocation changes no byte, so it is safe to find out this way whether there is any.
            self._can_allocate = self._try(0, offset, length)
            if not self._can_allocate:
                return False
        if offset < size:
            self._can_punch = self._try(_PUNCH, offset, length)
            if not self._can_punch:
                return False
            syscalls.fallocate(self._fd, 0, offset, length)
            self._proven = True
        return True

    def _try(self, mode: int, offset: int, length: int) -> bool:
        """Whether the file system has this mode. Other errors, ENOSPC for one, are raised."""
        try:
            syscalls.fallocate(self._fd, mode, offset, length)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            return False
        return True


class DeviceSpace(Space):
    """A block device. Its kernel interface takes whole sectors; ragged edges are written."""

    def __init__(self, fd: int, sector: int, write: Callable[[int, memoryview], None]) -> None:
        self._fd, self._sector, self._write = fd, sector, write

    def zero(self, offset: int, length: int, *, unmap: bool, fast: bool) -> None:
        end = offset + length
        if end > os.lseek(self._fd, 0, os.SEEK_END):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        low, high = align_up(offset, self._sector), align_down(end, self._sector)
        if low >= high:
            return self._write(offset, memoryview(bytes(length)))
        if not (unmap and self._punch(low, high - low)):
            if fast:
                # The kernel does not tell beforehand whether it would write the zeros itself.
                raise not_supported("Fast zeroing of this device")
            self._zero_sectors(low, high)
        if offset < low:
            self._write(offset, memoryview(bytes(low - offset)))
        if high < end:
            self._write(high, memoryview(bytes(end - high)))
        return None

    def discard(self, offset: int, length: int) -> None:
        low, high = align_up(offset, self._sector), align_down(offset + length, self._sector)
        if low >= high:
            return
        try:
            syscalls.discard_sectors(self._fd, low, high - low)
        except OSError as error:
            if error.errno not in UNSUPPORTED and error.errno != errno.EINVAL:
                raise

    def _punch(self, low: int, length: int) -> bool:
        """Unmaps sectors, if they then read as zeros. The kernel never falls back to writing here."""
        try:
            syscalls.fallocate(self._fd, _PUNCH, low, length)
        except OSError as error:
            if error.errno not in UNSUPPORTED and error.errno != errno.EINVAL:
                raise
            return False
        return True

    def _zero_sectors(self, low: int, high: int) -> None:
        for start in range(low, high, _DEVICE_STEP):
            try:
                length = min(_DEVICE_STEP, high - start)
                syscalls.fallocate(self._fd, FALLOC_ZERO_RANGE | FALLOC_KEEP_SIZE, start, length)
            except OSError as error:
                if error.errno in UNSUPPORTED or error.errno == errno.EINVAL:
                    raise not_supported("Zeroing a range of this device") from error
                raise
