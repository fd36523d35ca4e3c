"""PNG, writing only: 8 bits a colour, no alpha, one compressed stream (PNG Specification, third edition).

Forty lines, where an imaging library would be megabytes of compiled code loaded for one picture.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from typing import Final

SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"

_TRUECOLOUR: Final = 2
_FILTER_NONE: Final = b"\0"


def encode(width: int, height: int, pixels: bytes, texts: Mapping[str, str] | None = None) -> bytes:
    """The file for ``pixels``: red, green, blue, a byte each, row by row from the top. ``texts`` go in as tEXt chunks:
    keyword (1 to 79 characters) and text, both Latin-1."""
    if len(pixels) != width * height * 3:
        raise ValueError(f"{len(pixels)} bytes are not {width} x {height} pixels")
    stride = width * 3
    rows = b"".join(_FILTER_NONE + pixels[at : at + stride] for at in range(0, len(pixels), stride))
    parts = [SIGNATURE, _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, _TRUECOLOUR, 0, 0, 0))]
    for keyword, text in (texts or {}).items():
        parts.append(_chunk(b"tEXt", keyword.encode("latin-1") + b"\0" + text.encode("latin-1", "replace")))
    parts += [_chunk(b"IDAT", zlib.compress(rows)), _chunk(b"IEND", b"")]
    return b"".join(parts)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
