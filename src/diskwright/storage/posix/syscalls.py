"""System calls Python has no function for: fallocate with a mode, statx's direct I/O limits, ioctls.

ctypes is imported by the first call that needs it, and releases the GIL while the kernel works.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from functools import cache
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import ctypes

FALLOC_KEEP_SIZE: Final = 0x01
FALLOC_PUNCH_HOLE: Final = 0x02
FALLOC_ZERO_RANGE: Final = 0x10

UNSUPPORTED: Final = frozenset({errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.ENOTTY})
"""Errnos by which a file system, a device or the kernel says that it has no such operation at all."""

_BLKDISCARD: Final = 0x1277
_BLKSSZGET: Final = 0x1268
_FS_IOC_GETFLAGS: Final = 0x80086601
_FS_IOC_SETFLAGS: Final = 0x40086602
_FS_NOCOW: Final = 0x00800000
_FS_IOC_FSGETXATTR: Final = 0x801C581F
_FS_IOC_FSSETXATTR: Final = 0x401C5820
_FS_XFLAG_EXTSIZE: Final = 0x00000800
_FSXATTR: Final = struct.Struct("=5I8s")  # xflags, extsize, nextents, projid, cowextsize

_AT_EMPTY_PATH: Final = 0x1000
_STATX_DIOALIGN: Final = 0x2000
_STATX_SIZE: Final = 256
_STATX_DIO_MEM_ALIGN: Final = 152  # offset in struct statx; stx_dio_offset_align follows


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2), repeated when a signal interrupts it. Raises OSError."""
    function, get_errno = _fallocate()
    while function(fd, mode, offset, length) != 0:
        number = get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def direct_alignment(fd: int) -> int | None:
    """The alignment of offsets and lengths that statx(2) states for direct I/O on ``fd``.

    None when the kernel (before 6.1), the C library or the file system does not say.
    """
    import ctypes

    function = getattr(_libc(), "statx", None)
    if function is None:
        return None
    answer = ctypes.create_string_buffer(_STATX_SIZE)
    if function(fd, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, answer) != 0:
        return None
    (mask,) = struct.unpack_from("=I", answer, 0)
    _memory, offset = struct.unpack_from("=II", answer, _STATX_DIO_MEM_ALIGN)
    return int(offset) if mask & _STATX_DIOALIGN and offset else None


def sector_size(fd: int) -> int:
    """The logical sector of the block device ``fd``, in bytes. Raises OSError."""
    return int(struct.unpack("i", fcntl.ioctl(fd, _BLKSSZGET, bytes(4)))[0])


def discard_sectors(fd: int, offset: int, length: int) -> None:
    """Tells the block device ``fd`` that whole sectors are no longer needed. Raises OSError."""
    fcntl.ioctl(fd, _BLKDISCARD, struct.pack("=QQ", offset, length))


def set_nocow(fd: int) -> None:
    """Turns copy-on-write off for the empty file ``fd``, where its file system has it. Only a wish: never raises."""
    try:
        (flags,) = struct.unpack("l", fcntl.ioctl(fd, _FS_IOC_GETFLAGS, bytes(struct.calcsize("l"))))
        fcntl.ioctl(fd, _FS_IOC_SETFLAGS, struct.pack("l", flags | _FS_NOCOW))
    except OSError:
        pass


def set_extent_size(fd: int, length: int) -> None:
    """Tells the file system of the empty file ``fd`` how many bytes to take at once, where it can be told (XFS): a file
    that grows in small pieces has fewer extents then. Only a wish: never raises."""
    try:
        flags, _, *rest = _FSXATTR.unpack(fcntl.ioctl(fd, _FS_IOC_FSGETXATTR, bytes(_FSXATTR.size)))
        fcntl.ioctl(fd, _FS_IOC_FSSETXATTR, _FSXATTR.pack(flags | _FS_XFLAG_EXTSIZE, length, *rest))
    except (OSError, struct.error):
        pass


@cache
def _libc() -> ctypes.CDLL:
    import ctypes

    return ctypes.CDLL(None, use_errno=True)


@cache
def _fallocate() -> tuple[Any, Any]:
    """The C library's fallocate with 64-bit offsets, and the way to its errno."""
    import ctypes

    library = _libc()
    function = getattr(library, "fallocate64", None) or library.fallocate
    function.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    function.restype = ctypes.c_int
    return function, ctypes.get_errno
