"""No bytes at all (``null-co``, ``null-aio``): reads give zeros, writes vanish. For measuring everything else."""

from __future__ import annotations

import errno
import time
from dataclasses import dataclass
from typing import ClassVar, Self

from diskwright.core.driver import Segments, Storage
from diskwright.core.options import BOOL, INT, SIZE, option
from diskwright.errors import OptionError
from diskwright.extents import DATA, ZERO, Extent
from diskwright.units import GiB

_ZEROS = memoryview(bytes(1 << 20))


@dataclass(frozen=True, kw_only=True)
class NullOptions:
    size: int = option(SIZE, "size in bytes", default=GiB)
    latency_ns: int = option(INT, "nanoseconds every request takes", default=0)
    read_zeroes: bool = option(BOOL, "promise that reads give zeros, so that copies may skip them", default=False)

    def __post_init__(self) -> None:
        if self.latency_ns < 0:
            raise OptionError("Parameter 'latency-ns' must not be negative")


class NullStorage(Storage):
    """Reads give zeros with and without ``read-zeroes``: what a buffer held before is nobody's business. Only with
    it do ``extents`` say so."""

    name: ClassVar[str] = "null-co"
    options: ClassVar[type] = NullOptions
    prefixes: ClassVar[tuple[str, ...]] = ("null-co",)

    def __init__(self, options: NullOptions) -> None:
        self.filename = f"{self.name}://"
        self._size = options.size
        self._seconds = options.latency_ns / 1e9
        self._kind = ZERO if options.read_zeroes else DATA
        self.zero_init = options.read_zeroes

    @classmethod
    def parse_filename(cls, filename: str) -> dict[str, object]:
        if filename.partition(":")[2] not in ("", "//"):
            raise OptionError(f"The only file name of driver '{cls.name}' is '{cls.name}://', not '{filename}'")
        return {}

    @classmethod
    def open(cls, options: NullOptions, *, writable: bool) -> Self:
        return cls(options)

    @property
    def size(self) -> int:
        return self._size

    def readv(self, segments: Segments, *, nowait: bool = False) -> None:
        if self._seconds:
            if nowait:
                raise BlockingIOError(errno.EAGAIN, "Every request waits for its latency")
            self._wait()
        for _, buffer in segments:
            for start in range(0, len(buffer), len(_ZEROS)):
                piece = buffer[start : start + len(_ZEROS)]
                piece[:] = _ZEROS[: len(piece)]

    def writev(self, segments: Segments) -> None:
        self._wait()
        self._check_end(max(offset + len(buffer) for offset, buffer in segments))

    def write_zeros(self, offset: int, length: int, *, unmap: bool, fast: bool) -> None:
        self._wait()
        self._check_end(offset + length)

    def discard(self, offset: int, length: int) -> None:
        self._wait()

    def flush(self) -> None:
        self._wait()

    def extent_at(self, offset: int, length: int) -> Extent:
        inside = self._size - offset
        if inside <= 0:
            return Extent(offset, length, ZERO, -1)
        return Extent(offset, min(length, inside), self._kind, offset)

    def allocated_size(self) -> int | None:
        return 0

    def _wait(self) -> None:
        if self._seconds:
            time.sleep(self._seconds)

    def _check_end(self, end: int) -> None:
        if end > self._size:
            raise OSError(errno.ENOSPC, "A null device does not grow", self.filename)


class NullAioStorage(NullStorage):
    """The same under the other name it goes by."""

    name: ClassVar[str] = "null-aio"
    prefixes: ClassVar[tuple[str, ...]] = ("null-aio",)


DRIVERS = (NullStorage, NullAioStorage)
