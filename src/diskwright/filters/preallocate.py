"""preallocate: a file that grows is made longer in large steps, and as long as it has to be in the end."""

from __future__ import annotations

import errno
import threading
from dataclasses import dataclass
from typing import ClassVar, Final

from diskwright.core.driver import Filter, OpenContext, Segments
from diskwright.core.node import Node
from diskwright.core.options import SIZE, option
from diskwright.errors import OptionError
from diskwright.units import MiB, align_up

_SECTOR: Final = 512
_MOST: Final = 1 << 62
"""Beyond what any file can have."""


@dataclass(frozen=True, kw_only=True)
class PreallocateOptions:
    prealloc_align: int = option(SIZE, "what the file's length is a multiple of, in bytes", default=MiB)
    prealloc_size: int = option(SIZE, "how much space is taken beyond a write, in bytes", default=128 * MiB)

    def __post_init__(self) -> None:
        if not self.prealloc_align or self.prealloc_align % _SECTOR:
            raise OptionError("prealloc-align parameter of preallocate filter is not aligned to 512")
        if max(self.prealloc_align, self.prealloc_size) > _MOST:
            raise OptionError(f"prealloc-align and prealloc-size must be at most {_MOST}")


class Preallocate(Filter):
    """To its users the file is as long as what they wrote. When the process dies the file keeps its reserve."""

    name = "preallocate"
    options: ClassVar[type] = PreallocateOptions

    def __init__(self, child: Node, options: PreallocateOptions) -> None:
        self.child = child
        self._align, self._reserve = options.prealloc_align, options.prealloc_size
        self._lock = threading.Lock()
        self._size = child.size
        self._works = child.writable
        self._reserved = False
        """Whether the file is longer than it has to be."""

    @classmethod
    def open(cls, context: OpenContext, options: PreallocateOptions) -> Preallocate:
        return cls(context.file, options)

    @property
    def size(self) -> int:
        return self._size if self._works else self.child.size

    def writev(self, segments: Segments) -> None:
        self._make_room(max(offset + len(buffer) for offset, buffer in segments))
        self.child.writev(segments)

    def write_zeros(self, offset: int, length: int, *, unmap: bool, fast: bool) -> None:
        self._make_room(offset + length)
        self.child.write_zeros(offset, length, unmap=unmap, fast=fast)

    def _make_room(self, end: int) -> None:
        """A write up to ``end`` is about to come."""
        if end <= self._size or not self._works:
            return
        with self._lock:
            if end > self.child.size and self._works:
                self._extend(min(align_up(end + self._reserve, self._align), _MOST))
            self._size = max(self._size, end)

    def _extend(self, size: int) -> None:
        try:
            self.child.resize(size, preallocation="falloc")
            self._reserved = True
        except OSError as error:
            if error.errno == errno.ENOSPC:
                return  # no reserve; there may be room for the write
            # A child that cannot do it will not learn. What it has taken so far is given back.
            self._give_back()
            self._works = False

    def resize(self, size: int, *, preallocation: str) -> None:
        with self._lock:
            self._give_back()
            self.child.resize(size, preallocation=preallocation)
            self._size = size

    def _give_back(self) -> None:
        if self._reserved:
            self.child.resize(self._size)
            self._reserved = False

    def close(self) -> None:
        with self._lock:
            self._give_back()


DRIVERS = (Preallocate,)
