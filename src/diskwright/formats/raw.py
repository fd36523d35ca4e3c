"""raw: the disk's bytes as they are, or a window of them (``offset``, ``size``)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from diskwright.core.driver import CheckReport, Format, Info, MeasuredSource, Measurement, OpenContext, not_supported
from diskwright.core.node import Node
from diskwright.core.options import SIZE, OneOf, option
from diskwright.errors import OptionError, UnsupportedFeature
from diskwright.extents import DATA, Extent, Extents
from diskwright.units import SECTOR, align_up


@dataclass(frozen=True, kw_only=True)
class RawOptions:
    """The window. Without ``size`` it reaches to the file's end and follows it."""

    offset: int = option(SIZE, "where the disk begins in the file", default=0)
    size: int | None = option(SIZE, "how long the disk is; default: to the end of the file", default=None)


@dataclass(frozen=True, kw_only=True)
class RawCreateOptions:
    size: int = option(SIZE, "virtual disk size")
    preallocation: str = option(OneOf("off", "falloc", "full"), "how space is taken in advance", default="off")


class Raw(Format):
    """No metadata at all: a map that is one straight line."""

    name = "raw"
    options = RawOptions
    create_options = RawCreateOptions
    suffixes = (".raw", ".img")
    cluster_size = 1

    def __init__(self, file: Node, offset: int, size: int | None) -> None:
        self.children = (file,)
        self.linear = offset
        self._fixed_size = size

    @staticmethod
    def probe(head: bytes, filename: str) -> int:
        # Anything can be a raw disk, so this is only right when nothing else is.
        return 1

    @classmethod
    def open(cls, context: OpenContext, options: RawOptions) -> Raw:
        available = context.file.size
        if options.offset > available:
            raise OptionError(
                f"raw: offset {options.offset} lies beyond the end of '{context.file.filename}' ({available} bytes)"
            )
        if options.size is not None and options.offset + options.size > available:
            raise OptionError(
                f"raw: offset {options.offset} plus size {options.size} goes beyond the end of "
                f"'{context.file.filename}' ({available} bytes)"
            )
        return cls(context.file, options.offset, options.size)

    @classmethod
    def create(cls, file: Node, options: RawCreateOptions) -> None:
        file.resize(align_up(options.size, SECTOR), preallocation=options.preallocation)

    @classmethod
    def measure(cls, options: RawCreateOptions, source: MeasuredSource | None) -> Measurement:
        size = align_up(options.size, SECTOR)
        return Measurement(size, size)

    @property
    def size(self) -> int:  # type: ignore[override]
        assert self.linear is not None
        return self.children[0].size - self.linear if self._fixed_size is None else self._fixed_size

    def extent_at(self, offset: int, length: int) -> Extent:
        assert self.linear is not None
        return Extent(offset, length, DATA, offset + self.linear)

    def extents(self, offset: int, length: int) -> Extents:
        return Extents.of([self.extent_at(offset, length)])

    def in_place(self, offset: int, length: int) -> int:
        assert self.linear is not None
        return offset + self.linear

    def resize(self, size: int, *, preallocation: str = "off", conceal: Callable[[], None] | None = None) -> None:
        if self._fixed_size is not None:
            raise UnsupportedFeature("Cannot resize fixed-size raw disks")
        if preallocation == "metadata":
            raise UnsupportedFeature("Unsupported preallocation mode: metadata")
        assert self.linear is not None
        self.children[0].resize(size + self.linear, preallocation=preallocation)

    def check(self, repair: str) -> CheckReport:
        raise not_supported("This image format does not support checks")

    def info(self) -> Info:
        return Info()


DRIVERS: Final[tuple[Any, ...]] = (Raw,)
