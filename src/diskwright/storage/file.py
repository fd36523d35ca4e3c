"""Local files (``file``) and block devices (``host_device``).

Locks are those QEMU takes (see ``posix.locks``), cache modes mean what they mean there:

=============  ==================  ================================
``cache``      host page cache     flushed to the medium
=============  ==================  ================================
none           bypassed (O_DIRECT) when asked
writeback      used                when asked
writethrough   used                after every write
directsync     bypassed (O_DIRECT) after every write
unsafe         used                never
=============  ==================  ================================
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass
from typing import ClassVar, Final, Self

from diskwright.core.driver import not_supported
from diskwright.core.options import BOOL, SIZE, STR, OneOf, option
from diskwright.core.permissions import FORCED, READ, RESIZE, WRITE, WRITE_UNCHANGED, Access
from diskwright.errors import ImageLocked, OptionError
from diskwright.storage.posix import preallocate, syscalls
from diskwright.storage.posix.base import DescriptorStorage
from diskwright.storage.posix.direct import DirectIO, discover_alignment
from diskwright.storage.posix.locks import ImageLocks
from diskwright.storage.posix.opening import open_again, open_image
from diskwright.storage.posix.space import DeviceSpace, FileSpace
from diskwright.units import SECTOR, align_up

_DIRECT: Final = ("none", "directsync")
_WRITE_THROUGH: Final = ("writethrough", "directsync")

_CREATOR: Final = Access(READ | WRITE | RESIZE, READ | WRITE_UNCHANGED)
"""Creating destroys what was there: nobody else may be writing, or relying on the size."""

_WIPED: Final = 64 << 10
"""How much of a device's beginning is zeroed on creation, so that nobody takes it for the image it was."""


@dataclass(frozen=True, kw_only=True)
class FileOptions:
    """How a file or device is opened."""

    filename: str = option(STR, "path of the file or device")
    locking: str = option(
        OneOf("on", "off", "auto"),
        "lock the image against other processes: auto does where the kernel can",
        default="auto",
    )
    cache: str = option(
        OneOf("none", "writeback", "writethrough", "directsync", "unsafe"),
        "use of the host's page cache, and when writes are flushed",
        default="writeback",
    )
    aio: str = option(
        OneOf("threads", "native", "io_uring"),
        "accepted for the sake of other tools' command lines; threads are used for all three",
        default="threads",
    )
    discard: str = option(
        OneOf("unmap", "ignore"), "whether discarded ranges are given back to the file system", default="unmap"
    )
    force_share: bool = option(BOOL, "read the image even though another process is using it", default=False)


@dataclass(frozen=True, kw_only=True)
class FileCreateOptions:
    """What is created."""

    filename: str = option(STR, "path of the file or device")
    size: int = option(SIZE, "size in bytes, rounded up to whole sectors", default=0)
    preallocation: str = option(
        OneOf(*preallocate.MODES), "space reserved beforehand: none, reserved, or written with zeros", default="off"
    )
    nocow: bool = option(BOOL, "turn copy-on-write off for the file, on file systems that have it", default=False)
    extent_size_hint: int = option(
        SIZE, "how much space the file system should take at once, where it can be told; 0: as it likes", default=0
    )


