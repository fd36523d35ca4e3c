"""dmg: how chunks are unpacked. Every function makes at most ``size + 1`` bytes, but for what is said of LZFSE."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final

from diskwright.core.chunkmap import inflate, unpack
from diskwright.formats.dmg.packing import lzfse_library
from diskwright.units import MiB

Unpack = Callable[[memoryview, int], bytes]

_XZ_MEMORY: Final = 192 * MiB
"""What a decoder of xz may take: its largest preset (64 MiB) fits well."""
_MOST_BLOCKS: Final = 4096
"""Blocks of one LZFSE stream."""


def adc(raw: memoryview, size: int) -> bytes:
    """Apple Data Compression: literals, and copies of what came before. The first byte of each item tells by its two
    highest bits what follows: 1x that many bytes and one more; 01 a copy of 4 to 67 bytes, from a distance in two
    bytes; 00 a copy of 3 to 18 bytes, from a distance of ten bits. Raises ValueError, IndexError."""
    out, at, end = bytearray(), 0, len(raw)
    while at < end and len(out) < size:
        code = raw[at]
        if code & 0x80:
            count = (code & 0x7F) + 1
            if at + 1 + count > end:
                raise ValueError("a literal goes beyond its end")
            out += raw[at + 1 : at + 1 + count]
            at += 1 + count
            continue
        if code & 0x40:
            count, distance = (code & 0x3F) + 4, (raw[at + 1] << 8 | raw[at + 2]) + 1
            at += 3
        else:
            count, distance = (code >> 2) + 3, ((code & 3) << 8 | raw[at + 1]) + 1
            at += 2
        start = len(out) - distance
        if start < 0:
            raise ValueError("a copy begins before the first byte")
        piece = out[start : start + count]
        # A copy may reach into itself: then it repeats its first bytes.
        out += piece if len(piece) == count else (piece * -(-count // distance))[:count]
    return bytes(out[: size + 1])


def bunzip2(raw: memoryview, size: int) -> bytes:
    import bz2

    return unpack(bz2.BZ2Decompressor(), raw, size)


def unxz(raw: memoryview, size: int) -> bytes:
    import lzma

    return unpack(lzma.LZMADecompressor(lzma.FORMAT_XZ, _XZ_MEMORY), raw, size)


def unlzfse(raw: memoryview, size: int) -> bytes:
    """By a library, which takes no limit: so the lengths the stream's own blocks tell are added up before."""
    decompress = lzfse_library("decompress", "The image has LZFSE chunks, and no library for them is installed")
    told = _lzfse_size(raw)
    if told != size:
        raise ValueError(f"its blocks make up {told} bytes")
    return bytes(decompress(bytes(raw)))


def _lzfse_size(raw: memoryview) -> int:
    """Raises ValueError, struct.error."""
    at = total = 0
    for _ in range(_MOST_BLOCKS):
        magic = bytes(raw[at : at + 4])
        if magic == b"bvx$":
            return total
        (length,) = struct.unpack_from("<I", raw, at + 4)
        if magic == b"bvx-":
            at += 8 + length
        elif magic == b"bvxn":
            at += 12 + int(struct.unpack_from("<I", raw, at + 8)[0])
        elif magic == b"bvx2":
            first, second, third = struct.unpack_from("<3Q", raw, at + 8)
            at += (third & 0xFFFFFFFF) + (first >> 20 & 0xFFFFF) + (second >> 40 & 0xFFFFF)
        else:
            raise ValueError(f"a block of it begins with {magic!r}")
        total += length
    raise ValueError(f"it has more than {_MOST_BLOCKS} blocks")


CODECS: Final[dict[int, Unpack]] = {
    0x80000004: adc,
    0x80000005: inflate,
    0x80000006: bunzip2,
    0x80000007: unlzfse,
    0x80000008: unxz,
}
"""By the type of a chunk."""
