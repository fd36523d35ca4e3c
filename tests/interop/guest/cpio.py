"""Writes initramfs archives: cpio in the "newc" form of the kernel's Documentation/driver-api/early-userspace."""

from __future__ import annotations

import stat
from typing import BinaryIO

_TRAILER = "TRAILER!!!"


class CpioWriter:
    """Adds entries one by one to ``out``; ``close`` ends the archive. All belong to root and carry no time stamp."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._inode = 0
        self._directories: set[str] = set()

    def directory(self, path: str) -> None:
        """Adds a directory, its parents first; those already added are left alone."""
        path = path.strip("/")
        parent = path.rpartition("/")[0]
        if path and path not in self._directories:
            self.directory(parent)
            self._directories.add(path)
            self._entry(path, stat.S_IFDIR | 0o755, b"", links=2)

    def file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """Adds a regular file."""
        self._parent(path)
        self._entry(path, stat.S_IFREG | mode, data)

    def symlink(self, path: str, target: str) -> None:
        """Adds a symbolic link."""
        self._parent(path)
        self._entry(path, stat.S_IFLNK | 0o777, target.encode())

    def char_device(self, path: str, major: int, minor: int) -> None:
        """Adds a character device; unlike mknod this takes no privilege."""
        self._parent(path)
        self._entry(path, stat.S_IFCHR | 0o600, b"", device=(major, minor))

    def close(self) -> None:
        """Writes the end mark. The file below stays open."""
        self._entry(_TRAILER, 0, b"")

    def _parent(self, path: str) -> None:
        self.directory(path.strip("/").rpartition("/")[0])

    def _entry(self, path: str, mode: int, data: bytes, *, links: int = 1, device: tuple[int, int] = (0, 0)) -> None:
        name = path.strip("/").encode() + b"\0"
        self._inode += 1
        # inode, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check
        fields = (self._inode, mode, 0, 0, links, 0, len(data), 0, 0, *device, len(name), 0)
        header = b"070701" + b"".join(b"%08X" % field for field in fields)
        for part in (header + name, data):
            self._out.write(part)
            self._out.write(bytes(-len(part) % 4))  # both the name and the data end on a multiple of four