class FileStorage(DescriptorStorage):
    """A regular file; also a block device, when that is what the name leads to."""

    name: ClassVar[str] = "file"
    options: ClassVar[type] = FileOptions
    create_options: ClassVar[type] = FileCreateOptions
    prefixes: ClassVar[tuple[str, ...]] = ("file",)

    def __init__(self, fd: int, options: FileOptions, *, block: bool, writable: bool) -> None:
        super().__init__(fd, options.filename, writable=writable)
        self._options = options
        self._is_device = block
        self._write_through = writable and options.cache in _WRITE_THROUGH
        self.zero_init = not block
        self._locks = ImageLocks(fd, options.filename, required=options.locking == "on")
        if options.cache in _DIRECT:
            alignment = discover_alignment(fd, block=block)
            cached = open_again(fd, options.filename) if writable and not block else -1
            self._direct, self.alignment = DirectIO(fd, alignment, cached), alignment
        if block:
            self._space = DeviceSpace(fd, syscalls.sector_size(fd), self._write_held)
        else:
            self._space = FileSpace(fd, self._grow)

    @classmethod
    def parse_filename(cls, filename: str) -> dict[str, object]:
        return {"filename": filename.removeprefix(f"{cls.prefixes[0]}:")}

    @classmethod
    def open(cls, options: FileOptions, *, writable: bool) -> Self:
        """Raises OSError with the file's name, or OptionError."""
        if options.force_share and writable:
            raise OptionError("force-share=on can only be used with read-only images")
        flags = (os.O_RDWR if writable else os.O_RDONLY) | (os.O_DIRECT if options.cache in _DIRECT else 0)
        fd, status = open_image(options.filename, flags)
        try:
            block = stat.S_ISBLK(status.st_mode)
            cls._check_kind(options.filename, block)
            return cls(fd, options, block=block, writable=writable)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def _check_kind(cls, filename: str, block: bool) -> None:
        """Raises OSError when this driver is not for such a file."""

    @classmethod
    def create(cls, options: FileCreateOptions) -> None:
        """Makes a file of zeros; of a device, checks the size and wipes the beginning.

        A file that another process is using is left as it is (ImageLocked). When it fails, no new file is
        left behind.
        """
        fd, status, is_new = _open_or_make(options.filename)
        try:
            block = stat.S_ISBLK(status.st_mode)
            cls._check_kind(options.filename, block)
            ImageLocks(fd, options.filename, required=False).set(_CREATOR)
            storage = cls(fd, FileOptions(filename=options.filename), block=block, writable=True)
            storage._make_empty(align_up(options.size, SECTOR), options)
        except ImageLocked:
            raise  # new or not, somebody else is using it by now
        except BaseException:
            if is_new:
                os.unlink(options.filename)
            raise
        finally:
            os.close(fd)  # which ends the locks too

    def _make_empty(self, size: int, options: FileCreateOptions) -> None:
        if not self._is_device:
            self.truncate(0)
            if options.nocow:
                syscalls.set_nocow(self._fd)
            if options.extent_size_hint:
                syscalls.set_extent_size(self._fd, options.extent_size_hint)
            self.truncate(size, preallocation=options.preallocation)
            return
        if options.preallocation != "off":
            raise OptionError(f"Unsupported preallocation mode '{options.preallocation}' for a device")
        if size > self.size:
            text = f"The device has {self.size} bytes, fewer than the {size} wanted"
            raise OSError(errno.ENOSPC, text, self.filename)
        self._write_held(0, memoryview(bytes(min(_WIPED, self.size))))
        self.flush()

    def set_access(self, access: Access) -> None:
        if self._options.locking != "off":
            self._locks.set(FORCED if self._options.force_share else access)

    def flush(self) -> None:
        if self._options.cache != "unsafe":
            super().flush()

    def write_zeros(self, offset: int, length: int, *, unmap: bool, fast: bool) -> None:
        super().write_zeros(offset, length, unmap=unmap and self._options.discard == "unmap", fast=fast)

    def discard(self, offset: int, length: int) -> None:
        if self._options.discard == "unmap":
            super().discard(offset, length)

    def truncate(self, size: int, *, preallocation: str = "off") -> None:
        """As ``Storage.truncate``; a device keeps its size, and ENOTSUP is raised for any other."""
        if not self._is_device:
            super().truncate(size, preallocation=preallocation)
        elif size != self.size:
            error = not_supported(f"Changing a device's size from {self.size} to {size} bytes")
            self._name(error)
            raise error


class HostDeviceStorage(FileStorage):
    """A block device."""

    name: ClassVar[str] = "host_device"
    prefixes: ClassVar[tuple[str, ...]] = ("host_device",)

    @classmethod
    def _check_kind(cls, filename: str, block: bool) -> None:
        if not block:
            raise OSError(errno.ENOTBLK, "The driver 'host_device' needs a block device", filename)


def _open_or_make(filename: str) -> tuple[int, os.stat_result, bool]:
    """The file, opened for writing with its contents untouched, and whether it is new."""
    try:
        return *open_image(filename, os.O_RDWR | os.O_CREAT | os.O_EXCL), True
    except FileExistsError:
        return *open_image(filename, os.O_RDWR), False


DRIVERS = (FileStorage, HostDeviceStorage)
