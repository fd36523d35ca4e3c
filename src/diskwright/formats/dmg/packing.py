"""dmg: the kinds of images that are written, and how their chunks are packed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from diskwright.errors import LimitExceeded, OptionError, UnsupportedFeature
from diskwright.formats.dmg.tables import MAX_WRITTEN
from diskwright.units import KiB, MiB

RAW: Final = 1

Pack = Callable[[memoryview], bytes]


@dataclass(frozen=True)
class Kind:
    """``method``: the type of its packed chunks. ``unit``: bytes of a chunk, of the disk; larger ones pack better, and
    cost more to read a little of. Those of zlib are as Apple's programs make them."""

    name: str
    method: int
    unit: int
    level: int
    """The default."""


KINDS: Final = {
    kind.name: kind
    for kind in (
        Kind("UDZO", 0x80000005, 256 * KiB, 3),
        Kind("UDBZ", 0x80000006, 1 * MiB, 9),
        Kind("ULFO", 0x80000007, 1 * MiB, 1),
        Kind("ULMO", 0x80000008, 1 * MiB, 3),
        Kind("UDRO", RAW, 256 * KiB, 1),
    )
}

MAX_UNIT: Final = 2 * MiB


def unit_of(kind: Kind, size: int) -> int:
    """Bytes of a chunk in an image of ``size`` bytes: larger ones where there would be too many. LimitExceeded."""
    unit = kind.unit
    while -(-size // unit) > MAX_WRITTEN:
        unit *= 2
    if unit > MAX_UNIT:
        raise LimitExceeded(f"The image size is too large for dmg: at most {MAX_WRITTEN * MAX_UNIT} bytes are possible")
    return unit


def packer(kind: Kind, level: int | None) -> Pack | None:
    """What packs a chunk; None for the kind that does not. Thread-safe. Raises OptionError for a level it does not
    have, UnsupportedFeature when a library is missing."""
    if level is not None and not 1 <= level <= 9:
        raise OptionError(f"compression-level must be 1 to 9 for dmg, not {level}")
    chosen = kind.level if level is None else level
    made = {"UDZO": _zlib, "UDBZ": _bzip2, "ULFO": _lzfse, "ULMO": _xz}
    return made[kind.name](chosen) if kind.name in made else None


def _zlib(level: int) -> Pack:
    """Up to level 3 by ISA-L, where it is installed, which is ten times as fast. Its levels 0 and 3 only: the others
    do not give the same bytes every time when several threads work."""
    if level <= 3:
        try:
            from isal import igzip_lib
        except ImportError:
            pass
        else:
            fast = 0 if level == 1 else 3
            return lambda data: igzip_lib.compress(data, fast, igzip_lib.COMP_ZLIB, igzip_lib.MEM_LEVEL_DEFAULT, 15)
    import zlib

    return lambda data: zlib.compress(data, level)


def _bzip2(level: int) -> Pack:
    import bz2

    return lambda data: bz2.compress(data, level)


def _xz(level: int) -> Pack:
    import lzma

    return lambda data: lzma.compress(data, lzma.FORMAT_XZ, preset=level)


def _lzfse(level: int) -> Pack:
    compress = lzfse_library("compress", "To make images of the kind ULFO a library for LZFSE is needed")
    return lambda data: bytes(compress(bytes(data)))


def lzfse_library(function: str, why: str) -> Any:
    """``compress`` or ``decompress`` of whichever library there is. Raises UnsupportedFeature with ``why``."""
    try:
        import lzfse as library
    except ImportError:
        try:
            import liblzfse as library
        except ImportError:
            raise UnsupportedFeature(f"{why}: pip install lzfse") from None
    return getattr(library, function)
