"""Image locks between processes: open-file-description byte-range locks on the bytes QEMU locks.

A process that needs permission number *n* holds a read lock on byte 100 + n; one that does not share it
holds a read lock on byte 200 + n. Read locks never exclude each other, so any number of processes can say
so; whoever wants to know asks the kernel whether a write lock on the opposite byte could be had. The
bytes and their order were found by watching qemu-img and qemu-nbd 7.2 in /proc/locks.
"""

from __future__ import annotations

import errno
import fcntl
import struct
import threading
from typing import Final

from diskwright.core.permissions import ALL, Access, names
from diskwright.errors import ImageLocked

NEEDED_BASE: Final = 100
UNSHARED_BASE: Final = 200

_BITS: Final = tuple(bit for bit in (1 << n for n in range(ALL.bit_length())) if ALL & bit)
_FLOCK: Final = struct.Struct("hhqqi4x")  # l_type, l_whence, l_start, l_len, l_pid, as Linux aligns them
_TAKEN: Final = frozenset({errno.EAGAIN, errno.EACCES})
_NO_SUCH_LOCKS: Final = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})


class ImageLocks:
    """The locks one open file description holds. Closing that description gives them up."""

    def __init__(self, fd: int, filename: str, *, required: bool) -> None:
        """With ``required`` false, a kernel or file system without such locks is put up with."""
        self._fd, self._filename, self._required = fd, filename, required
        self._held: set[int] = set()
        self._unsupported = False
        self._serial = threading.Lock()

    def set(self, access: Access) -> None:
        """Holds exactly the locks of ``access``. Raises ImageLocked, and then holds what it held before."""
        with self._serial:
            if self._unsupported:
                return
            wanted = _bytes_of(access)
            taken: list[int] = []
            try:
                for byte in sorted(wanted - self._held):
                    self._take(byte)
                    taken.append(byte)
                self._look_for_conflicts(access)
            except BaseException as error:
                for byte in taken:
                    self._put(byte, fcntl.F_UNLCK)
                if isinstance(error, OSError) and error.errno in _NO_SUCH_LOCKS and not self._required:
                    self._unsupported = True
                    return
                raise
            for byte in self._held - wanted:
                self._put(byte, fcntl.F_UNLCK)
            self._held = wanted

    def _take(self, byte: int) -> None:
        try:
            self._put(byte, fcntl.F_RDLCK)
        except OSError as error:
            if error.errno not in _TAKEN:
                raise
            raise self._refused(byte) from error

    def _look_for_conflicts(self, access: Access) -> None:
        """Raises ImageLocked when another description does not share what we need, or needs what we do not share."""
        for number, bit in enumerate(_BITS):
            if access.needs & bit and self._held_elsewhere(UNSHARED_BASE + number):
                raise self._refused(NEEDED_BASE + number)
            if not access.shares & bit and self._held_elsewhere(NEEDED_BASE + number):
                raise self._refused(UNSHARED_BASE + number)

    def _put(self, byte: int, kind: int) -> None:
        try:
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, 0, byte, 1, 0))
        except OSError as error:
            error.filename = self._filename
            raise

    def _held_elsewhere(self, byte: int) -> bool:
        asked = _FLOCK.pack(fcntl.F_WRLCK, 0, byte, 1, 0)
        answer = fcntl.fcntl(self._fd, fcntl.F_OFD_GETLK, asked)
        return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)

    def _refused(self, byte: int) -> ImageLocked:
        shared, base = ("shared ", UNSHARED_BASE) if byte >= UNSHARED_BASE else ("", NEEDED_BASE)
        permission = names(_BITS[byte - base])
        return ImageLocked(
            f'Failed to get {shared}"{permission}" lock: Is another process using the image [{self._filename}]?'
        )


def _bytes_of(access: Access) -> set[int]:
    needed = {NEEDED_BASE + n for n, bit in enumerate(_BITS) if access.needs & bit}
    return needed | {UNSHARED_BASE + n for n, bit in enumerate(_BITS) if not access.shares & bit}
