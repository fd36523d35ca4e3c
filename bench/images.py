"""The images that are measured on: random data, tables without data, and a file system of real files."""

from __future__ import annotations

import os
import shutil
import stat
import struct
from typing import Final

from tests.peers.process import run

from bench.workspace import flush

CHUNK: Final = 1 << 20
FILL: Final = 0.6
"""Share of the file system that files take up."""
TREES: Final = ("/usr/share", "/usr/lib", "/usr/bin", "/usr/include", "/usr/libexec", "/usr/local", "/opt")
"""Where real files are taken from, in this order, until there are enough."""
SMALL_FILES: Final = 3000
"""How many files below LARGE_FILE are taken: a file system has them, and tens of thousands take minutes to copy."""
LARGE_FILE: Final = 64 << 10
MAKE_TIMEOUT: Final = 600.0
_PLACE: Final = 0x00FF_FFFF_FFFF_FE00
"""What is a file offset in an entry of a qcow2 table."""


def random_raw(path: str, size: int) -> None:
    """A raw image of ``size`` bytes that no program can mistake for zeros or compress."""
    with open(path, "wb") as file:
        for _ in range(size // CHUNK):
            file.write(os.urandom(CHUNK))


def copy(source: str, target: str) -> None:
    """A copy of a file, holes and all, in the page cache."""
    run("cp", "--sparse=auto", "--reflink=never", source, target, timeout=MAKE_TIMEOUT)


def convert(source: str, source_format: str, target: str, target_format: str) -> None:
    """A copy in another format, by qemu-img."""
    run("qemu-img", "convert", "-f", source_format, "-O", target_format, source, target, timeout=MAKE_TIMEOUT)


def empty_qcow2(path: str, size: int) -> None:
    """A qcow2 image in which nothing is allocated."""
    run("qemu-img", "create", "-q", "-f", "qcow2", path, str(size))


def tables_only(path: str, size: int) -> None:
    """A qcow2 image with every cluster allocated and nothing in them: all tables, hardly any space."""
    words = ("-q", "-f", "qcow2", "-o", "preallocation=metadata")
    run("qemu-img", "create", *words, path, str(size), timeout=MAKE_TIMEOUT)


def shuffle(path: str) -> None:
    """Fragments an image made by ``tables_only``, as hard as can be: the guest's clusters lie in random order, within
    each L2 table and over the whole file. Which clusters are in use stays the same."""
    import numpy as np

    with open(path, "r+b") as file:
        head = file.read(104)
        l1_size, l1_offset = struct.unpack_from(">IQ", head, 36)
        size = 1 << struct.unpack_from(">I", head, 20)[0]
        file.seek(l1_offset)
        places = [entry & _PLACE for (entry,) in struct.iter_unpack(">Q", file.read(l1_size * 8)) if entry & _PLACE]
        tables = np.empty((len(places), size // 8), ">u8")
        for i, place in enumerate(places):
            file.seek(place)
            tables[i] = np.frombuffer(file.read(size), ">u8")
        flat = tables.reshape(-1)
        used = np.flatnonzero(flat)
        flat[used] = np.random.default_rng(1).permutation(flat[used])
        for i, place in enumerate(places):
            file.seek(place)
            file.write(tables[i].tobytes())


def scattered(path: str, size: int) -> None:
    """As ``tables_only``, with every other guest cluster taken off the map: as many runs as there can be. What they
    had is leaked, which nobody measures here."""
    size -= size % (1 << 20)
    tables_only(path, size)
    with open(path, "r+b") as file:
        head = file.read(48)
        count, offset = struct.unpack_from(">IQ", head, 36)
        file.seek(offset)
        for entry in struct.unpack(f">{count}Q", file.read(8 * count)):
            place = entry & 0x00FF_FFFF_FFFF_FE00
            file.seek(place)
            table = bytearray(file.read(1 << 16))
            for at in range(0, len(table), 16):
                table[at : at + 8] = bytes(8)
            file.seek(place)
            file.write(table)


def shared_file_system(folder: str, size: int) -> str:
    """Path of a file system in ``folder``, made at the first call: it takes a while, and nobody changes it."""
    path = os.path.join(folder, "files.raw")
    if not os.path.exists(path):
        file_system(path, size)
        flush(path)
    warm(path)
    return path


def file_system(path: str, size: int) -> None:
    """A sparse raw image with an ext4 file system full of this machine's own files. Needs no mount and no root.

    The files are copied beside it first, since mke2fs fills a file system from one folder.
    """
    staging = path + ".files"
    os.mkdir(staging)
    try:
        _gather(staging, int(size * FILL))
        with open(path, "wb") as file:
            file.truncate(size)
        words = ("-q", "-F", "-t", "ext4", "-E", "nodiscard", "-d", staging, path)
        run("mke2fs", *words, timeout=MAKE_TIMEOUT)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def warm(path: str) -> None:
    """Reads the whole of a file, its data at least, into the page cache."""
    fd = os.open(path, os.O_RDONLY)
    try:
        size, at = os.fstat(fd).st_size, 0
        buffer = bytearray(CHUNK)
        while at < size:
            try:
                at = os.lseek(fd, at, os.SEEK_DATA)
                end = os.lseek(fd, at, os.SEEK_HOLE)
            except OSError:
                return  # nothing but a hole from here on
            while at < end:
                at += os.preadv(fd, [buffer], at) or end
    finally:
        os.close(fd)


def _gather(folder: str, wanted: int) -> None:
    """Copies regular files until they hold ``wanted`` bytes or a little less; once more from the begin when there are
    too few."""
    found, lap = _Gathered(wanted), 0
    while found.left > wanted // 20:
        before = found.left
        for tree in TREES:
            found.take(tree, os.path.join(folder, f"{lap}{tree}"))
        if found.left == before:
            raise OSError(f"no files to fill an image with in {', '.join(TREES)}")
        lap += 1


class _Gathered:
    """Copies files of any size until there are many, then only large ones."""

    def __init__(self, wanted: int) -> None:
        self.left, self.small = wanted, SMALL_FILES

    def take(self, source: str, target: str) -> None:
        for where, folders, names in os.walk(source):
            folders.sort()
            for name in sorted(names):
                if self.left <= 0:
                    return
                self._file(os.path.join(where, name), target + where[len(source) :])

    def _file(self, path: str, into: str) -> None:
        try:
            status = os.lstat(path)
            small = status.st_size < LARGE_FILE
            if not stat.S_ISREG(status.st_mode) or status.st_size > self.left or (small and self.small <= 0):
                return
            os.makedirs(into, exist_ok=True)
            shutil.copyfile(path, os.path.join(into, os.path.basename(path)))
        except PermissionError:
            return
        self.small -= small
        # What it takes of the file system: whole blocks, and an inode of 256 bytes.
        self.left -= -(-status.st_size // 4096) * 4096 + 256
