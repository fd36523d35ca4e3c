"""blklogwrites: keeps a log of all that is written, in the format of Linux's dm-log-writes target.

The log begins with a superblock of one log sector. Entries follow, each a sector that says what was done (in log
sectors), and for a write as many sectors of data. All numbers are little-endian.
"""

from __future__ import annotations

import struct
import threading
from dataclasses import dataclass
from typing import ClassVar, Final

from diskwright.core.driver import Filter, OpenContext, Role, Segments
from diskwright.core.node import Node
from diskwright.core.options import BOOL, INT, SIZE, option
from diskwright.core.ranges import Ranges
from diskwright.errors import CorruptImage, OptionError
from diskwright.units import MiB, align_down, align_up, is_power_of_two

MAGIC: Final = 0x6A736677736872
VERSION: Final = 1
FLUSH: Final = 1 << 0
DISCARD: Final = 1 << 2

_SUPER: Final = struct.Struct("<QQQI")
"""Magic number, version, number of entries, bytes in a log sector."""
_ENTRY: Final = struct.Struct("<QQQQ")
"""First sector, number of sectors, flags, length of the data of a mark."""

_SMALLEST: Final = 512
_LARGEST: Final = 8 * MiB
"""Log sectors are powers of two between these; a request may need a buffer of two of them."""


@dataclass(frozen=True, kw_only=True)
class BlkLogWritesOptions:
    log_append: bool = option(BOOL, "whether to go on with the log that is there", default=False)
    log_sector_size: int | None = option(SIZE, "unit of the log in bytes (512)", default=None)
    log_super_update_interval: int = option(INT, "entries after which the superblock is written again", default=4096)

    def __post_init__(self) -> None:
        if self.log_append and self.log_sector_size is not None:
            raise OptionError("log-append and log-sector-size are mutually exclusive")
        size = self.log_sector_size
        if size is not None and not (_SMALLEST <= size <= _LARGEST and is_power_of_two(size)):
            raise OptionError(f"Invalid log sector size {size}")
        if self.log_super_update_interval < 1:
            raise OptionError(f"Invalid log superblock update interval {self.log_super_update_interval}")


class BlkLogWrites(Filter):
    """A request is logged when the child has done it, so that what is in the log did happen. The superblock counts an
    entry when it is wholly in the log."""

    name = "blklogwrites"
    options: ClassVar[type] = BlkLogWritesOptions
    roles = (Role("file"), Role("log"))

    def __init__(self, child: Node, log: Node, options: BlkLogWritesOptions) -> None:
        """Raises CorruptImage for a log that cannot be gone on with."""
        self.child, self._log = child, log
        self._interval = options.log_super_update_interval
        self._lock = threading.Lock()
        self._ranges = Ranges()
        self._unit = options.log_sector_size or _SMALLEST
        self._entries, self._end = 0, self._unit
        if options.log_append:
            self._go_on()

    @classmethod
    def open(cls, context: OpenContext, options: BlkLogWritesOptions) -> BlkLogWrites:
        return cls(context.file, context.children["log"], options)

    @property
    def alignment(self) -> int:
        return max(self._unit, self.child.alignment)

    # -- an old log ------------------------------------------------------------------------------

    def _go_on(self) -> None:
        """Finds the end of the log that is there; an empty file is a log without entries."""
        log = self._log
        if not log.size:
            return
        magic, version, entries, unit = _SUPER.unpack(log.pread(0, _SUPER.size))
        for field, value, offset, good in (
            ("log superblock magic", f"{magic:#x}", 0, magic == MAGIC),
            ("log superblock version", version, 8, version == VERSION),
            ("log sector size", unit, 24, _SMALLEST <= unit <= _LARGEST and is_power_of_two(unit)),
            ("number of log entries", entries, 16, entries <= log.size // max(unit, 1)),
        ):
            if not good:
                raise CorruptImage(log.filename, field, value, offset, "not a log that can be gone on with")
        at = unit
        for number in range(entries):
            _, sectors, flags, _ = _ENTRY.unpack(log.pread(at, _ENTRY.size))
            following = at + unit + (0 if flags & DISCARD else sectors * unit)
            if following > log.size:
                raise CorruptImage(log.filename, f"log entry {number}", sectors, at, "it reaches beyond the log's end")
            at = following
        self._entries, self._end, self._unit = entries, at, unit

    # -- requests --------------------------------------------------------------------------------

    def writev(self, segments: Segments) -> None:
        for offset, buffer in segments:
            start, end = self._sectors(offset, len(buffer))
            with self._ranges.alone(start, end):  # two writes of one place are logged in the order they were done
                data = self._whole(start, end, offset, buffer)
                self.child.writev([(offset, buffer)])
                self._append(start, end - start, 0, data)

    def write_zeros(self, offset: int, length: int, *, unmap: bool, fast: bool) -> None:
        unit = self._unit
        start, end = self._sectors(offset, length)
        with self._ranges.alone(start, end):
            first, last = align_up(offset, unit), align_down(offset + length, unit)
            edges = []
            if first >= last:
                edges = [(start, end)]
            else:
                edges += [(start, first)] if start < first else []
                edges += [(last, end)] if last < end else []
            self.child.write_zeros(offset, length, unmap=unmap, fast=fast)
            for low, high in edges:
                self._append(low, high - low, 0, memoryview(self._padded(low, high)))
            if first < last:
                self._append(first, last - first, 0, None)

    def discard(self, offset: int, length: int) -> None:
        unit = self._unit
        first, last = align_up(offset, unit), align_down(offset + length, unit)
        if first >= last:
            return
        with self._ranges.alone(first, last):
            self.child.discard(first, last - first)
            self._append(first, last - first, DISCARD, None)

    def flush(self) -> None:
        self.child.flush()
        self._append(0, 0, FLUSH, None)

    def close(self) -> None:
        if self.child.writable:
            with self._lock:
                self._write_super()

    def _sectors(self, offset: int, length: int) -> tuple[int, int]:
        return align_down(offset, self._unit), align_up(offset + length, self._unit)

    def _padded(self, start: int, end: int) -> bytearray:
        """What the child has there; zeros beyond its end."""
        data = bytearray(end - start)
        inside = min(end, self.child.size) - start
        if inside > 0:
            self.child.readv([(start, memoryview(data)[:inside])])
        return data

    def _whole(self, start: int, end: int, offset: int, buffer: memoryview) -> memoryview:
        """A write in whole log sectors."""
        if (start, end) == (offset, offset + len(buffer)):
            return buffer
        data = self._padded(start, end)
        data[offset - start : offset - start + len(buffer)] = buffer
        return memoryview(data)

    # -- the log ---------------------------------------------------------------------------------

    def _append(self, offset: int, length: int, flags: int, data: memoryview | None) -> None:
        """One entry. Without ``data`` a write is one of zeros."""
        unit = self._unit
        entry = _ENTRY.pack(offset // unit, length // unit, flags, 0).ljust(unit, b"\0")
        with self._lock:
            at = self._end
            self._log.writev([(at, memoryview(entry))])
            at += unit
            if not flags and length:
                if data is not None:
                    self._log.writev([(at, data)])
                else:
                    self._log.write_zeros(at, length)
                at += length
            self._end = at
            self._entries += 1
            if flags & FLUSH or self._entries % self._interval == 0:
                self._write_super()

    def _write_super(self) -> None:
        self._log.flush()  # what is counted is there
        block = _SUPER.pack(MAGIC, VERSION, self._entries, self._unit).ljust(self._unit, b"\0")
        self._log.writev([(0, memoryview(block))])
        self._log.flush()


DRIVERS = (BlkLogWrites,)
