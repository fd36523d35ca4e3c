"""vmdk: what the extents of a disk share, and the flat ones.

A disk is one extent or many, one after the other. Each is a map of its own, over one file, and knows nothing of the
others: guest offsets are counted from its own beginning.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn, Self

from diskwright.core.driver import Format, OpenContext, Reservation
from diskwright.core.placing import InPlace
from diskwright.errors import CorruptImage
from diskwright.extents import DATA, ZERO, Extent
from diskwright.units import SECTOR

if TYPE_CHECKING:
    from diskwright.core.node import Node


class Part(Format):
    """One extent. Its image opens it."""

    name = "vmdk"
    kind: str
    """What the descriptor calls such an extent."""
    has_backing = True
    """As far as it knows, there is a parent."""
    compressed: bool = False
    before_change: Callable[[], None]
    """Called before the first change of anything in it; the image sets it."""

    @staticmethod
    def probe(head: bytes, filename: str) -> int:
        return 0

    @classmethod
    def open(cls, context: OpenContext, options: Any) -> Self:
        raise NotImplementedError("an extent is opened by its image")


class Flat(Part):
    """Bytes as they are, from ``start`` of a file on. ``child`` is the file's index among the image's children."""

    cluster_size = 1
    holes = "always"

    def __init__(self, file: Node, kind: str, start: int, size: int, child: int) -> None:
        """Raises CorruptImage when the file is too short."""
        if start + size > file.size:
            raise CorruptImage(
                file.filename, "length of the file", file.size, None,
                f"the extent in it is {size} bytes from {start} on",
            )  # fmt: skip
        self.children = (file,)
        self.file, self.kind, self.start, self.size, self.child = file, kind, start, size, child
        self._changed = False

    def extent_at(self, offset: int, length: int) -> Extent:
        return Extent(offset, length, DATA, self.start + offset, self.child)

    def _change(self) -> None:
        if not self._changed:
            self.before_change()
            self._changed = True

    def in_place(self, offset: int, length: int) -> int:
        if not self._changed:
            self._change()
        return self.start + offset

    def reserve(self, offset: int, length: int) -> Reservation:
        self._change()
        return InPlace(self.extent_at(offset, length))

    def discard(self, offset: int, length: int) -> None:
        self._change()
        self.file.discard(self.start + offset, length)

    def zero_init(self) -> bool:
        return self.file.zero_init


class Zeros(Part):
    """An extent without a file: it reads as zeros, and nothing can be written to it."""

    kind = "ZERO"
    cluster_size = 1

    def __init__(self, size: int) -> None:
        self.children = ()
        self.size = size

    def extent_at(self, offset: int, length: int) -> Extent:
        return Extent(offset, length, ZERO)

    def reserve(self, offset: int, length: int) -> NoReturn:
        raise OSError(errno.EROFS, f"The extent of zeros at {offset // SECTOR} sectors cannot be written to")

    def zero(self, offset: int, length: int, *, unmap: bool) -> tuple[int, int]:
        return offset, length

    def discard(self, offset: int, length: int) -> None:
        return
