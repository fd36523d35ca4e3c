"""Opening the file or device an image lies in, and refusing what is neither."""

from __future__ import annotations

import errno
import os
import stat

from diskwright.errors import OptionError

_MODE = 0o644
"""Permission bits of a new image, less the umask: an image is no program and nobody else's to write."""


def open_image(filename: str, flags: int) -> tuple[int, os.stat_result]:
    """A descriptor of the regular file or block device ``filename``, and its stat.

    Never waits for the other end of a FIFO. Raises OSError with the name, and OptionError for a name no
    file can have.
    """
    if "\0" in filename:
        raise OptionError(f"A file name cannot hold a NUL character: {filename!r}")
    fd = _open(filename, flags)
    try:
        status = os.fstat(fd)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, f"'file' driver requires '{filename}' to be a regular file", filename)
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode)):
            raise _wrong_kind(filename)
        os.set_blocking(fd, True)
    except BaseException:
        os.close(fd)
        raise
    return fd, status


def open_again(fd: int, filename: str) -> int:
    """Another open file description of the file ``fd``, for writing and without O_DIRECT. Raises OSError."""
    flags = os.O_WRONLY | os.O_CLOEXEC
    try:
        # By descriptor and not by name: the name may belong to another file by now.
        return os.open(f"/proc/self/fd/{fd}", flags)
    except FileNotFoundError:
        second = os.open(filename, flags)  # no /proc here
    if not os.path.sameopenfile(fd, second):
        os.close(second)
        raise OSError(errno.ESTALE, "Replaced by another file while it was opened", filename)
    return second


def _open(filename: str, flags: int) -> int:
    flags |= os.O_CLOEXEC | os.O_NOCTTY
    try:
        return os.open(filename, flags | os.O_NONBLOCK, _MODE)
    except BlockingIOError:
        # Another process has a lease on the file and must be waited for; FIFOs do not answer like this.
        return os.open(filename, flags, _MODE)
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise _wrong_kind(filename) from error
        if error.errno == errno.EINVAL and flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "filesystem does not support O_DIRECT", filename) from error
        raise


def _wrong_kind(filename: str) -> OSError:
    return OSError(errno.EINVAL, "Neither a regular file nor a block device", filename)
