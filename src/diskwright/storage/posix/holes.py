"""Where a file has holes: SEEK_DATA and SEEK_HOLE as extents.

lseek moves the position all users of a descriptor share. Nothing here or elsewhere in the package
reads or writes at that position, so threads may do this side by side.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

from diskwright.extents import DATA, ZERO, Extent


def first_run(fd: int, offset: int, length: int) -> Extent:
    """The first run of data or of zeros at ``offset``. Beyond the end of the file all is zeros.

    A file system that cannot say where holes are reports data up to the end; that is always true enough,
    since reading gives the right bytes either way. When somebody changes the file meanwhile, the answer
    was right at some moment of the call.
    """
    end = offset + length
    data = _seek(fd, offset, os.SEEK_DATA, end)
    if data > offset:
        return Extent(offset, min(data, end) - offset, ZERO, offset)
    return _data_run(fd, offset, end)


def runs(fd: int, offset: int, length: int) -> Iterator[Extent]:
    """All runs of the range, in order: what ``first_run`` would say of each, with half the calls."""
    end = offset + length
    while offset < end:
        data = min(_seek(fd, offset, os.SEEK_DATA, end), end)
        if data > offset:
            yield Extent(offset, data - offset, ZERO, offset)
        if data < end:
            yield (run := _data_run(fd, data, end))
            data += run.length
        offset = data


def _data_run(fd: int, offset: int, end: int) -> Extent:
    """The data at ``offset``, up to the next hole."""
    hole = _seek(fd, offset, os.SEEK_HOLE, offset)
    if hole <= offset or hole > end:
        # At or before ``offset``: punched or cut off since there was data. Data is never wrong, only slower.
        hole = end
    return Extent(offset, hole - offset, DATA, offset)


def _seek(fd: int, offset: int, whence: int, missing: int) -> int:
    """The next data or hole at or after ``offset``; ``missing`` when there is none before the end of the file."""
    try:
        return os.lseek(fd, offset, whence)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return missing
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        size = os.lseek(fd, 0, os.SEEK_END)
        if whence == os.SEEK_HOLE:
            return max(size, offset)
        return offset if offset < size else missing
